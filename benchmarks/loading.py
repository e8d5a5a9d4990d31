"""Time an epoch of loading: python benchmarks/loading.py --data-dir DIR"""

from functools import partial

import bench
import grain
import jax
import jax_dataloader
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from common import FlattenAndCast, NumpyLoader, load_mnist, numpy_collate

OPTIONS = {"batch_size": 32, "shuffle": True, "drop_last": True}


def grain_loader(train_set):
    dataset = grain.MapDataset.source(train_set).seed(0).shuffle()
    batches = dataset.batch(32, drop_remainder=True)
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return batches.to_iter_dataset(no_threads)  # slower with threads


def notebook_collate(batch):
    """Collate as JAX's notebook about data loading with PyTorch does."""
    return jax.tree.map(np.asarray, default_collate(batch))


def main() -> None:
    args = bench.parse_args(__doc__, rounds=10, train_examples=12_800)
    train_set = load_mnist(args.data_dir)[0][: args.train_examples]
    n = len(train_set)
    images, labels = numpy_collate(train_set)
    arrays = jax_dataloader.ArrayDataset(images, labels)
    tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    flattened = Subset(MNIST(args.data_dir, transform=FlattenAndCast()), range(n))
    usual = Subset(MNIST(args.data_dir, transform=ToTensor()), range(n))

    loaders = {
        "`NumpyLoader`": NumpyLoader(train_set, jax.random.key(0), **OPTIONS),
        "`DataLoader`": DataLoader(train_set, **OPTIONS),
        "`DataLoader`, `TensorDataset`": DataLoader(tensors, **OPTIONS),
        "jax-dataloader": jax_dataloader.DataLoader(arrays, "pytorch", **OPTIONS),
        "Grain": grain_loader(train_set),
        "JAX's notebook": DataLoader(flattened, collate_fn=notebook_collate, **OPTIONS),
        "PyTorch, usual way": DataLoader(usual, **OPTIONS),
        "arrays only: jax-dataloader": jax_dataloader.DataLoader(
            arrays, "jax", **OPTIONS
        ),
    }
    candidates = {
        name: bench.epochs(loader.__iter__) for name, loader in loaders.items()
    }
    by_hand = partial(bench.shuffled, np.random.permutation, 32, images, labels)
    candidates["arrays only: NumPy by hand"] = bench.epochs(by_hand)
    bench.compare("loading", candidates, args.rounds, n)


if __name__ == "__main__":
    main()
