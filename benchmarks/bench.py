"""What the benchmarks share: options, timing in turn, tables."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api
from common import DATA_DIR

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}


def parse_args(doc: str, **counts: int) -> argparse.Namespace:
    """Parse --data-dir, and an option for each keyword, with its default."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-dir", default=DATA_DIR)
    for name, default in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
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


def shuffled(permutation: Callable, batch_size: int, x: Any, y: Any) -> Iterator[tuple]:
    """Yield batches of arrays or tensors, shuffled by a function such as randperm."""
    for indices in permutation(len(x)).reshape(-1, batch_size):
        yield x[indices], y[indices]


def compare(
    title: str, candidates: dict[str, Iterator[None]], rounds: int, images: int
) -> dict[str, np.ndarray]:
    """Time an epoch of each candidate in each round, print a table, return the times.

    Times are in seconds for 60,000 images, from epochs of fewer. An epoch beforehand
    compiles and does not count.
    """
    for candidate in candidates.values():
        next(candidate)
    seconds = {name: np.zeros(rounds) for name in candidates}
    for i in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            next(candidate)
            seconds[name][i] = (time.perf_counter() - start) * 60_000 / images

    first_row = next(iter(seconds.values()))
    rows = [
        [name, two_digits(s.min()), two_digits(np.median(s)), quartiles(s / first_row)]
        for name, s in seconds.items()
    ]
    print_table([title, "minimum", "median", "ratio to the first row"], rows)
    return seconds


def two_digits(seconds: float) -> str:
    return f"{float(f'{seconds:.2g}'):g}"  # 110, not 1.1e+02


def quartiles(ratios: np.ndarray) -> str:
    lower, median, upper = np.percentile(ratios, [25, 50, 75])
    return f"{median:.2f} ({lower:.2f} to {upper:.2f})"


def print_table(header: list[str], rows: Iterable[list]) -> None:
    print()
    for cells in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(map(str, cells)), "|", flush=True)
