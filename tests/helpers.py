"""What several tests need: MNIST files of any content, and the run of a script."""

import contextlib
import io
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import common
import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api

STAGE_1, STAGE_2, STAGE_3 = mlp_numpy_api, mlp_flax, mlp_flax_bn_dropout
TWENTY_STEPS = "--epochs 2 --batch-size 64 --seed 3 --learning-rate 0.01".split()
LINE = re.compile(
    r"epoch (?P<epoch>\d+)  step (?P<step>\d+)  loss (?P<loss>\d+\.\d{4})  "
    r"train accuracy (?P<train>\d+\.\d\d)%  test accuracy (?P<test>\d+\.\d\d)%"
)


def draw(n, seed):
    """Drawn digits as MNIST's files hold them: uint8 (n, 28, 28), and labels (n,)."""
    images, labels = common.numpy_collate(common.draw_digits(n, seed))
    return np.rint(255 * images).astype(np.uint8).reshape(n, 28, 28), labels


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


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


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
    state: Any  # the parameters or the state that was evaluated last
    steps: list[Step]  # if the run was recorded


def run(script, data_dir, *options, record=False):
    """Call the main of a script, given as a module."""
    states, steps = [], []

    def evaluate(state, loader):
        states.append(state)
        return real_evaluate(state, loader)

    def step(state, x, y, *rest):
        steps.append(Step(leaves(state), x, y, rest))
        return real_step(state, x, y, *rest)

    is_stage_1 = script is STAGE_1
    evaluate_name = "accuracy" if is_stage_1 else "eval_model"
    step_name = "sgd_update" if is_stage_1 else "train_step"
    real_evaluate = getattr(script, evaluate_name)
    real_step = getattr(script, step_name)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(script, evaluate_name, evaluate)
        if record:
            patch.setattr(script, step_name, step)
        accuracy = script.main(["--data-dir", str(data_dir), *map(str, options)])
    lines = out.getvalue().splitlines()
    log = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    return Run(accuracy, lines, log, states[-1], steps)
