"""Choose learning rates: python benchmarks/validation.py --data-dir DIR"""

import contextlib
import io

import bench
import numpy as np

CANDIDATES = {  # by stage: pairs of initial and final learning rate
    1: [(initial, 0.03) for initial in (0.1, 0.2, 0.25, 0.3, 0.4)]
    + [(0.3, 0.01), (0.3, 0.1)],
    3: [(initial, 1e-5) for initial in (0.001, 0.002, 0.003, 0.005, 0.01)],
}


def train(script, initial: float, final: float, seed: int) -> float:
    """Return the accuracy of a run, in percent."""
    script.FINAL_LEARNING_RATE = final
    with contextlib.redirect_stdout(io.StringIO()):
        return 100 * script.main([f"--seed={seed}", f"--learning-rate={initial}"])


def main() -> None:
    args, train_set = bench.setup(__doc__, "--seeds")
    split = (train_set[:50_000], train_set[50_000:], "MNIST")
    rows, choices = [], []
    for stage, candidates in CANDIDATES.items():
        script = bench.SCRIPTS[stage]
        script.load_mnist = lambda data_dir: split
        means = {}
        for initial, final in candidates:
            accuracies = [train(script, initial, final, i) for i in range(args.seeds)]
            means[initial, final] = np.mean(accuracies)
            each_seed = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            rows.append(
                [stage, initial, final, f"{np.mean(accuracies):.2f}", each_seed]
            )
        choices.append(f"stage {stage}, the highest mean: {max(means, key=means.get)}")
    header = ["stage", "initial", "final", "validation accuracy, %", "seeds"]
    bench.print_table(header, rows)
    print("", *choices, sep="\n")


if __name__ == "__main__":
    main()
