"""Time an epoch of training: python benchmarks/training.py --data-dir DIR"""

import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import islice
from tempfile import TemporaryDirectory

import bench
import jax
import torch
from bench import SCRIPTS, epochs
from pytorch_mnist import make_model, make_step, usual_loader

from common import NumpyLoader, load_mnist, numpy_collate

TOTAL_STEPS = 10_000  # of the schedules; how long a step takes does not depend on it


def make_loader(train_set, batch_size, key):
    """Return the loader that the scripts train with."""
    return NumpyLoader(train_set, key, batch_size, shuffle=True, drop_last=True)


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
    """Take a step on each of K batches, in one compiled call, on data on the device."""
    state, step = start(stage, SCRIPTS[stage])
    on_device = jax.device_put(numpy_collate(batches))

    @partial(jax.jit, donate_argnums=0)
    def steps(state, x, y):
        return jax.lax.scan(lambda s, batch: (step(s, *batch), None), state, (x, y))[0]

    return epochs(lambda: [on_device], state, steps)


def pytorch_in_memory(stage, images, labels, compile_model=False):
    model = make_model(stage)
    if compile_model:
        model = torch.compile(model)
    batch_size = SCRIPTS[stage].BATCH_SIZE
    tensors = partial(bench.shuffled, torch.randperm, batch_size, images, labels)
    return epochs(tensors, None, make_step(stage, model, TOTAL_STEPS, fused=True))


def recipe(name):
    """Return mlp_flax.py with a recipe applied, as a module."""
    with TemporaryDirectory() as scratch:
        patched = f"{scratch}/{name}_recipe.py"
        command = ["patch", "-F0", "--silent", f"--output={patched}", "mlp_flax.py"]
        diff = f"recipes/{name}.diff"
        subprocess.run([*command, diff], cwd=bench.ROOT, check=True)
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


def seeds_recipe(train_set):
    """Train S seeds on 1/S of the images: as many steps as one seed's on all images."""
    script = recipe("seeds")
    images = train_set[: len(train_set) // script.NUM_SEEDS]
    keys = jax.random.split(jax.random.key(0), script.NUM_SEEDS)
    loaders = [make_loader(images, script.BATCH_SIZE, key) for key in keys]
    create_states = jax.vmap(script.create_train_state, in_axes=(0, None, None))
    state = create_states(keys, script.LEARNING_RATE, TOTAL_STEPS)

    def batches():
        return map(numpy_collate, zip(*loaders, strict=True))

    return epochs(batches, state, lambda *args: script.train_step(*args)[0])


def compare_stage(stage, train_set, args):
    script = SCRIPTS[stage]
    loader = make_loader(train_set, script.BATCH_SIZE, jax.random.key(0))
    batches = list(loader)
    images, labels = map(torch.from_numpy, numpy_collate(train_set))
    tensors = images, labels.long()
    usual = usual_loader(args.data_dir, script.BATCH_SIZE, len(train_set))
    usual_step = make_step(stage, make_model(stage), TOTAL_STEPS)

    candidates = {
        "epoch": epochs(loader.__iter__, *start(stage, script)),
        "batches ready": epochs(batches.__iter__, *start(stage, script)),
        "loading alone": epochs(loader.__iter__),
        "PyTorch in memory": pytorch_in_memory(stage, *tensors),
        "`torch.compile`": pytorch_in_memory(stage, *tensors, compile_model=True),
        "PyTorch, usual way": epochs(usual.__iter__, None, usual_step),
        "one `lax.scan`": one_scan(stage, batches),
    }
    if stage == 2:
        candidates["`scan.diff`"] = scan_recipe(loader)
        candidates["`nnx.diff`"] = epochs(loader.__iter__, *start(2, recipe("nnx")))
        candidates["`seeds.diff`, per seed"] = seeds_recipe(train_set)
    seconds = bench.compare(f"stage {stage}", candidates, args.rounds, len(train_set))
    if stage == 2:
        ratios = seconds["`scan.diff`"] / seconds["one `lax.scan`"]
        print("\n`scan.diff` / one `lax.scan`:", bench.quartiles(ratios))


def main() -> None:
    # 12,800 images are whole numbers of batches of 32 and of 128.
    args = bench.parse_args(__doc__, rounds=25, train_examples=12_800)
    train_set, _, _ = load_mnist(args.data_dir)
    for stage in SCRIPTS:
        compare_stage(stage, train_set[: args.train_examples], args)


if __name__ == "__main__":
    main()
