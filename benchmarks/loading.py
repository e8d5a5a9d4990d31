"""Time an epoch of loading: python benchmarks/loading.py --data-dir DIR"""

from functools import partial

import bench
import jax
import numpy as np
import torch
from bench import load_epochs
from pytorch_mnist import make_train_loader
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.datasets import MNIST

from common import FlattenAndCast, NumpyLoader

OPTIONS = {"batch_size": 32, "shuffle": True, "drop_last": True}


def jax_dataloader_epochs(images, labels, backend):
    import jax_dataloader

    dataset = jax_dataloader.ArrayDataset(images, labels)
    loader = jax_dataloader.DataLoader(dataset, backend, **OPTIONS)
    yield from load_epochs(lambda: loader)


def grain_epochs(train_set):
    import grain

    dataset = grain.MapDataset.source(train_set).seed(0).shuffle()
    batches = dataset.batch(32, drop_remainder=True)
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    loader = batches.to_iter_dataset(no_threads)  # slower with threads
    yield from load_epochs(lambda: loader)


def notebook_collate(batch):
    """Collate as JAX's notebook about data loading with PyTorch does."""
    return jax.tree.map(np.asarray, default_collate(batch))


def main() -> None:
    args, train_set = bench.setup(__doc__, "--rounds")
    images = np.stack([image for image, _ in train_set])
    labels = np.stack([label for _, label in train_set])
    tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    mnist = MNIST(args.data_dir, transform=FlattenAndCast())
    by_hand = partial(bench.shuffled, np.random.permutation, 32, images, labels)
    jax_dataloader = partial(jax_dataloader_epochs, images, labels)

    ours = NumpyLoader(train_set, jax.random.key(0), **OPTIONS)
    tensor_loader = DataLoader(tensors, **OPTIONS)
    notebook_loader = DataLoader(mnist, collate_fn=notebook_collate, **OPTIONS)
    usual_loader = make_train_loader(args.data_dir, 32)

    candidates = {
        "`NumpyLoader`": load_epochs(lambda: ours),
        "NumPy indexing by hand": load_epochs(by_hand),
        "jax-dataloader, its own backend": jax_dataloader("jax"),
        "jax-dataloader, PyTorch's backend": jax_dataloader("pytorch"),
        "`TensorDataset` in a `DataLoader`": load_epochs(lambda: tensor_loader),
        "Grain": grain_epochs(train_set),
        "torchvision as in JAX's notebook": load_epochs(lambda: notebook_loader),
        "torchvision, `ToTensor`": load_epochs(lambda: usual_loader),
    }
    bench.compare("loading an epoch", candidates, args.rounds)


if __name__ == "__main__":
    main()
