"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import bench
import jax
import numpy as np
import torch
from bench import load_epochs, start_script, train_epochs
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from pytorch_mnist import SETTINGS, make_train_loader, make_training, train_epoch

from common import NumpyLoader, Pairs

STEPS_PER_CALL = 25
SIZES = ((6_000, 32), (18_000, 32), (60_000, 32), (60_000, 512))  # images, batch size


def make_loader(train_set: Pairs, batch_size: int) -> NumpyLoader:
    """Return the loader that the scripts train with."""
    key = jax.random.key(0)
    return NumpyLoader(train_set, key, batch_size, shuffle=True, drop_last=True)


def scan_steps(step: Callable) -> Callable:
    """Return a function that takes all steps of a stack of batches in a compiled call."""

    def scan_body(state, batch):
        x, y = batch
        return step(state, x, y), None

    @partial(jax.jit, donate_argnums=0)
    def many_steps(state, xs, ys):
        state, _ = jax.lax.scan(scan_body, state, (xs, ys))
        return state

    return many_steps


def stack(batches: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Stack K batches: images (K, B, 784), classes (K, B)."""
    images, labels = zip(*batches, strict=True)
    return np.stack(images), np.stack(labels)


class Stacks:
    """Stacks of STEPS_PER_CALL batches from a loader; the last one may be smaller."""

    def __init__(self, loader: NumpyLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple]:
        batches = iter(self.loader)
        while some_batches := list(islice(batches, STEPS_PER_CALL)):
            yield stack(some_batches)


def pytorch_epochs(
    stage: int,
    steps_per_epoch: int,
    batches: Iterable,
    compiled: bool = False,
    fused: bool = False,
) -> Iterator[None]:
    """At each `next`, train for an epoch with PyTorch."""
    training = make_training(stage, steps_per_epoch, fused=fused)
    model, optimizer, scheduler = training
    if compiled:
        model.compile()
    while True:
        train_epoch(model, optimizer, scheduler, batches)
        yield


def nnx_step(modules: tuple, x: jax.Array, y: jax.Array) -> tuple:
    """Change the model and its optimizer, which know their own state, by one step."""
    model, optimizer = modules
    grads = nnx.grad(lambda model: cross_entropy(model(x), y).mean())(model)
    optimizer.update(model, grads)
    return modules


def nnx_epochs(loader: NumpyLoader, functional: bool) -> Iterator[None]:
    """At each `next`, train stage 2 for an epoch with Flax NNX."""
    linear = partial(nnx.Linear, rngs=nnx.Rngs(0))
    hidden = (linear(784, 512), nnx.relu, linear(512, 512), nnx.relu)
    model = nnx.Sequential(*hidden, linear(512, 10))
    script_state, _ = start_script(2, len(loader))
    modules = (model, nnx.Optimizer(model, script_state.tx, wrt=nnx.Param))
    if not functional:
        yield from train_epochs(loader, modules, nnx.jit(nnx_step))

    graph, state = nnx.split(modules)

    @partial(jax.jit, donate_argnums=0)
    def functional_step(state, x, y):
        modules = nnx.merge(graph, state)
        return nnx.state(nnx_step(modules, x, y))

    yield from train_epochs(loader, state, functional_step)


def compare_stage(stage: int, train_set: Pairs, data_dir: str, rounds: int) -> None:
    batch_size, *_ = SETTINGS[stage]
    loader = make_loader(train_set, batch_size)
    n = len(loader)
    all_batches = list(loader)
    on_device = jax.device_put(stack(all_batches))
    images = torch.from_numpy(np.stack([image for image, _ in train_set]))
    labels = torch.tensor([int(label) for _, label in train_set])
    tensors = bench.ShuffledArrays(torch.randperm, batch_size, images, labels)
    usual = make_train_loader(data_dir, batch_size)
    state, step = start_script(stage, n)

    candidates = {
        "epoch": train_epochs(loader, *start_script(stage, n)),
        "loading alone": load_epochs(loader),
        "batches ready": train_epochs(all_batches, *start_script(stage, n)),
        "one `lax.scan`": train_epochs([on_device], state, scan_steps(step)),
        "PyTorch, usual": pytorch_epochs(stage, n, usual),
        "PyTorch, fastest": pytorch_epochs(stage, n, tensors, fused=True),
        "PyTorch, fastest, compiled": pytorch_epochs(
            stage, n, tensors, fused=True, compiled=True
        ),
    }
    if stage == 2:
        state, step = start_script(stage, n)
        candidates |= {
            "many steps in a call (`recipes/scan.diff`)": train_epochs(
                Stacks(loader), state, scan_steps(step)
            ),
            "Flax NNX, `nnx.jit`": nnx_epochs(loader, functional=False),
            "Flax NNX, `nnx.split`": nnx_epochs(loader, functional=True),
        }
    seconds = bench.compare(f"stage {stage}", candidates, rounds)
    fastest = seconds["PyTorch, fastest"]
    bench.print_header(f"stage {stage}, each round", *range(1, rounds + 1))
    bench.print_row("PyTorch, fastest, seconds", *(f"{t:.3f}" for t in fastest))
    for name, values in seconds.items():
        ratios = values / fastest
        bench.print_row(f"{name}, ratio to it", *(f"{ratio:.2f}" for ratio in ratios))


def peak_memory(*options: str) -> str:
    """Return the most memory, in MB, that a process of stage 2 held, on Linux."""
    program = (
        "import sys, mlp_flax; mlp_flax.main(sys.argv[1:]); "
        "print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", program, *options]
    output = subprocess.check_output(command, cwd=bench.ROOT, text=True)
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", output)[1])
    return f"{kilobytes / 1000:.0f}"


def compare_sizes(train_set: Pairs, data_dir: str, rounds: int) -> None:
    """Show how the time and the memory of stage 2 depend on the number of images."""
    candidates = {}
    for n, batch_size in SIZES:
        loader = make_loader(train_set[:n], batch_size)
        name = f"{n:,} images in batches of {batch_size}"
        candidates[name] = train_epochs(loader, *start_script(2, len(loader)))
    bench.compare("stage 2, an epoch", candidates, rounds)

    bench.print_header("stage 2, a process of one epoch", "peak memory, MB")
    for name, (n, batch_size) in zip(candidates, SIZES, strict=True):
        options = [
            f"--data-dir={data_dir}",
            "--epochs=1",
            f"--train-examples={n}",
            f"--batch-size={batch_size}",
        ]
        bench.print_row(name, peak_memory(*options))


def main() -> None:
    parser = bench.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    train_set = bench.load_train_set(args.data_dir)
    for stage in SETTINGS:
        compare_stage(stage, train_set, args.data_dir, args.rounds)
    compare_sizes(train_set, args.data_dir, args.rounds)


if __name__ == "__main__":
    main()
