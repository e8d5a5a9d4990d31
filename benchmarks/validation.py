"""Choose learning rates: python benchmarks/validation.py --data-dir DIR"""

import contextlib
import io

import bench
import numpy as np

CANDIDATES = {  # by stage: initial, final learning rate
    1: [
        (0.1, 0.03),
        (0.2, 0.03),
        (0.25, 0.03),
        (0.3, 0.03),
        (0.4, 0.03),
        (0.3, 0.01),
        (0.3, 0.1),
    ],
    3: [(0.001, 1e-5), (0.002, 1e-5), (0.003, 1e-5), (0.005, 1e-5), (0.01, 1e-5)],
}


def train(script, initial: float, final: float, seed: int) -> float:
    """Return the accuracy of a run, in percent."""
    script.FINAL_LEARNING_RATE = final
    with contextlib.redirect_stdout(io.StringIO()):
        return 100 * script.main([f"--seed={seed}", f"--learning-rate={initial}"])


def main() -> None:
    args, train_set = bench.setup(__doc__, "--seeds")
    split = (train_set[:50_000], train_set[50_000:], "MNIST")
    bench.print_header("stage", "initial", "final", "validation accuracy, %", "seeds")
    for stage, candidates in CANDIDATES.items():
        script = bench.SCRIPTS[stage]
        script.load_mnist = lambda data_dir: split
        means = {}
        for initial, final in candidates:
            results = [
                train(script, initial, final, seed) for seed in range(args.seeds)
            ]
            means[initial, final] = np.mean(results)
            mean = f"{np.mean(results):.2f}"
            each_seed = ", ".join(f"{result:.2f}" for result in results)
            bench.print_row(stage, initial, final, mean, each_seed)
        initial, final = max(means, key=means.get)
        bench.print_row(f"{stage}, choice", initial, final, "", "")


if __name__ == "__main__":
    main()
