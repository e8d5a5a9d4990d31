"""What several tests need: data, a run of a script, a copy of it with recipes."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import common
import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api

ROOT = Path(__file__).parents[1]
STAGE_1, STAGE_2, STAGE_3 = mlp_numpy_api, mlp_flax, mlp_flax_bn_dropout
SMALL_LAYERS = (784, 128, 128, 10)  # trains faster than the scripts' own
TWENTY_STEPS = [  # on the 650 images of the fixture small_mnist, 10 an epoch
    "--epochs",
    "2",
    "--batch-size",
    "64",
    "--seed",
    "3",
    "--learning-rate",
    "0.01",
]
LINE = re.compile(
    r"epoch (?P<epoch>\d+)  step (?P<step>\d+)  loss (?P<loss>\d+\.\d{4})  "
    r"train accuracy (?P<train>\d+\.\d\d)%  test accuracy (?P<test>\d+\.\d\d)%"
)


# Data.


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
    for name, array in zip(common.MNIST_FILES, (*train, *test), strict=True):
        (raw / name).write_bytes(idx(array))


# Arrays.


def leaves(tree):
    """Copies of the arrays of a pytree."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# Runs.


class Step(NamedTuple):
    """A call of sgd_update or train_step."""

    before: list[np.ndarray]  # the parameters or the state that went in
    x: np.ndarray
    y: np.ndarray
    rest: tuple  # the learning rate in stage 1, the dropout key in stage 3
    loss: float
    printed: str  # what could be read of stdout before it


class Run(NamedTuple):
    state: Any  # what main returned: the state, in stage 1 the parameters,
    accuracy: float  # and the test accuracy
    lines: list[str]  # of stdout
    log: list[dict[str, str]]  # the lines of evaluations, see LINE
    steps: list[Step]  # if the run was recorded


def run(script, data_dir, *options, record=False):
    """Call the main of a script, given as a module.

    stdout goes to a real file, so that a line which is not flushed cannot be read yet.
    """
    name = "sgd_update" if hasattr(script, "sgd_update") else "train_step"
    real_step, steps = getattr(script, name), []

    def step(state, x, y, *rest):
        before, printed = leaves(state), Path(out.name).read_text()
        state, loss = real_step(state, x, y, *rest)
        steps.append(Step(before, x, y, rest, float(loss), printed))
        return state, loss

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.NamedTemporaryFile("w") as out,
        contextlib.redirect_stdout(out),
    ):
        if record:
            patch.setattr(script, name, step)
        argv = ["--data-dir", str(data_dir), *map(str, options)]
        state, accuracy = script.main(argv)
        out.flush()
        lines = Path(out.name).read_text().splitlines()
    log = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    return Run(state, accuracy, lines, log, steps)


def assert_resumes(script, data_dir, *options, record=False):
    """A run that is killed after its first save and resumed ends like a whole run.

    Returns the whole run. Its checkpoint is the file `whole` in the current directory.
    """
    whole_path, killed_path = Path("whole"), Path("killed")
    save = script.save_checkpoint

    def save_and_copy(path, *args):
        save(path, *args)
        if not killed_path.exists():
            # All files, because recipes/best.diff also saves whole.best, and that first.
            for file in Path().glob("whole*"):
                shutil.copy(file, file.name.replace("whole", "killed"))

    options = [*options, "--checkpoint"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_copy)
        whole = run(script, data_dir, *options, whole_path, record=record)
    killed = run(script, data_dir, *options, killed_path)
    evaluations, rest = (
        [line for line in result.lines if line.startswith("epoch ")]
        for result in (whole, killed)
    )
    assert rest == evaluations[1:], "it began anew"
    assert equal(killed.state, whole.state)
    assert killed_path.read_bytes() == whole_path.read_bytes()
    return whole


def error_of(function, *args):
    """The line that ends the program, with status 1, when a function is called."""
    with pytest.raises(SystemExit) as caught:
        function(*args)
    message = caught.value.code
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def start(*command, **options):
    """Start Python with a script and its options; stdout and stderr are pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, **pipes, **options)


def import_file(path, name):
    """Import a file as the module `name`, afresh if that was imported before."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(directory, *names):
    """Apply recipes to the copy of mlp_flax.py in `directory`, as README says."""
    for name in names:
        diff = ROOT / "recipes" / f"{name}.diff"
        with diff.open() as file:
            patch = ["patch", "-F0", "-p1", "--no-backup-if-mismatch"]
            done = subprocess.run(
                patch,
                cwd=directory,
                stdin=file,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, f"{name} does not apply: {done.stdout}"
