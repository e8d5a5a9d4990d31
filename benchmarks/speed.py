"""How fast the three scripts are, and beside what: one table of ratios.

Everything is measured in turn, round after round in one run, so that a ratio compares
neighbours in time; the table shows the median over the rounds, and the range.

    python benchmarks/speed.py --data-dir DIR

needs the real MNIST in DIR. --rounds 1 gives a first impression.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from itertools import repeat
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax
import numpy as np
import pytorch_mnist
import torch
from torchvision import datasets, transforms

import common
import mlp_flax
import mlp_flax_bn_dropout
import mlp_numpy_api

SCRIPTS = {1: mlp_numpy_api, 2: mlp_flax, 3: mlp_flax_bn_dropout}
KEY = jax.random.key(0)


class Stage:
    """One stage's work for an epoch, in each of the ways that are compared."""

    def __init__(
        self,
        number: int,
        data_dir: str,
        batch_size: int | None = None,
        examples: int | None = None,
    ):
        self.number, self.script = number, SCRIPTS[number]
        self.batch_size = batch_size or self.script.Config.batch_size
        train_set, _, _ = common.load_mnist(data_dir)
        train_set = common.first_examples(train_set, examples, self.batch_size)
        self.loader = common.NumpyLoader(
            train_set, KEY, self.batch_size, shuffle=True, drop_last=True
        )
        self.steps = len(self.loader)
        if number == 1:
            self.state = self.script.init_network_params(self.script.LAYER_SIZES, KEY)
        else:
            keys = KEY if number == 2 else {"params": KEY, "dropout": KEY}
            rate = self.script.Config.learning_rate
            self.state = self.script.create_train_state(keys, rate, 5 * self.steps)

    def make_others(self, data_dir: str) -> None:
        """What the epoch through the loader is compared with."""
        self.batches = [*self.loader]
        self.batch = jax.device_put(self.batches[0])
        self.make_article_loader(data_dir)
        self.make_pytorch(data_dir)

    def make_article_loader(self, data_dir: str) -> None:
        """Each image decoded by PIL and stacked by hand, anew in each epoch."""
        images = datasets.MNIST(
            data_dir,
            transform=lambda image: np.ravel(np.array(image, dtype=np.float32)),
        )
        self.article_loader = torch.utils.data.DataLoader(
            images,
            self.batch_size,
            sampler=common.JAXRandomSampler(images, KEY),
            collate_fn=lambda batch: tuple(map(np.stack, zip(*batch))),
            drop_last=True,
        )

    def make_pytorch(self, data_dir: str) -> None:
        images = datasets.MNIST(data_dir, transform=transforms.ToTensor())
        self.torch_loader = torch.utils.data.DataLoader(
            images, self.batch_size, shuffle=True, drop_last=True
        )
        self.torch_data = images.data.flatten(1) / 255, images.targets
        self.usual, self.fast = (
            (
                model,
                *pytorch_mnist.make_optimizer(self.number, model, 5 * self.steps, **o),
            )
            for model, o in (
                (pytorch_mnist.make_model(self.number), {}),
                (pytorch_mnist.make_model(self.number), {"fused": True}),
            )
        )

    def train(self, batches) -> None:
        """The scripts' inner loop, and the wait until its last result is there."""
        state, script = self.state, self.script
        if self.number == 1:
            rate = script.Config.learning_rate
            for step, (x, y) in enumerate(batches):
                lr = script.learning_rate_at(step, rate, 5 * self.steps)
                state = script.sgd_update(state, x, y, lr)
        elif self.number == 2:
            for x, y in batches:
                state, _ = script.train_step(state, x, y)
        else:
            for x, y in batches:
                state, _ = script.train_step(state, x, y, KEY)
        self.state = jax.block_until_ready(state)

    def epoch(self) -> None:
        self.train(self.loader)

    def ceiling(self) -> None:
        """One batch over and over, in the device's memory and in its caches."""
        self.train(repeat(self.batch, self.steps))

    def batches_at_hand(self) -> None:
        """An epoch of NumPy batches that lie ready: what no loader can undercut."""
        self.train(self.batches)

    def loader_alone(self) -> None:
        for _ in self.loader:
            pass

    def article_loading(self) -> None:
        for _ in self.article_loader:
            pass

    def pytorch_usual(self) -> None:
        pytorch_mnist.train_epoch(*self.usual, self.torch_loader)

    def pytorch_fastest(self) -> None:
        x, y = self.torch_data
        order = torch.randperm(len(x))[: self.steps * self.batch_size]
        batches = ((x[i], y[i]) for i in order.split(self.batch_size))
        pytorch_mnist.train_epoch(*self.fast, batches)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def whole_process(command: list[str]) -> tuple[float, float, float]:
    """Seconds to the end, seconds until 98% test accuracy was printed, final accuracy."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    passed = float("inf")
    for line in process.stdout:
        found = re.search(r"test accuracy:? +(\d+\.\d\d)%", line)
        if found and float(found[1]) >= 98:
            passed = min(passed, time.perf_counter() - start)
    if process.wait():
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, passed, float(found[1])


def spread(values: list[float], form: str = ".3f") -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def measure_epochs(data_dir: str, rounds: int) -> None:
    stages = [Stage(number, data_dir) for number in SCRIPTS]
    for stage in stages:
        stage.make_others(data_dir)
    times = defaultdict(list)
    for turn in range(rounds + 1):  # the first turn compiles, and does not count
        for stage in stages:
            for work in (
                stage.epoch,
                stage.ceiling,
                stage.batches_at_hand,
                stage.loader_alone,
                stage.article_loading,
                stage.pytorch_usual,
                stage.pytorch_fastest,
            ):
                took = seconds(work)
                if turn:
                    times[stage.number, work.__name__].append(took)

    def ratio(number: int, work: str, base: str, form: str = ".3f") -> str:
        pairs = zip(times[number, work], times[number, base])
        return spread([a / b for a, b in pairs], form)

    def rate(stage: Stage, work: str) -> str:
        examples = stage.steps * stage.batch_size
        return spread([examples / t for t in times[stage.number, work]], ",.0f")

    header = (
        "| one training epoch | " + " | ".join(f"stage {n}" for n in SCRIPTS) + " |"
    )
    print(header, "| --- | --- | --- | --- |", sep="\n")
    for name, cell in (
        ("examples/s, through `NumpyLoader`", lambda s: rate(s, "epoch")),
        ("examples/s, PyTorch the usual way", lambda s: rate(s, "pytorch_usual")),
        ("examples/s, PyTorch at its fastest", lambda s: rate(s, "pytorch_fastest")),
        ("epoch / ceiling", lambda s: ratio(s.number, "epoch", "ceiling")),
        (
            "batches at hand / ceiling",
            lambda s: ratio(s.number, "batches_at_hand", "ceiling"),
        ),
        ("loader / epoch", lambda s: ratio(s.number, "loader_alone", "epoch")),
        (
            "the article's loading / loader",
            lambda s: ratio(s.number, "article_loading", "loader_alone", ".1f"),
        ),
        (
            "epoch / PyTorch the usual way",
            lambda s: ratio(s.number, "epoch", "pytorch_usual"),
        ),
        (
            "epoch / PyTorch at its fastest",
            lambda s: ratio(s.number, "epoch", "pytorch_fastest"),
        ),
    ):
        print(f"| {name} | " + " | ".join(map(cell, stages)) + " |", flush=True)


def measure_processes(data_dir: str, rounds: int) -> None:
    print(
        "\n| whole process | stage 1 | stage 2 | stage 3 |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    results = defaultdict(list)
    for turn in range(rounds):
        for number, script in SCRIPTS.items():
            options = ["--data-dir", data_dir, "--seed", str(turn)]
            ours = [sys.executable, script.__file__, *options]
            theirs = [sys.executable, pytorch_mnist.__file__, "--stage", str(number)]
            results[number].append(
                (whole_process(ours), whole_process([*theirs, *options]))
            )

    def row(name: str, value, form: str) -> None:
        cells = [spread([value(*pair) for pair in results[n]], form) for n in SCRIPTS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    row("seconds", lambda ours, theirs: ours[0], ".1f")
    row("seconds, PyTorch", lambda ours, theirs: theirs[0], ".1f")
    row("script / PyTorch", lambda ours, theirs: ours[0] / theirs[0], ".3f")
    row("to 98%, script / PyTorch", lambda ours, theirs: ours[1] / theirs[1], ".3f")
    row("final accuracy, %", lambda ours, theirs: ours[2], ".2f")
    row("final accuracy, %, PyTorch", lambda ours, theirs: theirs[2], ".2f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default=str(common.DATA_DIR))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if common.load_mnist(args.data_dir)[2] != common.MNIST_NAME:
        raise SystemExit("speed.py needs the real MNIST: name it with --data-dir")
    print(
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"torch {torch.__version__}; medians of {args.rounds} rounds (range)\n"
    )
    measure_epochs(args.data_dir, args.rounds)
    measure_processes(args.data_dir, args.rounds)


if __name__ == "__main__":
    main()
