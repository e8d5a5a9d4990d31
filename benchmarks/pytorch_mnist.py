"""The same three networks in plain PyTorch, as a yardstick for the JAX scripts.

Written the usual way: torchvision's MNIST with ToTensor, a DataLoader, a scheduler that
is stepped once an update. Same widths, initialisation, loss, optimizer, schedule, batch
size, epochs and evaluations as the script of that stage, and the same lines printed.

    python benchmarks/pytorch_mnist.py --stage 2 --data-dir DIR
"""

import argparse

import torch
from torch import nn
from torchvision import datasets, transforms

# Per stage: batch size, learning rate at the start, its end as a share of that.
BATCH_SIZE = {1: 32, 2: 32, 3: 128}
LEARNING_RATE = {1: 0.3, 2: 1e-3, 3: 2e-3}
DECAY = {1: 0.1, 2: 1e-3, 3: 1e-3}
ADAM_BETAS = (0.9, 0.98)
EPOCHS = 5
EVAL_BATCH_SIZE = 2000


def make_model(stage: int) -> nn.Sequential:
    layers = [nn.Flatten()]
    for inputs, rate in ((784, 0.3), (512, 0.4)):
        layers += [nn.Linear(inputs, 512), nn.ReLU()]
        if stage == 3:
            layers += [nn.Dropout(rate), nn.BatchNorm1d(512)]
    layers.append(nn.Linear(512, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def make_optimizer(stage: int, model: nn.Module, steps: int, **options):
    """The stage's optimizer and its schedule over `steps` updates."""
    rate, decay = LEARNING_RATE[stage], DECAY[stage]
    if stage == 1:
        optimizer = torch.optim.SGD(model.parameters(), rate, **options)
        schedule = lambda step: decay ** (step / steps)
    else:
        optimizer = torch.optim.Adam(
            model.parameters(), rate, betas=ADAM_BETAS, **options
        )
        schedule = lambda step: max(1 - step / steps * (1 - decay), decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def train_epoch(model, optimizer, scheduler, loader) -> torch.Tensor:
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss


@torch.no_grad()
def accuracy(model: nn.Module, loader) -> float:
    model.eval()
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return correct / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_set, test_set = (
        datasets.MNIST(args.data_dir, train=train, transform=transforms.ToTensor())
        for train in (True, False)
    )
    loader = torch.utils.data.DataLoader(
        train_set, BATCH_SIZE[args.stage], shuffle=True, drop_last=True
    )
    train_eval_loader, test_loader = (
        torch.utils.data.DataLoader(data, EVAL_BATCH_SIZE)
        for data in (train_set, test_set)
    )
    model = make_model(args.stage)
    optimizer, scheduler = make_optimizer(args.stage, model, EPOCHS * len(loader))
    for epoch in range(1, EPOCHS + 1):
        loss = train_epoch(model, optimizer, scheduler, loader)
        print(
            f"epoch {epoch}  step {epoch * len(loader)}  loss {loss.item():.4f}  "
            f"train accuracy {accuracy(model, train_eval_loader):.2%}  "
            f"test accuracy {accuracy(model, test_loader):.2%}  (MNIST)",
            flush=True,
        )
    print(f"final test accuracy: {accuracy(model, test_loader):.2%} (MNIST)")


if __name__ == "__main__":
    main()
