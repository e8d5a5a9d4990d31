"""The recipes for many devices, steps and seeds at once, for bfloat16, and for NNX."""

import json
import os
import socket
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    LINE,
    STAGE_2,
    assert_close,
    assert_resumes,
    equal,
    leaves,
    run,
    start,
)

import common

FORTY_STEPS = ["--epochs", 4, "--batch-size", 64]  # as in the fixture `plain`


def losses(log):
    return [float(line["loss"]) for line in log]


def description(result):
    """The run's description, which its checkpoint holds."""
    return result.lines[0].removeprefix("run: ")


# devices


# A process: its number and a port, then options of mlp_flax.py. First, the processes
# have different data. Then each notes what main prints, and which rows of the first
# batch its devices get.
PROCESS = """
import contextlib, json, sys
import jax
index, port = map(int, sys.argv[1:3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import mlp_flax
real_step, real_apply, rows = mlp_flax.train_step, mlp_flax.apply_model, {}

def train_step(state, x, y):
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    for images, labels in zip(x.addressable_shards, y.addressable_shards):
        assert images.index[0] == labels.index[0]
        rows.setdefault(labels.index[0].start or 0, labels.data.tolist())
    return real_step(state, x, y)

def apply_model(state, x):
    assert [len(shard.data) for shard in x.addressable_shards] == [len(x) // 4] * 2
    return real_apply(state, x)

mlp_flax.train_step, mlp_flax.apply_model = train_step, apply_model
try:  # 640 images or 650 are 10 steps an epoch, so nothing else would stop this run
    mlp_flax.main([*sys.argv[3:], "--train-examples", str(640 + 10 * index)])
except SystemExit as error:
    print(error, file=sys.stderr)
with open(f"log{index}", "w") as log, contextlib.redirect_stdout(log):
    mlp_flax.main(sys.argv[3:])
with open(f"rows{index}", "w") as file:
    json.dump(rows, file)
"""


def run_two_processes(directory, *options):
    """Run mlp_flax.py in two processes with two devices each; return their stderr."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": os.environ["XLA_FLAGS"]
        + " --xla_force_host_platform_device_count=2",
        "NPROC": "8",  # XLA wants a core for each device
        "no_proxy": "localhost",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start("-c", PROCESS, i, port, *options, cwd=directory, env=environment)
        for i in range(2)
    ]
    try:
        stderr = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], stderr
    return stderr


def test_devices(recipe, plain, small_mnist, tmp_path):
    module = recipe("devices")
    options = ["--data-dir", small_mnist, *FORTY_STEPS, "--eval-every", 5]
    options += ["--max-steps", 10, "--checkpoint", "saved"]
    stderr = run_two_processes(tmp_path, *options)
    for text, images in zip(stderr, (640, 650), strict=True):
        message = "error: the processes do not agree on the run; here it is: "
        assert f"{message}MNIST, {images} training images" in text

    # Each device has rows of its own. Together, they are the batch.
    rows = {}
    for i in range(2):
        rows |= json.loads(Path(f"rows{i}").read_text())
    assert [len(labels) for labels in rows.values()] == [16] * 4
    labels = [label for first in sorted(rows, key=int) for label in rows[first]]
    assert labels == plain.steps[0].y.tolist()

    log = Path("log0").read_text()
    assert "\ndevice: 4 x " in log
    lines = [match.groupdict() for match in LINE.finditer(log)]
    assert losses(lines) == pytest.approx(losses(plain.log[:2]), abs=2e-4)
    assert Path("log1").read_text() == "", "both processes print"
    state = module.create_train_state(jax.random.key(0), 1e-3, 40)
    saved = module.load_checkpoint(Path("saved"), description(plain), state)
    assert_close(leaves(saved), plain.steps[10].before, 1e-3, 1e-5)


def test_devices_in_one_process(recipe, plain, small_mnist):
    """On the one device of most machines."""
    options = [*FORTY_STEPS, "--eval-every", 13]
    whole = assert_resumes(recipe("devices"), small_mnist, *options)
    assert_close(whole.state, plain.state, 1e-3, 1e-5)


def test_devices_with_a_batch_that_does_not_divide(recipe, small_mnist, monkeypatch):
    module = recipe("devices")
    monkeypatch.setattr(jax, "device_count", lambda: 5)
    message = "error: --batch-size is not a multiple of the 5 devices"
    with pytest.raises(SystemExit, match=message):
        run(module, small_mnist, "--batch-size", 64)

    # In an evaluation, 3 of 7 are classified correctly.
    pixels = np.eye(10, dtype=np.float32)[[0, 1, 2, 3, 4, 5, 6]]
    labels = np.int32([0, 1, 2, 0, 0, 0, 0])
    loader = common.NumpyLoader(list(zip(pixels, labels)), batch_size=7)
    state = module.TrainState.create(
        apply_fn=lambda variables, x: x, params={}, tx=optax.identity()
    )
    assert module.eval_model(state, loader) == 3 / 7


# scan


def test_scan(recipe, plain, small_mnist, monkeypatch):
    """38 steps, in calls that end at every 10th and every 15th."""
    module, calls = recipe("scan"), []
    train_steps = module.train_steps

    def spy(state, x, y):
        calls.append(len(x))
        return train_steps(state, x, y)

    monkeypatch.setattr(module, "train_steps", spy)
    monkeypatch.setattr(module, "STEPS_PER_CALL", 10)
    options = [*FORTY_STEPS, "--eval-every", 15, "--max-steps", 38]
    whole = assert_resumes(module, small_mnist, *options)
    assert calls == [10, 5, 5, 10, 8] + [5, 10, 8]  # the second run began at step 15
    assert_close(leaves(whole.state), plain.steps[38].before, 1e-3, 1e-5)
    each = [step.loss for step in plain.steps]
    means = [np.mean(each[:15]), np.mean(each[15:30]), np.mean(each[30:38])]
    assert losses(whole.log) == pytest.approx(means, abs=2e-4)


# bfloat16


def test_bfloat16(recipe, plain, small_mnist, batch):
    module = recipe("bfloat16")
    STAGE_2.save_checkpoint(Path("plain"), description(plain), plain.state)
    with pytest.raises(SystemExit, match="from another run"):
        run(module, small_mnist, *FORTY_STEPS, "--checkpoint", "plain")

    result = run(module, small_mnist, *FORTY_STEPS, "--eval-every", 5)
    assert {leaf.dtype.name for leaf in leaves(result.state.params)} == {"float32"}
    variables = {"params": result.state.params}
    logits, kept = module.MLP(module.LAYER_SIZES).apply(
        variables, batch[0], capture_intermediates=True
    )
    assert logits.dtype == jnp.float32
    for i in range(3):
        (output,) = kept["intermediates"][f"layers_{i}"]["__call__"]
        assert output.dtype == jnp.bfloat16
    assert losses(result.log) == pytest.approx(losses(plain.log), rel=0.05)


# nnx


def test_nnx(recipe, plain, small_mnist):
    """From the same parameters and on the same batches, it trains as Linen does."""
    module = recipe("nnx")
    assert_resumes(module, small_mnist, *FORTY_STEPS, "--eval-every", 13)
    state, other = (
        module.create_train_state(jax.random.key(seed), 1e-3, 40) for seed in (0, 1)
    )
    assert not equal(state.params, other.params)
    init_key, _ = jax.random.split(jax.random.key(0))
    linen = STAGE_2.create_train_state(init_key, 1e-3, 40)
    state = state.replace(params=linen.params)
    for step in plain.steps:
        state, loss = module.train_step(state, step.x, step.y)
        assert float(loss) == pytest.approx(step.loss, rel=1e-3)
    assert_close(state, plain.state, 1e-3, 1e-5)


# seeds


def test_seeds(recipe, small_mnist, monkeypatch):
    module = recipe("seeds")
    monkeypatch.setattr(module, "NUM_SEEDS", 2)
    options = [*FORTY_STEPS, "--eval-every", 13, "--seed", 3]
    both = assert_resumes(module, small_mnist, *options)
    assert "2 seeds at once" in both.lines[0]
    alone = run(STAGE_2, small_mnist, *FORTY_STEPS, "--seed", 4).state
    arrays = jax.device_get(both.state)
    first, second = (jax.tree.map(itemgetter(i), arrays) for i in range(2))
    assert_close(leaves(second), leaves(alone), 1e-3, 1e-5)
    assert not any(map(np.array_equal, leaves(first.params), leaves(second.params)))

    x, y = common.numpy_collate(common.load_mnist(small_mnist)[1])
    for accuracy, state in zip(both.accuracy, (first, second), strict=True):
        predicted = STAGE_2.apply_model(alone.replace(params=state.params), x)
        assert accuracy == pytest.approx((predicted == y).mean())
    a, b = both.accuracy
    mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
    assert both.lines[-2].endswith(
        f"test accuracy {mean:.2%} (standard deviation {deviation:.2%})"
    )
    assert both.lines[-1] == (
        f"final test accuracy: {mean:.2%} (MNIST), standard deviation {deviation:.2%}"
    )
