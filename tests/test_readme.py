"""README.md: whatever it tells people to type or to change does what it says."""

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import jaxlib.xla_client
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import unflatten_dict
from helpers import LINE, ROOT, SCRIPTS, STAGE_2, STAGE_3, leaves, load, run
from PIL import Image

import common
from common import FlattenAndCast

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def section(heading):
    return re.search(rf"## {heading}\n(.*?)(?=\n## |\Z)", README, re.DOTALL)[1]


def rows(heading):
    """The rows of the tables in a section, as lists of cells."""
    lines = re.findall(r"^\| (.*) \|$", section(heading), re.MULTILINE)
    return [
        [cell.strip() for cell in f" {line} ".split(" | ")]
        for line in lines
        if "---" not in line
    ]


def code(cell):
    """The lines of code in a cell."""
    return [part.strip("`") for part in cell.split("<br>")]


def changed_script(edits, directory, name):
    """A copy of mlp_flax.py with `edits`, pairs of a text and its lines, as a module."""
    text = (ROOT / "mlp_flax.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} is not there exactly once"
        indent = re.search(rf"^( *).*{re.escape(old)}", text, re.MULTILINE)[1]
        text = text.replace(old, f"\n{indent}".join(new))
    path = directory / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("mlp_flax_changed", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SMALL_CHANGES = {}
for change, old, new in rows("Small changes")[1:]:
    if change:
        edits = SMALL_CHANGES.setdefault(change, [])
    edits.append((*code(old), code(new)))
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
GPU = "on a GPU: memory on demand, the same bits each time"
TRAIN = ["--epochs", 4, "--batch-size", 32]  # 80 steps on small_mnist


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """The script with the change that the test is named after, in a scratch directory."""
    monkeypatch.chdir(tmp_path)
    edits = SMALL_CHANGES[request.param]
    return changed_script(edits, tmp_path, "changed")


def small_change(name):
    return pytest.mark.parametrize("changed", [name], indirect=True)


def test_every_small_change_has_a_test():
    tested = re.findall(
        r'@small_change\("(.*)"\)\n', inspect.getsource(sys.modules[__name__])
    )
    assert sorted([*tested, GPU]) == sorted(SMALL_CHANGES)


@small_change("mixed precision")
def test_mixed_precision(changed, small_mnist):
    result = run(changed, small_mnist, *TRAIN, watch=False)
    assert result.accuracy > 0.5
    assert {a.dtype.name for a in leaves(result.state.params)} == {"float32"}
    x, y = np.zeros((2, 784), np.float32), np.zeros(2, np.int32)
    program = str(jax.make_jaxpr(changed.train_step)(result.state, x, y))
    assert set(re.findall(r":(\w+)\[\S* = dot_general", program)) == {"bf16"}
    assert set(re.findall(r":(\w+)\[2\] = reduce_max", program)) == {"f32"}


@small_change("gradient accumulation")
def test_gradient_accumulation(changed, small_mnist):
    result = run(changed, small_mnist, *TRAIN)
    assert result.accuracy > 0.3
    kernels = [
        next(a for a in step.before if a.shape == (784, 512)) for step in result.steps
    ]
    moved = [not np.array_equal(a, b) for a, b in pairwise(kernels)]
    assert moved == [(i + 1) % 4 == 0 for i in range(len(moved))]
    # The schedule ends with the run.
    state = result.state.opt_state
    assert int(state.gradient_step) == 20
    update, _ = jax.jit(result.state.tx.update)(
        jax.tree.map(np.ones_like, result.state.params),
        state._replace(mini_step=jnp.int32(3)),
        result.state.params,
    )
    largest = max(np.abs(a).max() for a in leaves(update))
    assert largest <= 2 * changed.FINAL_LEARNING_RATE


@small_change("gradient clipping")
def test_gradient_clipping(changed, small_mnist):
    result = run(changed, small_mnist, *TRAIN, watch=False)
    assert result.accuracy > 0.5
    state = changed.create_train_state(jax.random.key(0), 1e-3, 10)
    large = jax.tree.map(lambda p: np.full_like(p, 1e3), state.params)
    opt_state = jax.jit(type(state).apply_gradients)(state, grads=large).opt_state
    mu = optax.tree_utils.tree_get(opt_state, "mu")  # 0.1 times the clipped gradient
    norm = np.sqrt(sum(np.vdot(a, a) for a in leaves(mu)))
    np.testing.assert_allclose(norm, 0.1, rtol=1e-3)


@small_change("AdamW, warm-up and cosine decay")
def test_adamw_warm_up_and_cosine_decay(changed, small_mnist):
    assert run(changed, small_mnist, *TRAIN, watch=False).accuracy > 0.5
    state = changed.create_train_state(jax.random.key(0), 0.1, 100)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    step = jax.jit(lambda state: state.apply_gradients(grads=zeros))
    rates = []  # without gradients, only the decay is left, times the learning rate
    for _ in range(101):
        before = state.params["layers_0"]["kernel"][0, 0]
        state = step(state)
        after = state.params["layers_0"]["kernel"][0, 0]
        rates.append(float(1 - after / before) / 0.01)
    assert rates[0] == 0
    assert np.argmax(rates) == 5
    np.testing.assert_allclose(rates[5], 0.1, rtol=1e-2)
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(96) / 95))
    np.testing.assert_allclose(rates[5:], cosine, atol=1e-3)


@small_change("a convolutional network")
def test_convolutional_network(changed, small_mnist):
    result = run(changed, small_mnist, *TRAIN, watch=False)
    assert result.accuracy > 0.5
    shapes = [a.shape for a in leaves(result.state.params)]
    assert (3, 3, 1, 32) in shapes
    assert (3, 3, 32, 64) in shapes
    assert (7 * 7 * 64, 10) in shapes


@small_change("another dataset")
def test_another_dataset(changed, small_mnist, tmp_path):
    raw = small_mnist / "MNIST" / "raw"
    shutil.copytree(raw, tmp_path / "FashionMNIST" / "raw")
    result = run(changed, tmp_path, *TRAIN, watch=False)
    assert result.lines[0] == "data: FashionMNIST, 640 training and 300 test images"
    assert result.lines[-1].endswith("% (FashionMNIST)")
    # The same files under MNIST's name give the same run.
    expected = run(load(STAGE_2), small_mnist, *TRAIN, watch=False)
    assert result.accuracy == expected.accuracy > 0.5


@small_change("weights for NumPy or PyTorch")
def test_weights_for_numpy_or_pytorch(changed, small_mnist):
    state = run(changed, small_mnist, *TRAIN, watch=False).state
    weights = dict(np.load("mlp.npz"))
    assert len(weights) == 6
    x = FlattenAndCast()(common.load_mnist(small_mnist)[1].images)
    expected = state.apply_fn({"params": unflatten_dict(weights, sep=".")}, x)
    h = torch.from_numpy(x)
    for i in range(3):
        kernel, bias = (
            torch.from_numpy(weights[f"layers_{i}.{n}"]) for n in ("kernel", "bias")
        )
        h = torch.nn.functional.linear(h, kernel.T, bias)
        h = h if i == 2 else torch.relu(h)
    np.testing.assert_allclose(h, expected, rtol=1e-3, atol=1e-4)
    assert np.array_equal(h.argmax(1), changed.apply_model(state, x))


def test_own_project(tmp_path, monkeypatch):
    """The edits that the text counts, with colour images that it describes."""
    text = section("Start your own project")
    edits = [
        (code(old)[0], code(new)) for old, new in rows("Start your own project")[1:]
    ]
    count = {2: "two", 3: "three", 4: "four", 5: "five"}[len(edits)]
    assert f"are {count} edits" in text
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1000)
    images = rng.integers(128, size=(1000, 32, 32, 3), dtype=np.uint8)
    corners = np.array([(0, 0), (0, 16), (16, 0), (16, 16)])[labels]
    for image, (row, column) in zip(images, corners):
        image[row : row + 16, column : column + 16, 1] += 60
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    monkeypatch.chdir(tmp_path)
    script = changed_script(edits, tmp_path, "mine")
    checkpoint = tmp_path / "mine.msgpack"
    options = ["--epochs", 2, "--checkpoint", checkpoint]
    result = run(script, "unused", *options)
    assert result.lines[0] == "data: my images, 800 training and 200 test images"
    assert result.steps[0].x.shape == (32, 32, 32, 3)
    assert result.accuracy > 0.8
    assert run(script, "unused", *options).steps == []  # its checkpoint is read, too


@pytest.mark.parametrize("name", [STAGE_2, STAGE_3])
def test_python_blocks(name, small_mnist, tmp_path, monkeypatch, capsys):
    script = load(name)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_mnist, "data")
    state = run(script, "data", *TRAIN, "--checkpoint", "run.msgpack").state
    digits = common.load_mnist("data")[1]
    Image.fromarray(digits.images[7]).resize((56, 56)).convert("RGB").save("digit.png")
    (program,) = blocks("python")
    if name == STAGE_3:  # the README says what to change
        program = program.replace("mlp_flax", STAGE_3)
        extra = re.search(r'`("batch_stats": .*?)`.*`(train=False)`', README)
        program = program.replace(
            'state["params"]}, x', f'state["params"], {extra[1]}}}, x, {extra[2]}'
        )
    capsys.readouterr()
    exec(program, {})  # noqa: S102 - as it stands in the README
    x = FlattenAndCast()(digits.images[[0, 7]])
    guesses = [int(guess) for guess in script.apply_model(state, x)]
    label = digits.labels[0]
    expected = f"a test image of {label}: {guesses[0]}\nmine: {guesses[1]}\n"
    assert capsys.readouterr().out == expected


@pytest.fixture(scope="module")
def parallel_copy(tmp_path_factory):
    """A directory with common.py and mlp_flax.py, to which the diff has been applied."""
    directory = tmp_path_factory.mktemp("parallel")
    for name in ("common.py", "mlp_flax.py"):
        shutil.copy(ROOT / name, directory)
    (diff,) = blocks("diff")
    subprocess.run(
        ["git", "apply", "-"], cwd=directory, input=diff, text=True, check=True
    )
    return directory


WATCHED = """
import sys, jax, mlp_flax
train_step, devices = mlp_flax.train_step, jax.device_count()
def watched(state, x, y):
    for a in (x, y):  # rows are split, parameters are everywhere
        assert len(a.addressable_shards) == devices == 4
        assert {s.data.shape[0] for s in a.addressable_shards} == {len(a) // devices}
    for a in jax.tree.leaves(state):
        assert a.is_fully_replicated and len(a.sharding.device_set) == devices
    return train_step(state, x, y)
mlp_flax.train_step = watched
mlp_flax.main()
mlp_flax.main([*sys.argv[1:], "--batch-size", "30"])
"""


def start(directory, program, options, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, options)],
        cwd=directory,
        env={**os.environ, "NPROC": "8", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def four_devices(directory, options):
    """Four virtual devices, with the environment that the README has for a GPU.

    XLA stops at a flag that it does not know, also on a CPU.
    """
    ((old, (new,)),) = SMALL_CHANGES[GPU]
    *environment, python, script = shlex.split(new)
    assert f"{python} {script}" == old
    environment = dict(variable.split("=", 1) for variable in environment)
    assert {*environment, "XLA_FLAGS"} == {"XLA_FLAGS", PREALLOCATE}
    assert PREALLOCATE in inspect.getsource(jaxlib.xla_client)
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    return [start(directory, WATCHED, options, **environment)]


def two_processes(directory, options):
    """The README's command, as Slurm would start it."""
    command = re.search(r"^    srun (python -c .*)$", README, re.MULTILINE)[1]
    _, _, program = shlex.split(command)
    with socket.socket() as free:  # JAX derives its port from the number of the job
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [
        start(directory, program, options, **slurm, SLURM_PROCID=i, SLURM_LOCALID=i)
        for i in "01"
    ]


def compare_with_one_device(start, data_dir, path, options):
    """Run, and return the processes' outputs; all but the first print nothing."""
    one = run(load(STAGE_2), data_dir, *options, watch=False)
    options = ["--data-dir", data_dir, *options, "--checkpoint", path / "saved"]
    processes = start(options)
    outputs = [process.communicate() for process in processes]
    lines, *silent = (
        [line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs
    )
    assert not any(silent), "one process prints"
    lines = lines[: len(one.lines)]
    assert lines[:3] == one.lines[:3], outputs
    log = [LINE.fullmatch(line).groupdict() for line in lines[3:-1]]
    assert [line["step"] for line in log] == [line["step"] for line in one.log]
    for line, expected in zip(log[:2], one.log[:2]):
        assert float(line["loss"]) == pytest.approx(float(expected["loss"]), abs=2e-4)
    final = float(re.search(r"accuracy: (.*)%", lines[-1])[1])
    assert abs(final - 100 * one.accuracy) <= 0.3 + 1e-9
    assert [p.name for p in path.iterdir()] == ["saved"]
    return [process.returncode for process in processes], outputs


SHORT = ["--epochs", 3, "--batch-size", 64, "--eval-every", 2, "--max-steps", 12]
LONG = ["--epochs", 1, "--eval-every", 100, "--max-steps", 400]
BOTH = pytest.mark.parametrize(
    ("data_dir", "options"),
    [
        ("small_mnist", SHORT),
        pytest.param("real_mnist", LONG, marks=pytest.mark.slow),
    ],
)


@BOTH
def test_diff_on_four_devices(data_dir, options, parallel_copy, tmp_path, request):
    data_dir = request.getfixturevalue(data_dir)
    codes, outputs = compare_with_one_device(
        partial(four_devices, parallel_copy), data_dir, tmp_path, options
    )
    # After its run, it got a batch that four devices do not divide.
    assert codes == [2]
    message = outputs[0][1].splitlines()[-1]
    assert message.endswith("error: argument --batch-size: 4 devices do not divide it")


@pytest.mark.slow
@BOTH
def test_diff_in_two_processes(data_dir, options, parallel_copy, tmp_path, request):
    data_dir = request.getfixturevalue(data_dir)
    codes, outputs = compare_with_one_device(
        partial(two_processes, parallel_copy), data_dir, tmp_path, options
    )
    assert codes == [0, 0], outputs


def test_options_are_those_of_the_scripts():
    table = " ".join(cell for row in rows("Options") for cell in row)
    listed = set(re.findall(r"`(--[a-z-]+)", table))
    parser = load(STAGE_2).make_parser()
    assert listed == {a.option_strings[-1] for a in parser._actions} - {"--help"}


def test_names_of_the_article_exist():
    for row in rows("From the article to the files")[1:]:
        if len(row) == 2:
            for stage, name in zip(
                ["common", *SCRIPTS], [r"common\.py", "stage 1", "stage 2", "stage 3"]
            ):
                found = re.search(rf"`?{name}`?: ((?:`\w+`(?:, )?)+)", row[1])
                for symbol in re.findall(r"`(\w+)`", found[1] if found else ""):
                    assert hasattr(load(stage), symbol), symbol
