"""What the benchmarks share: the scripts, options, and tables."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api
from common import DATA_DIR

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}


def parse_args(doc: str, **numbers: int) -> argparse.Namespace:
    """Parse --data-dir, and an option for each number; print what machine this is."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-dir", default=DATA_DIR)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    print(subprocess.getoutput("lscpu | grep '^Model'"))
    print(
        f"{os.cpu_count()} cores, jax {jax.__version__} on {jax.devices()[0]}, ", end=""
    )
    print(f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    return args


def print_table(header: list, rows: Iterable[list]) -> None:
    print()
    for cells in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(map(str, cells)), "|", flush=True)
