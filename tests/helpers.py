"""What several tests need: MNIST files of any content, and a script's whole run."""

import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
STAGE_1, STAGE_2, STAGE_3 = "mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"
SCRIPTS = [STAGE_1, STAGE_2, STAGE_3]
LINE = re.compile(
    r"epoch (?P<epoch>\d+)  step (?P<step>\d+)  loss (?P<loss>\d+\.\d{4})  "
    r"train accuracy (?P<train>\d+\.\d\d)%  test accuracy (?P<test>\d+\.\d\d)%"
)


def load(name):
    return importlib.import_module(name)


def idx(array):
    """The bytes of an IDX file, MNIST's format, that holds `array` as uint8."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(data_dir, train, test):
    """Write two datasets of common.draw_digits in torchvision's layout."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, digits in (("train", train), ("t10k", test)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(digits.images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(digits.labels))


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


class Step(NamedTuple):
    """One call of sgd_update or train_step: what went in and what came out."""

    before: list  # leaves of the parameters or the state
    x: np.ndarray
    y: np.ndarray
    rest: tuple  # the learning rate in stage 1, the dropout key in stage 3
    loss: float | None  # None in stage 1


class Run(NamedTuple):
    accuracy: float  # what main returned
    lines: list[str]  # of stdout
    log: list[dict[str, str]]  # the lines of evaluations, see LINE
    steps: list[Step]
    state: object  # the last parameters or train state


def run(script, data_dir, *options, watch=True):
    """Call the main of a script, given as a module; watch its evaluations and steps.

    Each step keeps a copy of the whole state, so do not watch those of a long run.
    """
    step_name, eval_name = "train_step", "eval_model"
    if script.__name__ == STAGE_1:
        step_name, eval_name = "sgd_update", "accuracy"
    real_step, real_eval = getattr(script, step_name), getattr(script, eval_name)
    steps, states, out = [], [], io.StringIO()

    def step(state, x, y, *rest):
        before = leaves(state)  # copies, for train_step gives the state's memory away
        result = real_step(state, x, y, *rest)
        loss = None if script.__name__ == STAGE_1 else float(result[1])
        steps.append(Step(before, x, y, rest, loss))
        return result

    def evaluate(state, loader):
        states.append(state)
        return real_eval(state, loader)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        if watch:
            patch.setattr(script, step_name, step)
        patch.setattr(script, eval_name, evaluate)
        accuracy = script.main(["--data-dir", str(data_dir), *map(str, options)])
    lines = out.getvalue().splitlines()
    log = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    return Run(accuracy, lines, log, steps, states[-1])


class Squares:
    """A dataset that tells whether JAX computes in the process that reads it."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        from jax._src import xla_bridge

        return {"square": np.float32(i * i), "jax": len(xla_bridge._backends) > 0}
