"""common.py, the bridge: what the loader yields, in which order, from which datasets."""

import os
from collections import namedtuple
from itertools import islice

import jax
import numpy as np
import pytest
import torch
import torchvision
from helpers import Squares
from torch.utils.data import DataLoader, Subset, TensorDataset

import common
from common import (
    ArrayDataset,
    FlattenAndCast,
    JAXRandomSampler,
    NumpyLoader,
    numpy_collate,
)

KEY = jax.random.key(7)
Point = namedtuple("Point", ["x", "y"])


def epochs_of(loader, count=1):
    return [np.concatenate(list(loader)).tolist() for _ in range(count)]


@pytest.mark.parametrize("data_dir", ["small_mnist", "real_mnist"])
@pytest.mark.parametrize("train", [True, False])
def test_batches_equal_torchvision_image_by_image(data_dir, train, request):
    data_dir = request.getfixturevalue(data_dir)
    ours = common.load_mnist(data_dir)[0 if train else 1]
    theirs = torchvision.datasets.MNIST(
        data_dir, train=train, transform=torchvision.transforms.ToTensor()
    )
    assert len(ours) == len(theirs)
    i = 0
    for x, y in NumpyLoader(ours, batch_size=500):
        assert (x.shape, x.dtype) == ((len(y), 784), np.float32)
        assert y.dtype == np.int32
        for image, label in zip(x, y):
            their_image, their_label = theirs[i]
            assert np.array_equal(image, their_image.numpy().ravel())
            assert label == their_label
            i += 1
    assert i == len(theirs)


def test_transform_takes_pil_images_bytes_and_batches_alike():
    images = common.draw_digits(3, seed=0).images
    pil = torchvision.transforms.functional.to_pil_image(images[0])
    expected = torchvision.transforms.functional.to_tensor(pil).numpy().ravel()
    for picture in (pil, images[0], torch.from_numpy(images[0])):
        vector = FlattenAndCast()(picture)
        assert (vector.shape, vector.dtype) == ((784,), np.float32)
        assert np.array_equal(vector, expected)
    batch = FlattenAndCast()(images)
    assert (batch.shape, batch.dtype) == ((3, 784), np.float32)
    assert np.array_equal(batch[0], expected)


def test_one_indexing_equals_example_by_example():
    fast = common.draw_digits(50, seed=0)
    slow = [fast[i] for i in range(50)]  # a list is a map-style dataset, too
    for a, b in zip(
        NumpyLoader(fast, KEY, batch_size=8, shuffle=True),
        NumpyLoader(slow, KEY, batch_size=8, shuffle=True),
        strict=True,
    ):
        assert type(a) is type(b) is tuple
        for left, right in zip(a, b, strict=True):
            assert left.dtype == right.dtype
            assert np.array_equal(left, right)


def test_a_batch_is_cut_by_one_call_of_the_transform():
    calls = []
    digits = common.draw_digits(20, seed=0)
    dataset = ArrayDataset(
        digits.images, digits.labels, lambda x: calls.append(x.shape) or x
    )
    assert len(list(NumpyLoader(dataset, batch_size=10))) == 2
    assert calls == [(10, 28, 28)] * 2


def test_every_example_once_an_epoch_in_an_order_of_its_own():
    loader = NumpyLoader(range(100), KEY, batch_size=7, shuffle=True)
    first, second, third = epochs_of(loader, 3)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(100))
    assert len({tuple(order) for order in (first, second, third, range(100))}) == 4


def test_key_and_epoch_decide_the_order():
    loader = NumpyLoader(range(100), KEY, batch_size=7, shuffle=True)
    first, second = epochs_of(loader, 2)
    again = NumpyLoader(range(100), KEY, batch_size=7, shuffle=True)
    next(iter(again))  # an epoch that is begun and left
    assert epochs_of(again) == [second]
    again.sampler.epoch = 0
    assert epochs_of(again) == [first]
    other = NumpyLoader(range(100), jax.random.key(8), batch_size=7, shuffle=True)
    assert epochs_of(other) != [first]


def test_orders_are_uniform():
    """Each of the 24 orders of 4 examples comes about as often as the others."""
    sampler = JAXRandomSampler(range(4), KEY)
    counts = {}
    for _ in range(2400):
        order = tuple(sampler)
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 60  # chi-squared, 23


def test_sampler_takes_old_keys():
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    assert list(JAXRandomSampler(range(9), old)) == list(
        JAXRandomSampler(range(9), new)
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (4, False, [4, 4, 2]),
        (4, True, [4, 4]),
        (5, False, [5, 5]),
        (5, True, [5, 5]),
        (11, False, [10]),
    ],
)
def test_batch_sizes(batch_size, drop_last, sizes, shuffle):
    loader = NumpyLoader(
        range(10), KEY, batch_size, shuffle=shuffle, drop_last=drop_last
    )
    assert len(loader) == len(sizes)
    assert [len(batch) for batch in loader] == sizes


def test_defaults_are_those_of_dataloader():
    assert [batch.tolist() for batch in NumpyLoader(range(3))] == [[0], [1], [2]]
    doubled = NumpyLoader(range(3), collate_fn=lambda batch: 2 * batch[0])
    assert list(doubled) == [0, 2, 4]


def test_without_shuffle_the_order_is_the_datasets():
    assert epochs_of(NumpyLoader(range(10), batch_size=4), 2) == [list(range(10))] * 2


def test_shuffle_needs_a_key():
    with pytest.raises(ValueError, match="rng_key"):
        NumpyLoader(range(10), shuffle=True)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 13])
def test_batches_from_a_step_go_on_like_a_run_that_never_stopped(
    shuffle, drop_last, step
):
    def batches(start):
        loader = NumpyLoader(range(23), KEY, 5, shuffle=shuffle, drop_last=drop_last)
        return (batch.tolist() for batch in loader.batches_from(start))

    whole = list(islice(batches(0), 20))
    assert list(islice(batches(step), 20 - step)) == whole[step:]
    epoch = [i for batch in whole[:5] for i in batch]
    assert drop_last or sorted(epoch) == list(range(23))


def test_batches_do_not_care_who_else_iterates():
    loader = NumpyLoader(range(23), KEY, 5, shuffle=True)
    undisturbed = [batch.tolist() for batch in islice(loader.batches_from(0), 15)]
    disturbed = []
    for batch in islice(loader.batches_from(0), 15):
        disturbed.append(batch.tolist())
        list(loader)
    assert disturbed == undisturbed


def test_subset_keeps_its_indices():
    digits = common.draw_digits(50, seed=0)
    (x, y), *rest = NumpyLoader(Subset(digits, [40, 3, 17]), batch_size=3)
    assert not rest
    assert np.array_equal(y, digits.labels[[40, 3, 17]])
    assert np.array_equal(x, FlattenAndCast()(digits.images[[40, 3, 17]]))


def test_collate_keeps_the_structure():
    def sample(i):
        return {
            "image": torch.full((2, 2), float(i)),
            "point": Point(i, [np.float32(i), i]),
            "tuple": (i, {"flag": i > 0}),
        }

    batch = numpy_collate([sample(0), sample(1), sample(2)])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    assert batch["image"].shape == (3, 2, 2)
    assert batch["image"].dtype == np.float32
    assert isinstance(batch["point"], Point)
    assert isinstance(batch["point"].y, list)
    assert batch["point"].y[0].tolist() == [0.0, 1.0, 2.0]
    assert isinstance(batch["tuple"], tuple)
    assert batch["tuple"][1]["flag"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    "samples",
    [
        [np.zeros(2), np.zeros(3)],
        [(1, np.zeros(2)), (1, np.zeros((2, 1)))],
        [(1, 2), (1,)],
        [{"a": 1}, {"b": 1}],
    ],
)
def test_samples_that_cannot_be_stacked(samples):
    with pytest.raises(ValueError):
        list(NumpyLoader(samples, batch_size=2))


def test_torch_datasets():
    x = torch.arange(12.0).reshape(6, 2)
    (a, b), _ = NumpyLoader(TensorDataset(x, x[:, 0]), batch_size=3)
    assert isinstance(a, np.ndarray)
    assert np.array_equal(a, x[:3].numpy())
    assert np.array_equal(b, x[:3, 0].numpy())


def test_client_code_of_the_article(small_mnist):
    """Its loader call, word for word, and an epoch through it."""
    mnist = torchvision.datasets.MNIST(small_mnist, transform=FlattenAndCast())
    loader = NumpyLoader(
        mnist,
        jax.random.PRNGKey(0),
        batch_size=32,
        shuffle=True,
        num_workers=0,
        collate_fn=numpy_collate,
        drop_last=True,
    )
    assert isinstance(loader, DataLoader)
    batches = list(loader)
    assert len(batches) == 20
    assert {x.shape for x, _ in batches} == {(32, 784)}
    assert {x.dtype for x, _ in batches} == {np.dtype("float32")}
    assert {type(y) for _, y in batches} == {np.ndarray}


def test_workers_give_the_same_batches_without_a_fork(monkeypatch):
    jax.numpy.zeros(3).block_until_ready()  # JAX's threads run in this process
    assert Squares()[0]["jax"]
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork"))
    options = {"batch_size": 4, "shuffle": True}
    alone = NumpyLoader(Squares(), jax.random.key(0), **options)
    helped = NumpyLoader(Squares(), jax.random.key(0), num_workers=1, **options)
    workers = set()
    for _ in range(2):  # epochs
        for expected, batch in zip(alone, helped, strict=True):
            assert np.array_equal(expected["square"], batch["square"])
            assert expected["jax"].all()
            assert not batch["jax"].any(), "JAX runs in a worker"
        workers |= {worker.pid for worker in helped._iterator._workers}
    assert len(workers) == 1, "a worker lives as long as its loader"
