"""What holds for all three scripts: log, options, seeds, errors."""

import math
import re
import runpy
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from helpers import ROOT, SCRIPTS, STAGE_1, STAGE_3, equal, load, run

import common
from common import ArrayDataset, DataError, FlattenAndCast, NumpyLoader

SHORT = ["--batch-size", 64, "--epochs", 2]  # 20 steps on small_mnist


def predicted(script, state, x):
    """The classes of all images in one call, whatever the loaders do."""
    if script.__name__ == STAGE_1:
        return np.asarray(script.batched_forward(state, x)).argmax(axis=1)
    return np.asarray(script.apply_model(state, x))


# What a run prints.


def test_log(script, small_mnist):
    """Each number of each line is what it says: compare it with one from elsewhere."""
    options = ["--batch-size", 100, "--epochs", 2, "--train-examples", 450]
    result = run(script, small_mnist, *options, "--eval-every", 3)
    train, test, _ = common.load_mnist(small_mnist)
    parameters = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    if script.__name__ == STAGE_3:
        parameters += 4 * 512  # scale and bias of two BatchNorms
    assert result.lines[:3] == [
        "data: MNIST, 450 training and 300 test images",
        f"device: {jax.devices()[0].device_kind}",
        f"parameters: {parameters:,}",
    ]
    assert [(line["epoch"], line["step"]) for line in result.log] == [
        ("1", "3"),
        ("2", "6"),
        ("2", "8"),
    ]
    assert len(result.lines) == 3 + 3 + 1

    x, y = FlattenAndCast()(train.images[:450]), train.labels[:450]
    last = result.log[-1]
    right = predicted(script, result.state, x) == y
    assert last["train"] == f"{100 * right.mean():.2f}"
    right = (
        predicted(script, result.state, FlattenAndCast()(test.images)) == test.labels
    )
    assert last["test"] == f"{100 * right.mean():.2f}"
    assert last["train"] != last["test"]
    assert result.accuracy == right.mean()
    assert isinstance(result.accuracy, float)
    assert result.lines[-1] == f"final test accuracy: {last['test']}% (MNIST)"

    for line in result.log:  # the loss is of that step's batch, before its update
        step = result.steps[int(line["step"]) - 1]
        loss = step.loss
        if script.__name__ == STAGE_1:
            params = list(zip(step.before[::2], step.before[1::2]))
            logits = script.batched_forward(params, step.x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, step.y)
            loss = loss.mean()
        assert float(line["loss"]) == pytest.approx(float(loss), abs=1e-4)
    assert len({line["loss"] for line in result.log}) == 3


def test_evaluation_once_an_epoch_by_default(script, small_mnist):
    log = run(script, small_mnist, *SHORT).log
    assert [(line["epoch"], line["step"]) for line in log] == [("1", "10"), ("2", "20")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_accuracy_counts_a_smaller_last_batch_rightly(name):
    script, key = load(name), jax.random.key(0)
    digits = common.draw_digits(103, seed=0)
    if name == STAGE_1:
        state, evaluate = (
            script.init_network_params(script.LAYER_SIZES, key),
            "accuracy",
        )
    else:
        keys = [key, key] if name == STAGE_3 else [key]
        state, evaluate = script.create_train_state(*keys, 1e-3, 10), "eval_model"
    # All images get one class: the first 100 examples wrong, the last 3 right.
    images = digits.images[:1].repeat(103, axis=0)
    guess = predicted(script, state, FlattenAndCast()(images[:2]))[0]
    labels = np.where(np.arange(103) < 100, (guess + 1) % 10, guess)
    dataset = ArrayDataset(images, labels, FlattenAndCast())
    for batch_size in (10, 100, 200):
        loader = NumpyLoader(dataset, batch_size=batch_size)
        assert getattr(script, evaluate)(state, loader) == pytest.approx(3 / 103)


# What the options do, and that they do nothing else.


def test_defaults(script):
    """The article's data, epochs and batch sizes, and data beside the scripts."""
    args = script.make_parser().parse_args([])
    assert args.data_dir == ROOT / "data"
    assert (args.epochs, args.seed) == (5, 0)
    assert args.batch_size == (128 if script.__name__ == STAGE_3 else 32)
    assert args.max_steps == math.inf
    assert args.train_examples is args.eval_every is None


def test_help_has_a_text_for_each_option(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert script.__doc__.partition("\n")[0] in text
    for action in script.make_parser()._actions:
        assert action.help.partition(" ")[0] in text
    assert "(default: 5)" in text


def test_seed_decides_all_that_is_random(script, small_mnist):
    a, b, c = (run(script, small_mnist, *SHORT, "--seed", s) for s in (0, 0, 1))
    assert equal(a.state, b.state)
    assert not any(
        np.array_equal(x, y)
        for x, y in zip(a.steps[0].before, c.steps[0].before)
        if np.unique(x).size
        > 2  # neither biases, which are zero, nor scales and counts
    )
    for same, other in zip(a.steps, b.steps, strict=True):
        assert np.array_equal(same.x, other.x)
    assert not any(np.array_equal(s.y, o.y) for s, o in zip(a.steps, c.steps))
    if script.__name__ == STAGE_3:
        keys = [jax.random.key_data(run.steps[0].rest[0]).tolist() for run in (a, b, c)]
        assert keys[0] == keys[1] != keys[2]


def test_each_use_of_randomness_has_a_key_of_its_own(script, small_mnist, monkeypatch):
    keys = []

    def spy(name):
        real = getattr(script, name)

        def wrapper(*args):
            keys.extend(a for a in args if isinstance(a, jax.Array))
            return real(*args)

        monkeypatch.setattr(script, name, wrapper)

    class Loader(NumpyLoader):
        def __init__(self, dataset, rng_key=None, *args, **kwargs):
            keys.extend([] if rng_key is None else [rng_key])
            super().__init__(dataset, rng_key, *args, **kwargs)

    monkeypatch.setattr(script, "NumpyLoader", Loader)
    if script.__name__ == STAGE_1:
        params = run(script, small_mnist, "--max-steps", 0).state
        (shuffle_key,) = keys
        for key in (shuffle_key, jax.random.key(0)):
            other = script.init_network_params(script.LAYER_SIZES, key)
            assert not np.allclose(params[0][0], other[0][0])
    else:
        spy("create_train_state")
        (step,) = run(script, small_mnist, "--max-steps", 1).steps
        keys.append(jax.random.key(0))
        numbers = [tuple(jax.random.key_data(key).tolist()) for key in keys]
        assert len(keys) == (4 if script.__name__ == STAGE_3 else 3)
        assert len(set(numbers)) == len(keys)
        if script.__name__ == STAGE_3:  # shuffling, parameters, dropout, their origin
            assert tuple(jax.random.key_data(step.rest[0]).tolist()) == numbers[2]


def test_epochs_differ_in_order_and_cover_the_set(script, small_mnist):
    steps = run(script, small_mnist, *SHORT).steps
    first, second = (
        np.concatenate([step.x for step in steps[i : i + 10]]) for i in (0, 10)
    )
    assert not np.array_equal(first, second)
    everything = FlattenAndCast()(common.load_mnist(small_mnist)[0].images)
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch, axis=0), np.sort(everything, axis=0))


def test_evaluation_changes_nothing(script, small_mnist):
    reference = run(script, small_mnist, *SHORT)
    often = run(script, small_mnist, *SHORT, "--eval-every", 1)
    assert len(often.log) == 20
    assert equal(reference.state, often.state)
    assert often.lines[-2:] == reference.lines[-2:]


def test_max_steps_ends_the_same_run_early(script, small_mnist):
    whole = run(script, small_mnist, *SHORT, "--eval-every", 13)
    short = run(script, small_mnist, *SHORT, "--max-steps", 13)
    assert len(short.steps) == 13
    assert short.log[-1:] == whole.log[:1]
    longer = run(script, small_mnist, *SHORT, "--max-steps", 1000)
    assert equal(longer.state, whole.state)


def test_max_steps_0_evaluates_the_untrained_network(script, small_mnist):
    result = run(script, small_mnist, "--max-steps", 0)
    assert result.log == result.steps == []
    assert result.accuracy < 0.3


def test_epochs_and_batch_size(script, small_mnist):
    steps = run(script, small_mnist, "--batch-size", 100, "--epochs", 3).steps
    assert [step.x.shape for step in steps] == [(100, 784)] * 18
    assert [step.y.shape for step in steps] == [(100,)] * 18


@pytest.mark.parametrize(
    ("examples", "batch_size", "count"), [(450, 50, 450), (641, 64, 640)]
)
def test_train_examples_are_the_first(script, examples, batch_size, count, small_mnist):
    options = ["--train-examples", examples, "--batch-size", batch_size, "--epochs", 1]
    result = run(script, small_mnist, *options)
    assert result.lines[0] == f"data: MNIST, {count} training and 300 test images"
    seen = np.concatenate([step.x for step in result.steps])
    first = FlattenAndCast()(common.load_mnist(small_mnist)[0].images[:count])
    assert np.array_equal(np.sort(seen, axis=0), np.sort(first, axis=0))


# What goes wrong, and what the user gets.


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", 0],
        ["--epochs", 2.5],
        ["--epochs", 99999999999],
        ["--batch-size", 0],
        ["--batch-size", 641],
        ["--batch-size", 9, "--train-examples", 8],
        ["--learning-rate", 0],
        ["--learning-rate", -0.1],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--train-examples", 0],
        ["--seed", -1],
        ["--seed", 2**70],
        ["--eval-every", 0],
        ["--max-steps", -1],
        ["--batch-size", "many"],
    ],
    ids=lambda options: f"{options[0]}={options[1]}",
)
def test_wrong_option(script, options, small_mnist, capsys):
    with pytest.raises(SystemExit) as caught:
        run(script, small_mnist, *options)
    assert caught.value.code == 2
    usage, message = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert usage.startswith("usage: ")
    assert f"error: argument {options[0]}: " in message
    assert str(options[1]) in message


def test_wrong_option_before_any_data_is_touched(script, tmp_path):
    with pytest.raises(SystemExit):
        run(script, tmp_path / "none", "--epochs", 0)
    assert not (tmp_path / "none").exists()


def test_largest_numbers_work(script, small_mnist):
    most = 2**31 - 1
    options = ["--epochs", most, "--eval-every", most, "--seed", most]
    options += ["--batch-size", 64, "--max-steps", 2]
    assert len(run(script, small_mnist, *options).steps) == 2
    options = ["--epochs", 1, "--max-steps", most, "--train-examples", most]
    assert len(run(script, small_mnist, *options, "--batch-size", 64).steps) == 10


@pytest.mark.parametrize("step", [1, 5])
def test_parameters_or_loss_that_are_not_finite(script, step, small_mnist, capsys):
    options = [*SHORT, "--learning-rate", "1e30", "--eval-every", step]
    with pytest.raises(SystemExit) as caught:
        script.main(["--data-dir", str(small_mnist), *map(str, options)])
    assert caught.value.code == f"error: diverged at step {step}; lower --learning-rate"
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["loss", "parameters"])
def test_one_number_that_is_not_finite(script, part, small_mnist, monkeypatch):
    if script.__name__ == STAGE_1:
        name = "loss" if part == "loss" else "sgd_update"
    else:
        name = "train_step"
    real = getattr(script, name)

    def spoil(leaf):
        return leaf.at[(-1,) * leaf.ndim].set(np.nan) if leaf.ndim else leaf

    def wrapper(*args):
        result = real(*args)
        if name == "loss":
            return result * np.inf
        if name == "sgd_update":
            return [*result[:-1], (result[-1][0], spoil(result[-1][1]))]
        state, loss = result
        if part == "loss":
            return state, loss * np.inf
        return state.replace(params=jax.tree.map(spoil, state.params)), loss

    monkeypatch.setattr(script, name, wrapper)
    with pytest.raises(SystemExit, match="diverged at step 2;"):
        run(script, small_mnist, *SHORT, "--eval-every", 2)


def test_lines_come_at_once_through_a_pipe(script, small_mnist, monkeypatch):
    flushed, real = [], print

    def spy(*args, **kwargs):
        if args[0].startswith("epoch"):
            flushed.append(kwargs.get("flush"))
        real(*args, **kwargs)

    monkeypatch.setattr("builtins.print", spy)
    run(script, small_mnist, *SHORT)
    assert flushed == [True, True]


def test_control_c(small_mnist):
    options = ["--data-dir", small_mnist, "--epochs", "1000000"]
    # Tests in a shell's background ignore Ctrl-C, and the script would inherit that.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, ROOT / "mlp_flax.py", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, ours)
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr == ""


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("fault", "code"),
    [(DataError("no data"), "error: no data"), (KeyboardInterrupt(), 130)],
)
def test_guard_at_the_end_of_the_script(name, fault, code, monkeypatch):
    def fail(data_dir):
        raise fault

    monkeypatch.setattr(common, "load_mnist", fail)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert caught.value.code == code


def test_scripts_stand_alone():
    """Each imports common.py and no other file of the project."""
    project = {path.stem for path in ROOT.glob("*.py")}
    for name in [*SCRIPTS, "common"]:
        text = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
        assert imported & project <= {"common"}


@pytest.mark.parametrize(
    ("file", "most"),
    [
        ("common.py", 200),
        ("mlp_numpy_api.py", 175),
        ("mlp_flax.py", 200),
        ("mlp_flax_bn_dropout.py", 230),
        ("README.md", 230),
    ],
)
def test_files_stay_small(file, most):
    assert (ROOT / file).read_text().count("\n") <= most


def test_neighbours_differ_in_what_the_stage_teaches():
    diff = subprocess.run(
        ["git", "diff", "--no-index", "--numstat", *(f"{s}.py" for s in SCRIPTS[1:])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    added, removed, *_ = diff.split()
    assert int(added) + int(removed) <= 80
