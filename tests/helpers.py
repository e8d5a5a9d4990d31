"""What several tests need: MNIST files of any content, and a script's run."""

import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import common

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"]
LINE = re.compile(
    r"epoch (?P<epoch>\d+)  step (?P<step>\d+)  loss (?P<loss>\d+\.\d{4})  "
    r"train accuracy (?P<train>\d+\.\d\d)%  test accuracy (?P<test>\d+\.\d\d)%"
)


def load(name):
    return importlib.import_module(name)


def draw(n, seed):
    """Drawn digits as MNIST's files hold them: uint8 (n, 28, 28), and labels (n,)."""
    images, labels = zip(*common.draw_digits(n, seed))
    pixels = np.rint(255 * np.stack(images)).astype(np.uint8)
    return pixels.reshape(n, 28, 28), np.array(labels)


def idx(array):
    """The bytes of an IDX file, MNIST's format, that holds `array` as uint8."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(data_dir, train, test):
    """Write MNIST's four files, in torchvision's layout, from two pairs of arrays."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, (images, labels) in (("train", train), ("t10k", test)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))


def leaves(tree):
    """Copies of the arrays of a pytree."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def arrays(dataset):
    """All images and all labels of a list of pairs."""
    return common.numpy_collate(dataset)


class Step(NamedTuple):
    """A call of sgd_update or train_step."""

    before: list[np.ndarray]  # the parameters or the state that went in
    x: np.ndarray
    y: np.ndarray
    rest: tuple  # the learning rate in stage 1, the dropout key in stage 3


class Run(NamedTuple):
    accuracy: float  # what main returned
    lines: list[str]  # of stdout
    log: list[dict[str, str]]  # the lines of evaluations, see LINE
    evaluated: list[list[np.ndarray]]  # parameters or state at each evaluation
    state: Any  # the last one of them
    options: list[str]
    steps: tuple[Step, ...] = ()


@contextlib.contextmanager
def record(script):
    """Yield a list that the training steps of a script are added to, as they happen."""
    name = "sgd_update" if script.__name__ == "mlp_numpy_api" else "train_step"
    real, steps = getattr(script, name), []

    def step(state, x, y, *rest):
        steps.append(Step(leaves(state), x, y, rest))
        return real(state, x, y, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, name, step)
        yield steps


def run(script, data_dir, *options):
    """Call the main of a script, given as a module."""
    name = "accuracy" if script.__name__ == "mlp_numpy_api" else "eval_model"
    real, states, evaluated = getattr(script, name), [], []

    def evaluate(state, loader):
        states.append(state)
        evaluated.append(leaves(state))
        return real(state, loader)

    options = list(map(str, options))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(script, name, evaluate)
        accuracy = script.main(["--data-dir", str(data_dir), *options])
    lines = out.getvalue().splitlines()
    log = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    return Run(accuracy, lines, log, evaluated, states[-1], options)
