"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import bench
import jax
import torch
from bench import SCRIPTS, epochs
from pytorch_mnist import make_model, make_step
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from common import NumpyLoader, load_mnist, numpy_collate

TOTAL_STEPS = 10_000  # of the schedules; how long a step takes does not depend on it


def start(stage, script):
    """Return a script's initial state, and its step: (state, x, y) -> next state."""
    init_key, dropout_key = jax.random.split(jax.random.key(0))

    def stage_1_step(state, x, y):
        params, i = state
        lr = script.learning_rate_at(i, script.LEARNING_RATE, TOTAL_STEPS)
        return script.sgd_update(params, x, y, lr)[0], i + 1

    if stage == 1:
        params = script.init_network_params(script.LAYER_SIZES, init_key)
        return (params, 0), stage_1_step
    state = script.create_train_state(init_key, script.LEARNING_RATE, TOTAL_STEPS)
    keys = [dropout_key] if stage == 3 else []
    return state, lambda state, x, y: script.train_step(state, x, y, *keys)[0]


def one_scan(stage, batches):
    """Take a step on each batch, in one compiled call, on data on the device."""
    state, step = start(stage, SCRIPTS[stage])
    on_device = jax.device_put(numpy_collate(batches))

    @partial(jax.jit, donate_argnums=0)
    def steps(state, x, y):
        return jax.lax.scan(lambda s, batch: (step(s, *batch), None), state, (x, y))[0]

    return epochs(lambda: [on_device], state, steps)


def pytorch(stage, make_batches, fused=None):
    step = make_step(stage, make_model(stage), TOTAL_STEPS, fused)
    return epochs(make_batches, None, step)


def one_tensor(train_set, batch_size):
    """Yield shuffled batches of one tensor of images, and one of labels."""
    images, labels = map(torch.from_numpy, numpy_collate(train_set))
    while True:
        order = torch.randperm(len(images)).reshape(-1, batch_size)
        yield ((images[indices], labels[indices]) for indices in order)


def recipe(name):
    """Return mlp_flax.py with a recipe applied, as a module."""
    with TemporaryDirectory() as scratch:
        script = Path(shutil.copy(bench.ROOT / "mlp_flax.py", scratch))
        diff = bench.ROOT / "recipes" / f"{name}.diff"
        subprocess.run(["git", "apply", diff], cwd=scratch, check=True)
        script.rename(script.with_name(f"{name}_recipe.py"))
        sys.path.insert(0, scratch)
        return import_module(f"{name}_recipe")


def scan_recipe(loader):
    script = recipe("scan")

    def stacks():
        batches = iter(loader)
        while waiting := list(islice(batches, script.STEPS_PER_CALL)):
            yield numpy_collate(waiting)

    state, _ = start(2, script)
    return epochs(stacks, state, lambda *args: script.train_steps(*args)[0])


def compare_stage(stage, train_set, args):
    script, n = SCRIPTS[stage], len(train_set)
    options = {"batch_size": script.BATCH_SIZE, "shuffle": True, "drop_last": True}
    loader = NumpyLoader(train_set, jax.random.key(0), **options)
    batches, tensors = list(loader), one_tensor(train_set, script.BATCH_SIZE)
    like_for_like = DataLoader(train_set, **options)
    usual_set = Subset(MNIST(args.data_dir, transform=ToTensor()), range(n))
    usual = DataLoader(usual_set, **options)

    candidates = {
        "epoch": epochs(loader.__iter__, *start(stage, script)),
        "PyTorch, like for like": pytorch(stage, like_for_like.__iter__),
        "PyTorch, in memory": pytorch(stage, tensors.__next__, fused=True),
        "PyTorch, usual way": pytorch(stage, usual.__iter__),
        "batches ready": epochs(batches.__iter__, *start(stage, script)),
        "one `lax.scan`": one_scan(stage, batches),
    }
    if stage == 2:
        candidates["`scan.diff`"] = scan_recipe(loader)
        candidates["`nnx.diff`"] = epochs(loader.__iter__, *start(2, recipe("nnx")))
    seconds = bench.time_in_turn(candidates, args.rounds, n)
    bench.print_ratios(f"stage {stage}", seconds)
    if stage == 2:
        ratios = seconds["`scan.diff`"] / seconds["one `lax.scan`"]
        print("\n`scan.diff` / one `lax.scan`:", bench.quartiles(ratios))


def main() -> None:
    # 12,800 images are whole numbers of batches of 32 and of 128.
    args = bench.parse_args(__doc__, rounds=12, train_examples=12_800)
    train_set, _, _ = load_mnist(args.data_dir)
    for stage in SCRIPTS:
        compare_stage(stage, train_set[: args.train_examples], args)


if __name__ == "__main__":
    main()
