"""Choose the learning rates of stages 1 and 3 without a look at the test set.

    python benchmarks/validation.py --data-dir DIR

trains on the first 50,000 training images, evaluates on the last 10,000, and prints the
mean accuracy over --seeds seeds for a few initial and final learning rates. The choice is
the setting of the highest mean.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlp_flax_bn_dropout
import mlp_numpy_api
from common import ArrayDataset, load_mnist

CANDIDATES = {  # initial, final learning rate
    mlp_numpy_api: [(0.3, 0.01), (0.3, 0.1)]
    + [(initial, 0.03) for initial in (0.1, 0.2, 0.25, 0.3, 0.4)],
    mlp_flax_bn_dropout: [(i, 1e-5) for i in (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)],
}


def validation_sets(data_dir: str) -> tuple[ArrayDataset, ArrayDataset, str]:
    """What the scripts get in place of load_mnist's sets."""
    full, _, name = load_mnist(data_dir)
    if name != "MNIST":
        raise SystemExit("validation.py needs the real MNIST: see --data-dir")
    return (
        ArrayDataset(full.images[:50_000], full.labels[:50_000], full.transform),
        ArrayDataset(full.images[50_000:], full.labels[50_000:], full.transform),
        name,
    )


def accuracy(script, initial: float, final: float, seed: int, data_dir: str) -> float:
    script.load_mnist, script.FINAL_LEARNING_RATE = validation_sets, final
    options = ["--data-dir", data_dir, "--seed", str(seed)]
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main([*options, "--learning-rate", str(initial)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    print("| script | initial | final | validation accuracy, % | seeds |")
    print("| --- | --- | --- | --- | --- |")
    for script, candidates in CANDIDATES.items():
        means = {}
        for setting in candidates:
            found = [
                100 * accuracy(script, *setting, seed, args.data_dir)
                for seed in range(args.seeds)
            ]
            means[setting] = mean(found)
            cells = [f"{rate:g}" for rate in setting]
            cells += [f"{means[setting]:.2f}", " ".join(f"{f:.2f}" for f in found)]
            print(f"| `{script.__name__}.py` | {' | '.join(cells)} |", flush=True)
        choice = max(means, key=means.get)
        print(f"| choice | {choice[0]:g} | {choice[1]:g} | | |", flush=True)


if __name__ == "__main__":
    main()
