"""Choose learning rates: python benchmarks/validation.py --data-dir DIR"""

import contextlib
import io
from itertools import product

import bench
import numpy as np

from common import load_mnist

GRID = {  # by stage: initial learning rates, and ratios of the final to the initial one
    1: ([0.15, 0.3, 0.6], [1 / 9, 1 / 3, 1]),
    3: ([1e-3, 2e-3, 4e-3], [1 / 2000, 1 / 200, 1 / 20]),
}

args = bench.parse_args(__doc__, seeds=5)
train_set, _, _ = load_mnist(args.data_dir)
for stage, grid in GRID.items():
    script, rows = bench.SCRIPTS[stage], []
    script.load_mnist = lambda _: (train_set[:50_000], train_set[50_000:], "MNIST")
    for initial, decay in product(*grid):
        script.LEARNING_RATE_DECAY, accuracies = decay, []
        for seed in range(args.seeds):
            with contextlib.redirect_stdout(io.StringIO()):
                options = [f"--learning-rate={initial}", f"--seed={seed}"]
                accuracies.append(100 * script.main(options)[1])
        result = f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
        rows.append([initial, f"{initial * decay:.2g}", result])
    bench.print_table([f"stage {stage}, from", "to", "validation accuracy, %"], rows)
