"""Time an epoch of loading: python benchmarks/loading.py --data-dir DIR"""

import bench
import grain
import jax
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from common import NumpyLoader, load_mnist, numpy_collate

OPTIONS = {"batch_size": 32, "shuffle": True, "drop_last": True}


def main() -> None:
    args = bench.parse_args(__doc__, rounds=10, train_examples=12_800)
    train_set = load_mnist(args.data_dir)[0][: args.train_examples]
    tensors = TensorDataset(*map(torch.from_numpy, numpy_collate(train_set)))
    usual = Subset(MNIST(args.data_dir, transform=ToTensor()), range(len(train_set)))
    shuffled = grain.MapDataset.source(train_set).seed(0).shuffle()
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # faster here
    loaders = {
        "`NumpyLoader`": NumpyLoader(train_set, jax.random.key(0), **OPTIONS),
        "`DataLoader`": DataLoader(train_set, **OPTIONS),
        "`DataLoader`, `TensorDataset`": DataLoader(tensors, **OPTIONS),
        "Grain": shuffled.batch(32, drop_remainder=True).to_iter_dataset(no_threads),
        "PyTorch, usual way": DataLoader(usual, **OPTIONS),
    }
    candidates = {
        name: bench.epochs(loader.__iter__) for name, loader in loaders.items()
    }
    seconds = bench.time_in_turn(candidates, args.rounds, len(train_set))
    bench.print_ratios("loading", seconds)


if __name__ == "__main__":
    main()
