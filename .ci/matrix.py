"""Test with the lowest and the newest releases that requirements.txt allows.

    pip install uv && python .ci/matrix.py

makes an environment for each Python and for both ends of the bounds, runs the tests in
it, and prints a table. uv finds the Pythons, or fetches them; each environment takes
some gigabytes while it is tested, and is deleted after that.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = [sys.executable, "-m", "uv"]
PACKAGES = ["jax", "flax", "optax", "orbax-checkpoint", "torch", "torchvision", "numpy"]


def test(python: str, resolution: str, pytest_options: list[str]) -> tuple[list, bool]:
    """Return a row of versions and results, and whether all tests passed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        venv = Path(scratch) / "venv"
        interpreter = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = [*UV, "pip", "-q"]
        subprocess.run([*UV, "venv", "-q", "--python", python, venv], check=True)
        subprocess.run(
            [*pip, "install", "--python", interpreter, "--resolution", resolution]
            + ["-r", ROOT / "requirements.txt"],
            check=True,
        )
        listing = subprocess.run(
            [*pip, "list", "--python", interpreter, "--format", "json"],
            stdout=subprocess.PIPE,
            check=True,
        )
        venv_config = (venv / "pyvenv.cfg").read_text()
        versions = {p["name"]: p["version"] for p in json.loads(listing.stdout)}
        tests = subprocess.run(
            [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            + pytest_options,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    print(tests.stdout[-3000:], file=sys.stderr)
    release = re.search(r"(?<=version_info = )\S+", venv_config)[0]
    summary = re.findall(r"\d+ (?:passed|failed|error)s?", tests.stdout)
    row = [release, *(versions[p] for p in PACKAGES), ", ".join(summary)]
    return row, not tests.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--python",
        nargs="+",
        default=["3.10", "3.11", "3.12", "3.13"],
        help="versions, or paths of interpreters (default: %(default)s)",
    )
    parser.add_argument(
        "--resolution", nargs="+", default=["lowest-direct", "highest"], metavar="END"
    )
    parser.add_argument("--smoke", action="store_true", help="run test_smoke.py only")
    args = parser.parse_args()

    header = ["releases", "Python", *PACKAGES, "tests"]
    table = [header, ["---"] * len(header)]
    all_passed = True
    for python in args.python:
        for resolution in args.resolution:
            options = ["test_smoke.py"] if args.smoke else []
            row, passed = test(python, resolution, options)
            all_passed &= passed
            table.append([resolution.partition("-")[0], *row])
            print("| " + " | ".join(table[-1]) + " |", file=sys.stderr)
    for row in table:
        print("| " + " | ".join(row) + " |")
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
