"""What holds for all three scripts: log, options, seeds, and what goes wrong."""

import io
import re
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, SCRIPTS, arrays, draw, equal, load, record, run, write_mnist

import common
from common import DataError, JAXRandomSampler, NumpyLoader

SHORT = ["--batch-size", 64, "--epochs", 2]  # 20 steps on small_mnist
STAGE_1, STAGE_2, STAGE_3 = SCRIPTS


def predict(script, state, x):
    """The classes of all images in one call, whatever the loaders do."""
    if script.__name__ == STAGE_1:
        return np.asarray(script.batched_forward(state, x)).argmax(axis=1)
    return np.asarray(script.apply_model(state, x))


# What a run prints.


def test_first_lines(script, whole_run):
    parameters = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    if script.__name__ == STAGE_3:
        parameters += 4 * 512  # scale and bias of two BatchNorms
    assert whole_run(script).lines[:3] == [
        "data: MNIST, 640 training and 300 test images",
        f"device: {jax.devices()[0].device_kind}",
        f"parameters: {parameters:,}",
    ]


def test_a_line_for_each_evaluation(script, whole_run):
    log = whole_run(script).log
    steps = [(line["epoch"], line["step"]) for line in log]
    assert steps == [("1", "7"), ("2", "14"), ("2", "20")]
    assert len(whole_run(script).lines) == 3 + 3 + 1


def test_accuracies(script, whole_run, small_mnist):
    result = whole_run(script)
    for split, dataset in zip(("train", "test"), common.load_mnist(small_mnist)):
        x, y = arrays(dataset)
        right = predict(script, result.state, x) == y
        assert result.log[-1][split] == f"{100 * right.mean():.2f}"
    assert result.log[-1]["train"] != result.log[-1]["test"]
    assert result.accuracy == right.mean()
    assert isinstance(result.accuracy, float)
    assert result.lines[-1] == f"final test accuracy: {100 * right.mean():.2f}% (MNIST)"


@pytest.mark.parametrize("batch_size", [10, 100, 200])
def test_accuracy_counts_a_smaller_last_batch_rightly(script, batch_size, whole_run):
    """All images get one class: the first 100 examples are wrong, the last 3 right."""
    state = whole_run(script).state
    image = np.zeros(784, np.float32)
    guess = int(predict(script, state, image[None])[0])
    dataset = [(image, (guess + 1) % 10)] * 100 + [(image, guess)] * 3
    evaluate = script.accuracy if script.__name__ == STAGE_1 else script.eval_model
    loader = NumpyLoader(dataset, batch_size=batch_size)
    assert evaluate(state, loader) == pytest.approx(3 / 103)


def test_loss_is_of_the_batch_before_its_update(whole_run):
    """Stages 2 and 3 print what train_step returns; see their own tests."""
    stage = load(STAGE_1)
    result = whole_run(stage)
    for line in result.log:
        step = result.steps[int(line["step"]) - 1]
        params = list(zip(step.before[::2], step.before[1::2]))
        logits = stage.batched_forward(params, step.x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, step.y).mean()
        assert float(line["loss"]) == pytest.approx(float(loss), abs=1e-4)
    assert len({line["loss"] for line in result.log}) == 3


# Random numbers: the seed decides everything, and each use has a key of its own.


def test_keys(script, whole_run, small_mnist):
    """Parameters, order of the images, dropout: in this order in all three scripts."""
    n = 3 if script.__name__ == STAGE_3 else 2
    params_key, shuffle_key, *dropout_key = jax.random.split(jax.random.key(0), n)
    first, *_ = steps = whole_run(script).steps
    if script.__name__ == STAGE_1:
        expected = script.init_network_params(script.LAYER_SIZES, params_key)
    else:
        expected = script.create_train_state(params_key, 1e-3, 20)
        assert all(step.rest == tuple(dropout_key) for step in steps)
    assert equal(first.before, expected)
    sampler = JAXRandomSampler(range(640), shuffle_key)
    order = [*sampler, *sampler]  # two epochs
    images, labels = arrays(common.load_mnist(small_mnist)[0])
    assert np.array_equal(np.concatenate([step.x for step in steps]), images[order])
    assert np.array_equal(np.concatenate([step.y for step in steps]), labels[order])


def test_another_seed_is_another_run(script, whole_run, small_mnist):
    with record(script) as steps:
        run(script, small_mnist, *SHORT, "--seed", 1, "--max-steps", 1)
    first = whole_run(script).steps[0]
    assert not np.array_equal(steps[0].y, first.y)
    weights = [leaf.ndim == 2 for leaf in first.before]
    different = [not equal(a, b) for a, b in zip(steps[0].before, first.before)]
    assert different[weights.index(True)]
    if script.__name__ == STAGE_3:
        assert steps[0].rest != first.rest


def test_evaluation_changes_nothing(script, whole_run, small_mnist):
    """The same state after step 14, however often it is evaluated on the way."""
    often = run(script, small_mnist, *SHORT, "--eval-every", 1, "--max-steps", 14)
    assert len(often.log) == 14
    whole = whole_run(script)
    # Each evaluation looks at two sets. Steps 7 and 14 are the first two of `whole`.
    assert equal(often.evaluated[2 * 13], whole.evaluated[2 * 1])
    assert [often.log[6], often.log[13]] == whole.log[:2]


# What the options do.


def test_evaluation_once_an_epoch_by_default(script, small_mnist):
    log = run(script, small_mnist, *SHORT).log
    assert [(line["epoch"], line["step"]) for line in log] == [("1", "10"), ("2", "20")]


def test_max_steps_0_evaluates_the_untrained_network(script, small_mnist):
    result = run(script, small_mnist, "--max-steps", 0)
    assert result.log == []
    assert result.accuracy < 0.3


def test_first_train_examples_in_batches(script, small_mnist):
    options = ["--train-examples", 450, "--batch-size", 100, "--epochs", 3]
    with record(script) as steps:
        result = run(script, small_mnist, *options)
    assert result.lines[0] == "data: MNIST, 450 training and 300 test images"
    assert [step.x.shape for step in steps] == [(100, 784)] * 12
    first, _ = arrays(common.load_mnist(small_mnist)[0][:450])
    seen = np.unique(np.concatenate([step.x for step in steps]), axis=0)
    for image in seen:
        assert (first == image).all(axis=1).any()


def test_defaults(script):
    args = script.make_parser().parse_args([])
    assert args.data_dir == ROOT / "data"
    rates = {STAGE_1: 0.3, STAGE_2: 1e-3, STAGE_3: 2e-3}
    assert args.learning_rate == rates[script.__name__]
    assert args.batch_size == (128 if script.__name__ == STAGE_3 else 32)
    assert (args.epochs, args.seed) == (5, 0)
    assert args.max_steps is args.train_examples is args.eval_every is None


def test_help_is_for_people(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in (5, script.make_parser().get_default("batch_size"), 0):
        assert f"(default: {default})" in text
    assert text.count("(default: ") == (8 if script.__name__ == STAGE_1 else 9)
    for word in ("None", "inf", str(ROOT), "%"):
        assert word not in text


def test_home_directory_is_expanded(flax_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    options = ["--data-dir=~/data", "--checkpoint=~/run.msgpack"]
    args = flax_script.make_parser().parse_args(options)
    assert args.data_dir == tmp_path / "data"
    assert args.checkpoint == tmp_path / "run.msgpack"


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
        ["--batch-size", "many"],
        ["--learning-rate", 0],
        ["--learning-rate", -0.1],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--train-examples", 0],
        ["--seed", -1],
        ["--seed", 2**70],
        ["--eval-every", 0],
        ["--max-steps", -1],
    ],
    ids=lambda options: f"{options[0]}={options[1]}",
)
def test_wrong_option(script, options, small_mnist, capsys):
    with pytest.raises(SystemExit) as caught:
        run(script, small_mnist, *options)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {options[0]}: " in message
    assert str(options[1]) in message


def test_too_many_epochs_for_the_schedule(flax_script, small_mnist, capsys):
    with pytest.raises(SystemExit) as caught:
        run(flax_script, small_mnist, "--epochs", 2**31 - 1, "--max-steps", 1)
    assert caught.value.code == 2
    assert "error: argument --epochs: " in capsys.readouterr().err


def test_wrong_option_before_any_data_is_touched(script, tmp_path):
    with pytest.raises(SystemExit):
        run(script, tmp_path / "none", "--epochs", 0)
    assert not (tmp_path / "none").exists()


def test_a_batch_of_one_image_has_no_variance(small_mnist, capsys):
    with pytest.raises(SystemExit) as caught:
        run(load(STAGE_3), small_mnist, "--batch-size", 1)
    assert caught.value.code == 2
    assert "argument --batch-size: " in capsys.readouterr().err


def test_divergence(script, small_mnist, tmp_path, capsys):
    options = ["--learning-rate", "1e30", "--eval-every", "5"]
    if script.__name__ != STAGE_1:
        options += ["--checkpoint", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as caught:
        script.main(["--data-dir", str(small_mnist), *options])
    assert re.match(
        "error: diverged at step 5: .*--learning-rate.*label", caught.value.code
    )
    assert "accuracy" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["loss", "parameter"])
def test_one_number_that_is_not_finite(script, part, small_mnist, monkeypatch):
    """In what comes out of a step: parameters in stage 1, a state and a loss in others."""
    name = "train_step"
    if script.__name__ == STAGE_1:
        name = "loss" if part == "loss" else "sgd_update"
    real = getattr(script, name)

    def spoiled(*args):
        leaves, structure = jax.tree.flatten(real(*args))
        i = -1 if part == "loss" else next(i for i, a in enumerate(leaves) if a.ndim)
        flat = jnp.ravel(leaves[i]).at[-1].set(jnp.inf)
        leaves[i] = flat.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, leaves)

    monkeypatch.setattr(script, name, spoiled)
    with pytest.raises(SystemExit, match="diverged at step 1:"):
        run(script, small_mnist, *SHORT, "--eval-every", 1)


def test_large_numbers_are_no_divergence(flax_script, small_mnist, monkeypatch):
    real = flax_script.train_step

    def step(*args):
        state, loss = real(*args)
        return state.replace(
            params=jax.tree.map(lambda p: p + 1e30, state.params)
        ), loss

    monkeypatch.setattr(flax_script, "train_step", step)
    result = run(flax_script, small_mnist, *SHORT, "--max-steps", 1)
    assert [line["step"] for line in result.log] == ["1"]


def start(name, *options):
    """Start a script as a user does."""
    return subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_control_c(small_mnist):
    """Also shows that a line of the log comes at once through a pipe."""
    # Tests in a shell's background ignore Ctrl-C, and the script would inherit that.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = start(STAGE_2, "--data-dir", small_mnist, "--epochs", 100_000)
    signal.signal(signal.SIGINT, ours)
    for line in process.stdout:
        if line.startswith("epoch 2"):
            break
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT  # a shell makes this 130
    assert stderr == ""


@pytest.mark.parametrize("error", [RuntimeError("no such backend"), AssertionError()])
def test_platform_that_is_not_there(script, error, tmp_path, monkeypatch):
    """JAX_PLATFORMS=cuda without a GPU: one line instead of a traceback."""

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit) as caught:
        run(script, tmp_path)
    assert caught.value.code.startswith("error: no device for JAX_PLATFORMS=")
    assert str(error) in caught.value.code


def test_without_docstrings(script):
    """As with python -OO."""
    text = (ROOT / f"{script.__name__}.py").read_text()
    names = {"__name__": "optimized", "__file__": f"{script.__name__}.py"}
    exec(compile(text, "optimized", "exec", optimize=2), names)
    with pytest.raises(SystemExit) as caught:
        names["main"](["--help"])
    assert caught.value.code == 0


def test_pasted_into_a_notebook(script, small_mnist, tmp_path, monkeypatch, capsys):
    """There is no __file__, and sys.argv is Jupyter's."""
    shutil.copytree(small_mnist, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    before = signal.getsignal(signal.SIGINT)
    exec((ROOT / f"{script.__name__}.py").read_text(), {"__name__": "__main__"})
    assert signal.getsignal(signal.SIGINT) == before, "a notebook stops cells by this"
    assert capsys.readouterr().out.endswith("% (MNIST)\n")


def test_console_that_cannot_show_a_path(flax_script, tmp_path, monkeypatch):
    data_dir = tmp_path / "数据"
    data_dir.mkdir()
    write_mnist(data_dir, draw(128, seed=2), draw(50, seed=3))
    path = data_dir / "检查点"
    options = ["--data-dir", str(data_dir), "--checkpoint", str(path)]
    for _ in range(2):  # the second run resumes
        console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", console)
        flax_script.main([*options, "--epochs", "1"])
    console.flush()
    assert "resuming" in console.buffer.getvalue().decode("cp1252")
    assert path.exists()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (DataError("no data"), "^error: no data .*--data-dir"),
        (ValueError("a bug of my own"), "^a bug of my own$"),
    ],
)
def test_guard_at_the_end_of_the_script(name, fault, expected, monkeypatch):
    def fail(data_dir):
        raise fault

    monkeypatch.setattr(common, "load_mnist", fail)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    ours = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, ValueError), match=expected) as caught:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, ours)
    assert caught.type is (SystemExit if isinstance(fault, DataError) else ValueError)


def test_scripts_import_no_other_file_of_the_project():
    files = {path.stem for path in ROOT.glob("*.py")}
    for name in (*SCRIPTS, "common"):
        text = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
        assert imported & files == (set() if name == "common" else {"common"})
