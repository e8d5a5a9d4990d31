"""Train every stage over several seeds: a table of results, and a figure of the curves.

    python benchmarks/learning_curves.py --data-dir DIR

runs the three scripts as a user does, twice for each seed: the default run, which is
evaluated once an epoch, and its first 1,000 updates with an evaluation every 100. It
writes learning_curves.png beside itself and the table into ../README.md, between the
two comments that say so.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIGURE = Path(__file__).with_name("learning_curves.png")
TABLE = re.compile(r"(?<=<!-- results -->\n).*?(?=<!-- end of results -->)", re.DOTALL)

STAGES = {
    "mlp_numpy_api": "stage 1: jax.numpy, SGD",
    "mlp_flax": "stage 2: Flax, Optax's Adam",
    "mlp_flax_bn_dropout": "stage 3: Dropout, BatchNorm",
}
COLORS = ["#0072b2", "#d55e00", "#009e73"]  # told apart by the colour-blind, too
# What the article logged: number of updates, test accuracy in percent.
ARTICLE = {
    "mlp_numpy_api": dict(
        zip(
            range(100, 1100, 100),
            (83.6, 89.4, 90.1, 91.3, 91.1, 92.5, 93.0, 93.3, 93.0, 93.6),
        )
    ),
    "mlp_flax_bn_dropout": dict(
        zip(
            (1, 101, 201, 301, 401, 469, 569),
            (31.1, 93.7, 94.9, 95.1, 95.1, 95.1, 95.1),
        )
    ),
}


def run(script: str, *options: str) -> tuple[dict[int, float], float, float]:
    """Test accuracy by number of updates, final accuracy, seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / f"{script}.py"), *options]
    output = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    seconds = time.perf_counter() - start
    final = re.search(r"final test accuracy: (\S+)% \(MNIST\)\n$", output)
    if not final:
        raise SystemExit("learning_curves.py needs the real MNIST: see --data-dir")
    line = re.compile(r"step (\d+) .* test accuracy (\S+)%")
    curve = {int(step): float(accuracy) for step, accuracy in line.findall(output)}
    return curve, float(final[1]), seconds


def draw(curves: dict[str, list[dict[int, float]]]) -> None:
    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False})
    mpl.rcParams["axes.spines.right"] = False
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (script, label), color in zip(STAGES.items(), COLORS):
        steps = sorted(curves[script][0])
        values = np.array([[curve[s] for s in steps] for curve in curves[script]])
        axes.plot(steps, values.mean(axis=0), color=color, label=label)
        axes.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.25, lw=0
        )
        if script in ARTICLE:
            axes.plot(
                *zip(*ARTICLE[script].items()),
                "o",
                color=color,
                markersize=4,
                markerfacecolor="white",
                label=f"{label.partition(':')[0]}, the article's log",
            )
    axes.set(xscale="log", xlim=(90, 12_000), ylim=(82, 99), ylabel="test accuracy, %")
    axes.set_xlabel("updates (batch size 32; 128 in stage 3)")
    axes.set_xticks(
        [100, 300, 1000, 3000, 10_000], ["100", "300", "1,000", "3,000", "10,000"]
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default=str(ROOT / "data"))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    curves = {script: [] for script in STAGES}
    rows = []
    for script in STAGES:
        finals, times = [], []
        for seed in range(args.seeds):
            options = ["--data-dir", args.data_dir, "--seed", str(seed)]
            curve, final, seconds = run(script, *options)
            early = ["--max-steps", "1000", "--eval-every", "100"]
            curves[script].append(run(script, *options, *early)[0] | curve)
            finals.append(final)
            times.append(seconds)
        rows.append(
            f"| `{script}.py` | {mean(finals):.2f} % ± {stdev(finals):.2f} "
            f"| {mean(finals[:3]):.2f} % | {min(finals):.2f} % | {mean(times):.0f} s |\n"
        )
        print(rows[-1], end="", flush=True)
    draw(curves)
    header = (
        f"| script | test accuracy, {args.seeds} seeds | seeds 0 to 2 | worst seed | time |\n"
        "| --- | --- | --- | --- | --- |\n"
    )
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = header + "".join(rows)
    readme.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()
