"""What the benchmarks share: options, the scripts' steps, timing in turn, tables."""

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


def start_script(stage: int, steps_per_epoch: int) -> tuple[Any, Callable]:
    """Return a script's initial state, and its step: (state, x, y) -> next state."""
    script = SCRIPTS[stage]
    total_steps = script.EPOCHS * steps_per_epoch
    params_key, dropout_key = jax.random.split(jax.random.key(0))

    def stage_1_step(state, x, y):
        params, i = state
        lr = script.learning_rate_at(i, script.LEARNING_RATE, total_steps)
        return script.sgd_update(params, x, y, lr), i + 1

    def stage_2_step(state, x, y):
        return script.train_step(state, x, y)[0]

    def stage_3_step(state, x, y):
        return script.train_step(state, x, y, dropout_key)[0]

    if stage == 1:
        params = script.init_network_params(script.LAYER_SIZES, params_key)
        return (params, 0), stage_1_step
    state = script.create_train_state(params_key, script.LEARNING_RATE, total_steps)
    return state, stage_2_step if stage == 2 else stage_3_step


def load_epochs(make_batches: Callable[[], Iterable]) -> Iterator[None]:
    """Go through an epoch's batches at each `next`, and do nothing with them."""
    while True:
        for _ in make_batches():
            pass
        yield


def train_epochs(
    make_batches: Callable[[], Iterable], state: Any, step: Callable
) -> Iterator[None]:
    """Train for an epoch at each `next`."""
    while True:
        for x, y in make_batches():
            state = step(state, x, y)
        jax.block_until_ready(state)
        yield


def compare(
    title: str, candidates: dict[str, Iterator[None]], rounds: int
) -> dict[str, np.ndarray]:
    """Time an epoch of each candidate in each round, print a table, return the seconds.

    An epoch beforehand compiles and does not count. A candidate that fails there, because
    its package is missing or has another API, gets a row that says so.
    """
    print_header(title, "seconds", "ratio to the first row")
    seconds = {}
    for name, epochs in candidates.items():
        try:
            next(epochs)
            seconds[name] = np.zeros(rounds)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            print_row(name, f"not available: {reason}", "")

    for i in range(rounds):
        for name, values in seconds.items():
            start = time.perf_counter()
            next(candidates[name])
            values[i] = time.perf_counter() - start

    first_row = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = np.median(values / first_row)
        print_row(name, median_and_range(values), f"{ratio:.2f}")
    return seconds


def median_and_range(values: np.ndarray) -> str:
    return f"{np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"


def print_header(*names: object) -> None:
    print()
    print_row(*names)
    print_row(*["---"] * len(names))


def print_row(*cells: object) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)
