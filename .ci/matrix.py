"""Test with the lowest and the newest releases that requirements.txt allows.

    pip install uv && python .ci/matrix.py

makes an environment for each Python and for both ends of the bounds, runs the tests in
it, and prints a table, a row for each set of versions. uv finds the Pythons, or fetches
them; each environment takes some gigabytes while it is tested, and is deleted after that.
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
PACKAGES = ["jax", "flax", "optax", "torch", "torchvision", "numpy"]


def test(
    python: str, resolution: str, pytest_options: list[str]
) -> tuple[str, list, bool]:
    """Return Python's release, a row of versions and results, and whether all passed."""
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
    summary = re.findall(r"\d+ (?:passed|failed|errors?)", tests.stdout)
    row = [*(versions[p] for p in PACKAGES), ", ".join(summary)]
    return release, row, not tests.returncode


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

    table = {}  # releases, versions and results: the Pythons they were seen on
    all_passed = True
    for resolution in args.resolution:
        for python in args.python:
            options = ["test_smoke.py"] if args.smoke else []
            try:
                release, row, passed = test(python, resolution, options)
            except subprocess.CalledProcessError as error:  # uv has said why
                print(f"{python} {resolution}: {error}", file=sys.stderr, flush=True)
                all_passed = False
                continue
            all_passed &= passed
            table.setdefault((resolution.partition("-")[0], *row), []).append(release)
            print(f"{release} {resolution}: {row}", file=sys.stderr, flush=True)
    header = ["releases", "Python", *PACKAGES, "tests"]
    for row in (header, ["---"] * len(header)):
        print("| " + " | ".join(row) + " |")
    for (releases, *row), pythons in table.items():
        print("| " + " | ".join([releases, ", ".join(pythons), *row]) + " |")
    sys.exit(not all_passed)


if __name__ == "__main__":
    main()
