"""Stages 2 and 3: stop at any time, resume exactly, refuse what is of another run."""

import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from flax import serialization
from helpers import STAGE_2, STAGE_3, TWENTY_STEPS, equal, error_of, run, start


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
    """In the middle of an epoch; the file byte for byte."""
    path = tmp_path / "new directory" / "parts"
    options = [*TWENTY_STEPS, "--checkpoint", path]
    run(flax_script, small_mnist, *options, "--max-steps", 14)
    rest, whole = run(flax_script, small_mnist, *options), whole_run(flax_script)
    assert "resuming after step 14" in rest.lines
    assert rest.log == whole.log[-1:]
    assert equal(rest.state, whole.state)
    assert path.read_bytes() == checkpoint.read_bytes()
    assert list(path.parent.iterdir()) == [path]


def test_finished_run_only_evaluates(flax_script, checkpoint, whole_run, small_mnist):
    before = checkpoint.read_bytes()
    options = [*TWENTY_STEPS, "--checkpoint", checkpoint]
    again = run(flax_script, small_mnist, *options)
    assert again.log == []
    assert again.lines[-1] == whole_run(flax_script).lines[-1]
    assert checkpoint.read_bytes() == before


# What is not a checkpoint of the same run is refused, and stays as it is.


def test_description_is_the_line_that_is_printed(flax_script, checkpoint, whole_run):
    assert f"run: {read(checkpoint)['run']}" == whole_run(flax_script).lines[0]


def refusal(script, data_dir, path, capsys, *options):
    """The line that ends the program, and what is printed above it."""
    before = path.read_bytes()
    argv = [*TWENTY_STEPS, "--checkpoint", path, *options, "--data-dir", data_dir]
    message = error_of(script.main, [str(arg) for arg in argv])
    assert message.startswith(f"error: {path} is ")
    assert path.read_bytes() == before
    return message, capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "described"),
    [
        ("--epochs=3", "epochs 3"),
        ("--batch-size=65", "batch size 65"),
        ("--learning-rate=0.02", "learning rate 0.02"),
        ("--seed=4", "seed 4"),
        ("--train-examples=649", "649 training images"),
    ],
)
def test_checkpoint_of_another_run(
    flax_script, option, described, checkpoint, small_mnist, capsys
):
    message, out = refusal(flax_script, small_mnist, checkpoint, capsys, option)
    assert read(checkpoint)["run"] in message
    assert described in out


@pytest.mark.parametrize(
    ("script", "constant", "value"),
    [
        (STAGE_2, "LAYER_SIZES", (784, 20, 10)),
        (STAGE_2, "LEARNING_RATE_DECAY", 1 / 50),
        (STAGE_3, "LEARNING_RATE_DECAY", 1 / 50),
        (STAGE_3, "DROPOUT_RATES", (0.3, 0.5)),
    ],
)
def test_checkpoint_of_another_script(
    script, constant, value, whole_run, checkpoints, small_mnist, capsys, monkeypatch
):
    whole_run(script)
    monkeypatch.setattr(script, constant, value)
    path = checkpoints / script.__name__
    message, _ = refusal(script, small_mnist, path, capsys)
    assert read(path)["run"] in message


def test_checkpoint_of_a_run_on_other_data(
    flax_script, checkpoint, small_mnist, capsys, monkeypatch
):
    train_set, test_set, _ = flax_script.load_mnist(small_mnist)
    data = train_set, test_set, "my digits"
    monkeypatch.setattr(flax_script, "load_mnist", lambda data_dir: data)
    message, _ = refusal(flax_script, small_mnist, checkpoint, capsys)
    assert "MNIST" in message


def test_file_that_is_no_checkpoint(flax_script, whole_run, checkpoint):
    state, other = whole_run(flax_script).state, {"params": np.zeros(3)}
    description = read(checkpoint)["run"]
    for content in (
        b"holiday photos",
        b"\x01",
        checkpoint.read_bytes()[:1_000_000],
        serialization.to_bytes(other),
        serialization.to_bytes({"run": description, "state": other}),
    ):
        checkpoint.write_bytes(content)
        message = error_of(flax_script.load_checkpoint, checkpoint, description, state)
        assert message.startswith(f"error: {checkpoint} is not a checkpoint")
        assert checkpoint.read_bytes() == content


# Whatever happens while saving, the file is whole.


def test_disk_is_full(flax_script, tmp_path):
    """As it is when a file may have a thousand bytes and no more."""
    path = tmp_path / "saved"
    flax_script.save_checkpoint(path, "run", {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            flax_script.save_checkpoint(path, "run", {"step": np.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_save_the_same_file(flax_script, tmp_path):
    """None fails, and the file is whole at every moment."""
    path = tmp_path / "saved"

    def save(description):
        for _ in range(50):
            flax_script.save_checkpoint(path, description, {"x": np.zeros(100_000)})

    flax_script.save_checkpoint(path, "one", {})
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(save, description) for description in ("one", "two")]
        while not all(future.done() for future in futures):
            assert read(path)["run"] in ("one", "two")
    for future in futures:
        future.result()
    assert list(tmp_path.iterdir()) == [path]


def start_run(script, path, data_dir):
    """Start a run of 800 steps, 4 an epoch, saved every 3."""
    options = ["--epochs", 200, "--batch-size", 160, "--eval-every", 3]
    places = ["--data-dir", data_dir, "--checkpoint", path]
    return start(script.__file__, *options, *places)


@pytest.mark.slow
def test_killed_at_random_moments(flax_script, small_mnist, tmp_path):
    rng, path = random.Random(0), tmp_path / "killed"
    whole, _ = start_run(flax_script, tmp_path / "whole", small_mnist).communicate()
    for _ in range(20):
        before = path.read_bytes() if path.exists() else b""
        process = start_run(flax_script, path, small_mnist)
        # Each run saves something before it is killed, unless it gets to its end.
        while not path.exists() or path.read_bytes() == before:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    rest, _ = start_run(flax_script, path, small_mnist).communicate()
    assert "resuming after step " in rest
    assert rest.splitlines()[-1] == whole.splitlines()[-1]
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
