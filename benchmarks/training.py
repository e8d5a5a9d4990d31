"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import importlib.util
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import bench
import jax
import numpy as np
import torch
from bench import load_epochs, start_script, train_epochs
from pytorch_mnist import SETTINGS, make_train_loader, make_training, train_epoch

from common import NumpyLoader

SIZES = [(6_000, 32), (18_000, 32), (60_000, 32), (60_000, 512)]  # images, batch size


def make_loader(train_set, batch_size):
    """Return the loader that the scripts train with."""
    key = jax.random.key(0)
    return NumpyLoader(train_set, key, batch_size, shuffle=True, drop_last=True)


def stack(batches):
    """Stack K batches: images (K, B, 784), classes (K, B)."""
    images, labels = zip(*batches, strict=True)
    return np.stack(images), np.stack(labels)


def stacks(loader):
    """Yield the batches of an epoch in stacks of 25, as recipes/scan.diff does."""
    batches = iter(loader)
    while next_batches := list(islice(batches, 25)):
        yield stack(next_batches)


def scan_recipe(steps_per_epoch):
    """Return the initial state and the step of mlp_flax.py with recipes/scan.diff."""
    with TemporaryDirectory() as directory:
        script = Path(directory, "mlp_flax.py")
        shutil.copy(bench.ROOT / script.name, script)
        diff = bench.ROOT / "recipes" / "scan.diff"
        subprocess.run(["git", "apply", diff], cwd=directory, check=True)
        spec = importlib.util.spec_from_file_location("scan_recipe", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    total_steps = module.EPOCHS * steps_per_epoch
    state = module.create_train_state(
        jax.random.key(0), module.LEARNING_RATE, total_steps
    )
    return state, lambda state, x, y: module.train_steps(state, x, y)[0]


def scan_of(step):
    """Return a function that takes a step on each batch of a stack, in one call."""

    def scan_body(state, batch):
        x, y = batch
        return step(state, x, y), None

    @partial(jax.jit, donate_argnums=0)
    def scan(state, x, y):
        state, _ = jax.lax.scan(scan_body, state, (x, y))
        return state

    return scan


def pytorch_epochs(stage, steps_per_epoch, make_batches, **options):
    """Train with PyTorch for an epoch at each `next`."""
    model, optimizer, scheduler = make_training(stage, steps_per_epoch, **options)
    while True:
        train_epoch(model, optimizer, scheduler, make_batches())
        yield


def compare_stage(stage, train_set, data_dir, rounds):
    script = bench.SCRIPTS[stage]
    batch_size = script.BATCH_SIZE
    settings = (batch_size, script.LEARNING_RATE, script.FINAL_LEARNING_RATE)
    assert SETTINGS[stage] == settings, "pytorch_mnist.py has other settings"

    loader = make_loader(train_set, batch_size)
    n = len(loader)
    batches = list(loader)
    on_device = jax.device_put(stack(batches))
    state, step = start_script(stage, n)
    images = torch.from_numpy(np.stack([image for image, _ in train_set]))
    labels = torch.tensor([int(label) for _, label in train_set])
    tensors = partial(bench.shuffled, torch.randperm, batch_size, images, labels)
    usual_loader = make_train_loader(data_dir, batch_size)

    candidates = {
        "epoch": train_epochs(lambda: loader, *start_script(stage, n)),
        "loading alone": load_epochs(lambda: loader),
        "batches ready": train_epochs(lambda: batches, *start_script(stage, n)),
        "one `lax.scan`": train_epochs(lambda: [on_device], state, scan_of(step)),
        "PyTorch, usual": pytorch_epochs(stage, n, lambda: usual_loader),
        "PyTorch, fastest": pytorch_epochs(stage, n, tensors, fused=True),
    }
    if stage == 2:
        recipe = train_epochs(lambda: stacks(loader), *scan_recipe(n))
        candidates["`recipes/scan.diff`"] = recipe
    seconds = bench.compare(f"stage {stage}", candidates, rounds)

    ratios = seconds["epoch"] / seconds["PyTorch, fastest"]
    each_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"\nstage {stage}, epoch / PyTorch's fastest, each round: {each_round}")


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
    """Show how time and memory depend on the number of images and the batch size."""
    candidates = {}
    for n, batch_size in SIZES:
        loader = make_loader(train_set[:n], batch_size)
        options = ["--epochs=1", f"--train-examples={n}", f"--batch-size={batch_size}"]
        memory = peak_memory(f"--data-dir={data_dir}", *options)
        name = f"{n:,} in batches of {batch_size}: {memory:.0f} MB"
        make_batches = partial(iter, loader)
        candidates[name] = train_epochs(make_batches, *start_script(2, len(loader)))
    bench.compare("stage 2, images and peak memory", candidates, rounds)


def main() -> None:
    args, train_set = bench.setup(__doc__, "--rounds")
    for stage in bench.SCRIPTS:
        compare_stage(stage, train_set, args.data_dir, args.rounds)
    compare_sizes(train_set, args.data_dir, args.rounds)


if __name__ == "__main__":
    main()
