"""Stages 2 and 3: stop at any time, resume exactly; and nothing is lost if that fails."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import serialization
from helpers import STAGE_2, TWENTY_STEPS, equal, run


@pytest.fixture
def checkpoint(flax_script, whole_run, checkpoints, tmp_path):
    """A copy of the checkpoint of a whole run."""
    whole_run(flax_script)
    path = tmp_path / "checkpoint"
    path.write_bytes((checkpoints / flax_script.__name__).read_bytes())
    return path


def read(path):
    return serialization.msgpack_restore(path.read_bytes())


# Resuming.


def test_stopped_and_resumed_equals_never_stopped(
    flax_script, checkpoint, whole_run, small_mnist, tmp_path
):
    """In the middle of an epoch and at its end; the file byte for byte."""
    path = tmp_path / "new directory" / "parts"
    options = [*TWENTY_STEPS, "--checkpoint", path]
    for last in (3, 10, 14):
        run(flax_script, small_mnist, *options, "--max-steps", last, "--eval-every", 4)
    rest, whole = run(flax_script, small_mnist, *options), whole_run(flax_script)
    assert rest.lines[3] == "resuming after step 14"
    assert rest.log == whole.log[-1:]
    assert equal(rest.state, whole.state)
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_finished_run_only_evaluates_and_more_epochs_extend_it(
    flax_script, checkpoint, whole_run, small_mnist
):
    options = [*TWENTY_STEPS, "--checkpoint", checkpoint]
    before = checkpoint.read_bytes()
    again = run(flax_script, small_mnist, *options)
    assert again.log == []
    assert again.lines[-1] == whole_run(flax_script).lines[-1]
    assert checkpoint.read_bytes() == before
    longer = run(flax_script, small_mnist, *options, "--epochs", 3)
    assert [line["step"] for line in longer.log] == ["30"]


# What is not a checkpoint of the same run is refused, and stays as it is.


def test_checkpoint_of_another_run(flax_script, checkpoint, small_mnist):
    before = checkpoint.read_bytes()
    assert read(checkpoint)["run"] == {
        "script": f"{flax_script.__name__}.py",
        "data": "MNIST",
        "number of training images": 650,
        "number of parameters": 669_706 if flax_script is STAGE_2 else 671_754,
        "seed": 3,
        "random number generator": "threefry2x32",
        "batch size": 64,
        "learning rate": 0.01,
    }
    options = [*TWENTY_STEPS, "--seed", 1, "--checkpoint", checkpoint]
    message = f"^error: {checkpoint} is from another run: its seed is 3, not 1$"
    with pytest.raises(SystemExit, match=message):
        run(flax_script, small_mnist, *options)
    assert checkpoint.read_bytes() == before


def test_no_checkpoint_at_all(flax_script, whole_run, checkpoint, tmp_path):
    contents = [b"", b"holiday photos", b"\x01", b"\xa3abc"]
    contents += [checkpoint.read_bytes()[:1_000_000]]
    for value in (
        {"params": np.zeros(3)},
        {"run": {}, "state": {"params": np.zeros(3)}},
        {"run": 3, "state": {}},
    ):
        contents.append(serialization.to_bytes(value))
    state = whole_run(flax_script).state
    for content in contents:
        checkpoint.write_bytes(content)
        message = f"^error: {checkpoint} is not a checkpoint of this script: [^\n]*$"
        with pytest.raises(SystemExit, match=message):
            flax_script.load_checkpoint(checkpoint, {"seed": 0}, state)
        assert checkpoint.read_bytes() == content
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is not .*directory"):
        flax_script.load_checkpoint(tmp_path, {"seed": 0}, state)


# Whatever happens while saving, the file is whole.


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_disk_is_full(flax_script, method, tmp_path, monkeypatch):
    """The earlier checkpoint is as it was, and nothing else is left."""
    path = tmp_path / "a"
    flax_script.save_checkpoint(path, {}, {"step": 1})
    before, write = path.read_bytes(), Path.write_bytes

    def fail(self, content=None):
        if method == "write_bytes":
            write(self, content[:10])  # as far as it goes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, method, fail)
    reason = os.strerror(errno.ENOSPC)
    message = f"^error: cannot save the checkpoint {path}: .*{reason}"
    with pytest.raises(SystemExit, match=message):
        flax_script.save_checkpoint(path, {}, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_run_saves_the_same_file_meanwhile(flax_script, tmp_path, monkeypatch):
    path, replace = tmp_path / "a", Path.replace

    def another_run_comes_first(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        flax_script.save_checkpoint(path, {}, {"step": 2})
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", another_run_comes_first)
    flax_script.save_checkpoint(path, {}, {"step": 1})
    assert read(path)["state"]["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_followed(flax_script, tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for step in (1, 2):
        flax_script.save_checkpoint(link, {}, {"step": step})
        assert link.is_symlink()
        assert read(target)["state"]["step"] == step


def start(script, path, data_dir):
    """Start a run of 480 steps, 4 an epoch, saved every 3."""
    options = "--epochs 120 --batch-size 160 --eval-every 3 --checkpoint".split()
    command = [sys.executable, script.__file__, "--data-dir", data_dir, *options, path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


@pytest.mark.slow
def test_killed_at_random_moments(flax_script, small_mnist, tmp_path):
    rng, path = random.Random(0), tmp_path / "killed"
    whole, _ = start(flax_script, tmp_path / "whole", small_mnist).communicate()
    for _ in range(20):
        before = path.read_bytes() if path.exists() else b""
        process = start(flax_script, path, small_mnist)
        while not path.exists() or path.read_bytes() == before:
            if process.poll() is not None:  # it has got to its end
                break
            time.sleep(0.01)  # each run does something before it is killed
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.communicate()[1] == ""
    stdout, _ = start(flax_script, path, small_mnist).communicate()
    assert "resuming after step " in stdout
    assert stdout.splitlines()[-1] == whole.splitlines()[-1]
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
