"""recipes/*.diff: each is applied as a user does, run, and looked at for its effect."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import STAGE_2, assert_close, equal, leaves, run
from PIL import Image

import common

ROOT = Path(__file__).parents[1]
TRAIN = ["--epochs", 4, "--batch-size", 64]  # 40 steps on small_mnist
X, Y = common.numpy_collate(common.draw_digits(64, seed=5))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that applies diffs to a copy, and returns mlp_flax.py as a module."""
    monkeypatch.chdir(tmp_path)
    for file in ("common.py", "mlp_flax.py"):
        shutil.copy(ROOT / file, tmp_path)

    def apply_and_import(*names):
        for name in names:
            command = ["git", "apply", ROOT / "recipes" / f"{name}.diff"]
            status = subprocess.run(command, check=False).returncode
            assert status == 0, "mlp_flax.py has changed: run recipes/update.py"
        spec = importlib.util.spec_from_file_location("mlp_recipe", "mlp_flax.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return apply_and_import


@pytest.fixture(scope="module")
def plain(small_mnist):
    """The run of mlp_flax.py without a recipe."""
    return run(STAGE_2, small_mnist, *TRAIN, "--eval-every", 5, record=True)


def train(module, data_dir, *options, record=False):
    """A run that has to learn, whatever the recipe changes."""
    result = run(module, data_dir, *TRAIN, *options, record=record)
    assert result.accuracy > 0.3
    return result


def ones_like(tree):
    return jax.tree.map(jnp.ones_like, tree)


def norm(tree):
    return np.sqrt(sum(np.square(leaf).sum() for leaf in leaves(tree)))


# All recipes.


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*.diff")), ids=lambda p: p.stem
)
def test_recipe_says_what_it_does_and_is_short(path):
    introduction, _, change = path.read_text().partition("\n@@")
    assert introduction.startswith(f"{path.stem}: ")
    longer = path.stem in ("image-folder", "best", "devices")
    changed_lines = re.findall(r"^[-+]\s*\S", change, re.MULTILINE)
    assert len(changed_lines) <= (25 if longer else 15)


def test_recipes_together(recipe, small_mnist):
    train(recipe("adamw", "bfloat16", "clip", "devices", "export"), small_mnist)
    assert Path("mlp.npz").exists()


def test_update_moves_a_diff_to_a_changed_script(tmp_path):
    """A copy of the repository, in which lines are added above a recipe's change."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    script = Path(shutil.copy(ROOT / "mlp_flax.py", tmp_path))
    diff = tmp_path / "recipes" / "clip.diff"
    before = diff.read_text()
    update = [sys.executable, tmp_path / "recipes" / "update.py"]
    for command in (["git", "init", "-q"], ["git", "add", "."], update):
        subprocess.run(command, cwd=tmp_path, check=True)
    assert diff.read_text() == before

    text = script.read_text().replace("Stage 2", "Line\n\nStage 2")
    script.write_text(text.replace("or steps_per_epoch", "or steps_per_epoch + 1"))
    for command in (update, ["git", "apply", diff]):
        subprocess.run(command, cwd=tmp_path, check=True)
    assert diff.read_text() != before
    assert "or steps_per_epoch + 1" in script.read_text()
    assert "clip_by_global_norm" in script.read_text()


# The optimizer.


def test_accumulate(recipe, small_mnist):
    result = train(recipe("accumulate"), small_mnist, record=True)
    kernels = [max(step.before, key=np.size) for step in result.steps]
    moved = [not np.array_equal(a, b) for a, b in pairwise(kernels)]
    assert moved == [(i + 1) % 4 == 0 for i in range(39)]
    # One more gradient completes a group of four: Adam then takes its last step.
    state = result.state
    last = state.opt_state._replace(mini_step=jnp.int32(3))
    updates, _ = jax.jit(state.tx.update)(ones_like(state.params), last, state.params)
    assert max(np.abs(leaf).max() for leaf in leaves(updates)) < 1e-4


def test_clip(recipe, small_mnist):
    state = train(recipe("clip"), small_mnist).state
    for size, expected in ((1e3, 1.0), (1e-6, 1e-6 * norm(ones_like(state.params)))):
        grads = jax.tree.map(lambda p: jnp.full_like(p, size), state.params)  # noqa: B023
        _, opt_state = jax.jit(state.tx.update)(grads, state.tx.init(state.params))
        mu = optax.tree_utils.tree_get(opt_state, "mu")  # 0.1 times what Adam is given
        np.testing.assert_allclose(norm(mu), 0.1 * expected, rtol=1e-3)


def test_adamw(recipe, small_mnist):
    """Without gradients, AdamW only decays the weights, by its learning rates."""
    module = recipe("adamw")
    train(module, small_mnist)
    state = module.create_train_state(jax.random.key(0), 0.1, 100)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    step = jax.jit(lambda state: state.apply_gradients(grads=zeros))
    weights = []
    for _ in range(102):
        weights.append(float(state.params["layers_0"]["kernel"][0, 0]))
        state = step(state)
    rates = np.array([1 - after / before for before, after in pairwise(weights)]) / 0.01
    assert rates[0] == 0
    cosine = 1e-5 + (0.1 - 1e-5) * (1 + np.cos(np.pi * np.arange(96) / 95)) / 2
    np.testing.assert_allclose(rates[5:], cosine, atol=1e-3)
    assert np.argmax(rates) == 5


def test_finetune(recipe, plain, small_mnist):
    module = recipe("finetune")
    STAGE_2.save_checkpoint(Path("pretrained.msgpack"), {}, plain.state)
    options = ["--pretrained", "pretrained.msgpack", "--learning-rate", 0.01]
    start = run(module, small_mnist, *options, "--max-steps", 0)
    assert equal(start.state.params, plain.state.params)
    end = train(module, small_mnist, *options)
    for name, layer in end.state.params.items():
        assert equal(layer, plain.state.params[name]) == (name == "layers_0")
    assert end.accuracy > plain.accuracy - 0.05


# The model, the data and the loss.


def test_bfloat16(recipe, small_mnist):
    module = recipe("bfloat16")
    state = train(module, small_mnist).state
    assert {leaf.dtype.name for leaf in leaves(state.params)} == {"float32"}
    params = {"params": state.params}
    logits, kept = module.MLP().apply(params, X, capture_intermediates=True)
    assert logits.dtype == jnp.float32
    for i in range(3):
        (output,) = kept["intermediates"][f"layers_{i}"]["__call__"]
        assert output.dtype == jnp.bfloat16


def test_cnn(recipe, small_mnist):
    state = train(recipe("cnn"), small_mnist).state
    shapes = {leaf.shape for leaf in leaves(state.params)}
    assert shapes >= {(3, 3, 1, 32), (3, 3, 32, 64), (7 * 7 * 64, 10)}


def test_fashion(recipe, plain, small_mnist, tmp_path):
    shutil.copytree(small_mnist / "MNIST", tmp_path / "FashionMNIST")
    result = train(recipe("fashion"), tmp_path)
    assert result.lines[0] == "data: FashionMNIST, 650 training and 300 test images"
    assert result.lines[-1].endswith("% (FashionMNIST)")
    assert equal(result.state, plain.state)  # the files are the same


def test_image_folder(recipe, tmp_path, monkeypatch, capsys):
    """Pictures of many sizes, the color of which is their folder and class."""
    module = recipe("image-folder")
    image = module.load_image(Image.new("RGB", (50, 40), (255, 0, 51)))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.float32)
    np.testing.assert_allclose(image[7, 9], [1, 0, 0.2])

    for split, n in (("train", 60), ("test", 10)):
        for color in ("blue", "green", "red"):
            folder = tmp_path / "colors" / split / color
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20 + i, 30), color).save(folder / f"{i}.png")
    # Workers import the module of the transform.
    shutil.copy("mlp_flax.py", "mlp_recipe.py")
    monkeypatch.syspath_prepend(tmp_path)
    result = run(module, "colors", "--epochs", 2)
    assert result.lines[0] == "data: colors, 180 training and 30 test images"
    assert result.lines[-1] == "final test accuracy: 100.00% (colors)"

    with pytest.raises(SystemExit):
        module.main(["--data-dir", "colors", "--train-examples", "1"])
    assert "argument --train-examples: " in capsys.readouterr().err


def test_regression(recipe, small_mnist):
    module = recipe("regression")
    result = run(module, small_mnist, *TRAIN)
    x, y = common.numpy_collate(common.load_mnist(small_mnist)[1])
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
    result = train(module, small_mnist, record=True)
    _, _, augment_key = jax.random.split(jax.random.key(0), 3)
    assert all(step.rest == (augment_key,) for step in result.steps)

    image = jnp.zeros((28, 28)).at[10, 15].set(1)
    keys = jax.random.split(jax.random.key(0), 300)
    shift = jax.jit(jax.vmap(module.random_shift, (0, None)))
    shifted = np.asarray(shift(keys, image.ravel()))
    positions = {divmod(int(i), 28) for i in shifted.argmax(axis=1)}
    assert positions == {(y, x) for y in range(8, 13) for x in range(13, 18)}

    # In a step, each image has a shift of its own, and another one at the next step.
    seen = []

    def spy(variables, x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x)
        return x[:, :10]

    state = module.TrainState.create(apply_fn=spy, params={}, tx=optax.identity())
    images = jnp.tile(image.reshape(1, 784), (8, 1))
    for _ in range(2):
        state, _ = module.train_step(state, images, Y[:8], augment_key)
    jax.effects_barrier()
    assert len(np.unique(seen[0], axis=0)) > 1
    assert not np.array_equal(seen[0], seen[1])


# What is kept and written.


def test_best(recipe, small_mnist, monkeypatch):
    """The accuracy on the validation set is made up: step 12 is the best."""
    module, tested = recipe("best"), []
    evaluate = module.eval_model

    def spy(state, loader):
        if len(loader.dataset) == 650 - 541:
            return 1 - abs(int(state.step) - 12) / 100
        if len(loader.dataset) == 300:
            tested.append(leaves(state))
        return evaluate(state, loader)

    monkeypatch.setattr(module, "eval_model", spy)
    options = [*TRAIN, "--eval-every", 4, "--checkpoint"]
    whole = run(module, small_mnist, *options, "whole", record=True)
    assert whole.lines[0] == "data: MNIST, 541 training and 300 test images"
    assert "validation accuracy 100.00%" in whole.lines[5]
    assert len(tested) == 1, "the test set was not looked at once"
    assert equal(tested[0], whole.steps[12].before)

    run(module, small_mnist, *options, "parts", "--max-steps", 16)
    parts = run(module, small_mnist, *options, "parts")
    assert parts.lines[-1] == whole.lines[-1]
    for suffix in ("", ".best.msgpack"):
        files = [Path(f"{name}{suffix}").read_bytes() for name in ("whole", "parts")]
        assert files[0] == files[1]
    with pytest.raises(SystemExit):  # --checkpoint is required
        module.main(["--data-dir", str(small_mnist)])


def test_export(recipe, small_mnist):
    state = train(recipe("export"), small_mnist).state
    weights, layers = np.load("mlp.npz"), []
    for i in range(3):
        kernel, bias = weights[f"layers_{i}.kernel"], weights[f"layers_{i}.bias"]
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data = torch.tensor(kernel.T)
        linear.bias.data = torch.tensor(bias)
        layers += [linear, torch.nn.ReLU()]
    theirs = torch.nn.Sequential(*layers[:-1])(torch.from_numpy(X)).detach().numpy()
    assert_close(theirs, state.apply_fn({"params": state.params}, X), 1e-3, 1e-4)


def test_log(recipe, small_mnist):
    result = train(recipe("log"), small_mnist)
    records = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert len(records) == 4
    for record, line in zip(records, result.log, strict=True):
        assert record["epoch"] == int(line["epoch"])
        assert record["step"] == int(line["step"])
        assert f"{record['loss']:.4f}" == line["loss"]
        for split in ("train", "test"):
            assert f"{record[f'{split}_accuracy']:.2%}" == f"{line[split]}%"


# How steps are made.


def test_scan(recipe, plain, small_mnist):
    """40 steps, in calls of 25, 5 and 10: an evaluation is due after step 30."""
    module, calls = recipe("scan"), []
    train_steps = module.train_steps

    def spy(state, x, y):
        calls.append(len(x))
        return train_steps(state, x, y)

    module.train_steps = spy
    options = [*TRAIN, "--eval-every", 30, "--checkpoint"]
    whole = run(module, small_mnist, *options, "whole")
    assert calls == [25, 5, 10]
    assert_close(whole.state, plain.state, 1e-3, 1e-5)
    for line, expected in zip(whole.log, (plain.log[5], plain.log[7]), strict=True):
        assert line["step"] == expected["step"]
        assert float(line["loss"]) == pytest.approx(float(expected["loss"]), abs=2e-4)
    run(module, small_mnist, *options, "parts", "--max-steps", 35)
    assert equal(run(module, small_mnist, *options, "parts").state, whole.state)


# A run that says which rows of the first batch each device gets.
WATCHED = """
import sys
import jax
jax.distributed.initialize()
import mlp_flax
train_step = mlp_flax.train_step
def watched(state, x, y):
    mlp_flax.train_step = train_step
    for x_rows, y_rows in zip(x.addressable_shards, y.addressable_shards):
        assert len(x_rows.data) == len(y_rows.data) == len(x) // jax.device_count()
        print("rows", y_rows.index[0].start or 0, y_rows.data.tolist(), file=sys.stderr)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    return train_step(state, x, y)
mlp_flax.train_step = watched
mlp_flax.main()
"""


def test_devices(recipe, plain, small_mnist, tmp_path):
    """Two processes, as Slurm starts them, with two devices each."""
    recipe("devices")
    options = [*TRAIN, "--eval-every", 5, "--max-steps", 10, "--checkpoint", "saved"]
    program = [sys.executable, "-c", WATCHED, "--data-dir", small_mnist]
    environment = {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX derives its port from this
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "NPROC": "8",  # makes XLA take this machine for a larger one
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = []
    for i in "01":
        process = {**os.environ, **environment, "SLURM_PROCID": i, "SLURM_LOCALID": i}
        command = [*program, *map(str, options)]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=process, **pipes))
    (stdout, stderr), (silent, more) = (p.communicate(timeout=300) for p in processes)
    assert [p.returncode for p in processes] == [0, 0], stderr + more
    # Gloo's own messages, from several threads, are broken anywhere.
    assert not re.search("data:|device:|parameters:|accuracy", silent), "both print"
    assert (tmp_path / "saved").exists()

    # Each device gets its own rows, and together they get the batch.
    rows = dict(re.findall(r"rows (\d+) \[(.*)\]", stderr + more))
    assert set(rows) == {"0", "16", "32", "48"}
    given = ", ".join(rows[start] for start in sorted(rows, key=int))
    assert given == str(plain.steps[0].y.tolist()).strip("[]")

    losses = re.findall(r"step (\d+)  loss (\S+)", stdout)
    for (step, loss), expected in zip(losses, plain.log[:2], strict=True):
        assert step == expected["step"]
        # The log has four digits, so two runs 1e-4 apart can differ by 2 of the last.
        assert float(loss) == pytest.approx(float(expected["loss"]), abs=2.01e-4)


def test_devices_refuse_another_batch_size(recipe, small_mnist, monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: 3 * jax.local_devices())
    with pytest.raises(SystemExit, match="^2$"):
        run(recipe("devices"), small_mnist, "--batch-size", 64)
    message = "argument --batch-size: not a multiple of 3 devices"
    assert message in capsys.readouterr().err
