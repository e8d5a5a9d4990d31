"""What holds for all three scripts: log, options, keys, and what goes wrong."""

import math
import operator
import re
import runpy
import signal
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from helpers import (
    LINE,
    STAGE_1,
    STAGE_2,
    STAGE_3,
    TWENTY_STEPS,
    equal,
    error_of,
    import_file,
    run,
)

import common
from common import JAXRandomSampler, NumpyLoader, numpy_collate


def predict(script, state, x):
    """The classes of all images in one call, whatever the loaders do."""
    if script is STAGE_1:
        return np.asarray(script.batched_forward(state, x)).argmax(axis=1)
    return np.asarray(script.apply_model(state, x))


@pytest.fixture
def use_data(monkeypatch):
    """A function that gives a script other data than MNIST."""

    def use(script, train_set, test_set):
        data = train_set, test_set, "mine"
        monkeypatch.setattr(script, "load_mnist", lambda data_dir: data)

    return use


# What a run prints and returns.


def test_log_of_an_untrained_network_with_the_defaults(script, small_mnist):
    as_it_is = import_file(script.__file__, "as_it_is")
    result = run(as_it_is, small_mnist, "--max-steps", 0)
    parameters, batch_size, rates = {
        STAGE_1: ("669,706", 32, "0.3 to 0.1"),
        STAGE_2: ("669,706", 32, "0.001 to 1e-05"),
        STAGE_3: ("671,754", 128, "0.002 to 1e-05"),
    }[script]
    assert result.lines[0] == (
        f"run: MNIST, 650 training images, {parameters} parameters, epochs 5, "
        f"batch size {batch_size}, seed 0, learning rate {rates}"
        f"{', dropout (0.3, 0.4)' if script is STAGE_3 else ''}"
    )
    assert result.lines[1] == f"device: {jax.devices()[0].device_kind}"
    assert result.log == []
    final = f"final test accuracy: {result.accuracy:.2%} (MNIST)"
    assert result.lines[-1] == final


def test_log(script, whole_run):
    result = whole_run(script)
    final_rate = {STAGE_1: "0.00333", STAGE_2: "0.0001", STAGE_3: "5e-05"}[script]
    assert f"seed 3, learning rate 0.01 to {final_rate}" in result.lines[0]
    evaluations = [(line["epoch"], line["step"]) for line in result.log]
    assert evaluations == [("1", "7"), ("2", "14"), ("2", "20")]
    losses = [step.loss for step in result.steps]
    for line, since in zip(result.log, (losses[:7], losses[7:14], losses[14:])):
        assert float(line["loss"]) == pytest.approx(np.mean(since), abs=1e-4)


def test_log_comes_at_once(script, whole_run):
    """Where it is buffered, as in a file: the line of step 7 is there in the eighth."""
    assert "step 7 " in whole_run(script).steps[7].printed


def test_accuracies(script, whole_run, small_mnist):
    result = whole_run(script)
    train, test = (
        (predict(script, result.state, x) == y).mean()
        for x, y in map(numpy_collate, common.load_mnist(small_mnist)[:2])
    )
    assert train != test
    assert result.log[-1]["train"] == f"{100 * train:.2f}"
    assert result.log[-1]["test"] == f"{100 * test:.2f}"
    assert type(result.accuracy) is float
    assert result.accuracy == test
    assert result.lines[-1] == f"final test accuracy: {100 * test:.2f}% (MNIST)"


@pytest.mark.parametrize("drop_last", [False, True])
def test_accuracy_is_a_fraction_of_the_examples_seen(script, whole_run, drop_last):
    """All images get one class: the first 100 examples are wrong, the last 13 right."""
    state, image = whole_run(script).state, np.zeros(784, np.float32)
    guess = int(predict(script, state, image[None])[0])
    dataset = [(image, (guess + 1) % 10)] * 100 + [(image, guess)] * 13
    evaluate = script.accuracy if script is STAGE_1 else script.eval_model
    loader = NumpyLoader(dataset, batch_size=10, drop_last=drop_last)
    expected = 10 / 110 if drop_last else 13 / 113
    assert evaluate(state, loader) == pytest.approx(expected)


# The seed decides everything, and each use of randomness has a key of its own.


def test_keys(script, whole_run, small_mnist):
    """Parameters, order of the images, dropout: in this order in all three scripts."""
    n = 3 if script is STAGE_3 else 2
    init_key, shuffle_key, *dropout_key = jax.random.split(jax.random.key(3), n)
    steps = whole_run(script).steps
    if script is STAGE_1:
        create = partial(script.init_network_params, script.LAYER_SIZES)
    else:
        create = partial(script.create_train_state, learning_rate=1e-3, total_steps=20)
        assert all(step.rest == tuple(dropout_key) for step in steps)
    assert equal(steps[0].before, create(init_key))
    assert not equal(steps[0].before, create(shuffle_key))
    sampler = JAXRandomSampler(range(650), shuffle_key)
    epochs = [list(sampler), list(sampler)]
    order = [*epochs[0][:640], *epochs[1][:640]]  # whole batches only
    images, labels = numpy_collate(common.load_mnist(small_mnist)[0])
    assert equal([step.x for step in steps], np.split(images[order], 20))
    assert equal([step.y for step in steps], np.split(labels[order], 20))


def test_training_changes_every_leaf(script, whole_run):
    first, *_, last = whole_run(script).steps
    assert not any(map(np.array_equal, first.before, last.before))


def test_evaluating_saving_and_stopping_early_change_nothing(
    script, whole_run, small_mnist
):
    """The same state after step 14, however often it is evaluated on the way."""
    options = ["--eval-every", 1, "--max-steps", 14]
    often, whole = run(script, small_mnist, *TWENTY_STEPS, *options), whole_run(script)
    assert len(often.log) == 14
    assert equal(often.state, whole.steps[14].before)
    for line, expected in ((often.log[6], whole.log[0]), (often.log[13], whole.log[1])):
        assert (line["train"], line["test"]) == (expected["train"], expected["test"])


# What the options do.


def test_first_train_examples_in_batches(script, small_mnist):
    """In batches of one size, evaluated once an epoch."""
    options = [*TWENTY_STEPS, "--train-examples", 640, "--max-steps", 21]
    result = run(script, small_mnist, *options, record=True)
    assert "640 training images" in result.lines[0]
    evaluations = [(line["epoch"], line["step"]) for line in result.log]
    assert evaluations == [("1", "10"), ("2", "20")]
    first = {image.tobytes() for image, _ in common.load_mnist(small_mnist)[0][:640]}
    for epoch in (result.steps[:10], result.steps[10:]):
        assert {image.tobytes() for step in epoch for image in step.x} == first


def test_no_epochs(script, use_data, whole_run, small_mnist):
    """The initial state; and without --train-examples, the data is not sliced."""

    class OnDisk(list):
        def __getitem__(self, i):
            return super().__getitem__(operator.index(i))

    train_set, test_set, _ = common.load_mnist(small_mnist)
    use_data(script, OnDisk(train_set), OnDisk(test_set))
    result = run(script, small_mnist, *TWENTY_STEPS, "--epochs", 0)
    assert result.lines[-1].endswith("(mine)")
    assert result.log == []
    assert equal(result.state, whole_run(script).steps[0].before)


def test_help_shows_the_defaults(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    data_dir = Path(common.__file__).parent / "data"
    defaults = {"--data-dir": data_dir, "--epochs": 5, "--seed": 0, "--max-steps": None}
    for option, default in defaults.items():
        default = re.escape(str(default))
        assert re.search(rf"{option} [A-Z_]+ [^()]+ \(default: {default}\)", text)
    assert ("--checkpoint" in text) == (script is not STAGE_1)


@pytest.mark.parametrize(
    "option",
    [
        "--epochs=-1",
        "--epochs=2.5",
        "--batch-size=-1",
        "--learning-rate=fast",
        "--seed=-1",
        "--max-steps=-1",
        "--train-examples=-1",
        "--eval-every=-1",
    ],
)
def test_wrong_option(script, option, capsys):
    """Exit status 2, and argparse's message with the option."""
    with pytest.raises(SystemExit, match="^2$"):
        script.main([option])
    name, _, value = option.partition("=")
    message = capsys.readouterr().err
    assert f"error: argument {name}: " in message
    assert value in message


def test_constants_may_be_changed_from_outside(script, small_mnist, monkeypatch):
    """As from a notebook: 784 * 20 + 20 + 20 * 10 + 10 parameters."""
    monkeypatch.setattr(script, "LAYER_SIZES", (784, 20, 10))
    parameters = 15_910
    if script is STAGE_3:
        monkeypatch.setattr(script, "DROPOUT_RATES", (0.0,))
        parameters += 2 * 20  # scale and bias of a BatchNorm
    result = run(script, small_mnist, "--max-steps", 0)
    assert f"{parameters:,} parameters" in result.lines[0]
    leaves = jax.tree.leaves(result.state if script is STAGE_1 else result.state.params)
    assert sum(leaf.size for leaf in leaves) == parameters
    if script is STAGE_3:  # without dropout, its key has no effect
        x, y = numpy_collate(common.load_mnist(small_mnist)[0][:9])
        losses = set()
        for seed in (0, 1):
            state = jax.tree.map(jnp.copy, result.state)
            _, loss = script.train_step(state, x, y, jax.random.key(seed))
            losses.add(float(loss))
        assert len(losses) == 1


def test_run_as_a_program(script, small_mnist, monkeypatch, capsys):
    """As by Jupyter's %run, where a signal handler that stays would kill the kernel."""
    argv = [script.__file__, "--data-dir", str(small_mnist), "--max-steps", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    before = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(script.__file__, run_name="__main__")
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.splitlines()[-1].endswith("% (MNIST)")


def test_scripts_import_no_other_file_of_the_project(script):
    text = Path(script.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    files = {path.stem for path in Path(script.__file__).parent.glob("*.py")}
    assert imported & files == {"common"}


# What goes wrong, and what the user gets.


def error_of_running(script, data_dir, capsys, *options):
    """The line that ends the program, and the steps evaluated until then."""
    argv = ["--data-dir", str(data_dir), *map(str, options)]
    message = error_of(script.main, argv)
    out = capsys.readouterr().out
    assert "final" not in out
    return message, [match["step"] for match in LINE.finditer(out)]


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size=651"],
        ["--batch-size=9", "--train-examples=8"],
        ["--train-examples=0"],
    ],
)
def test_batch_larger_than_the_training_set(script, options, small_mnist, capsys):
    message, _ = error_of_running(script, small_mnist, capsys, *options)
    assert "--batch-size" in message


@pytest.mark.parametrize("label", [10, -100])
def test_rare_label_outside_the_classes(
    flax_script, label, whole_run, use_data, small_mnist, tmp_path, capsys
):
    """One, seen in step 9, so that the second evaluation finds it, in step 14.

    Stage 1 ignores such an image, as one_hot says.
    """
    bad = whole_run(flax_script).steps[8].x[0]
    train_set, test_set, _ = common.load_mnist(small_mnist)
    train_set = [(x, label if np.array_equal(x, bad) else y) for x, y in train_set]
    use_data(flax_script, train_set, test_set)
    path = tmp_path / "saved"
    options = [*TWENTY_STEPS, "--eval-every", 7, "--checkpoint", path]
    message, log = error_of_running(flax_script, small_mnist, capsys, *options)
    for part in ("nan", "step 14", "--learning-rate", "labels"):
        assert part in message
    assert log == ["7"]
    assert serialization.msgpack_restore(path.read_bytes())["state"]["step"] == 7


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_loss_that_is_not_finite(script, loss, small_mnist, monkeypatch, capsys):
    """Once, in step 3; the loss of the step that is evaluated is finite."""
    losses = iter(jnp.array([1, 1, loss, 1]))
    name = "sgd_update" if script is STAGE_1 else "train_step"
    monkeypatch.setattr(script, name, lambda state, *_: (state, next(losses)))
    options = [*TWENTY_STEPS, "--eval-every", 4]
    message, log = error_of_running(script, small_mnist, capsys, *options)
    for part in (str(loss), "step 4", "--learning-rate"):
        assert part in message
    assert log == []


def test_labels_of_shape_n_by_1_are_not_evaluated_in_silence(
    script, use_data, small_mnist
):
    """An error, or an accuracy that nobody believes."""
    sets = common.load_mnist(small_mnist)[:2]
    use_data(script, *([(x, np.array([y])) for x, y in pairs] for pairs in sets))
    try:
        accuracy = run(script, small_mnist, "--max-steps", 0).accuracy
    except (TypeError, ValueError):
        return
    assert accuracy > 2


def test_optimizer_state_may_hold_infinity_and_a_key(
    flax_script, small_mnist, monkeypatch
):
    """Only the loss is tested: some optimizers start with a best loss of infinity."""
    extra = optax.GradientTransformation(
        lambda params: {"best": jnp.array(jnp.inf), "key": jax.random.key(0)},
        lambda updates, state, params=None: (updates, state),
    )
    create_train_state = flax_script.create_train_state

    def create_with_extra(*args):
        state = create_train_state(*args)
        tx = optax.chain(state.tx, extra)
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    monkeypatch.setattr(flax_script, "create_train_state", create_with_extra)
    result = run(flax_script, small_mnist, *TWENTY_STEPS, "--max-steps", 1)
    assert len(result.log) == 1
