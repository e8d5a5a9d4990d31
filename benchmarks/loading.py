"""Time an epoch of loading: python benchmarks/loading.py --data-dir DIR"""

import bench
import jax
import numpy as np
import torch
from bench import load_epochs
from pytorch_mnist import make_train_loader
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.datasets import MNIST

from common import FlattenAndCast, NumpyLoader

BATCH_SIZE = 32


def jax_dataloader_epochs(images, labels, backend):
    import jax_dataloader

    dataset = jax_dataloader.ArrayDataset(images, labels)
    yield from load_epochs(
        jax_dataloader.DataLoader(
            dataset, backend, batch_size=BATCH_SIZE, shuffle=True, drop_last=True
        )
    )


def grain_epochs(train_set, **read_options):
    import grain

    dataset = grain.MapDataset.source(train_set).seed(0).shuffle()
    batches = dataset.batch(BATCH_SIZE, drop_remainder=True)
    yield from load_epochs(batches.to_iter_dataset(grain.ReadOptions(**read_options)))


def notebook_collate(batch):
    """Collate as JAX's notebook "Training a simple neural network, with PyTorch" does."""
    return jax.tree.map(np.asarray, default_collate(batch))


def main() -> None:
    parser = bench.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    train_set = bench.load_train_set(args.data_dir)
    images = np.stack([image for image, _ in train_set])
    labels = np.array([label for _, label in train_set])
    tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    pictures = MNIST(args.data_dir, transform=FlattenAndCast())
    options = {"batch_size": BATCH_SIZE, "shuffle": True, "drop_last": True}

    candidates = {
        "`NumpyLoader`": load_epochs(
            NumpyLoader(train_set, jax.random.key(0), **options)
        ),
        "NumPy indexing by hand": load_epochs(
            bench.ShuffledArrays(np.random.permutation, BATCH_SIZE, images, labels)
        ),
        "jax-dataloader, its own backend": jax_dataloader_epochs(images, labels, "jax"),
        "jax-dataloader, PyTorch's backend": jax_dataloader_epochs(
            images, labels, "pytorch"
        ),
        "`TensorDataset` in a `DataLoader`": load_epochs(
            DataLoader(tensors, **options)
        ),
        "Grain, no threads": grain_epochs(
            train_set, num_threads=0, prefetch_buffer_size=0
        ),
        "Grain, its default threads": grain_epochs(train_set),
        "torchvision as in JAX's notebook": load_epochs(
            DataLoader(pictures, collate_fn=notebook_collate, **options)
        ),
        "torchvision, `ToTensor`": load_epochs(
            make_train_loader(args.data_dir, BATCH_SIZE)
        ),
    }
    bench.compare("loading an epoch", candidates, args.rounds)


if __name__ == "__main__":
    main()
