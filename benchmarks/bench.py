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
from common import Pairs, load_mnist

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}


def setup(doc: str, count: str) -> tuple[argparse.Namespace, Pairs]:
    """Return the options and the training set; exit if it is not MNIST."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument(count, type=int, default=5)
    args = parser.parse_args()
    train_set, _, data_name = load_mnist(args.data_dir)
    if data_name != "MNIST":
        parser.error(f"argument --data-dir: no MNIST in {args.data_dir}")
    return args, train_set


def shuffled(permutation: Callable, batch_size: int, x: Any, y: Any) -> Iterator[tuple]:
    """Yield batches of arrays or tensors, shuffled by a function such as randperm."""
    order = permutation(len(x))
    for start in range(0, len(x) - batch_size + 1, batch_size):
        indices = order[start : start + batch_size]
        yield x[indices], y[indices]


def keep(state: Any, x: Any, y: Any) -> Any:
    return state


def epochs(
    make_batches: Callable[[], Iterable], state: Any = None, step: Callable = keep
) -> Iterator[None]:
    """Take a step on each batch of an epoch at each `next`; by default, only load them."""
    while True:
        for x, y in make_batches():
            state = step(state, x, y)
        jax.block_until_ready(state)
        yield


def compare(
    title: str, candidates: dict[str, Iterator[None]], rounds: int
) -> dict[str, np.ndarray]:
    """Time an epoch of each candidate in each round, print a table, return the seconds.

    An epoch beforehand compiles and does not count.
    """
    for candidate in candidates.values():
        next(candidate)
    seconds = {name: np.zeros(rounds) for name in candidates}
    for i in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            next(candidate)
            seconds[name][i] = time.perf_counter() - start

    first_row = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        ratio = np.median(values / first_row)
        rows.append([name, median_and_range(values), f"{ratio:.2f}"])
    print_table([title, "seconds", "ratio to the first row"], rows)
    return seconds


def median_and_range(values: np.ndarray) -> str:
    return f"{np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"


def print_table(header: list[str], rows: Iterable[list]) -> None:
    print()
    for cells in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(map(str, cells)), "|", flush=True)
