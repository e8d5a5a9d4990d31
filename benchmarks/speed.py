"""Time epochs of training and of loading: python benchmarks/speed.py --data-dir DIR

All candidates take turns. A ratio is the time of the first one divided by that of another
in the same round: the median of the rounds, and their quartiles.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench
import grain
import jax
import numpy as np
import torch
from pytorch_mnist import make_model, make_step
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from common import NumpyLoader, load_mnist, numpy_collate

IMAGES = 6_400  # of an epoch: whole numbers of batches of 32 and of 128
TOTAL_STEPS = 10_000  # of the schedules; how long a step takes does not depend on it


def only_load(state: Any, x: Any, y: Any) -> Any:
    return state


def epochs(
    make_batches: Callable[[], Iterable], state: Any = None, step: Callable = only_load
) -> Iterator[None]:
    """Train for an epoch at each `next`; by default, only load its batches."""
    while True:
        for x, y in make_batches():
            state = step(state, x, y)
        jax.block_until_ready(state)
        yield


def start(stage: int, script: Any) -> tuple[Any, Callable]:
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


def one_scan(stage: int, batches: list) -> Iterator[None]:
    """Take a step on each batch, in one compiled call, on data on the device."""
    state, step = start(stage, bench.SCRIPTS[stage])
    on_device = jax.device_put(numpy_collate(batches))

    @partial(jax.jit, donate_argnums=0)
    def steps(state, x, y):
        return jax.lax.scan(lambda s, batch: (step(s, *batch), None), state, (x, y))[0]

    return epochs(lambda: [on_device], state, steps)


def recipe(name: str) -> Any:
    """Return mlp_flax.py with a recipe applied, as a module."""
    with TemporaryDirectory() as scratch:
        script = Path(shutil.copy(bench.ROOT / "mlp_flax.py", scratch))
        diff = bench.ROOT / "recipes" / f"{name}.diff"
        subprocess.run(["git", "apply", diff], cwd=scratch, check=True)
        script.rename(script.with_name(f"{name}_recipe.py"))
        sys.path.insert(0, scratch)
        return import_module(f"{name}_recipe")


def scan_recipe(loader: NumpyLoader) -> Iterator[None]:
    script = recipe("scan")

    def stacks():
        batches = iter(loader)
        while waiting := list(islice(batches, script.STEPS_PER_CALL)):
            yield map(np.stack, zip(*waiting))

    state, _ = start(2, script)
    return epochs(stacks, state, lambda *args: script.train_steps(*args)[0])


def training(stage: int, train_set: list, usual_set: Dataset) -> dict[str, Iterator]:
    script = bench.SCRIPTS[stage]
    options = {"batch_size": script.BATCH_SIZE, "shuffle": True, "drop_last": True}
    loader = NumpyLoader(train_set, jax.random.key(0), **options)
    batches = list(loader)
    tensors = TensorDataset(*map(torch.from_numpy, numpy_collate(train_set)))

    def one_tensor_batches():
        for indices in torch.randperm(IMAGES).reshape(-1, script.BATCH_SIZE):
            yield tensors[indices]

    def pytorch(make_batches, fused=None):
        step = make_step(stage, make_model(stage), TOTAL_STEPS, fused)
        return epochs(make_batches, None, step)

    candidates = {
        "the script": epochs(loader.__iter__, *start(stage, script)),
        "batches ready": epochs(batches.__iter__, *start(stage, script)),
        "one `lax.scan`": one_scan(stage, batches),
    }
    if stage == 2:
        candidates["`scan.diff`"] = scan_recipe(loader)
        candidates["`nnx.diff`"] = epochs(loader.__iter__, *start(2, recipe("nnx")))
    return candidates | {
        "PyTorch, like for like": pytorch(DataLoader(train_set, **options).__iter__),
        "PyTorch, at its best": pytorch(one_tensor_batches, fused=True),
        "PyTorch, usual way": pytorch(DataLoader(usual_set, **options).__iter__),
    }


def loading(train_set: list, usual_set: Dataset) -> dict[str, Iterator]:
    options = {"batch_size": 32, "shuffle": True, "drop_last": True}
    shuffled = grain.MapDataset.source(train_set).seed(0).shuffle()
    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # faster here
    loaders = {
        "`NumpyLoader`": NumpyLoader(train_set, jax.random.key(0), **options),
        "`DataLoader`": DataLoader(train_set, **options),
        "Grain": shuffled.batch(32, drop_remainder=True).to_iter_dataset(no_threads),
        "PyTorch, usual way": DataLoader(usual_set, **options),
    }
    return {name: epochs(loader.__iter__) for name, loader in loaders.items()}


def compare(title: str, candidates: dict[str, Iterator], rounds: int) -> None:
    """Print the seconds for 60,000 images, and the ratios."""
    times = np.zeros((1 + rounds, len(candidates)))
    for each_round in times:
        for i, candidate in enumerate(candidates.values()):
            begin = time.perf_counter()
            next(candidate)
            each_round[i] = time.perf_counter() - begin
    times = times[1:]  # the first round compiles
    seconds = np.median(times, axis=0) * 60_000 / IMAGES
    ratios = np.percentile(times[:, :1] / times, [50, 25, 75], axis=0).T
    rows = []
    for name, s, (median, low, high) in zip(candidates, seconds, ratios, strict=True):
        rows.append([name, f"{s:.2g}", f"{median:.2f} ({low:.2f} to {high:.2f})"])
    bench.print_table([title, "seconds", "ratio"], rows)


def main() -> None:
    args = bench.parse_args(__doc__, rounds=24)
    train_set = load_mnist(args.data_dir)[0][:IMAGES]
    usual_set = Subset(MNIST(args.data_dir, transform=ToTensor()), range(IMAGES))
    for stage in bench.SCRIPTS:
        compare(f"stage {stage}", training(stage, train_set, usual_set), args.rounds)
    compare("loading", loading(train_set, usual_set), args.rounds)


if __name__ == "__main__":
    main()
