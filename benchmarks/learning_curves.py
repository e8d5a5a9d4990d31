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
    HERE / "article.csv", delimiter=",", names=True, dtype=(int, int, float, float)
)
PYTORCH_SEEDS = 2  # it takes several times as long


class Run(NamedTuple):
    """What a process did; all accuracies are of the test set, in percent."""

    seconds: float
    final_accuracy: float
    curve: dict[int, float]  # accuracy by step


def run(*command: str) -> Run:
    start = time.perf_counter()
    output = subprocess.check_output([sys.executable, *command], text=True)
    seconds = time.perf_counter() - start
    points = re.findall(r"step (\d+) .*test accuracy (\S+)%", output)
    curve = {int(step): float(accuracy) for step, accuracy in points}
    final_accuracy = re.search(r"^final test accuracy: (\S+)%", output, re.MULTILINE)[1]
    return Run(seconds, float(final_accuracy), curve)


def early_curve(*command: str, steps: list[int]) -> dict[int, float]:
    """Return the accuracy at every 100th of the first 1,000 steps, and at `steps`."""
    curve = run(*command, "--max-steps=1000", "--eval-every=100").curve
    for step in steps:
        if step not in curve:  # a run of its own, which ends with an evaluation
            curve |= run(*command, f"--max-steps={step}").curve
    return curve


def print_results(runs: dict[int, list[Run]]) -> None:
    rows = []
    for stage, script in bench.SCRIPTS.items():
        finals = np.array([run.final_accuracy for run in runs[stage]])
        mean = f"{finals.mean():.2f} % ± {finals.std(ddof=1):.2f}"
        each_seed = ", ".join(f"{accuracy:.2f}" for accuracy in finals)
        seconds = np.mean([run.seconds for run in runs[stage]])
        rows.append([f"`{script.__name__}.py`", mean, each_seed, f"{seconds:.0f} s"])
    bench.print_table(["script", "test accuracy", "each seed", "a run"], rows)


def print_steps(curves: dict[int, list[dict]]) -> None:
    rows = []
    for stage, step, log, rerun in ARTICLE:
        mean = np.mean([curve[step] for curve in curves[stage]])
        # Where the article has no figure, log is NaN, and fmax takes the other one.
        ahead = "yes" if mean > np.fmax(log, rerun) else "no"
        rows.append([stage, step, f"{mean:.2f}", log, rerun, ahead])
    bench.print_table(
        ["stage", "step", "mean", "article", "rerun", "ahead of both"], rows
    )


def print_pytorch(runs: dict[int, list[Run]], pytorch: dict[int, list[Run]]) -> None:
    rows = []
    for stage, pytorch_runs in pytorch.items():
        theirs = np.array([run.seconds for run in pytorch_runs])
        ours = np.array([run.seconds for run in runs[stage]])[: len(theirs)]
        cells = [bench.median_and_range(x) for x in (ours, theirs, ours / theirs)]
        rows.append([f"stage {stage}", *cells])
    bench.print_table(
        ["whole run, seconds", "script", "PyTorch", "script / PyTorch"], rows
    )


def draw(curves: dict[int, list[dict]]) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, 3, sharey=True, figsize=(9, 3.6), layout="constrained"
    )
    for axis, (stage, script) in zip(axes, bench.SCRIPTS.items(), strict=True):
        steps = sorted(curves[stage][0])
        y = np.array([[curve[step] for step in steps] for curve in curves[stage]])
        axis.fill_between(steps, y.min(axis=0), y.max(axis=0), alpha=0.3, lw=0)
        axis.plot(steps, y.mean(axis=0), label=f"script, {len(y)} seeds")
        points = ARTICLE[ARTICLE["stage"] == stage]
        axis.plot(points["step"], points["log"], "ko", mfc="w", label="article's log")
        axis.plot(
            points["step"], points["rerun"], "C1x", label="its listing, run again"
        )

        axis.set(xscale="log", xlim=(80, 15_000), ylim=(80, 100))
        axis.set_yticks(range(80, 101, 5))
        axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
        axis.set_title(f"stage {stage}: {script.__name__}.py", size="medium")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    axes[0].set_ylabel("test accuracy, %")
    figure.supxlabel("steps of 32 images; in stage 3, of 128", size="medium")
    figure.savefig(HERE / "learning_curves.png", dpi=150)


def main() -> None:
    args, _ = bench.setup(__doc__, "--seeds")
    runs, curves, pytorch = ({1: [], 2: [], 3: []} for _ in range(3))
    for stage, script in bench.SCRIPTS.items():
        steps = set(ARTICLE["step"][ARTICLE["stage"] == stage].tolist())
        for seed in range(args.seeds):
            options = [f"--data-dir={args.data_dir}", f"--seed={seed}"]
            whole = run(script.__file__, *options)
            early_steps = sorted(steps - set(whole.curve))
            early = early_curve(script.__file__, *options, steps=early_steps)
            runs[stage].append(whole)
            curves[stage].append(early | whole.curve)
            if seed < PYTORCH_SEEDS:
                yardstick = run(pytorch_mnist.__file__, f"--stage={stage}", *options)
                pytorch[stage].append(yardstick)
    print_results(runs)
    print_steps(curves)
    print_pytorch(runs, pytorch)
    draw(curves)


if __name__ == "__main__":
    main()
