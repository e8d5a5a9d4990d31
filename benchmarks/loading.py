"""Time loading with each loader: python benchmarks/loading.py --data-dir DIR"""

from functools import cache, partial

import bench
import jax
import numpy as np
import torch
from pytorch_mnist import make_train_loader
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.datasets import MNIST

from common import NumpyLoader

OPTIONS = {"batch_size": 32, "shuffle": True, "drop_last": True}
args, train_set = bench.setup(__doc__)
images, labels = train_set.__getitems__([*range(60_000)])  # float32 (60000, 784)


@cache
def jax_dataloader(backend):
    import jax_dataloader

    dataset = jax_dataloader.ArrayDataset(images, labels)
    return jax_dataloader.DataLoader(dataset, backend, **OPTIONS)


@cache
def grain(*read_options):
    from grain import MapDataset, ReadOptions

    dataset = MapDataset.source(list(zip(images, labels))).seed(0).shuffle()
    batches = dataset.batch(32, drop_remainder=True)
    return batches.to_iter_dataset(ReadOptions(*read_options))


tensors = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
to_numpy = partial(jax.tree.map, np.asarray)
flat = MNIST(args.data_dir, transform=lambda image: np.float32(image).ravel())
usual = DataLoader(flat, collate_fn=lambda x: to_numpy(default_collate(x)), **OPTIONS)
by_hand = partial(bench.cut, np.random.permutation, 32, images, labels)
loaders = {
    "`NumpyLoader`": NumpyLoader(train_set, bench.KEY, **OPTIONS).__iter__,
    "NumPy indexing by hand": by_hand,
    "jax-dataloader, its own backend": partial(jax_dataloader, "jax"),
    "jax-dataloader, PyTorch's backend": partial(jax_dataloader, "pytorch"),
    "`TensorDataset` in a `DataLoader`": DataLoader(tensors, **OPTIONS).__iter__,
    "Grain": partial(grain, 0, 0),
    "Grain, its 16 read threads": grain,
    "torchvision as in JAX's notebook": usual.__iter__,
    "torchvision, `ToTensor`": make_train_loader(args.data_dir, 32).__iter__,
}
works = {name: bench.repeat(loader) for name, loader in loaders.items()}
bench.compare("loading an epoch", works, args.rounds)
