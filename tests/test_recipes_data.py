"""Recipes for the data, the model and the export of its weights."""

import pickle
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import (
    assert_close,
    assert_resumes,
    draw,
    equal,
    error_of,
    run,
    start,
    write_mnist,
)
from PIL import Image
from torchvision.datasets import FashionMNIST

import common

# 40 steps on small_mnist, 10 an epoch.
TRAIN = ["--epochs", 4, "--batch-size", 64, "--eval-every", 15]


# The model.


def linear(weights, layer):
    kernel, bias = weights[f"{layer}.kernel"], weights[f"{layer}.bias"]
    module = torch.nn.Linear(*kernel.shape)
    module.weight.data = torch.from_numpy(kernel.T)
    module.bias.data = torch.from_numpy(bias)
    return module


def conv(weights, layer):
    kernel, bias = weights[f"{layer}.kernel"], weights[f"{layer}.bias"]
    module = torch.nn.Conv2d(*kernel.shape[2:], kernel_size=3, stride=2)
    module.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1))
    module.bias.data = torch.from_numpy(bias)
    return module


def test_export(recipe, small_mnist, batch):
    """The network in PyTorch, read as the introduction says, has the same logits."""
    state = run(recipe("export"), small_mnist, *TRAIN).state
    weights = np.load("weights.npz")
    hidden = torch.from_numpy(batch[0])
    for layer in ("layers_0", "layers_1"):
        hidden = linear(weights, layer)(hidden).relu()
    logits = linear(weights, "layers_2")(hidden).detach().numpy()
    ours = jax.jit(state.apply_fn)({"params": state.params}, batch[0])
    assert_close(logits, ours, 1e-3, 1e-4)


def test_cnn_and_its_export(recipe, small_mnist, batch):
    """Also with other recipes, for one run."""
    module = recipe("cnn", "augment", "weighted", "log", "export")
    result = run(module, small_mnist, *TRAIN)
    assert result.accuracy > 0.3
    assert not hasattr(module, "MLP")
    state = result.state
    shapes = [layer["kernel"].shape for layer in state.params.values()]
    assert shapes == [(3, 3, 1, 32), (3, 3, 32, 64), (7 * 7 * 64, 10)]
    init = jax.jit(module.CNN(num_classes=3).init_with_output)
    logits, _ = init(jax.random.key(0), batch[0])
    assert logits.shape == (40, 3)

    weights = np.load("weights.npz")
    hidden = torch.from_numpy(batch[0]).reshape(-1, 1, 28, 28)
    for layer in ("layers_0", "layers_1"):
        padded = torch.nn.functional.pad(hidden, (0, 1, 0, 1))
        hidden = conv(weights, layer)(padded).relu()
    flat = hidden.permute(0, 2, 3, 1).flatten(1)
    logits = linear(weights, "layers_2")(flat).detach().numpy()
    ours = jax.jit(state.apply_fn)({"params": state.params}, batch[0])
    assert_close(logits, ours, 1e-3, 1e-4)


def test_export_of_bfloat16_parameters(recipe, small_mnist, monkeypatch):
    module = recipe("export")
    create = module.create_train_state

    def create_in_bfloat16(*arguments):
        state = create(*arguments)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.params)
        return state.replace(params=params)

    monkeypatch.setattr(module, "create_train_state", create_in_bfloat16)
    run(module, small_mnist, "--max-steps", 0)
    assert {array.dtype.name for array in np.load("weights.npz").values()} == {
        "float32"
    }


# The data.


def test_fashion(recipe, plain, small_mnist, tmp_path, monkeypatch):
    """FashionMNIST's files have MNIST's form: with MNIST's, the run is the same."""
    module, decoded = recipe("fashion"), []
    shutil.copytree(small_mnist / "MNIST", tmp_path / "FashionMNIST")
    read = FashionMNIST.__getitem__

    def count_and_read(dataset, index):
        decoded.append(index)
        return read(dataset, index)

    monkeypatch.setattr(FashionMNIST, "__getitem__", count_and_read)
    result = run(module, tmp_path, *TRAIN)
    assert equal(result.state, plain.state)
    assert result.accuracy == plain.accuracy
    assert result.lines[0].startswith("run: FashionMNIST, 650 training images, ")
    assert len(decoded) <= 650 + 650 + 2  # list() also asks for one past the end


def test_augment(recipe, plain, small_mnist):
    result = assert_resumes(recipe("augment"), small_mnist, *TRAIN)
    assert result.accuracy > 0.3
    assert not equal(result.state, plain.state)
    assert "shifted by up to 2 pixels" in result.lines[0]


def test_augment_shifts_without_wrap_around(recipe):
    module = recipe("augment")
    keys = jax.random.split(jax.random.key(0), 300)
    shift = jax.jit(jax.vmap(module.random_shift, (0, None)))
    for (row, column), rows, columns in (
        ((10, 15), range(8, 13), range(13, 18)),
        ((0, 27), range(3), range(25, 28)),
    ):
        image = jnp.zeros((28, 28)).at[row, column].set(1)
        shifted = np.asarray(shift(keys, image.ravel())).reshape(-1, 28, 28)
        _, *pixels = np.nonzero(shifted)
        assert set(zip(*pixels)) == {(r, c) for r in rows for c in columns}


def test_augment_shifts_each_image_and_each_step_anew(recipe, batch):
    module, seen = recipe("augment"), []

    def apply_fn(variables, x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x)
        return x[:, :10]

    state = module.TrainState.create(apply_fn=apply_fn, params={}, tx=optax.identity())
    images = np.tile(batch[0][0], (8, 1))
    for _ in range(2):
        state, _ = module.train_step(state, images, batch[1][:8], jax.random.key(0))
        jax.effects_barrier()
    assert len(np.unique(seen[0], axis=0)) > 1
    assert not np.array_equal(seen[0], seen[1])


def test_weighted(recipe, tmp_path):
    """Five classes are ten times as frequent as the others; drawn, all are equal."""
    images, labels = draw(1300, seed=2)
    keep = np.flatnonzero((labels < 5) | (np.arange(1300) % 10 == 0))[:650]
    write_mnist(tmp_path, (images[keep], labels[keep]), draw(650, seed=3))
    result = assert_resumes(recipe("weighted"), tmp_path, *TRAIN, record=True)
    counts = np.bincount(np.concatenate([step.y for step in result.steps]))
    assert counts.sum() > 2000
    expected = counts.sum() / 10
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert "classes drawn equally often" in result.lines[0]


def test_weighted_epochs_differ(recipe, batch):
    sampler = recipe("weighted").BalancedSampler(list(zip(*batch)), jax.random.key(0))
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.start_at(0, skip=5)
    assert [list(sampler), list(sampler)] == [first[5:], second]


# Image folders.


def make_folders(directory):
    """Images of many sizes in a folder for each class, which is their color."""
    for split, n in (("train", 60), ("test", 10)):
        for color in ("blue", "green", "red"):
            folder = directory / split / color
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20 + i, 30), color).save(folder / f"{i}.png")


def test_image_folder(recipe, tmp_path, monkeypatch):
    """Without the workers, which take long to start, but with what they are given."""
    module, decoded, workers = recipe("image-folder"), Counter(), []
    make_folders(tmp_path)
    read = module.ImageFolder.__getitem__

    def count_and_read(dataset, index):
        decoded[dataset.samples[index][0]] += 1
        return read(dataset, index)

    def loader(dataset, *args, num_workers=0, persistent_workers=0, **options):
        pickle.loads(pickle.dumps((dataset, options.get("worker_init_fn"))))
        workers.append(num_workers)
        return common.NumpyLoader(dataset, *args, **options)

    monkeypatch.setattr(module.ImageFolder, "__getitem__", count_and_read)
    monkeypatch.setattr(module, "NumpyLoader", loader)
    options = ["--epochs", 3, "--eval-every", 7, "--checkpoint"]
    result = run(module, ".", *options, "checkpoint")
    description = f"run: '{tmp_path.name}', 180 training images, 64 pixels, classes "
    assert result.lines[0].startswith(f"{description}['blue', 'green', 'red'], ")
    assert result.lines[-1] == f"final test accuracy: 100.00% ('{tmp_path.name}')"
    assert workers[0] > 0 and workers[1:] == [0, 0]
    # 15 steps of 32 images, and each once for the training accuracy.
    train = [n for path, n in decoded.items() if "train" in Path(path).parts]
    assert sum(train) == 15 * 32 + 180


def test_image_folder_takes_examples_of_all_classes(recipe, tmp_path, monkeypatch):
    module, datasets = recipe("image-folder"), []
    make_folders(tmp_path)

    def loader(dataset, *arguments, **options):
        datasets.append(dataset)
        return common.NumpyLoader(dataset, *arguments, **options)

    monkeypatch.setattr(module, "NumpyLoader", loader)
    for _ in range(2):
        run(module, ".", "--train-examples", 20, "--batch-size", 20, "--max-steps", 0)
    assert list(datasets[0].indices) == list(datasets[3].indices)
    for dataset in datasets[:2]:  # for training, and for the training accuracy
        assert len(dataset) == 20
        assert {y for _, y in dataset} == {0, 1, 2}


def test_image_folder_refuses_other_classes(recipe, tmp_path):
    main, argv = recipe("image-folder").main, ["--data-dir", "."]
    assert "train" in error_of(main, argv)  # is missing
    make_folders(tmp_path)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "pink")
    train, test = ["blue", "green", "red"], ["blue", "green", "pink"]
    assert error_of(main, argv) == f"error: classes {train} in train, {test} in test"

    hidden = tmp_path / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    assert hidden.name in error_of(main, argv)  # is empty
    shutil.copy(tmp_path / "train" / "red" / "0.png", hidden)
    train = [hidden.name, *train]
    assert error_of(main, argv) == f"error: classes {train} in train, {test} in test"


def test_load_image(recipe):
    module = recipe("image-folder")
    Image.new("RGBA", (50, 40), (255, 0, 51, 7)).save("alpha.png")
    image = module.load_image("alpha.png")
    assert (image.shape, image.dtype) == ((64, 64, 3), np.float32)
    assert_close(image, np.broadcast_to(np.float32([1, 0, 0.2]), (64, 64, 3)))

    exif = Image.Exif()
    exif[0x0112] = 3  # the orientation: upside down
    upside_down = Image.new("L", (50, 40))
    upside_down.paste(255, (0, 20, 50, 40))  # white below
    upside_down.save("rotated.png", exif=exif)
    image = module.load_image("rotated.png")
    assert image[:20].min() == 1 and image[-20:].max() == 0

    for mode, name in (("I;16", "a.png"), ("I", "a.tif"), ("F", "b.tif")):
        Image.new(mode, (50, 40)).save(name)
        with pytest.raises(ValueError, match=f"{name} has mode I?F?"):
            module.load_image(name)


@pytest.mark.slow
def test_image_folder_leaves_no_worker_behind(recipe, tmp_path):
    recipe("image-folder")
    make_folders(tmp_path)
    options = ["--data-dir", ".", "--epochs", 10**6, "--eval-every", 1]
    process = start("mlp_flax.py", *options)
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)  # the pipes end with the last process that has them


# Another target.


def test_regression(recipe, small_mnist, monkeypatch):
    """A target with mean 100 and standard deviation 4, on the training set."""
    module = recipe("regression")

    train_set, test_set, _ = common.load_mnist(small_mnist)
    ink = np.array([x.mean() for x, _ in train_set])  # the target, scaled

    def with_targets(pairs):
        return [(x, 100 + 4 * (x.mean() - ink.mean()) / ink.std()) for x, _ in pairs]

    train_set, test_set = with_targets(train_set), with_targets(test_set)
    monkeypatch.setattr(module, "load_mnist", lambda _: (train_set, test_set, "ink"))
    result = run(module, small_mnist, *TRAIN, "--learning-rate", 0.003)
    assert_close([result.state.target_mean, result.state.target_std], [100, 4])
    x, y = common.numpy_collate(test_set)
    predictions = np.asarray(module.apply_model(result.state, x))
    assert predictions.shape == (650,)
    assert module.apply_model(result.state, x[:1]).shape == (1,)
    rmse = np.sqrt(np.mean((predictions - y) ** 2))
    assert rmse < 2
    assert result.accuracy == pytest.approx(rmse, rel=1e-4)
    assert result.lines[-1] == f"final test RMSE: {result.accuracy:.4f} (ink)"
    assert f"test RMSE {result.accuracy:.4f}" in result.lines[-2]

    column = [(x, np.array([y])) for x, y in test_set]  # targets (N, 1) would broadcast
    refused = pytest.raises((AssertionError, ValueError))
    with refused:
        module.eval_model(result.state, common.NumpyLoader(column, batch_size=64))
    with refused:
        module.train_step(result.state, x, y[:, None])
