"""The loader of common.py: NumPy batches, and every promise of torch's DataLoader kept."""

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


class Stream(data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Memory(list):
    """Each sample is its index and the history of the process that loaded it."""

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


# What makes no sense is refused at once.


def test_second_argument_is_not_a_key():
    keys = jax.random.split(jax.random.key(7))
    for wrong in (32, np.array([0, 7], np.uint32), jax.numpy.zeros(2), keys):
        with pytest.raises(TypeError, match="(?s)rng_key.*not a JAX key.*batch_size="):
            NumpyLoader(range(100), wrong, shuffle=True)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: NumpyLoader([1], shuffle=True), "rng_key"),
        (lambda: NumpyLoader([1], jax.random.key(7)), "rng_key"),
        (lambda: NumpyLoader([1], jax.random.key(7), sampler=[0]), "rng_key"),
        (lambda: NumpyLoader([1], batch_size=None), "batch_size=None"),
        (lambda: shuffled([1], sampler=[0]), "sampler"),
        (lambda: shuffled([1], batch_sampler=[[0]]), "batch_sampler"),
        (lambda: shuffled(Stream()), "IterableDataset"),
        (lambda: shuffled([1]).batches_from(-1), "step is -1"),
        (lambda: shuffled([]).batches_from(0), "0 examples"),
        (lambda: shuffled([1], 2, drop_last=True).batches_from(0), "1 examples.*=2"),
        (lambda: NumpyLoader([1]).batches_from(0), "rng_key"),
        (lambda: NumpyLoader([1], sampler=[0]).batches_from(0), "rng_key"),
        (lambda: NumpyLoader([1], batch_sampler=[[0]]).batches_from(0), "rng_key"),
    ],
)
def test_contradiction(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


# Samples become batches.


def test_by_default_batches_of_one_in_the_order_of_the_dataset():
    loader = NumpyLoader(range(3))
    assert as_lists(loader) == as_lists(loader) == [[0], [1], [2]]


def test_collate_fn_gets_a_list_of_samples():
    samples = [("a", 0), ("b", 1), ("c", 2)]
    (batch,) = NumpyLoader(samples, batch_size=3, collate_fn=lambda batch: batch)
    assert batch == samples
    (batch,) = NumpyLoader([(1, 2), (3, 4)], batch_size=2, collate_fn=None)
    assert as_lists(batch) == [[1, 3], [2, 4]]
    assert type(batch[0]) is np.ndarray


def test_structure_of_a_sample_is_kept():
    sample = {"point": Point(1, [2, 3]), "tuple": (4, {"flag": True})}
    batch = numpy_collate([sample, sample])
    assert jax.tree.structure(batch) == jax.tree.structure(sample)
    assert batch["point"].y[1].tolist() == [3, 3]
    assert batch["tuple"][1]["flag"].tolist() == [True, True]


@pytest.mark.parametrize(
    "value",
    [3, 1.5, True, np.float16(3), np.ones((2, 3), "uint8"), torch.ones(2, 3)],
)
def test_numbers_arrays_and_tensors_keep_their_dtype(value):
    batch, array = numpy_collate([value, value]), np.asarray(value)
    assert type(batch) is np.ndarray
    assert (batch.shape, batch.dtype) == ((2, *array.shape), array.dtype)
    assert np.array_equal(batch[1], array)


@pytest.mark.parametrize("zeros", [np.zeros, torch.zeros])
@pytest.mark.parametrize("shapes", [[(2,), (3,)], [(2, 4), (2, 1)], [(1, 2), (2,)]])
def test_different_shapes_are_named(shapes, zeros):
    samples = [(zeros(shape), 0) for shape in shapes]
    with pytest.raises(ValueError, match="different shapes") as caught:
        list(NumpyLoader(samples, batch_size=2))
    for shape in shapes:
        assert ", ".join(map(str, shape)) in str(caught.value)


@pytest.mark.parametrize("other", [(1,), [1, 2], (1, (2, 3)), (1, None)])
def test_different_structures_are_refused(other):
    with pytest.raises(ValueError):
        numpy_collate([(1, 2), other])


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
    assert len(training_generator) == 20
    for x, y in training_generator:
        assert (x.shape, x.dtype) == ((32, 784), np.float32)
        assert (y.shape, type(y)) == ((32,), np.ndarray)


# What works with DataLoader works here.


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        data.StackDataset(x=range(10), y=TENSORS),
        data.ConcatDataset([TENSORS, TENSORS]),
        data.random_split(TENSORS, [4, 6])[1],
        Stream(),
    ],
)
def test_dataset_is_loaded_as_by_dataloader(dataset):
    ours = jax.tree.leaves(list(NumpyLoader(dataset, batch_size=4)))
    theirs = jax.tree.leaves(list(DataLoader(dataset, batch_size=4)))
    for array, tensor in zip(ours, theirs, strict=True):
        assert type(array) is np.ndarray
        assert np.array_equal(array, tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "drop_last": True},
        {"batch_size": 4, "generator": torch.Generator()},
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


def test_workers_are_spawned_and_compute_nothing_with_jax(monkeypatch):
    monkeypatch.setattr(Memory, "events", "forked")
    monkeypatch.setenv("JAX_PLATFORMS", "none")  # a worker that computes fails
    options = {"worker_init_fn": note_worker, "prefetch_factor": 3}
    loader = shuffled(Memory(range(10)), 4, num_workers=1, **options)
    batches = list(loader)
    assert as_lists(i for i, _ in batches) == as_lists(shuffled(range(10), 4))
    assert {event for _, events in batches for event in events} == {"new, worker 0"}
    # Iterations that share workers disturb each other, so it has to be asked for.
    assert not loader.persistent_workers


# The order, and a run that goes on where it was stopped.


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_order_is_jaxs_permutation_for_the_key_and_the_epoch(make_key):
    sampler = JAXRandomSampler(range(100), make_key(7))
    keys = [jax.random.fold_in(jax.random.key(7), epoch) for epoch in range(3)]
    orders = [jax.random.permutation(key, 100).tolist() for key in keys]
    assert [list(sampler) for _epoch in range(3)] == orders
    sampler.start_at(epoch=1, skip=30)
    assert [list(sampler), list(sampler)] == [orders[1][30:], orders[2]]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5, 6, 13])
def test_batches_from_a_step_are_those_of_a_run_that_never_stopped(step, drop_last):
    loader = shuffled(range(23), 5, drop_last=drop_last)
    whole = [batch for _epoch in range(4) for batch in as_lists(loader)]
    assert {len(batch) for batch in whole} == ({5} if drop_last else {5, 3})
    assert as_lists(loader.batches_from(step), len(whole) - step) == whole[step:]


def test_skipped_examples_are_not_loaded():
    loaded = []
    loader = shuffled(range(20), 4, collate_fn=loaded.extend)
    next(loader.batches_from(8))  # an epoch has 5 batches
    assert len(loaded) == 4


def test_iterations_of_one_loader_do_not_disturb_each_other():
    loader = shuffled(range(12), 6)
    undisturbed = as_lists(loader.batches_from(0), 8)
    batches, others = loader.batches_from(0), loader.batches_from(3)
    disturbed = []
    for _ in range(8):
        disturbed += as_lists(batches, 1)
        list(loader)
        next(others)
    assert disturbed == undisturbed
