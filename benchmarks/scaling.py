"""How cost grows with the number of examples and with the batch size.

    python benchmarks/scaling.py --data-dir DIR

prints, for each stage, examples per second of a training epoch (median of --rounds,
after one that compiles) and the peak memory of a whole process of one epoch, as a ratio
to a process that only does the script's imports. Unix only, for the memory.
"""

import argparse
import subprocess
import sys
from functools import cache
from statistics import median

import speed
from speed import SCRIPTS, Stage, seconds

import common

EXAMPLES = [6_000, 18_000, 60_000]
BATCH_SIZES = [32, 128, 512, 1024]


# A process reports no less than its parent held when it was started. So one that holds
# next to nothing starts the process to be measured.
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@cache
def peak_memory(*command: str) -> int:
    """Peak resident memory of a process; the unit is the system's, here it cancels."""
    launch = [sys.executable, "-c", LAUNCHER, sys.executable, *command]
    return int(subprocess.run(launch, stdout=subprocess.PIPE, check=True).stdout)


def row(number: int, examples: int, batch_size: int, args: argparse.Namespace) -> str:
    script = SCRIPTS[number]
    stage = Stage(number, args.data_dir, batch_size, examples)
    stage.epoch()
    took = median(seconds(stage.epoch) for _ in range(args.rounds))
    rate = stage.steps * batch_size / took
    imports = peak_memory(
        "-c",
        f"import sys; sys.path.insert(0, {str(speed.ROOT)!r}); import {script.__name__}",
    )
    options = ["--epochs", "1", "--data-dir", args.data_dir]
    options += ["--train-examples", str(examples), "--batch-size", str(batch_size)]
    memory = peak_memory(script.__file__, *options) / imports
    return (
        f"| {number} | {examples:,} | {batch_size} | {took:.2f} | {rate:,.0f} "
        f"| {memory:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default=str(common.DATA_DIR))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        "| stage | examples | batch size | s an epoch | examples/s | memory / imports |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for number, script in SCRIPTS.items():
        usual = script.Config.batch_size
        sizes = [(count, usual) for count in EXAMPLES]
        sizes += [(EXAMPLES[-1], size) for size in BATCH_SIZES if size != usual]
        for examples, batch_size in sizes:
            print(row(number, examples, batch_size, args), flush=True)


if __name__ == "__main__":
    main()
