"""The scripts' training in PyTorch: python benchmarks/pytorch_mnist.py --data-dir DIR

This is PyTorch's usual way: a DataLoader over torchvision's MNIST with ToTensor. Network,
optimizer, schedule, batch size and evaluations are those of the scripts.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

BATCH_SIZE = {1: 32, 2: 32, 3: 128}  # by stage
LEARNING_RATES = {1: (0.3, 0.1), 2: (1e-3, 1e-5), 3: (2e-3, 1e-5)}  # initial, final
EPOCHS = 5


def make_model(stage: int) -> nn.Sequential:
    """Return the network of a stage, for images (B, 784) or (B, 1, 28, 28)."""
    layers = [nn.Flatten()]
    for inputs, units, dropout_rate in ((784, 512, 0.3), (512, 512, 0.4)):
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        if stage == 3:
            layers += [nn.BatchNorm1d(units), nn.Dropout(dropout_rate)]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def make_step(
    stage: int, model: nn.Module, total_steps: int, fused: bool | None = None
) -> Callable[[None, Tensor, Tensor], None]:
    """Return the training step, a function of None, images and labels."""
    initial, final = LEARNING_RATES[stage]
    if stage == 1:
        optimizer = optim.SGD(model.parameters(), initial, fused=fused)
        scheduler = ExponentialLR(optimizer, (final / initial) ** (1 / total_steps))
    else:
        optimizer = optim.Adam(model.parameters(), initial, fused=fused)
        scheduler = LinearLR(optimizer, 1, final / initial, total_steps)

    def step(_: None, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y.long()).backward()
        optimizer.step()
        scheduler.step()

    return step


@torch.no_grad()
def accuracy(model: nn.Module, dataset: MNIST) -> float:
    model.eval()
    loader = DataLoader(dataset, batch_size=2000)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / len(dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train_set = MNIST(args.data_dir, train=True, transform=ToTensor())
    test_set = MNIST(args.data_dir, train=False, transform=ToTensor())
    loader = DataLoader(train_set, BATCH_SIZE[args.stage], shuffle=True, drop_last=True)
    model = make_model(args.stage)
    train_step = make_step(args.stage, model, EPOCHS * len(loader))
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for x, y in loader:
            train_step(None, x, y)
        print(
            f"epoch {epoch}  step {epoch * len(loader)}  "
            f"train accuracy {accuracy(model, train_set):.2%}  "
            f"test accuracy {accuracy(model, test_set):.2%}"
        )
    print(f"final test accuracy: {accuracy(model, test_set):.2%} (MNIST)")


if __name__ == "__main__":
    main()
