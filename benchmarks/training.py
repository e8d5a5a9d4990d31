"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import importlib.util
import shutil
import subprocess
from functools import partial
from itertools import islice
from tempfile import TemporaryDirectory

import bench
import jax
import numpy as np
import torch
from bench import SCRIPTS, epochs
from pytorch_mnist import SETTINGS, make_train_loader, make_training, train_epoch

from common import NumpyLoader

SIZES = [(6_000, 32), (18_000, 32), (60_000, 32), (60_000, 512)]  # images, batch size


def make_loader(train_set, batch_size):
    """Return the loader that the scripts train with."""
    key = jax.random.key(0)
    return NumpyLoader(train_set, key, batch_size, shuffle=True, drop_last=True)


def start(stage, steps_per_epoch):
    """Return a script's initial state, and its step: (state, x, y) -> next state."""
    script = SCRIPTS[stage]
    total_steps = script.EPOCHS * steps_per_epoch
    params_key, dropout_key = jax.random.split(jax.random.key(0))

    def stage_1_step(state, x, y):
        params, i = state
        lr = script.learning_rate_at(i, script.LEARNING_RATE, total_steps)
        return script.sgd_update(params, x, y, lr), i + 1

    if stage == 1:
        params = script.init_network_params(script.LAYER_SIZES, params_key)
        return (params, 0), stage_1_step
    state = script.create_train_state(params_key, script.LEARNING_RATE, total_steps)
    keys = [dropout_key] if stage == 3 else []
    return state, lambda state, x, y: script.train_step(state, x, y, *keys)[0]


def pytorch_epochs(stage, steps_per_epoch, make_batches, **options):
    model, optimizer, scheduler = make_training(stage, steps_per_epoch, **options)
    while True:
        train_epoch(model, optimizer, scheduler, make_batches())
        yield


def stack(batches):
    """Stack K batches: images (K, B, 784), classes (K, B)."""
    images, labels = zip(*batches, strict=True)
    return np.stack(images), np.stack(labels)


def scan_of(step):
    """Return a function that takes a step on each batch of a stack, in one call."""

    def body(state, batch):
        return step(state, *batch), None

    scan = jax.jit(jax.lax.scan, static_argnums=0, donate_argnums=1)
    return lambda state, x, y: scan(body, state, (x, y))[0]


def scan_recipe_epochs(loader):
    """Train with recipes/scan.diff, which takes 25 steps in each call."""
    with TemporaryDirectory() as directory:
        script = shutil.copy(SCRIPTS[2].__file__, directory)
        diff = bench.ROOT / "recipes" / "scan.diff"
        subprocess.run(["git", "apply", diff], cwd=directory, check=True)
        spec = importlib.util.spec_from_file_location("scan_recipe", script)
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)

    def stacks():
        batches = iter(loader)
        while next_batches := list(islice(batches, 25)):
            yield stack(next_batches)

    state, _ = start(2, len(loader))
    return epochs(stacks, state, lambda *args: recipe.train_steps(*args)[0])


def compare_stage(stage, train_set, data_dir, rounds):
    script = SCRIPTS[stage]
    settings = (script.BATCH_SIZE, script.LEARNING_RATE, script.FINAL_LEARNING_RATE)
    assert SETTINGS[stage] == settings, "pytorch_mnist.py has other settings"
    loader = make_loader(train_set, script.BATCH_SIZE)
    n, batches = len(loader), list(loader)
    on_device = jax.device_put(stack(batches))
    state, step = start(stage, n)
    images = torch.from_numpy(np.stack([image for image, _ in train_set]))
    labels = torch.tensor([int(label) for _, label in train_set])
    tensors = partial(bench.shuffled, torch.randperm, script.BATCH_SIZE, images, labels)
    usual_loader = make_train_loader(data_dir, script.BATCH_SIZE)

    candidates = {
        "epoch": epochs(loader.__iter__, *start(stage, n)),
        "loading alone": epochs(loader.__iter__),
        "batches ready": epochs(batches.__iter__, *start(stage, n)),
        "one `lax.scan`": epochs(lambda: [on_device], state, scan_of(step)),
        "PyTorch, usual": pytorch_epochs(stage, n, usual_loader.__iter__),
        "PyTorch, fastest": pytorch_epochs(stage, n, tensors, fused=True),
    }
    if stage == 2:
        candidates["`recipes/scan.diff`"] = scan_recipe_epochs(loader)
    seconds = bench.compare(f"stage {stage}", candidates, rounds)
    ratios = seconds["epoch"] / seconds["PyTorch, fastest"]
    print(f"\nstage {stage}, epoch / PyTorch's fastest, each round:", ratios.round(2))


def compare_sizes(train_set, rounds):
    """Show how time depends on the number of images and the batch size."""
    candidates = {}
    for n, batch_size in SIZES:
        loader = make_loader(train_set[:n], batch_size)
        name = f"{n:,} in batches of {batch_size}"
        candidates[name] = epochs(loader.__iter__, *start(2, len(loader)))
    bench.compare("stage 2, images", candidates, rounds)


def main() -> None:
    args, train_set = bench.setup(__doc__, "--rounds")
    for stage in SCRIPTS:
        compare_stage(stage, train_set, args.data_dir, args.rounds)
    compare_sizes(train_set, args.rounds)


if __name__ == "__main__":
    main()
