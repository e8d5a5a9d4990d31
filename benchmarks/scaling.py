"""Vary examples and batch size: python benchmarks/scaling.py --data-dir DIR"""

import subprocess
import sys

import bench
from torch.utils.data import Subset

from common import NumpyLoader

SIZES = [(n, 32) for n in (6_000, 18_000, 60_000)]
SIZES += [(60_000, batch_size) for batch_size in (128, 512, 1024)]
# A process reports no less than its parent held at its start; this parent holds little.
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(*command: str) -> int:
    """Return the most memory that a Python process held, in the system's unit."""
    launch = [sys.executable, "-c", LAUNCHER, sys.executable, *command]
    return int(subprocess.check_output(launch, cwd=bench.ROOT).split()[-1])


args, train_set = bench.setup(__doc__)
for stage, script in bench.SCRIPTS.items():
    works = {}
    imports = peak_memory("-c", f"import {script.__name__}")
    run = [script.__file__, "--data-dir", args.data_dir, "--epochs", "1"]
    for n, batch_size in SIZES:
        sizes = ["--train-examples", str(n), "--batch-size", str(batch_size)]
        memory = peak_memory(*run, *sizes) / imports
        part = Subset(train_set.dataset, range(n))
        loader = NumpyLoader(part, bench.KEY, batch_size, shuffle=True, drop_last=True)
        name = f"{n:,} in {batch_size}s, memory {memory:.2f}"
        works[name] = bench.repeat(loader.__iter__, *bench.start(stage, len(loader)))
    bench.compare(f"stage {stage}", works, args.rounds)
