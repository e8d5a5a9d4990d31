"""Run all seeds and draw: python benchmarks/learning_curves.py --data-dir DIR"""

import re
import subprocess
import sys
import time
from pathlib import Path

import bench
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
# (stage, step, test accuracy in percent), one for each that the article prints
ARTICLE = np.genfromtxt(HERE / "article.csv", delimiter=",", names=True)
WITHOUT_DROPOUT = """
import mlp_flax_bn_dropout
mlp_flax_bn_dropout.DROPOUT_RATES = (0.0, 0.0)
mlp_flax_bn_dropout.main()
"""


def run(*command: str) -> tuple[float, dict[int, float]]:
    """Run a Python program, as a process.

    Returns the seconds that it takes, and the test accuracy in percent at each step at
    which it evaluates.
    """
    start = time.perf_counter()
    log = subprocess.check_output([sys.executable, *command], text=True)
    seconds = time.perf_counter() - start
    points = re.findall(r"step (\d+) .*test accuracy (\S+)%", log)
    return seconds, {int(step): float(accuracy) for step, accuracy in points}


def whole_runs(stage: int, each_seed: list[list[str]]) -> list[list[str]]:
    """Return the rows of a table: seeds' last accuracies, seconds, ratio of seconds."""
    script = bench.SCRIPTS[stage]
    programs = {
        f"`{script.__name__}.py`": [script.__file__],
        "PyTorch, usual way": [HERE / "pytorch_mnist.py", f"--stage={stage}"],
    }
    if stage == 3:
        programs["stage 3 without dropout"] = ["-c", WITHOUT_DROPOUT]
    rows, seconds = [], np.zeros((len(each_seed), len(programs)))
    finals = np.zeros_like(seconds)
    for i, options in enumerate(each_seed):
        for j, command in enumerate(programs.values()):
            seconds[i, j], curve = run(*command, *options)
            finals[i, j] = curve[max(curve)]
    ratios = np.median(seconds[:, :1] / seconds, axis=0)
    for name, accuracies, s, ratio in zip(programs, finals.T, seconds.T, ratios):
        mean = f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}"
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        rows.append([name, mean, each, f"{np.median(s):.0f}", f"{ratio:.2f}"])
    return rows


def learning_curve(stage: int, options: list[str]) -> dict[int, float]:
    """Return the accuracy after step 1, each 100th of the first 1,000, each epoch."""
    script = bench.SCRIPTS[stage].__file__
    _, first = run(script, *options, "--max-steps=1")
    _, early = run(script, *options, "--max-steps=1000", "--eval-every=100")
    _, whole = run(script, *options)
    return dict(sorted((first | early | whole).items()))


def beside_the_article(stage: int, curves: list[dict[int, float]]) -> None:
    """Print the means of the last evaluations that are not after the article's steps."""
    theirs = ARTICLE[ARTICLE["stage"] == stage]
    at = [max(step for step in curves[0] if step <= its) for its in theirs["step"]]
    means = [np.mean([curve[step] for curve in curves]) for step in at]
    header = [f"stage {stage}, step", *theirs["step"].astype(int)]
    ours = ["the script", *(f"{mean:.2f}" for mean in means)]
    bench.print_table(
        header, [["article", *theirs["accuracy"]], ["at step", *at], ours]
    )
    print("ahead of the article at each:", bool(np.all(means > theirs["accuracy"])))


def draw(stage: int, curves: list[dict[int, float]], axis: plt.Axes) -> None:
    steps = list(curves[0])
    y = np.array([list(curve.values()) for curve in curves])
    axis.fill_between(steps, y.min(axis=0), y.max(axis=0), alpha=0.3, lw=0)
    axis.plot(steps, y.mean(axis=0), label=f"script, {len(y)} seeds")
    theirs = ARTICLE[ARTICLE["stage"] == stage]
    axis.plot(theirs["step"], theirs["accuracy"], "ko", mfc="w", label="article")

    axis.set(xscale="log", xlim=(80, 15_000), ylim=(80, 100))
    axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
    axis.set_title(f"stage {stage}: {bench.SCRIPTS[stage].__name__}.py", size="medium")
    axis.grid(alpha=0.3)


def main() -> None:
    args = bench.parse_args(__doc__, seeds=5)
    each_seed = [
        [f"--data-dir={args.data_dir}", f"--seed={seed}"] for seed in range(args.seeds)
    ]
    figure, axes = plt.subplots(
        1, 3, sharey=True, figsize=(9, 3.6), layout="constrained"
    )
    table = []
    for stage, axis in zip(bench.SCRIPTS, axes, strict=True):
        table += whole_runs(stage, each_seed)
        curves = [learning_curve(stage, options) for options in each_seed]
        draw(stage, curves, axis)
        if stage != 2:  # of which the article prints nothing
            beside_the_article(stage, curves)
    header = ["a whole run", "test accuracy, %", "each seed", "seconds", "ratio"]
    bench.print_table(header, table)
    axes[0].legend(loc="lower right")
    axes[0].set_ylabel("test accuracy, %")
    figure.supxlabel("steps of 32 images; in stage 3, of 128", size="medium")
    figure.savefig(HERE / "learning_curves.png", dpi=150)


if __name__ == "__main__":
    main()
