"""Stages 2 and 3: stop at any time, resume exactly; and nothing is lost if that fails."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from helpers import STAGE_2, TWENTY_STEPS, equal, leaves, run


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
    options, before = (
        [*TWENTY_STEPS, "--checkpoint", checkpoint],
        checkpoint.read_bytes(),
    )
    again = run(flax_script, small_mnist, *options)
    assert again.log == []
    assert again.lines[-1] == whole_run(flax_script).lines[-1]
    assert checkpoint.read_bytes() == before
    longer = run(flax_script, small_mnist, *options, "--epochs", 3)
    assert [line["step"] for line in longer.log] == ["30"]


def test_every_leaf_of_the_state_is_saved_and_loaded(flax_script, whole_run, tmp_path):
    state = whole_run(flax_script).state
    numbered = jax.tree.unflatten(
        jax.tree.structure(state),
        [np.full_like(leaf, i + 1) for i, leaf in enumerate(jax.tree.leaves(state))],
    )
    flax_script.save_checkpoint(tmp_path / "a", {"seed": 0}, numbered)
    loaded = flax_script.load_checkpoint(tmp_path / "a", {"seed": 0}, state)
    assert equal(loaded, numbered)
    assert [a.dtype for a in leaves(loaded)] == [a.dtype for a in leaves(numbered)]
    assert type(loaded) is type(state)


# What is not a checkpoint of the same run is refused, and stays as it is.


def test_checkpoint_of_another_run(flax_script, checkpoint, whole_run, small_mnist):
    before = checkpoint.read_bytes()
    description = {
        "script": f"{flax_script.__name__}.py",
        "data": "MNIST",
        "number of training images": 650,
        "number of parameters": 669_706 if flax_script is STAGE_2 else 671_754,
        "seed": 3,
        "random number generator": "threefry2x32",
        "batch size": 64,
        "learning rate": 0.01,
    }
    assert read(checkpoint)["run"] == description
    error = f"^error: {checkpoint} is from another run: its "
    for name, value in description.items():
        with pytest.raises(SystemExit, match=f"{error}{name} is {value}, not new$"):
            state, changed = whole_run(flax_script).state, {**description, name: "new"}
            flax_script.load_checkpoint(checkpoint, changed, state)
    with pytest.raises(SystemExit, match=f"{error}seed is 3, not 1$"):
        options = [*TWENTY_STEPS, "--seed", 1, "--checkpoint", checkpoint]
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


def test_several_runs_with_one_file(flax_script, tmp_path):
    """Each saves in its own time, and whoever reads finds a whole file."""
    path, finished = tmp_path / "a", []

    def save(i):
        for _ in range(20):
            flax_script.save_checkpoint(path, {}, {"weights": np.full(100_000, i)})
        finished.append(i)

    flax_script.save_checkpoint(path, {}, {"weights": np.zeros(100_000)})
    threads = [threading.Thread(target=save, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(set(read(path)["state"]["weights"].tolist())) == 1
    assert sorted(finished) == [0, 1, 2]
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
