"""common.py: what the loader yields, and in which order."""

from collections import namedtuple

import jax
import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import Subset

import common
from common import FlattenAndCast, JAXRandomSampler, NumpyLoader, numpy_collate

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
        assert np.issubdtype(y.dtype, np.integer)
        for image, label in zip(x, y):
            their_image, their_label = theirs[i]
            assert np.array_equal(image, their_image.numpy().ravel())
            assert label == their_label
            i += 1
    assert i == len(theirs)


def test_transform_takes_pil_images_and_bytes_alike():
    image = common.draw_digits(1, seed=0).images[0]
    pil = torchvision.transforms.functional.to_pil_image(image)
    expected = torchvision.transforms.functional.to_tensor(pil).numpy().ravel()
    for picture in (pil, image, torch.from_numpy(image)):
        vector = FlattenAndCast()(picture)
        assert (vector.shape, vector.dtype) == ((784,), np.float32)
        assert np.array_equal(vector, expected)


def test_fast_path_equals_example_by_example():
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
    again.sampler.set_epoch(0)
    assert epochs_of(again) == [first]
    other = NumpyLoader(range(100), jax.random.key(8), batch_size=7, shuffle=True)
    assert epochs_of(other) != [first]


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


def test_without_shuffle_the_order_is_the_datasets():
    assert epochs_of(NumpyLoader(range(10), batch_size=4), 2) == [list(range(10))] * 2


def test_shuffle_needs_a_key():
    with pytest.raises(ValueError, match="rng_key"):
        NumpyLoader(range(10), shuffle=True)


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


def test_drawn_digits_follow_from_their_seed():
    a, b, c = (common.draw_digits(200, seed) for seed in (0, 0, 1))
    assert np.array_equal(a.images, b.images)
    assert np.array_equal(a.labels, b.labels)
    assert not np.array_equal(a.images, c.images)
    assert set(a.labels) == set(range(10))
    assert (a.images.max(axis=(1, 2)) > 128).all(), "no image is blank"
