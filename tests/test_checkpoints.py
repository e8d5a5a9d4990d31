"""Stop any time, resume exactly; and nothing is lost where that is impossible."""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, load

import common
from common import UserError

STAGES = ["mlp_flax", "mlp_flax_bn_dropout"]


@pytest.fixture(params=STAGES)
def script(request):
    return load(request.param)


def train(script, data_dir, **options):
    """Train, by default for 3 epochs of 10 updates; return the state's arrays."""
    options = {"epochs": 3, "batch_size": 64, **options}
    config = script.Config(data_dir=data_dir, **options)
    train_set, test_set, name = common.load_mnist(data_dir)
    train_set = common.first_examples(
        train_set, config.train_examples, config.batch_size
    )
    state = script.train(config, train_set, test_set, name)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def contents(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir())


@pytest.fixture
def saved(small_mnist, tmp_path):
    """A checkpoint directory with two epochs of stage 2."""
    directory = tmp_path / "saved"
    train(load("mlp_flax"), small_mnist, max_steps=20, checkpoint_dir=directory)
    assert steps(directory) == [10, 20]
    return directory


def test_stopped_and_resumed_equals_never_stopped(
    script, small_mnist, tmp_path, capsys
):
    whole = train(script, small_mnist)
    train(script, small_mnist, max_steps=10, checkpoint_dir=tmp_path / "a")
    train(script, small_mnist, max_steps=25, checkpoint_dir=tmp_path / "a")
    capsys.readouterr()
    resumed = train(script, small_mnist, checkpoint_dir=tmp_path / "a")
    assert f"resuming from step 20 in {tmp_path / 'a'}\n" in capsys.readouterr().out
    assert equal(whole, resumed)
    assert steps(tmp_path / "a") == [20, 30]


def test_finished_run_only_evaluates(script, small_mnist, tmp_path, capsys):
    options = {"data_dir": small_mnist, "epochs": 2, "batch_size": 64}
    config = script.Config(**options, checkpoint_dir=tmp_path / "a")
    script.main(config)
    *_, epoch, final = capsys.readouterr().out.splitlines()
    before = contents(tmp_path / "a")
    script.main(config)
    *_, resuming, again = capsys.readouterr().out.splitlines()
    assert epoch.startswith("epoch 2")
    assert resuming.startswith("resuming from step 20")
    assert again == final
    assert contents(tmp_path / "a") == before


def test_more_epochs_go_on_along_the_longer_schedule(
    script, small_mnist, tmp_path, monkeypatch
):
    train(script, small_mnist, epochs=2, checkpoint_dir=tmp_path / "a")
    longer = train(script, small_mnist, epochs=3, checkpoint_dir=tmp_path / "a")
    assert not equal(longer, train(script, small_mnist, epochs=3))

    # The same by hand: the first epochs on the short schedule, the last on the long one.
    create = script.create_train_state
    monkeypatch.setattr(
        script, "create_train_state", lambda key, rate, steps: create(key, rate, 20)
    )
    train(script, small_mnist, epochs=3, max_steps=20, checkpoint_dir=tmp_path / "b")
    monkeypatch.setattr(script, "create_train_state", create)
    assert equal(longer, train(script, small_mnist, checkpoint_dir=tmp_path / "b"))


def test_orbax_is_imported_for_checkpoints_only(small_mnist):
    program = (
        "import sys, mlp_flax as s; from pathlib import Path\n"
        "s.main(s.Config(data_dir=Path(sys.argv[1]), max_steps=1))\n"
        "assert not any(name.startswith('orbax') for name in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, small_mnist]
    subprocess.run(command, cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"batch_size": 32}, "batch size 64, not 32"),
        ({"learning_rate": 0.01}, "learning rate 0.001, not 0.01"),
        ({"train_examples": 600}, "training examples 640, not 600"),
        ({"epochs": 1}, "step 20 already, and the run is to end with step 10"),
        ({"stage": "mlp_flax_bn_dropout"}, "script mlp_flax, not mlp_flax_bn_dropout"),
        ({"layers": (64, 10)}, r"layer sizes \[512, 512, 10\], not \[64, 10\]"),
    ],
)
def test_checkpoint_of_another_run(options, reason, saved, small_mnist, monkeypatch):
    script = load(options.pop("stage", "mlp_flax"))
    monkeypatch.setattr(
        script, "LAYER_SIZES", options.pop("layers", script.LAYER_SIZES)
    )
    before = contents(saved)
    with pytest.raises(UserError, match=reason) as caught:
        train(script, small_mnist, checkpoint_dir=saved, **options)
    assert str(saved) in str(caught.value)
    assert contents(saved) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip(largest(step)),
        lambda step: os.truncate(largest(step), 100),
        lambda step: largest(step).unlink(),
        lambda step: (step / "run" / "metadata").write_text("{"),
        lambda step: (step / "state" / "_METADATA").unlink(),
    ],
    ids=["flipped", "truncated", "deleted", "run", "metadata"],
)
def test_damaged_checkpoint(damage, saved, small_mnist):
    damage(saved / "20")
    before = contents(saved)
    with pytest.raises(UserError, match=f"read step 20 .*; delete {saved / '20'}"):
        train(load("mlp_flax"), small_mnist, checkpoint_dir=saved)
    assert contents(saved) == before


def test_directory_of_something_else(small_mnist, tmp_path):
    (tmp_path / "holiday.txt").write_text("photos")
    with pytest.raises(UserError, match=f"{tmp_path}: it holds holiday.txt"):
        train(load("mlp_flax"), small_mnist, checkpoint_dir=tmp_path)
    with pytest.raises(UserError, match="holiday.txt: .*exists"):
        train(load("mlp_flax"), small_mnist, checkpoint_dir=tmp_path / "holiday.txt")
    assert contents(tmp_path) == {tmp_path / "holiday.txt": b"photos"}


def test_directory_is_not_writable(saved, small_mnist, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{saved}: Permission denied; name another"):
        train(load("mlp_flax"), small_mnist, checkpoint_dir=saved)


@pytest.mark.parametrize("when", ["before", "while saving"])
def test_disk_is_full(when, saved, small_mnist, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(saved)
    if when == "before":
        usage = shutil.disk_usage(saved)._replace(free=1_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(UserError, match=f"{saved}: .*No space left on device; free"):
        train(load("mlp_flax"), small_mnist, checkpoint_dir=saved)
    assert contents(saved) == before


def test_diverged_state_is_not_saved(script, small_mnist, tmp_path):
    with pytest.raises(UserError, match="at step 10;"):
        train(
            script,
            small_mnist,
            learning_rate=1e30,
            eval_every=15,
            checkpoint_dir=tmp_path / "a",
        )
    assert steps(tmp_path / "a") == []


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_random_moments(name, kills, small_mnist, tmp_path):
    """60 epochs of 2 updates each, so that much of the time goes into saving."""
    script, directory = load(name), tmp_path / "a"
    options = {"epochs": 60, "batch_size": 320}
    whole = train(script, small_mnist, **options)
    command = [sys.executable, ROOT / f"{name}.py", "--data-dir", small_mnist]
    command += ["--epochs", "60", "--batch-size", "320", "--checkpoint-dir", directory]
    rng = random.Random(name)
    for _ in range(kills):
        complete = [p.name for p in directory.glob("*") if p.name.isdecimal()]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        begin = [process.stdout.readline() for _ in range(4)]
        if complete:
            last = max(map(int, complete))
            assert begin[3] == f"resuming from step {last} in {directory}\n"
        while not complete and not list(directory.glob("[0-9]*[0-9]")):
            assert process.poll() is None
            time.sleep(0.01)  # the first run is killed after its first checkpoint
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        assert "error" not in process.communicate()[1]
    assert equal(whole, train(script, small_mnist, checkpoint_dir=directory, **options))
    assert steps(directory) == [118, 120]


@pytest.mark.parametrize("name", STAGES)
def test_readme_snippet(name, small_mnist, tmp_path, monkeypatch, capsys):
    script = load(name)
    train(script, small_mnist, checkpoint_dir=tmp_path / "checkpoints")
    shutil.copytree(small_mnist, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    if name == "mlp_flax_bn_dropout":  # the README says what to change
        snippet = snippet.replace("mlp_flax", name)
        snippet = snippet.replace(
            '{"params": state["params"]}, image',
            '{"params": state["params"], "batch_stats": state["batch_stats"]}, '
            "image, train=False",
        )
    capsys.readouterr()
    exec(snippet, {})  # noqa: S102 - as it stands in the README
    digits = common.load_mnist(small_mnist)[1]
    assert re.fullmatch(r"predicted \d, is (\d)\n", capsys.readouterr().out)[1] == str(
        digits.labels[0]
    )
