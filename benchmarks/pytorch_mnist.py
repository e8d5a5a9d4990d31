"""The yardstick: python benchmarks/pytorch_mnist.py --stage 2 --data-dir DIR"""

import argparse

import torch
from torch import nn, optim
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

EPOCHS = 5  # as in the scripts
# Batch size, initial and final learning rate; training.py checks them against the scripts.
SETTINGS = {1: (32, 0.3, 0.1), 2: (32, 1e-3, 1e-5), 3: (128, 2e-3, 1e-5)}


def make_train_loader(data_dir: str, batch_size: int) -> DataLoader:
    train_set = MNIST(data_dir, transform=ToTensor())
    return DataLoader(train_set, batch_size, shuffle=True, drop_last=True)


def make_model(stage: int) -> nn.Sequential:
    layers = [nn.Flatten()]
    for inputs, dropout_rate in ((784, 0.3), (512, 0.4)):
        layers += [nn.Linear(inputs, 512), nn.ReLU()]
        if stage == 3:
            layers += [nn.Dropout(dropout_rate), nn.BatchNorm1d(512)]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def make_training(stage: int, epoch_steps: int, **options) -> tuple:
    """Return model, optimizer and scheduler; `options` go to the optimizer."""
    _, initial, final = SETTINGS[stage]
    model, steps = make_model(stage), EPOCHS * epoch_steps
    factor = final / initial  # from the first learning rate to the last
    if stage == 1:
        optimizer = optim.SGD(model.parameters(), initial, **options)
        return model, optimizer, ExponentialLR(optimizer, factor ** (1 / steps))
    optimizer = optim.Adam(model.parameters(), initial, **options)
    return model, optimizer, LinearLR(optimizer, 1, factor, steps)


def train_epoch(model, optimizer, scheduler, batches):
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss


@torch.no_grad()
def accuracy(model: nn.Module, dataset: MNIST) -> float:
    model.eval()
    loader = DataLoader(dataset, batch_size=2000)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / len(dataset)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    loader = make_train_loader(args.data_dir, SETTINGS[args.stage][0])
    test_set = MNIST(args.data_dir, train=False, transform=ToTensor())
    model, *rest = make_training(args.stage, len(loader))
    for epoch in range(1, EPOCHS + 1):
        loss = train_epoch(model, *rest, loader)
        accuracies = accuracy(model, loader.dataset), accuracy(model, test_set)
        print(epoch, loss.item(), *accuracies, flush=True)
    print(f"final test accuracy: {accuracy(model, test_set):.2%} (MNIST)")
