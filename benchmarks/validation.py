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


def train(script, initial: float, decay: float, seed: int) -> float:
    """Return the accuracy of a run, in percent."""
    script.LEARNING_RATE_DECAY = decay
    with contextlib.redirect_stdout(io.StringIO()):
        _, accuracy = script.main([f"--seed={seed}", f"--learning-rate={initial}"])
    return 100 * accuracy


def main() -> None:
    args = bench.parse_args(__doc__, seeds=5)
    train_set, _, _ = load_mnist(args.data_dir)
    split = train_set[:50_000], train_set[50_000:], "MNIST"
    rows = []
    for stage, grid in GRID.items():
        script = bench.SCRIPTS[stage]
        script.load_mnist = lambda data_dir: split
        for initial, decay in product(*grid):
            accuracies = [train(script, initial, decay, i) for i in range(args.seeds)]
            result = f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
            rows.append([stage, initial, f"{initial * decay:.2g}", result])
    header = ["stage", "initial rate", "final rate", "validation accuracy, %"]
    bench.print_table(header, rows)


if __name__ == "__main__":
    main()
