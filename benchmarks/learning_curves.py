"""Run all seeds and draw: python benchmarks/learning_curves.py --data-dir DIR"""

import re
import subprocess
import sys
import time
from typing import NamedTuple

import bench
import matplotlib.pyplot as plt
import numpy as np
import pytorch_mnist

HERE = bench.ROOT / "benchmarks"
ARTICLE = np.genfromtxt(
    HERE / "article.csv", delimiter=",", names=True, dtype=(int, int, float)
)


class Run(NamedTuple):
    """What a process did; all accuracies are of the test set, in percent."""

    seconds: float
    accuracy: float  # at the end
    curve: dict[int, float]  # accuracy by step


def run(*command: str) -> Run:
    start = time.perf_counter()
    output = subprocess.check_output([sys.executable, *command], text=True)
    seconds = time.perf_counter() - start
    points = re.findall(r"step (\d+) .*test accuracy (\S+)%", output)
    curve = {int(step): float(accuracy) for step, accuracy in points}
    accuracy = re.search(r"\nfinal test accuracy: (\S+)% \(MNIST\)", output)[1]
    return Run(seconds, float(accuracy), curve)


def add_early_steps(curve: dict[int, float], steps: set[int], *command: str) -> None:
    """Add the accuracy at every 100th of the first 1,000 steps, and at `steps`."""
    curve |= run(*command, "--max-steps=1000", "--eval-every=100").curve
    for step in steps - set(curve):
        curve[step] = run(*command, f"--max-steps={step}").accuracy


def result_row(name: str, runs: list[Run]) -> list[str]:
    accuracies = np.array([run.accuracy for run in runs])
    mean = f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}"
    each_seed = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    seconds = [run.seconds for run in runs]
    return [name, mean, each_seed, f"{min(seconds):.0f}", f"{np.median(seconds):.0f}"]


def print_steps(runs: dict[int, list[Run]]) -> None:
    rows = []
    for stage, step, article in ARTICLE:
        mean = np.mean([run.curve[step] for run in runs[stage]])
        ahead = "yes" if mean > article else "no"
        rows.append([stage, step, f"{mean:.2f}", article, ahead])
    bench.print_table(["stage", "step", "mean", "article", "ahead"], rows)


def draw(runs: dict[int, list[Run]]) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, 3, sharey=True, figsize=(9, 3.6), layout="constrained"
    )
    for axis, (stage, script) in zip(axes, bench.SCRIPTS.items(), strict=True):
        steps = sorted(runs[stage][0].curve)
        y = np.array([[run.curve[step] for step in steps] for run in runs[stage]])
        axis.fill_between(steps, y.min(axis=0), y.max(axis=0), alpha=0.3, lw=0)
        axis.plot(steps, y.mean(axis=0), label=f"script, {len(y)} seeds")
        points = ARTICLE[ARTICLE["stage"] == stage]
        axis.plot(points["step"], points["accuracy"], "ko", mfc="w", label="article")

        axis.set(xscale="log", xlim=(80, 15_000), ylim=(80, 100))
        axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
        axis.set_title(f"stage {stage}: {script.__name__}.py", size="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    axes[0].set_ylabel("test accuracy, %")
    figure.supxlabel("steps of 32 images; in stage 3, of 128", size="medium")
    figure.savefig(HERE / "learning_curves.png", dpi=150)


def main() -> None:
    args = bench.parse_args(__doc__, seeds=5, pytorch_seeds=2)
    runs, rows = {}, []
    for stage, script in bench.SCRIPTS.items():
        steps = set(ARTICLE["step"][ARTICLE["stage"] == stage].tolist())
        runs[stage], pytorch_runs = [], []
        for seed in range(args.seeds):
            options = [f"--data-dir={args.data_dir}", f"--seed={seed}"]
            runs[stage].append(run(script.__file__, *options))
            if seed < args.pytorch_seeds:
                command = [pytorch_mnist.__file__, f"--stage={stage}", *options]
                pytorch_runs.append(run(*command))
            add_early_steps(runs[stage][-1].curve, steps, script.__file__, *options)

        # zip ends with the seeds that PyTorch has run.
        pairs = zip(runs[stage], pytorch_runs, strict=False)
        ratios = [ours.seconds / theirs.seconds for ours, theirs in pairs]
        script_row = result_row(f"`{script.__name__}.py`", runs[stage])
        rows.append([*script_row, f"{np.median(ratios):.2f}"])
        rows.append([*result_row("PyTorch, usual way", pytorch_runs), "1"])
    header = ["a whole run", "test accuracy, %", "each seed", "seconds: minimum"]
    bench.print_table([*header, "median", "ratio to PyTorch"], rows)
    print_steps(runs)
    draw(runs)


if __name__ == "__main__":
    main()
