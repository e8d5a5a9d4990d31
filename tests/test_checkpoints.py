"""Stages 2 and 3: stop any time, resume exactly; and nothing is lost where that fails."""

import errno
import functools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from helpers import ROOT, SCRIPTS, STAGE_2, STAGE_3, equal, leaves, load, run

import common

RUN = ["--batch-size", 64, "--epochs", 3]  # 30 steps on small_mnist


@functools.cache
def never_stopped(script, data_dir):
    return run(script, data_dir, *RUN, watch=False)


@pytest.fixture
def saved(small_mnist, tmp_path):
    """A checkpoint of stage 2 after 20 of 30 steps."""
    path = tmp_path / "saved"
    run(load(STAGE_2), small_mnist, *RUN, "--max-steps", 20, "--checkpoint", path)
    return path


def test_stopped_and_resumed_equals_never_stopped(flax_script, small_mnist, tmp_path):
    """In the middle of an epoch, before and at its end; the file byte for byte."""
    plain = never_stopped(flax_script, small_mnist)
    whole, parts = tmp_path / "whole", tmp_path / "new directory" / "parts"
    assert equal(
        plain.state, run(flax_script, small_mnist, *RUN, "--checkpoint", whole).state
    )
    for last in (3, 10, 14):
        options = [*RUN, "--max-steps", last, "--eval-every", 4, "--checkpoint", parts]
        run(flax_script, small_mnist, *options)
    rest = run(flax_script, small_mnist, *RUN, "--checkpoint", parts)
    assert rest.lines[3] == f"going on from step 14 in {parts}"
    assert len(rest.steps) == 16
    assert equal(plain.state, rest.state)
    assert rest.log == plain.log[1:]
    assert parts.read_bytes() == whole.read_bytes()
    assert [path.name for path in parts.parent.iterdir()] == ["parts"]


def test_every_evaluation_saves(flax_script, small_mnist, tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    save = flax_script.save_checkpoint

    def spy(*args):
        save(*args)
        seen.append(serialization.msgpack_restore(path.read_bytes())["state"]["step"])

    monkeypatch.setattr(flax_script, "save_checkpoint", spy)
    options = [*RUN, "--eval-every", 8, "--max-steps", 20]
    run(flax_script, small_mnist, *options, "--checkpoint", path)
    assert seen == [8, 16, 20]


def test_every_leaf_of_the_state_is_saved_and_loaded(flax_script, tmp_path):
    keys = [jax.random.key(i) for i in range(2 if "bn" in flax_script.__name__ else 1)]
    zeros = flax_script.create_train_state(*keys, 1e-3, 10)
    numbered = jax.tree.unflatten(
        jax.tree.structure(zeros),
        [np.full_like(leaf, i + 1) for i, leaf in enumerate(jax.tree.leaves(zeros))],
    )
    flax_script.save_checkpoint(tmp_path / "a", {"seed": 0}, numbered)
    loaded = flax_script.load_checkpoint(tmp_path / "a", {"seed": 0}, zeros)
    assert equal(loaded, numbered)
    assert [a.dtype for a in leaves(loaded)] == [a.dtype for a in leaves(numbered)]
    assert type(loaded) is type(zeros)


def test_finished_run_only_evaluates(flax_script, small_mnist, tmp_path):
    path = tmp_path / "a"
    first = run(flax_script, small_mnist, *RUN, "--checkpoint", path)
    before = path.read_bytes()
    again = run(flax_script, small_mnist, *RUN, "--checkpoint", path)
    assert again.steps == []
    assert again.lines[-1] == first.lines[-1]
    assert path.read_bytes() == before


def test_more_epochs_go_on_along_the_longer_schedule(
    flax_script, small_mnist, tmp_path
):
    path = tmp_path / "a"
    run(flax_script, small_mnist, *RUN[:2], "--epochs", 2, "--checkpoint", path)
    longer = run(flax_script, small_mnist, *RUN, "--checkpoint", path)
    assert len(longer.steps) == 10
    # Adam's last step, of one third of the way down, is larger than on the short way.
    assert not equal(longer.state, never_stopped(flax_script, small_mnist).state)


@pytest.mark.parametrize(
    ("option", "value", "name", "saved_value"),
    [
        ("--seed", 1, "seed", 0),
        ("--batch-size", 32, "batch_size", 64),
        ("--learning-rate", 0.01, "learning_rate", 0.002),
        ("--train-examples", 600, "images", 640),
    ],
)
def test_checkpoint_of_another_run(
    option, value, name, saved_value, flax_script, small_mnist, tmp_path
):
    path, options = tmp_path / "a", [*RUN, "--learning-rate", 0.002, "--max-steps", 1]
    run(flax_script, small_mnist, *options, "--checkpoint", path)
    before = path.read_bytes()
    options += [option, value, "--checkpoint", path]
    with pytest.raises(SystemExit) as caught:
        run(flax_script, small_mnist, *options)
    assert caught.value.code == (
        f"error: {path} is not a checkpoint of this run: "
        f"that one has {{{name!r}: {saved_value}}}"
    )
    assert path.read_bytes() == before


def test_checkpoint_of_another_script_model_or_data(
    saved, small_mnist, tmp_path, monkeypatch
):
    before = saved.read_bytes()
    options = [*RUN, "--checkpoint", saved]
    with pytest.raises(SystemExit, match=r"'script': 'mlp_flax.py'"):
        run(load(STAGE_3), small_mnist, *options, "--learning-rate", 1e-3)
    script = load(STAGE_2)
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_mnist", lambda _: (*digits, "drawn digits"))
        digits = common.load_mnist(small_mnist)[:2]
        with pytest.raises(SystemExit, match="'data': 'MNIST'"):
            run(script, small_mnist, *options)
    monkeypatch.setattr(
        script, "MLP", lambda: load(STAGE_3).nn.Dense(10)
    )  # some other model
    with pytest.raises(SystemExit, match="'parameters': 669706"):
        run(script, small_mnist, *options)
    assert saved.read_bytes() == before


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
def test_no_checkpoint_at_all(content, flax_script, small_mnist, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        run(flax_script, small_mnist, "--checkpoint", path)
    message = caught.value.code
    assert message.startswith(f"error: {path} is not a checkpoint of this run: ")
    assert "\n" not in message
    assert path.read_bytes() == content


def test_half_a_checkpoint(saved, small_mnist):
    half = saved.read_bytes()[:1_000_000]
    saved.write_bytes(half)
    with pytest.raises(SystemExit, match="is not a checkpoint of this run"):
        run(load(STAGE_2), small_mnist, *RUN, "--checkpoint", saved)
    assert saved.read_bytes() == half


def test_checkpoint_is_a_directory(flax_script, small_mnist, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is not .*directory"):
        run(flax_script, small_mnist, "--checkpoint", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_disk_is_full(when, flax_script, small_mnist, tmp_path, monkeypatch):
    path = tmp_path / "a"
    options = [*RUN, "--checkpoint", path]
    run(flax_script, small_mnist, *options, "--max-steps", 5)
    before, real = path.read_bytes(), Path.write_bytes

    def fail(self, content=None):
        if when == "writing":
            real(self, content[:1000])  # as far as it goes
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = {"writing": "write_bytes", "replacing": "replace"}[when]
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail)
        with pytest.raises(SystemExit) as caught:
            run(flax_script, small_mnist, *options)
    assert caught.value.code.startswith("error: cannot save the checkpoint: ")
    assert os.strerror(errno.ENOSPC) in caught.value.code
    assert str(path) in caught.value.code
    assert path.read_bytes() == before
    whole = never_stopped(flax_script, small_mnist)  # the next run goes on from there
    assert equal(whole.state, run(flax_script, small_mnist, *options).state)


def test_diverged_state_is_not_saved(flax_script, small_mnist, tmp_path):
    path = tmp_path / "a"
    options = [*RUN, "--learning-rate", 1e30, "--checkpoint", path]
    with pytest.raises(SystemExit, match="diverged at step 10;"):
        run(flax_script, small_mnist, *options)
    assert list(tmp_path.iterdir()) == []


def test_without_the_option_nothing_is_written(flax_script, small_mnist, tmp_path):
    before = sorted(ROOT.iterdir())
    run(flax_script, small_mnist, "--max-steps", 1)
    assert sorted(ROOT.iterdir()) == before


def start(name, data_dir, path):
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
    wholes = {name: start(name, small_mnist, tmp_path / name) for name in SCRIPTS[1:]}
    last_lines = [p.communicate()[0].splitlines()[-1] for p in wholes.values()]
    paths = {name: tmp_path / f"{name}, killed" for name in wholes}
    for _ in range(20):
        before = {p: p.read_bytes() if p.exists() else b"" for p in paths.values()}
        processes = [start(name, small_mnist, path) for name, path in paths.items()]
        for process, path in zip(processes, paths.values()):
            while not path.exists() or path.read_bytes() == before[path]:
                if process.poll() is not None:  # it has got to its end
                    break
                time.sleep(0.01)  # each run does something before it is killed
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            assert process.communicate()[1] == ""
    for (name, path), last_line in zip(paths.items(), last_lines):
        stdout, _ = start(name, small_mnist, path).communicate()
        assert "going on from step " in stdout
        assert stdout.splitlines()[-1] == last_line
        assert path.read_bytes() == (tmp_path / name).read_bytes()
