"""Run all seeds and draw: python benchmarks/learning_curves.py --data-dir DIR"""

import re
import sys
import time
from subprocess import PIPE, Popen

import bench
import matplotlib.pyplot as plt
import numpy as np
import pytorch_mnist

HERE, README = bench.ROOT / "benchmarks", bench.ROOT / "README.md"
TABLE = re.compile("(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
MEASURES = "seconds", "seconds to 98%", "final accuracy, %"


def run(*command: str) -> tuple[tuple, dict[int, float]]:
    """Return the MEASURES of a run, and its test accuracy in percent by step."""
    start, reached, curve = time.perf_counter(), np.inf, {}
    with Popen([sys.executable, *command], stdout=PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.search(r"(?:step (\d+) .*)?test accuracy:? +(\S+)%", line):
                seconds = time.perf_counter() - start
                curve[int(found[1] or 0)] = accuracy = float(found[2])
                reached = min(reached, seconds if accuracy >= 98 else np.inf)
    return (seconds, reached, curve.pop(0)), curve


args, _ = bench.setup(__doc__, "--seeds")
rows = ["| script | with | test accuracy | each seed | a run |\n", f"{'| --- ' * 5}|\n"]
bench.print_row("whole runs", "script", "PyTorch", "script / PyTorch")
bench.print_row(*["---"] * 4)
article = np.genfromtxt(HERE / "article.csv", delimiter=",", names=True)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
figure, axes = plt.subplots(1, 3, sharey=True, figsize=(9, 3.6), layout="constrained")
for axis, (stage, script) in zip(axes, bench.SCRIPTS.items()):
    ours, theirs, curves = [], [], []
    for seed in range(args.seeds):
        options = ["--data-dir", args.data_dir, "--seed", str(seed)]
        early = [*options, "--max-steps", "1000", "--eval-every", "100"]
        measures, curve = run(script.__file__, *options)
        ours.append(measures)
        curves.append(run(script.__file__, *early)[1] | curve)
        if seed < 2:  # it takes several times as long
            theirs.append(run(pytorch_mnist.__file__, f"--stage={stage}", *options)[0])
    for name, a, b in zip(MEASURES, np.transpose(ours[:2]), np.transpose(theirs)):
        bench.print_row(f"stage {stage}, {name}", *map(bench.spread, (a, b, a / b)))
    seconds, _, finals = np.transpose(ours)
    lessons = re.search(" with (.*)\\.\n", script.__doc__)[1]
    rows.append(
        f"| `{script.__name__}.py` | {lessons} "
        f"| {finals.mean():.2f} % ± {finals.std(ddof=1):.2f} "
        f"| {', '.join(map('{:.2f}'.format, finals))} | {seconds.mean():.0f} s |\n"
    )
    x = sorted(curves[0])
    y = np.array([[curve[step] for step in x] for curve in curves])
    axis.fill_between(x, y.min(0), y.max(0), alpha=0.3, lw=0)
    axis.plot(x, y.mean(0), label=f"script, {args.seeds} seeds")
    points = article[article["stage"] == stage]
    axis.plot(points["step"], points["log"], "ko", mfc="w", label="article's log")
    axis.plot(points["step"], points["rerun"], "C1x", label="its listing, run again")
    axis.set(xscale="log", xlim=(80, 15_000), ylim=(80, 100), yticks=range(80, 101, 5))
    axis.set_title(f"stage {stage}: {script.__name__}.py", size="medium")
    axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
    axis.grid(alpha=0.3)
axes[0].legend(loc="lower right")
axes[0].set_ylabel("test accuracy, %")
figure.supxlabel("steps of 32 images; in stage 3, of 128", size="medium")
figure.savefig(HERE / "learning_curves.png", dpi=150)
text = README.read_text(encoding="utf-8")
README.write_text(TABLE.sub("".join(rows), text), encoding="utf-8")
