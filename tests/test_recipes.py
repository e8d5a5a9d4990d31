"""recipes/*.diff: each is applied as a user does, run, and looked at for its effect."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import LINE, ROOT, arrays, equal, leaves, load, record, run
from PIL import Image

import common

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.diff"))
TRAIN = ["--epochs", 4, "--batch-size", 32]  # 80 steps on small_mnist
CAPTURE = {"capture_output": True, "text": True, "check": False}
LONGER = {"image-folder", "best", "devices"}


def apply(directory, *names):
    """Copy common.py and mlp_flax.py to `directory`, and apply diffs."""
    for file in ("common.py", "mlp_flax.py"):
        shutil.copy(ROOT / file, directory)
    for name in names:
        diff = ROOT / "recipes" / f"{name}.diff"
        command = ["git", "apply", diff]
        result = subprocess.run(command, cwd=directory, **CAPTURE)
        assert result.returncode == 0, (
            f"recipes/{name}.diff does not apply: run `python recipes/update.py`\n"
            + result.stderr
        )
    return directory / "mlp_flax.py"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that returns mlp_flax.py with diffs applied, as a module."""
    monkeypatch.chdir(tmp_path)

    def apply_and_import(*names):
        path = apply(tmp_path, *names)
        spec = importlib.util.spec_from_file_location("_".join(names), path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return apply_and_import


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_it_does_and_is_short(name, tmp_path):
    text = (ROOT / "recipes" / f"{name}.diff").read_text()
    assert text.startswith(f"{name}: ")
    changed = [
        line
        for line in text.partition("\n@@")[2].splitlines()
        if re.match(r"[-+]\s*\S", line)
    ]
    assert len(changed) <= (25 if name in LONGER else 15)
    apply(tmp_path, name)


def test_update_moves_a_diff_to_a_changed_script(tmp_path):
    """A copy of the repository, in which lines are added above a recipe's change."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "recipes", copy / "recipes")
    shutil.copy(ROOT / "mlp_flax.py", copy)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    script, diff = copy / "mlp_flax.py", copy / "recipes" / "clip.diff"
    before = diff.read_text()
    update = [sys.executable, copy / "recipes" / "update.py"]
    subprocess.run(update, check=True)
    assert diff.read_text() == before

    text = script.read_text().replace("Stage 2", "Line\n\nStage 2")
    script.write_text(text.replace("or steps_per_epoch", "or steps_per_epoch + 1"))
    subprocess.run(update, check=True)
    assert diff.read_text() != before
    subprocess.run(["git", "apply", diff], cwd=copy, check=True)
    assert "or steps_per_epoch + 1" in script.read_text()
    assert "clip_by_global_norm" in script.read_text()


def train(module, data_dir, *options):
    """A run that has to learn, whatever the recipe changes."""
    result = run(module, data_dir, *TRAIN, *options)
    assert result.accuracy > 0.5
    return result


def test_bfloat16(recipe, small_mnist):
    module = recipe("bfloat16")
    state = train(module, small_mnist).state
    assert {leaf.dtype.name for leaf in leaves(state.params)} == {"float32"}
    x, y = np.zeros((2, 784), np.float32), np.zeros(2, np.int32)
    program = str(jax.make_jaxpr(module.train_step)(state, x, y))
    assert set(re.findall(r":(\w+)\[\S* = dot_general", program)) == {"bf16"}
    assert set(re.findall(r":(\w+)\[2\] = reduce_max", program)) == {"f32"}


def test_accumulate(recipe, small_mnist):
    module = recipe("accumulate")
    with record(module) as steps:
        result = run(module, small_mnist, *TRAIN)
    assert result.accuracy > 0.3
    index = [leaf.shape for leaf in steps[0].before].index((784, 512))
    kernels = [step.before[index] for step in steps]
    moved = [not np.array_equal(a, b) for a, b in pairwise(kernels)]
    assert moved == [(i + 1) % 4 == 0 for i in range(len(moved))]
    # Adam's last update has the final learning rate.
    ones = jax.tree.map(jnp.ones_like, result.state.params)
    last = result.state.opt_state._replace(mini_step=jnp.int32(3))
    updates, _ = jax.jit(result.state.tx.update)(ones, last, result.state.params)
    assert max(np.abs(leaf).max() for leaf in leaves(updates)) < 1e-4


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in leaves(tree)))


def test_clip(recipe, small_mnist):
    module = recipe("clip")
    state = train(module, small_mnist).state
    ones = jax.tree.map(jnp.ones_like, state.params)
    large, small = (jax.tree.map(lambda g: g * s, ones) for s in (1e3, 1e-6))  # noqa: B023
    for grads, expected in ((large, 1.0), (small, norm(small))):
        _, opt_state = jax.jit(state.tx.update)(grads, state.tx.init(state.params))
        mu = optax.tree_utils.tree_get(opt_state, "mu")  # 0.1 times what Adam is given
        np.testing.assert_allclose(norm(mu), 0.1 * expected, rtol=1e-3)


def decay_rates(module, learning_rate, steps):
    """The learning rates of AdamW: without gradients, it only decays the weights."""
    state = module.create_train_state(jax.random.key(0), learning_rate, steps)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    step = jax.jit(lambda state: state.apply_gradients(grads=zeros))
    weights = []
    for _ in range(steps + 2):
        weights.append(float(jax.tree.leaves(state.params)[1].ravel()[0]))
        state = step(state)
    return np.array([1 - after / before for before, after in pairwise(weights)]) / 0.01


def test_adamw(recipe, small_mnist):
    module = recipe("adamw")
    train(module, small_mnist)
    rates = decay_rates(module, 0.1, 100)
    assert rates[0] == 0
    assert np.argmax(rates) == 5
    cosine = 1e-5 + (0.1 - 1e-5) * (1 + np.cos(np.pi * np.arange(96) / 95)) / 2
    np.testing.assert_allclose(rates[5:], cosine, atol=1e-3)


def test_cnn(recipe, small_mnist):
    state = train(recipe("cnn"), small_mnist).state
    shapes = [leaf.shape for leaf in leaves(state.params)]
    for shape in ((3, 3, 1, 32), (3, 3, 32, 64), (7 * 7 * 64, 10)):
        assert shape in shapes


def test_fashion(recipe, small_mnist, tmp_path):
    shutil.copytree(small_mnist / "MNIST", tmp_path / "FashionMNIST")
    result = train(recipe("fashion"), tmp_path)
    assert result.lines[0] == "data: FashionMNIST, 640 training and 300 test images"
    assert result.lines[-1].endswith("% (FashionMNIST)")
    same_files = run(load("mlp_flax"), small_mnist, *TRAIN)
    assert equal(result.state, same_files.state)


def test_image_folder(recipe, tmp_path):
    """Blue, green and red pictures of many sizes; the color is folder and class."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 10)):
        for channel, color in enumerate(("blue", "green", "red")):
            folder = tmp_path / "colors" / split / color
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(100, size=(20 + i, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{i}.png")

    script = recipe("image-folder").__file__
    options = ["--data-dir", "colors", "--batch-size", "10", "--epochs", "3"]
    result = subprocess.run([sys.executable, script, *options], **CAPTURE)
    assert result.stderr == ""
    assert "data: colors, 90 training and 30 test images" in result.stdout
    assert "final test accuracy: 100.00% (colors)\n" in result.stdout


def test_image_folder_loads_channels_last(recipe, tmp_path, capsys):
    module = recipe("image-folder")
    image = module.load_image(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.float32)
    np.testing.assert_allclose(image[7, 9], [1, 0, 0.2])
    for folder in ("train/a", "test/a"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / folder / "1.png")
    with pytest.raises(SystemExit):
        module.main(["--data-dir", str(tmp_path), "--train-examples", "1"])
    assert "argument --train-examples: " in capsys.readouterr().err


def test_regression(recipe, small_mnist):
    module = recipe("regression")
    result = run(module, small_mnist, *TRAIN)
    x, y = arrays(common.load_mnist(small_mnist)[1])
    predictions = np.asarray(module.apply_model(result.state, x))
    assert predictions.shape == (300,)
    rmse = np.sqrt(((predictions - y) ** 2).mean())
    assert result.accuracy == pytest.approx(rmse, rel=1e-5)
    assert result.lines[-1] == f"final test RMSE: {rmse:.4f} (MNIST)"
    assert rmse < 0.9 * y.std(), "better than always predicting the mean"
    with pytest.raises((AssertionError, ValueError)):  # shapes that would broadcast
        module.train_step(result.state, x, y[:, None])


def test_augment(recipe, small_mnist):
    module = recipe("augment")
    with record(module) as steps:
        train(module, small_mnist)
    params_key, _, augment_key = jax.random.split(jax.random.key(0), 3)
    assert all(step.rest == (augment_key,) for step in steps)

    image = jnp.zeros((28, 28)).at[10, 15].set(1)
    keys = jax.random.split(jax.random.key(0), 500)
    shifted = jax.vmap(module.random_shift, (0, None))(keys, image.ravel())
    positions = {divmod(int(i), 28) for i in shifted.argmax(axis=1)}
    assert positions == {(y, x) for y in range(8, 13) for x in range(13, 18)}

    # In a step, each image has a shift of its own, and another one at the next step.
    state = module.create_train_state(params_key, 1e-3, 10)
    images = jnp.tile(image.reshape(1, 784), (8, 1))
    seen = []

    def spy(variables, x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x)
        return state.apply_fn(variables, x)

    spied = state.replace(apply_fn=spy)
    for _ in range(2):
        spied, _ = module.train_step(spied, images, np.zeros(8, np.int32), augment_key)
    jax.effects_barrier()
    assert len(np.unique(seen[0], axis=0)) > 1
    assert not np.array_equal(seen[0], seen[1])


def test_finetune(recipe, small_mnist):
    checkpoint = ["--checkpoint", "pretrained.msgpack"]
    pretrained = run(load("mlp_flax"), small_mnist, *TRAIN, *checkpoint)
    module = recipe("finetune")
    options = ["--pretrained", "pretrained.msgpack", "--learning-rate", 0.01]
    start = run(module, small_mnist, *options, "--max-steps", 0)
    assert equal(start.state.params, pretrained.state.params)
    end = train(module, small_mnist, *options)
    for name, layer in end.state.params.items():
        assert equal(layer, pretrained.state.params[name]) == (name == "layers_0")
    assert end.accuracy > pretrained.accuracy - 0.05


def test_best(recipe, small_mnist, monkeypatch):
    module = recipe("best")
    tested, real = [], module.eval_model

    def spy(state, loader):
        if len(loader.dataset) == 300:
            tested.append(leaves(state))
        return real(state, loader)

    monkeypatch.setattr(module, "eval_model", spy)
    options = [*TRAIN, "--learning-rate", 0.03, "--eval-every", 4]
    result = run(module, small_mnist, *options, "--checkpoint", "run.msgpack")
    assert result.lines[0] == "data: MNIST, 533 training and 300 test images"
    assert len(tested) == 1, "the test set is looked at once"
    accuracies = re.findall(r"validation accuracy (\S+)%", "\n".join(result.lines))
    best = np.argmax(np.float64(accuracies))  # the first, if there are several
    assert best < len(accuracies) - 1, "a run whose last state is not the best"
    # Each evaluation looks at the training set, then at the validation set.
    assert equal(tested[0], result.evaluated[2 * best])
    read = module.serialization.msgpack_restore
    saved = read((module.Path("run.best.msgpack")).read_bytes())["state"]
    assert saved["step"] == 4 * (best + 1)

    with pytest.raises(SystemExit):
        module.main(["--data-dir", str(small_mnist)])


def test_best_resumes(recipe, small_mnist):
    module = recipe("best")
    options = [*TRAIN, "--learning-rate", 0.03, "--eval-every", 4, "--checkpoint"]
    whole = run(module, small_mnist, *options, "whole")
    run(module, small_mnist, *options, "parts", "--max-steps", 20)
    parts = run(module, small_mnist, *options, "parts")
    assert parts.lines[-1] == whole.lines[-1]
    for suffix in ("", ".best.msgpack"):
        read = [module.Path(name + suffix).read_bytes() for name in ("whole", "parts")]
        assert read[0] == read[1]


def test_export(recipe, small_mnist):
    module = recipe("export")
    state = train(module, small_mnist).state
    weights = dict(np.load("mlp.npz"))
    layers = []
    for i in range(3):
        kernel, bias = weights[f"layers_{i}.kernel"], weights[f"layers_{i}.bias"]
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data = torch.from_numpy(kernel.T.copy())
        linear.bias.data = torch.from_numpy(bias)
        layers += [linear, torch.nn.ReLU()]
    x, _ = arrays(common.load_mnist(small_mnist)[1])
    theirs = torch.nn.Sequential(*layers[:-1])(torch.from_numpy(x)).detach().numpy()
    ours = state.apply_fn({"params": state.params}, x)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


def test_log(recipe, small_mnist):
    result = train(recipe("log"), small_mnist)
    with open("log.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) == len(result.log) == 4
    for record_, line in zip(records, result.log):
        assert record_["epoch"] == int(line["epoch"])
        assert record_["step"] == int(line["step"])
        assert record_["loss"] == pytest.approx(float(line["loss"]), abs=1e-4)
        for split in ("train", "test"):
            assert f"{record_[f'{split}_accuracy']:.2%}" == f"{line[split]}%"


def test_scan(recipe, small_mnist):
    """40 steps, in calls of 25, 5 and 10: an evaluation is due after step 30."""
    module = recipe("scan")
    options = ["--epochs", 2, "--batch-size", 32, "--eval-every", 30]
    plain = run(load("mlp_flax"), small_mnist, *options)
    calls, real = [], module.train_steps

    def spy(state, x, y):
        calls.append(len(x))
        return real(state, x, y)

    module.train_steps = spy
    scanned = run(module, small_mnist, *options, "--checkpoint", "whole")
    assert calls == [25, 5, 10]
    assert [line["step"] for line in scanned.log] == ["30", "40"]
    for a, b in zip(plain.log, scanned.log, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-4)
    for a, b in zip(leaves(plain.state), leaves(scanned.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    for last in ("13", "40"):
        parts = [*options, "--max-steps", last, "--checkpoint", "parts"]
        resumed = run(module, small_mnist, *parts)
    assert equal(resumed.state, scanned.state)


# A run that says which rows of the first batch each device gets.
WATCHED = """
import os, sys
import jax
if "SLURM_JOB_ID" in os.environ:
    jax.distributed.initialize()
import mlp_flax
train_step = mlp_flax.train_step
def watched(state, x, y):
    mlp_flax.train_step = train_step
    for x_shard, y_shard in zip(x.addressable_shards, y.addressable_shards):
        assert len(x_shard.data) == len(y_shard.data) == len(x) // jax.device_count()
        print("rows", y_shard.index[0].start or 0, y_shard.data.tolist(), file=sys.stderr)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    return train_step(state, x, y)
mlp_flax.train_step = watched
mlp_flax.main()
"""
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def start(directory, program, options, **environment):
    """Start a program; NPROC makes XLA take this machine for a larger one."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, options)],
        cwd=directory,
        env={**os.environ, "NPROC": "8", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_process():
    return [FOUR_DEVICES]


def two_processes():
    """The environments of two processes, as Slurm sets them."""
    with socket.socket() as free:  # JAX derives its port from the number of the job
        free.bind(("127.0.0.1", 0))
        job = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    slurm["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    return [{**slurm, "SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01"]


@pytest.mark.parametrize(
    ("environments", "devices"), [(one_process, 4), (two_processes, 2)]
)
def test_devices(environments, devices, small_mnist, tmp_path):
    apply(tmp_path, "devices")
    options = ["--epochs", 2, "--batch-size", 64, "--eval-every", 4]
    with record(load("mlp_flax")) as steps:
        one = run(load("mlp_flax"), small_mnist, *options)
    options = ["--data-dir", small_mnist, *options, "--checkpoint", tmp_path / "saved"]
    started = [start(tmp_path, WATCHED, options, **env) for env in environments()]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs

    # Each device gets its own rows, and together they get the batch.
    stderr = "\n".join(err for _, err in outputs)
    rows = dict(re.findall(r"rows (\d+) \[(.*)\]", stderr))
    assert len(rows) == devices
    given = [rows[row].split(", ") for row in sorted(rows, key=int)]
    assert [int(y) for part in given for y in part] == steps[0].y.tolist()

    (lines, *silent) = [
        [line for line in out.splitlines() if "Gloo" not in line] for out, _ in outputs
    ]
    assert not any(silent), "one process prints"
    log = [match.groupdict() for match in map(LINE.fullmatch, lines) if match]
    assert [line["step"] for line in log] == [line["step"] for line in one.log]
    for ours, theirs in zip(log, one.log):
        # The log has four digits, so two runs 1e-4 apart can differ by 2 of the last.
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=2.01e-4)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "names", [("clip", "adamw", "cnn"), ("scan", "bfloat16")], ids="+".join
)
def test_recipes_together(names, recipe, small_mnist):
    train(recipe(*names), small_mnist)


def test_devices_with_bfloat16_and_a_batch_that_does_not_divide(small_mnist, tmp_path):
    apply(tmp_path, "devices", "bfloat16")
    program = """
import sys, mlp_flax
mlp_flax.main(sys.argv[1:])
mlp_flax.main([*sys.argv[1:], "--batch-size", "30"])
"""
    process = start(
        tmp_path, program, ["--data-dir", small_mnist, *TRAIN], **FOUR_DEVICES
    )
    stdout, stderr = process.communicate()
    assert float(re.search(r"final test accuracy: (.*)% \(MNIST\)\n", stdout)[1]) > 50
    assert process.returncode == 2
    assert "argument --batch-size: not a multiple of 4 devices" in stderr
