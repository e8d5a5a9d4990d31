"""Test with the lowest and the newest releases that requirements.txt allows.

    pip install uv && python .ci/matrix.py

prints a table, a row for each Python and each end of the bounds. All other arguments,
such as `-k loader`, are passed on to pytest. uv finds the Pythons, or downloads them;
`--python` takes versions or paths.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["jax", "flax", "optax", "torch", "torchvision", "numpy"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PRINT_VERSIONS = f"""
import platform
from importlib.metadata import version
print(platform.python_version(), *[version(name) for name in {PACKAGES}])
"""


def run(python: str, resolution: str, *args: str) -> subprocess.CompletedProcess:
    """Run Python with `args` in an environment of its own; keep what it prints."""
    uv = [sys.executable, "-m", "uv", "run", "--isolated", "--no-project"]
    options = ["--python", python, "--resolution", resolution]
    requirements = ["--with-requirements", "requirements.txt"]
    if resolution == "lowest-direct":
        requirements += ["--with-requirements", ".ci/lowest.txt"]
    command = [*uv, *options, *requirements, "python", *args]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )


parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--python", nargs="+", default=PYTHONS)
parser.add_argument("--resolution", nargs="+", default=["lowest-direct", "highest"])
args, pytest_args = parser.parse_known_args()

failed = False
print("| releases | Python |", " | ".join(PACKAGES), "| tests |")
print("| --- " * (len(PACKAGES) + 3) + "|", flush=True)
for resolution in args.resolution:
    for python in args.python:
        versions = run(python, resolution, "-c", PRINT_VERSIONS)
        if versions.returncode != 0:  # uv has said why
            cells = [python, *["?"] * len(PACKAGES), "not installed"]
            failed = True
        else:
            tests = run(python, resolution, "-m", "pytest", *pytest_args)
            lines = tests.stdout.splitlines() or ["no output"]
            summary = lines[-1].strip("= ").partition(" in ")[0]
            cells = [*versions.stdout.split(), summary]
            if tests.returncode != 0:
                print(tests.stdout, file=sys.stderr)
                failed = True
        print("|", " | ".join([resolution, *cells]), "|", flush=True)
sys.exit(failed)
