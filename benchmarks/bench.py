"""What the benchmarks share: the scripts, options, timing in turn, tables."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api
from common import DATA_DIR

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}


def parse_args(doc: str, **counts: int) -> argparse.Namespace:
    """Parse --data-dir, and an option for each keyword; print what machine this is."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-dir", default=DATA_DIR)
    for name, default in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [
        line.partition(": ")[2] for line in lines if line.startswith("model name")
    ]
    print(f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores,")
    print(f"jax {jax.__version__} on {jax.devices()[0].platform}, ", end="")
    print(f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    return parser.parse_args()


def only_load(state: Any, x: Any, y: Any) -> Any:
    return state


def epochs(
    make_batches: Callable[[], Iterable], state: Any = None, step: Callable = only_load
) -> Iterator[None]:
    """Train for an epoch at each `next`; by default, only load its batches."""
    while True:
        for x, y in make_batches():
            state = step(state, x, y)
        jax.block_until_ready(state)
        yield


def time_in_turn(
    candidates: dict[str, Iterator[None]], rounds: int, images: int
) -> dict[str, np.ndarray]:
    """Return the seconds of each candidate in each round, scaled to 60,000 images.

    The candidates take turns. An epoch beforehand compiles and does not count.
    """
    seconds = {name: np.zeros(rounds) for name in candidates}
    for i in range(-1, rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            next(candidate)
            if i >= 0:
                seconds[name][i] = (time.perf_counter() - start) * 60_000 / images
    return seconds


def print_ratios(title: str, seconds: dict[str, np.ndarray]) -> None:
    """Print each candidate's median, and the ratios of the first one's time to its."""
    first = next(iter(seconds.values()))
    rows = [
        [name, f"{np.median(s):.2g}", quartiles(first / s)]
        for name, s in seconds.items()
    ]
    print_table([title, "seconds", "ratio"], rows)


def quartiles(ratios: np.ndarray) -> str:
    lower, median, upper = np.percentile(ratios, [25, 50, 75])
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"


def print_table(header: list[str], rows: Iterable[list]) -> None:
    print()
    for cells in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(map(str, cells)), "|", flush=True)
