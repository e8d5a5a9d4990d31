"""Run all seeds and draw: python benchmarks/learning_curves.py --data-dir DIR"""

import contextlib
import io
import re
import subprocess
import sys
import time
from pathlib import Path

import bench
import matplotlib.pyplot as plt
import numpy as np
import pytorch_mnist

HERE = Path(__file__).parent
ARTICLE = np.genfromtxt(
    HERE / "article.csv", delimiter=",", names=True, dtype=(int, int, float)
)


def time_process(*command: str) -> tuple[float, str]:
    """Run a Python program; return the seconds that it takes, and what it prints."""
    start = time.perf_counter()
    output = subprocess.check_output([sys.executable, *command], text=True)
    return time.perf_counter() - start, output


def final_accuracy(output: str) -> float:
    """Return the accuracy in the last line, in percent."""
    return float(re.search(r"\nfinal test accuracy: (\S+)% \(MNIST\)", output)[1])


def evaluations(output: str) -> dict[int, float]:
    """Return the test accuracy at each step of a log, in percent."""
    points = re.findall(r"step (\d+) .*test accuracy (\S+)%", output)
    return {int(step): float(accuracy) for step, accuracy in points}


def run_here(script, *options: str) -> str:
    """Run a script in this process, which saves its imports; return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.main(options)
    return out.getvalue()


def add_early_steps(curve: dict[int, float], steps: set[int], script, *options) -> None:
    """Add the accuracy at every 100th of the first 1,000 steps, and at `steps`."""
    curve |= evaluations(
        run_here(script, *options, "--max-steps=1000", "--eval-every=100")
    )
    for step in steps - set(curve):
        curve[step] = final_accuracy(run_here(script, *options, f"--max-steps={step}"))


def result_row(name: str, accuracies: list[float], seconds=(), ratio="") -> list[str]:
    mean = f"{np.mean(accuracies):.2f}"
    if len(accuracies) > 1:
        mean += f" ± {np.std(accuracies, ddof=1):.2f}"
    each_seed = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    median = f"{np.median(seconds):.0f}" if seconds else ""
    return [name, mean, each_seed, median, ratio]


def draw(curves: dict[int, list[dict[int, float]]]) -> None:
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
    args = bench.parse_args(__doc__, seeds=5, pytorch_seeds=1)
    curves, rows = {}, []
    for stage, script in bench.SCRIPTS.items():
        steps = set(ARTICLE["step"][ARTICLE["stage"] == stage].tolist())
        finals, seconds, their_finals, ratios = [], [], [], []
        curves[stage], without_dropout = [], []
        for seed in range(args.seeds):
            options = [f"--data-dir={args.data_dir}", f"--seed={seed}"]
            duration, output = time_process(script.__file__, *options)
            seconds.append(duration)
            finals.append(final_accuracy(output))
            if seed < args.pytorch_seeds:
                command = [pytorch_mnist.__file__, f"--stage={stage}", *options]
                their_duration, their_output = time_process(*command)
                their_finals.append(final_accuracy(their_output))
                ratios.append(duration / their_duration)
            curve = evaluations(output)
            add_early_steps(curve, steps, script, *options)
            curves[stage].append(curve)
            if stage == 3:
                rates, script.DROPOUT_RATES = script.DROPOUT_RATES, (0.0, 0.0)
                without_dropout.append(final_accuracy(run_here(script, *options)))
                script.DROPOUT_RATES = rates
        ratio = f"{np.median(ratios):.2f}"
        rows.append(result_row(f"`{script.__name__}.py`", finals, seconds, ratio))
        rows.append(result_row("PyTorch, usual way", their_finals))
    rows.append(result_row("stage 3 without dropout", without_dropout))
    header = ["a whole run", "test accuracy, %", "each seed", "seconds", "ratio"]
    bench.print_table(header, rows)

    rows = []
    for stage, step, article in ARTICLE:
        mean = np.mean([curve[step] for curve in curves[stage]])
        ahead = "yes" if mean > article else "no"
        rows.append([stage, step, f"{mean:.2f}", article, ahead])
    bench.print_table(["stage", "step", "mean", "article", "ahead"], rows)
    draw(curves)


if __name__ == "__main__":
    main()
