"""What the benchmarks share: the scripts, options, timing in turn, tables."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pytorch_mnist import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api
from common import Pairs, load_mnist

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}


def make_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="where MNIST is")
    return parser


def load_train_set(data_dir: str) -> Pairs:
    """Return the training set as the scripts load it; exit if it is not MNIST."""
    train_set, _, data_name = load_mnist(data_dir)
    if data_name != "MNIST":
        sys.exit("error: these benchmarks need the real MNIST (see --data-dir)")
    return train_set


@dataclass
class ShuffledArrays:
    """Batches of two arrays or tensors, in a new random order each time."""

    permutation: Callable  # np.random.permutation or torch.randperm
    batch_size: int
    x: Any
    y: Any

    def __iter__(self) -> Iterator[tuple]:
        order = self.permutation(len(self.x))
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            indices = order[start : start + self.batch_size]
            yield self.x[indices], self.y[indices]


def start_script(stage: int, steps_per_epoch: int) -> tuple[Any, Callable]:
    """Return a script's initial state and its step: (state, x, y) -> next state."""
    script = SCRIPTS[stage]
    learning_rate = script.LEARNING_RATE
    total_steps = script.EPOCHS * steps_per_epoch
    settings = (script.BATCH_SIZE, learning_rate, script.FINAL_LEARNING_RATE)
    assert SETTINGS[stage] == settings, "pytorch_mnist.py has other settings"
    key = jax.random.key(0)

    if stage == 1:
        params = script.init_network_params(script.LAYER_SIZES, key)

        def sgd_step(state, x, y):
            params, i = state
            lr = script.learning_rate_at(i, learning_rate, total_steps)
            return script.sgd_update(params, x, y, lr), i + 1

        return (params, 0), sgd_step

    params_key, dropout_key = jax.random.split(key)
    other_args = [dropout_key] if stage == 3 else []

    def flax_step(state, x, y):
        state, _ = script.train_step(state, x, y, *other_args)
        return state

    return script.create_train_state(params_key, learning_rate, total_steps), flax_step


def load_epochs(batches: Iterable) -> Iterator[None]:
    """At each `next`, go through all batches and do nothing with them."""
    while True:
        for _ in batches:
            pass
        yield


def train_epochs(batches: Iterable, state: Any, step: Callable) -> Iterator[None]:
    """At each `next`, train for an epoch."""
    while True:
        for x, y in batches:
            state = step(state, x, y)
        jax.block_until_ready(state)
        yield


def compare(
    title: str, candidates: dict[str, Iterator[None]], rounds: int
) -> dict[str, np.ndarray]:
    """Time all candidates in turn, print a table, and return their seconds by round.

    The first `next` of each compiles and does not count. A candidate that fails there, as
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


def median_and_range(values: Iterable[float]) -> str:
    lowest, median, highest = np.quantile(values, (0, 0.5, 1))
    return f"{median:.3f} ({lowest:.3f} to {highest:.3f})"


def print_header(*names: str) -> None:
    print()
    print_row(*names)
    print_row(*["---"] * len(names))


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)
