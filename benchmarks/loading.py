"""Time an epoch of loading: python benchmarks/loading.py --data-dir DIR"""

from functools import partial

import bench
import grain
import jax
import jax_dataloader
import numpy as np
import torch
from bench import epochs
from pytorch_mnist import make_train_loader
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.datasets import MNIST

from common import FlattenAndCast, NumpyLoader

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
    args, train_set = bench.setup(__doc__, "--rounds")
    images = np.stack([image for image, _ in train_set])
    labels = np.stack([label for _, label in train_set])
    arrays = jax_dataloader.ArrayDataset(images, labels)
    tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    mnist = MNIST(args.data_dir, transform=FlattenAndCast())

    loaders = {
        "`NumpyLoader`": NumpyLoader(train_set, jax.random.key(0), **OPTIONS),
        "jax-dataloader, its own backend": jax_dataloader.DataLoader(
            arrays, "jax", **OPTIONS
        ),
        "jax-dataloader, PyTorch's backend": jax_dataloader.DataLoader(
            arrays, "pytorch", **OPTIONS
        ),
        "`TensorDataset` in a `DataLoader`": DataLoader(tensors, **OPTIONS),
        "Grain": grain_loader(train_set),
        "torchvision as in JAX's notebook": DataLoader(
            mnist, collate_fn=notebook_collate, **OPTIONS
        ),
        "torchvision, `ToTensor`": make_train_loader(args.data_dir, 32),
    }
    candidates = {name: epochs(loader.__iter__) for name, loader in loaders.items()}
    by_hand = partial(bench.shuffled, np.random.permutation, 32, images, labels)
    candidates["NumPy indexing by hand"] = epochs(by_hand)
    bench.compare("loading an epoch", candidates, args.rounds)


if __name__ == "__main__":
    main()
