"""What holds for all three scripts: log, options, keys, and what goes wrong."""

import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers import STAGE_1, STAGE_2, STAGE_3, TWENTY_STEPS, equal, run

import common
from common import DataError, JAXRandomSampler, NumpyLoader, numpy_collate


def predict(script, state, x):
    """The classes of all images in one call, whatever the loaders do."""
    if script is STAGE_1:
        return np.asarray(script.batched_forward(state, x)).argmax(axis=1)
    return np.asarray(script.apply_model(state, x))


# What a run prints and returns.


def test_log(script, whole_run):
    parameters = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    if script is STAGE_3:
        parameters += 4 * 512  # scale and bias of two BatchNorms
    result = whole_run(script)
    assert result.lines[:3] == [
        "data: MNIST, 650 training and 300 test images",
        f"device: {jax.devices()[0].device_kind}",
        f"parameters: {parameters:,}",
    ]
    assert len(result.lines) == 3 + 3 + 1
    evaluations = [(line["epoch"], line["step"]) for line in result.log]
    assert evaluations == [("1", "7"), ("2", "14"), ("2", "20")]


def test_accuracies(script, whole_run, small_mnist):
    result = whole_run(script)
    for split, dataset in zip(("train", "test"), common.load_mnist(small_mnist)):
        x, y = numpy_collate(dataset)
        right = predict(script, result.state, x) == y
        assert result.log[-1][split] == f"{100 * right.mean():.2f}"
    assert result.log[-1]["train"] != result.log[-1]["test"]
    assert isinstance(result.accuracy, float)
    assert result.accuracy == right.mean()
    assert result.lines[-1] == f"final test accuracy: {100 * right.mean():.2f}% (MNIST)"


def test_accuracy_counts_a_smaller_last_batch_rightly(script, whole_run):
    """All images get one class: the first 100 examples are wrong, the last 3 right."""
    state, image = whole_run(script).state, np.zeros(784, np.float32)
    guess = int(predict(script, state, image[None])[0])
    dataset = [(image, (guess + 1) % 10)] * 100 + [(image, guess)] * 3
    evaluate = script.accuracy if script is STAGE_1 else script.eval_model
    loader = NumpyLoader(dataset, batch_size=10)
    assert evaluate(state, loader) == pytest.approx(3 / 103)


# The seed decides everything, and each use of randomness has a key of its own.


def test_keys(script, whole_run, small_mnist):
    """Parameters, order of the images, dropout: in this order in all three scripts."""
    n = 3 if script is STAGE_3 else 2
    params_key, shuffle_key, *dropout_key = jax.random.split(jax.random.key(3), n)
    steps = whole_run(script).steps
    if script is STAGE_1:
        expected = script.init_network_params(script.LAYER_SIZES, params_key)
    else:
        expected = script.create_train_state(params_key, 1e-3, 20)
        assert all(step.rest == tuple(dropout_key) for step in steps)
    assert equal(steps[0].before, expected)
    sampler = JAXRandomSampler(range(650), shuffle_key)
    order = [*list(sampler)[:640], *list(sampler)[:640]]  # two epochs of whole batches
    images, labels = numpy_collate(common.load_mnist(small_mnist)[0])
    assert equal([step.x for step in steps], np.split(images[order], 20))
    assert equal([step.y for step in steps], np.split(labels[order], 20))


def test_a_step_changes_every_leaf(script, whole_run):
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
    assert [often.log[6], often.log[13]] == whole.log[:2]


# What the options do.


def test_first_train_examples_in_batches(script, small_mnist):
    """In batches of one size, evaluated once an epoch."""
    options = [*TWENTY_STEPS, "--train-examples", 450]
    result = run(script, small_mnist, *options, record=True)
    assert result.lines[0] == "data: MNIST, 450 training and 300 test images"
    evaluations = [(line["epoch"], line["step"]) for line in result.log]
    assert evaluations == [("1", "7"), ("2", "14")]
    assert [step.x.shape for step in result.steps] == [(64, 784)] * 14
    first = {image.tobytes() for image, _ in common.load_mnist(small_mnist)[0][:450]}
    assert {image.tobytes() for step in result.steps for image in step.x} <= first


def test_defaults(script):
    args = script.make_parser().parse_args([])
    assert args.data_dir == Path(script.__file__).parent / "data"
    rates = {STAGE_1: 0.3, STAGE_2: 1e-3, STAGE_3: 2e-3}
    assert args.learning_rate == rates[script]
    assert args.batch_size == (128 if script is STAGE_3 else 32)
    assert (args.epochs, args.seed) == (5, 0)
    assert args.max_steps is args.train_examples is args.eval_every is None
    assert getattr(args, "checkpoint", None) is None


def test_help_is_for_people(script, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == (8 if script is STAGE_1 else 9)
    directory = Path(script.__file__).parent
    assert not re.search(rf"None|\binf\b|%|{re.escape(str(directory))}", text)


def test_home_directory_is_expanded(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = ["--data-dir=~/there"]
    if script is not STAGE_1:
        options += ["--checkpoint=~/there"]
    args = vars(script.make_parser().parse_args(options))
    paths = [value for value in args.values() if isinstance(value, Path)]
    assert paths == len(options) * [tmp_path / "there"]


# What goes wrong, and what the user gets.


WRONG_OPTIONS = """--epochs=0 --epochs=2.5 --epochs=99999999999 --batch-size=0 --batch-size=651
    --learning-rate=0 --learning-rate=nan --learning-rate=inf --train-examples=0 --seed=-1
    --seed=1180591620717411303424 --eval-every=0 --max-steps=-1""".split()
WRONG_OPTIONS += ["--batch-size=9 --train-examples=8"]
ALL = (STAGE_1, STAGE_2, STAGE_3)
WRONG_RUNS = [(script, options) for script in ALL for options in WRONG_OPTIONS]
WRONG_RUNS += [(STAGE_2, "--epochs=2147483647")]  # Optax counts steps in 32 bits
WRONG_RUNS += [(STAGE_3, "--epochs=2147483647")]
WRONG_RUNS += [(STAGE_3, "--batch-size=1")]  # a single image has no variance


@pytest.mark.parametrize(("script", "options"), WRONG_RUNS)
def test_wrong_option(script, options, small_mnist, capsys):
    """Exit status 2, and argparse's message with the option."""
    with pytest.raises(SystemExit, match="^2$"):
        run(script, small_mnist, *options.split())
    name, _, _ = options.partition("=")
    assert f"error: argument {name}: " in capsys.readouterr().err


DIVERGENCE = [(script, "weights") for script in ALL]
DIVERGENCE += [(STAGE_2, "loss"), (STAGE_3, "loss")]  # in stage 1, never the loss alone


@pytest.mark.parametrize(("script", "part"), DIVERGENCE)
def test_divergence(script, part, small_mnist, tmp_path, monkeypatch, capsys):
    """Not by a large number. Evaluations save, but not the one that finds it."""
    name = "sgd_update" if script is STAGE_1 else "train_step"
    real_step, steps = getattr(script, name), []

    def step(*args):
        new, structure = jax.tree.flatten(real_step(*args))
        steps.append(args)
        if len(steps) in (3, 6):
            value = 1e30 if len(steps) == 3 else jnp.inf
            if part == "loss":
                new[-1] = jnp.float32(value)
            else:  # in all three scripts, an array of parameters
                new[1] = new[1].at[-1].set(value)
        return jax.tree.unflatten(structure, new)

    monkeypatch.setattr(script, name, step)
    options = ["--data-dir", str(small_mnist), *TWENTY_STEPS, "--eval-every", "3"]
    path = tmp_path / "saved"
    if script is not STAGE_1:
        options += ["--checkpoint", str(path)]
    with pytest.raises(SystemExit) as caught:
        script.main(options)
    message = "error: diverged at step 6: .*--learning-rate.*labels"
    assert re.match(message, caught.value.code)
    evaluations = capsys.readouterr().out.splitlines()[3:]
    assert [line[:15] for line in evaluations] == ["epoch 1  step 3"]
    if script is not STAGE_1:
        assert serialization.msgpack_restore(path.read_bytes())["state"]["step"] == 3


def test_control_c(small_mnist, monkeypatch):
    """Also shows that a line of the log comes at once through a pipe.

    Otherwise it would come at the end: the whole log is smaller than Python's buffer.
    """
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    options = ["--data-dir", small_mnist, "--epochs", "90", "--batch-size", "8"]
    command = [sys.executable, STAGE_2.__file__, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests in a shell's background ignore Ctrl-C, and the script would inherit that.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **pipes)
    signal.signal(signal.SIGINT, ours)
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    process.send_signal(signal.SIGINT)
    assert "final" not in process.stdout.read()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGINT  # a shell makes this 130


@pytest.mark.parametrize("error", [RuntimeError("no such backend"), AssertionError()])
def test_platform_that_is_not_there(script, error, tmp_path, monkeypatch):
    """JAX_PLATFORMS=cuda without a GPU: one line instead of a traceback."""

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit, match=f"^error: no device for .*{error}"):
        run(script, tmp_path)


def test_without_docstrings(script):
    """As with python -OO."""
    program = compile(Path(script.__file__).read_text(), "name", "exec", optimize=2)
    names = {"__name__": "optimized", "__file__": "name.py"}
    exec(program, names)
    with pytest.raises(SystemExit, match="^0$"):
        names["main"](["--help"])


def test_pasted_into_a_notebook(script, small_mnist, tmp_path, monkeypatch, capsys):
    """There is no __file__, and sys.argv is Jupyter's."""
    shutil.copytree(small_mnist, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    before = signal.getsignal(signal.SIGINT)
    exec(Path(script.__file__).read_text(), {"__name__": "__main__"})
    assert signal.getsignal(signal.SIGINT) == before, "a notebook stops cells by this"
    assert capsys.readouterr().out.endswith("% (MNIST)\n")


@pytest.mark.parametrize(
    ("fault", "exception", "message"),
    [
        (DataError("no data"), SystemExit, "^error: no data .*--data-dir"),
        (ValueError("a bug of my own"), ValueError, "^a bug of my own$"),
    ],
)
def test_guard_at_the_end(script, fault, exception, message, monkeypatch):
    def fail(data_dir):
        raise fault

    monkeypatch.setattr(common, "load_mnist", fail)
    monkeypatch.setattr(sys, "argv", [script.__file__])
    ours = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(exception, match=message):
            runpy.run_path(script.__file__, run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, ours)


def test_scripts_import_no_other_file_of_the_project(script):
    text = Path(script.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    files = {path.stem for path in Path(script.__file__).parent.glob("*.py")}
    assert imported & files == {"common"}
