"""The loader of common.py: NumPy batches, order by key, DataLoader's promises."""

from collections import namedtuple
from itertools import islice

import jax
import numpy as np
import pytest
import torch
from torch.utils import data
from torch.utils.data import DataLoader

from common import FlattenAndCast, JAXRandomSampler, NumpyLoader, numpy_collate

# Workers import this file and must not compute with JAX, so no key is made here.
Point = namedtuple("Point", ["x", "y"])
TENSORS = data.TensorDataset(torch.arange(10), torch.ones(10, 3))
DICTS = [{"image": np.full(3, i), "points": [Point(i, 2 * i)]} for i in range(10)]


class Stream(data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Memory(list):
    """Each sample is its index and the history of the process that loaded it.

    A forked worker would inherit that of this process; a spawned one imports it anew.
    """

    events = "new"

    def __getitem__(self, i):
        return i, Memory.events


def note_worker(worker_id):
    Memory.events += f", worker {worker_id}"


def shuffled(dataset, batch_size=1, **options):
    key = jax.random.key(7)
    return NumpyLoader(dataset, key, batch_size, shuffle=True, **options)


def as_lists(batches, count=None):
    return [batch.tolist() for batch in islice(batches, count)]


# Samples become batches.


@pytest.mark.parametrize(
    "value",
    [3, 1.5, True, np.float16(3), np.ones((2, 3), "uint8"), torch.ones(2, 3)],
)
def test_numbers_arrays_and_tensors_keep_their_dtype(value):
    batch, array = numpy_collate([value, value]), np.asarray(value)
    assert type(batch) is np.ndarray
    assert (batch.shape, batch.dtype) == ((2, *array.shape), array.dtype)
    assert np.array_equal(batch[1], array)


def test_structure_of_a_sample_is_kept():
    sample = {"point": Point(1, [2, 3]), "tuple": (4, {"flag": True})}
    batch = numpy_collate([sample, sample])
    assert jax.tree.structure(batch) == jax.tree.structure(sample)
    assert batch["point"].y[1].tolist() == [3, 3]
    assert batch["tuple"][1]["flag"].tolist() == [True, True]


@pytest.mark.parametrize("other", [(1,), [1, 2], (1, (2, 3)), (1, np.ones(3))])
def test_samples_that_differ_in_structure_or_shape_are_refused(other):
    with pytest.raises(ValueError):
        numpy_collate([(1, 2), other])


def test_collate_fn_gets_a_list_of_samples():
    samples = [("a", 0), ("b", 1), ("c", 2)]
    (batch,) = NumpyLoader(samples, batch_size=3, collate_fn=lambda batch: batch)
    assert batch == samples


def test_code_of_the_article(small_mnist):
    from torchvision.datasets import MNIST  # not above, where workers would wait for it

    mnist_dataset = MNIST(small_mnist, download=True, transform=FlattenAndCast())
    loader_key = jax.random.PRNGKey(0)
    training_generator = NumpyLoader(
        mnist_dataset,
        loader_key,
        batch_size=32,
        shuffle=True,
        num_workers=0,
        collate_fn=numpy_collate,
        drop_last=True,
    )
    assert len(list(training_generator)) == len(training_generator) == 20
    for x, y in training_generator:
        assert (x.shape, x.dtype) == ((32, 784), np.float32)
        assert (y.shape, type(y)) == ((32,), np.ndarray)


# What works with DataLoader works here, or raises.


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        DICTS,
        data.StackDataset(x=range(10), y=TENSORS),
        data.ConcatDataset([TENSORS, TENSORS]),
        data.Subset(DICTS, [3, 1, 2]),
        data.random_split(TENSORS, [4, 6])[1],
        Stream(),
    ],
)
def test_dataset_is_loaded_as_by_dataloader(dataset):
    ours, theirs = list(NumpyLoader(dataset)), list(DataLoader(dataset))
    for batch, expected in zip(ours, theirs, strict=True):
        for array, tensor in zip(*map(jax.tree.leaves, (batch, expected)), strict=True):
            assert type(array) is np.ndarray
            assert np.array_equal(array, tensor)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 4, "drop_last": True},
        {"batch_size": 4, "pin_memory": True},
        {"batch_size": 4, "collate_fn": data.default_collate},
        {"sampler": [5, 3, 8]},
        {"sampler": data.DistributedSampler(range(10), num_replicas=2, rank=1)},
        {"batch_sampler": [[1, 2], [0], [7, 8, 9]]},
    ],
)
def test_option_works_as_with_dataloader(options):
    ours, theirs = NumpyLoader(range(10), **options), DataLoader(range(10), **options)
    assert len(ours) == len(theirs)
    assert as_lists(ours) == as_lists(theirs)
    assert as_lists(ours) == as_lists(theirs), "the second epoch"


def test_key_and_shuffle_need_each_other():
    """The usual mistake: DataLoader's second argument is the batch size."""
    with pytest.raises(ValueError, match="shuffle=False and rng_key=32"):
        NumpyLoader(range(100), 32)
    with pytest.raises(ValueError, match="shuffle=True and rng_key=None"):
        NumpyLoader(range(100), shuffle=True)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (range(9), {"sampler": [0]}),
        (range(9), {"batch_sampler": [[0]]}),
        (Stream(), {}),
    ],
)
def test_shuffle_excludes_another_order(dataset, options):
    with pytest.raises((TypeError, ValueError)):
        shuffled(dataset, **options)


def test_workers_are_spawned_and_compute_nothing_with_jax(monkeypatch):
    monkeypatch.setattr(Memory, "events", "forked")
    monkeypatch.setenv("JAX_PLATFORMS", "none")  # a worker that computes fails
    options = {"worker_init_fn": note_worker, "prefetch_factor": 3}
    loader = shuffled(Memory(range(23)), 4, num_workers=1, **options)
    batches = list(loader)
    assert as_lists(i for i, _ in batches) == as_lists(shuffled(range(23), 4))
    assert {event for _, events in batches for event in events} == {"new, worker 0"}


def test_torchs_random_numbers():
    """Loading draws none, so evaluating does not change random transforms."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for loader in (NumpyLoader(range(3)), shuffled(range(3))):
        list(loader)
        assert loader.generator.initial_seed() == 3, "workers ignore torch's seed"
    assert torch.equal(torch.get_rng_state(), before)

    mine = torch.Generator()
    assert NumpyLoader(range(3), generator=mine).generator is mine


# The order, and a run that goes on where it was stopped.


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_order_is_jaxs_permutation_for_the_key_and_the_epoch(make_key):
    sampler = JAXRandomSampler(range(23), make_key(7))
    keys = [jax.random.fold_in(jax.random.key(7), epoch) for epoch in range(3)]
    orders = [jax.random.permutation(key, 23).tolist() for key in keys]
    assert [list(sampler) for _epoch in range(3)] == orders
    sampler.start_at(epoch=1, skip=9)
    assert [list(sampler), list(sampler)] == [orders[1][9:], orders[2]]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 6, 13])
def test_batches_from_a_step_are_those_of_a_run_that_never_stopped(step, drop_last):
    loader = shuffled(range(23), 5, drop_last=drop_last)
    whole = [batch for _epoch in range(4) for batch in as_lists(loader)]
    assert {len(batch) for batch in whole} == ({5} if drop_last else {5, 3})
    assert as_lists(loader.batches_from(step), len(whole) - step) == whole[step:]


def test_batches_from_with_an_order_of_ones_own():
    class Backwards(JAXRandomSampler):
        def __iter__(self):
            return reversed(list(super().__iter__()))

    loader = NumpyLoader(range(23), sampler=Backwards(range(23), jax.random.key(7)))
    whole = as_lists(loader) + as_lists(loader)
    assert as_lists(loader.batches_from(23), 23) == whole[23:]


def test_skipped_examples_are_not_loaded():
    loaded = []
    loader = shuffled(range(23), 4, collate_fn=loaded.extend)
    next(loader.batches_from(8))  # an epoch has 6 batches
    assert len(loaded) == 4


def test_iterations_of_one_loader_do_not_disturb_each_other():
    loader = shuffled(range(23), 12)
    undisturbed = as_lists(loader.batches_from(0), 8)
    batches, others = loader.batches_from(0), loader.batches_from(3)
    disturbed = []
    for _ in range(8):
        disturbed += as_lists(batches, 1)
        list(loader)
        next(others)
    assert disturbed == undisturbed
