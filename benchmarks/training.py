"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import re
import subprocess
import sys
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

from common import NumpyLoader

STEPS_PER_CALL = 25


def make_loader(train_set, batch_size):
    """Return the loader that the scripts train with."""
    key = jax.random.key(0)
    return NumpyLoader(train_set, key, batch_size, shuffle=True, drop_last=True)


def script_epochs(stage, loader):
    """Train as the script does for an epoch at each `next`."""
    return train_epochs(lambda: loader, *start_script(stage, len(loader)))


def stack(batches):
    """Stack K batches: images (K, B, 784), classes (K, B)."""
    images, labels = zip(*batches, strict=True)
    return np.stack(images), np.stack(labels)


def stacks(loader):
    """Yield an epoch in stacks of STEPS_PER_CALL batches; the last may be smaller."""
    batches = iter(loader)
    while next_batches := list(islice(batches, STEPS_PER_CALL)):
        yield stack(next_batches)


def many_steps(step):
    """Return a function that takes a step with each batch of a stack, in one call."""

    def scan_body(state, batch):
        x, y = batch
        return step(state, x, y), None

    @partial(jax.jit, donate_argnums=0)
    def scan(state, xs, ys):
        state, _ = jax.lax.scan(scan_body, state, (xs, ys))
        return state

    return scan


def pytorch_epochs(stage, steps_per_epoch, make_batches, fused=False, compiled=False):
    """Train with PyTorch for an epoch at each `next`."""
    model, optimizer, scheduler = make_training(stage, steps_per_epoch, fused=fused)
    if compiled:
        model.compile()
    while True:
        train_epoch(model, optimizer, scheduler, make_batches())
        yield


def nnx_step(modules, x, y):
    """Update the model and its optimizer in place, as is usual in Flax NNX."""
    model, optimizer = modules
    grads = nnx.grad(lambda model: cross_entropy(model(x), y).mean())(model)
    optimizer.update(model, grads)
    return modules


def nnx_epochs(loader, use_split):
    """Train stage 2 in Flax NNX for an epoch at each `next`."""
    linear = partial(nnx.Linear, rngs=nnx.Rngs(0))
    hidden = (linear(784, 512), nnx.relu, linear(512, 512), nnx.relu)
    model = nnx.Sequential(*hidden, linear(512, 10))
    script_state, _ = start_script(2, len(loader))
    modules = (model, nnx.Optimizer(model, script_state.tx, wrt=nnx.Param))
    graph, state = nnx.split(modules)

    @partial(jax.jit, donate_argnums=0)
    def split_step(state, x, y):
        modules = nnx_step(nnx.merge(graph, state), x, y)
        return nnx.state(modules)

    if use_split:
        yield from train_epochs(lambda: loader, state, split_step)
    else:
        yield from train_epochs(lambda: loader, modules, nnx.jit(nnx_step))


def compare_stage(stage, train_set, data_dir, rounds):
    script = bench.SCRIPTS[stage]
    batch_size = script.BATCH_SIZE
    settings = (batch_size, script.LEARNING_RATE, script.FINAL_LEARNING_RATE)
    assert SETTINGS[stage] == settings, "pytorch_mnist.py has other settings"

    loader = make_loader(train_set, batch_size)
    batches = list(loader)
    on_device = jax.device_put(stack(batches))
    images = torch.from_numpy(np.stack([image for image, _ in train_set]))
    labels = torch.tensor([int(label) for _, label in train_set])
    tensors = partial(bench.shuffled, torch.randperm, batch_size, images, labels)
    usual_loader = make_train_loader(data_dir, batch_size)

    n = len(loader)
    state, step = start_script(stage, n)
    candidates = {
        "epoch": script_epochs(stage, loader),
        "loading alone": load_epochs(lambda: loader),
        "batches ready": train_epochs(lambda: batches, *start_script(stage, n)),
        "one `lax.scan`": train_epochs(lambda: [on_device], state, many_steps(step)),
        "PyTorch, usual": pytorch_epochs(stage, n, lambda: usual_loader),
        "PyTorch, fastest": pytorch_epochs(stage, n, tensors, fused=True),
        "PyTorch, fastest, compiled": pytorch_epochs(
            stage, n, tensors, fused=True, compiled=True
        ),
    }
    if stage == 2:
        state, step = start_script(stage, n)
        candidates |= {
            "many steps in a call (`recipes/scan.diff`)": train_epochs(
                lambda: stacks(loader), state, many_steps(step)
            ),
            "Flax NNX, `nnx.jit`": nnx_epochs(loader, use_split=False),
            "Flax NNX, `nnx.split`": nnx_epochs(loader, use_split=True),
        }
    seconds = bench.compare(f"stage {stage}", candidates, rounds)

    fastest = seconds.pop("PyTorch, fastest")
    bench.print_header(f"stage {stage}, each round", *range(1, rounds + 1))
    bench.print_row("PyTorch, fastest: seconds", *(f"{t:.3f}" for t in fastest))
    for name, values in seconds.items():
        ratios = values / fastest
        bench.print_row(f"{name}: ratio to it", *(f"{ratio:.2f}" for ratio in ratios))


def peak_memory(*options):
    """Return the most memory, in MB, that a process of stage 2 held (Linux only)."""
    program = (
        "import sys, mlp_flax; mlp_flax.main(sys.argv[1:]); "
        "print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", program, *options]
    output = subprocess.check_output(command, cwd=bench.ROOT, text=True)
    return int(re.search(r"VmHWM:\s+(\d+) kB", output)[1]) / 1000


def compare_sizes(train_set, data_dir, rounds):
    """Show how time and memory of an epoch depend on images and batch size."""
    sizes = [(6_000, 32), (18_000, 32), (60_000, 32), (60_000, 512)]
    candidates = {}
    memory = {}
    for n, batch_size in sizes:
        name = f"{n:,} images in batches of {batch_size}"
        loader = make_loader(train_set[:n], batch_size)
        candidates[name] = script_epochs(2, loader)
        options = ["--epochs=1", f"--train-examples={n}", f"--batch-size={batch_size}"]
        memory[name] = peak_memory(f"--data-dir={data_dir}", *options)

    bench.compare("stage 2, an epoch", candidates, rounds)
    bench.print_header("stage 2, a process of one epoch", "peak memory, MB")
    for name, megabytes in memory.items():
        bench.print_row(name, f"{megabytes:.0f}")


def main() -> None:
    args, train_set = bench.setup(__doc__, "--rounds")
    for stage in bench.SCRIPTS:
        compare_stage(stage, train_set, args.data_dir, args.rounds)
    compare_sizes(train_set, args.data_dir, args.rounds)


if __name__ == "__main__":
    main()
