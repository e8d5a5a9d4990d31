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
from helpers import ROOT, SCRIPTS, equal, leaves, load, record, run

import common

RUN = ["--epochs", 2, "--batch-size", 64]  # 20 steps on small_mnist
STAGE_2, STAGE_3 = SCRIPTS[1:]


def saved_by(result):
    """The checkpoint that a run was told to write."""
    return Path(result.options[result.options.index("--checkpoint") + 1])


@pytest.fixture
def checkpoint(flax_script, whole_run, tmp_path):
    """A copy of the checkpoint of a whole run."""
    path = tmp_path / "checkpoint"
    path.write_bytes(saved_by(whole_run(flax_script)).read_bytes())
    return path


def test_stopped_and_resumed_equals_never_stopped(
    flax_script, whole_run, small_mnist, tmp_path
):
    """In the middle of an epoch, before its end and at it; the file byte for byte."""
    path = tmp_path / "new directory" / "parts"
    for last in (3, 9, 10, 14):
        options = [*RUN, "--max-steps", last, "--eval-every", 4, "--checkpoint", path]
        run(flax_script, small_mnist, *options)
    with record(flax_script) as steps:
        rest = run(flax_script, small_mnist, *RUN, "--checkpoint", path)
    whole = whole_run(flax_script)
    assert rest.lines[3] == "resuming after step 14"
    assert len(steps) == 6
    assert equal(rest.state, whole.state)
    assert rest.log[-1] == whole.log[-1]
    assert path.read_bytes() == saved_by(whole).read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["parts"]


def test_saving_changes_nothing(flax_script, whole_run, small_mnist):
    assert equal(
        run(flax_script, small_mnist, *RUN).state, whole_run(flax_script).state
    )


def test_every_evaluation_saves(flax_script, small_mnist, tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    save = flax_script.save_checkpoint

    def spy(*args):
        save(*args)
        seen.append(serialization.msgpack_restore(path.read_bytes())["state"]["step"])

    monkeypatch.setattr(flax_script, "save_checkpoint", spy)
    options = ["--eval-every", 3, "--max-steps", 8, "--checkpoint", path]
    run(flax_script, small_mnist, *RUN, *options)
    assert seen == [3, 6, 8]


def test_every_leaf_of_the_state_is_saved_and_loaded(flax_script, tmp_path):
    state = flax_script.create_train_state(jax.random.key(0), 1e-3, 10)
    numbered = jax.tree.unflatten(
        jax.tree.structure(state),
        [np.full_like(leaf, i + 1) for i, leaf in enumerate(jax.tree.leaves(state))],
    )
    flax_script.save_checkpoint(tmp_path / "a", {"seed": 0}, numbered)
    loaded = flax_script.load_checkpoint(tmp_path / "a", {"seed": 0}, state)
    assert equal(loaded, numbered)
    assert [a.dtype for a in leaves(loaded)] == [a.dtype for a in leaves(numbered)]
    assert type(loaded) is type(state)


def test_finished_run_only_evaluates(flax_script, checkpoint, whole_run, small_mnist):
    before = checkpoint.read_bytes()
    with record(flax_script) as steps:
        again = run(flax_script, small_mnist, *RUN, "--checkpoint", checkpoint)
    assert steps == []
    assert again.lines[-1] == whole_run(flax_script).lines[-1]
    assert checkpoint.read_bytes() == before


def test_more_epochs_extend_the_run(flax_script, checkpoint, small_mnist):
    options = [*RUN, "--epochs", 3, "--checkpoint", checkpoint]
    with record(flax_script) as steps:
        run(flax_script, small_mnist, *options)
    assert len(steps) == 10


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--seed", 1], "its seed is 0, not 1"),
        (["--batch-size", 32], "its batch size is 64, not 32"),
        (["--learning-rate", 0.5], r"its learning rate is 0\.00\d, not 0\.5"),
        (["--train-examples", 600], "its number of training images is 640, not 600"),
    ],
)
def test_checkpoint_of_another_run(
    flax_script, options, difference, checkpoint, small_mnist
):
    before = checkpoint.read_bytes()
    message = f"^error: {checkpoint} is from another run: {difference}$"
    with pytest.raises(SystemExit, match=message):
        run(flax_script, small_mnist, *RUN, *options, "--checkpoint", checkpoint)
    assert checkpoint.read_bytes() == before


def test_checkpoint_of_another_script_data_model_or_generator(
    whole_run, small_mnist, monkeypatch
):
    script = load(STAGE_2)
    path = saved_by(whole_run(script))
    before = path.read_bytes()
    options = [*RUN, "--checkpoint", path]
    with pytest.raises(SystemExit, match="its script is mlp_flax.py, not mlp_flax_bn"):
        run(load(STAGE_3), small_mnist, *options, "--learning-rate", 1e-3)

    with jax.default_prng_impl("rbg"):
        message = "its random number generator is threefry2x32, not rbg"
        with pytest.raises(SystemExit, match=message):
            run(script, small_mnist, *options)

    with monkeypatch.context() as patch:
        train_set, test_set, _ = common.load_mnist(small_mnist)
        patch.setattr(script, "load_mnist", lambda _: (train_set, test_set, "others"))
        with pytest.raises(SystemExit, match="its data is MNIST, not others"):
            run(script, small_mnist, *options)

    monkeypatch.setattr(script, "MLP", lambda: script.nn.Dense(10))
    with pytest.raises(
        SystemExit, match="its number of parameters is 669706, not 7850"
    ):
        run(script, small_mnist, *options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"holiday photos",
        b"\x01",
        b"\xa3abc",
        serialization.to_bytes({"params": np.zeros(3)}),
        serialization.to_bytes({"run": {}, "state": {"params": np.zeros(3)}}),
        serialization.to_bytes({"run": 3, "state": {}}),
    ],
)
def test_no_checkpoint_at_all(flax_script, content, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(content)
    state = flax_script.create_train_state(jax.random.key(0), 1e-3, 10)
    message = f"^error: {path} is not a checkpoint of this script: [^\n]*$"
    with pytest.raises(SystemExit, match=message):
        flax_script.load_checkpoint(path, {"seed": 0}, state)
    assert path.read_bytes() == content


def test_half_a_checkpoint(flax_script, checkpoint, small_mnist):
    half = checkpoint.read_bytes()[:1_000_000]
    checkpoint.write_bytes(half)
    with pytest.raises(SystemExit, match="is not a checkpoint of this script"):
        run(flax_script, small_mnist, *RUN, "--checkpoint", checkpoint)
    assert checkpoint.read_bytes() == half


def test_checkpoint_is_a_directory(flax_script, small_mnist, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is not .*directory"):
        run(flax_script, small_mnist, "--checkpoint", tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    message = (
        f"^error: cannot save the checkpoint {path}: .*{os.strerror(errno.ENOSPC)}"
    )
    with pytest.raises(SystemExit, match=message):
        flax_script.save_checkpoint(path, {}, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_several_runs_with_one_file(flax_script, tmp_path):
    """Each saves in its own time, and whoever reads finds a whole file."""
    path = tmp_path / "a"
    states = [{"weights": np.full(100_000, i)} for i in range(3)]
    failures = []

    def save(state):
        try:
            for _ in range(20):
                flax_script.save_checkpoint(path, {}, state)
        except BaseException as failure:  # noqa: BLE001 - SystemExit, too
            failures.append(failure)

    flax_script.save_checkpoint(path, {}, states[0])
    threads = [threading.Thread(target=save, args=[state]) for state in states]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        weights = serialization.msgpack_restore(path.read_bytes())["state"]["weights"]
        assert len(set(weights.tolist())) == 1
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_followed(flax_script, tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for step in (1, 2):
        flax_script.save_checkpoint(link, {}, {"step": step})
        assert link.is_symlink()
        assert (
            serialization.msgpack_restore(target.read_bytes())["state"]["step"] == step
        )


def test_without_the_option_nothing_is_written(flax_script, small_mnist):
    before = sorted(ROOT.iterdir())
    run(flax_script, small_mnist, "--max-steps", 1)
    assert sorted(ROOT.iterdir()) == before


def start(name, path, data_dir):
    options = ["--epochs", "120", "--batch-size", "160", "--eval-every", "3"]
    command = [sys.executable, ROOT / f"{name}.py", "--data-dir", data_dir, *options]
    return subprocess.Popen(
        [*command, "--checkpoint", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_random_moments(small_mnist, tmp_path):
    """480 steps, 4 an epoch, saved every 3, so that much time goes into saving."""
    rng = random.Random(0)
    names = (STAGE_2, STAGE_3)
    wholes = [start(name, tmp_path / name, small_mnist) for name in names]
    last_lines = [process.communicate()[0].splitlines()[-1] for process in wholes]
    paths = [tmp_path / f"{name}, killed" for name in names]
    for _ in range(20):
        before = [path.read_bytes() if path.exists() else b"" for path in paths]
        processes = [start(*pair, small_mnist) for pair in zip(names, paths)]
        for process, path, old in zip(processes, paths, before):
            while not path.exists() or path.read_bytes() == old:
                if process.poll() is not None:  # it has got to its end
                    break
                time.sleep(0.01)  # each run does something before it is killed
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            assert process.communicate()[1] == ""
    for name, path, last_line in zip(names, paths, last_lines):
        stdout, _ = start(name, path, small_mnist).communicate()
        assert "resuming after step " in stdout
        assert stdout.splitlines()[-1] == last_line
        assert path.read_bytes() == (tmp_path / name).read_bytes()
