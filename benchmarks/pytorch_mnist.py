"""The scripts' training in PyTorch: python benchmarks/pytorch_mnist.py --data-dir DIR

This is PyTorch's usual way: a DataLoader over torchvision's MNIST with ToTensor. Network,
optimizer, schedule, batch size and evaluations are those of the scripts.
"""

from collections.abc import Callable

import bench
import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor


def make_model(stage: int) -> nn.Sequential:
    """Return the network of a stage, for images (B, 784) or (B, 1, 28, 28)."""
    script = bench.SCRIPTS[stage]
    *sizes, classes = script.LAYER_SIZES
    layers = [nn.Flatten()]
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        if stage == 3:
            layers += [nn.BatchNorm1d(sizes[i + 1])]
            layers += [nn.Dropout(script.DROPOUT_RATES[i])]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def make_step(
    stage: int, model: nn.Module, total_steps: int, fused: bool | None = None
) -> Callable[[None, Tensor, Tensor], None]:
    """Return the training step. It has bench.epochs' arguments: no state, x, and y."""
    script = bench.SCRIPTS[stage]
    initial, decay = script.LEARNING_RATE, script.LEARNING_RATE_DECAY
    if stage == 1:
        optimizer = optim.SGD(model.parameters(), initial, fused=fused)
        scheduler = ExponentialLR(optimizer, decay ** (1 / total_steps))
    else:
        optimizer = optim.Adam(model.parameters(), initial, fused=fused)
        scheduler = LinearLR(optimizer, 1, decay, total_steps)

    def step(_: None, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y.long()).backward()
        optimizer.step()
        scheduler.step()

    return step


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Subset | MNIST) -> float:
    model.eval()
    loader = DataLoader(dataset, batch_size=2000)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / len(dataset)


def main() -> None:
    args = bench.parse_args(__doc__, stage=2, seed=0)
    torch.manual_seed(args.seed)
    script = bench.SCRIPTS[args.stage]
    train_set, test_set = (
        MNIST(args.data_dir, train, transform=ToTensor()) for train in (True, False)
    )
    loader = DataLoader(train_set, script.BATCH_SIZE, shuffle=True, drop_last=True)
    model = make_model(args.stage)
    step = make_step(args.stage, model, script.EPOCHS * len(loader))
    for epoch in range(1, script.EPOCHS + 1):
        model.train()
        for x, y in loader:
            step(None, x, y)
        train_accuracy, test_accuracy = (
            accuracy(model, train_set),
            accuracy(model, test_set),
        )
        print(f"epoch {epoch}  {train_accuracy:.2%}  {test_accuracy:.2%}", flush=True)
    print(f"final test accuracy: {accuracy(model, test_set):.2%} (MNIST)")


if __name__ == "__main__":
    main()
