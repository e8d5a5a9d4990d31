"""What the benchmarks share: options, epochs, timing in turn, tables."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from pytorch_mnist import SETTINGS
from torch.utils.data import Subset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api
from common import load_mnist

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}
KEY = jax.random.key(0)


def setup(doc: str, count: str = "--rounds") -> tuple[argparse.Namespace, Subset]:
    """Return options and training set, as the scripts load it; exit without MNIST."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--data-dir", default=str(ROOT / "data"))
    parser.add_argument(count, type=int, default=5)
    args = parser.parse_args()
    train_set, _, name = load_mnist(args.data_dir)
    if name != "MNIST":
        parser.error("the real MNIST is needed: see --data-dir")
    return args, Subset(train_set, range(len(train_set)))


def cut(permutation: Callable, batch_size: int, x, y) -> Iterator[tuple]:
    """Yield batches of arrays or tensors, shuffled by a function such as randperm."""
    order = permutation(len(x))[: len(x) // batch_size * batch_size]
    for indices in order.reshape(-1, batch_size):
        yield x[indices], y[indices]


def repeat(make_batches: Callable, state=None, step=lambda *_: None) -> Iterator[None]:
    """Go through an epoch at each `next`; without a step, this is loading alone."""
    while True:
        for x, y in make_batches():
            state = step(state, x, y)
        yield jax.block_until_ready(state)


def start(stage: int, epoch_steps: int) -> tuple:
    """Return the initial state, and the script's step: (state, x, y) -> next state."""
    script, options = SCRIPTS[stage], SCRIPTS[stage].make_parser().parse_args([])
    rate, steps = options.learning_rate, options.epochs * epoch_steps
    assert SETTINGS[stage] == (options.batch_size, rate, script.FINAL_LEARNING_RATE)
    if stage == 1:

        def step(state, x, y):
            params, i = state
            lr = script.learning_rate_at(i, rate, steps)
            return script.sgd_update(params, x, y, lr), i + 1

        return (script.init_network_params(script.LAYER_SIZES, KEY), 0), step
    keys = [KEY] if stage == 3 else []  # for dropout
    state = script.create_train_state(KEY, *keys, rate, steps)
    return state, lambda state, x, y: script.train_step(state, x, y, *keys)[0]


def compare(title: str, works: dict[str, Iterator], rounds: int) -> None:
    """Print the seconds of all works, taken in turn, and their ratios to the first."""
    ours, times = next(iter(works)), {}
    print_row(title, "seconds", "/ first row", "first row / this")
    print_row(*["---"] * 4)
    for name, work in works.items():
        try:
            next(work)  # compiles, and does not count
            times[name] = np.empty(rounds)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as e:
            print_row(name, f"not available: {' '.join(str(e).split())}", "", "")
    for i in range(rounds):
        for name, seconds in times.items():
            start = time.perf_counter()
            next(works[name])
            seconds[i] = time.perf_counter() - start
    for name, t in times.items():
        print_row(name, *map(spread, (t, t / times[ours], times[ours] / t)))


def spread(values: np.ndarray) -> str:
    """Return the median and the range, as text."""
    return "{1:.3f} ({0:.3f} to {2:.3f})".format(*np.quantile(values, (0, 0.5, 1)))


def print_row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)
