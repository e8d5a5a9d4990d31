"""Time what comes before training, in stage 2: python benchmarks/startup.py DIR"""

import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path

PACKAGES = ("numpy", "jax.numpy", "torch.utils.data", "optax", "flax.linen", "mlp_flax")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
times = [("start", time.perf_counter())]


def lap(what):
    times.append((what, time.perf_counter()))


for package in PACKAGES:
    import_module(package)
    lap(f"import {package}")

import jax

import mlp_flax as script

params_key, shuffle_key = jax.random.split(jax.random.key(0))
lap("start JAX, make keys")

train_set, _, _ = script.load_mnist(sys.argv[1])
lap("load MNIST")

loader = script.NumpyLoader(
    train_set, shuffle_key, script.BATCH_SIZE, shuffle=True, drop_last=True
)
x, y = next(loader.batches_from(0))
lap("make the loader, load a batch")

total_steps = script.EPOCHS * len(loader)
state = script.create_train_state(params_key, script.LEARNING_RATE, total_steps)
jax.block_until_ready(state)
lap("compile and run `init`")

jax.block_until_ready(script.train_step(state, x, y))
lap("compile and run the first step")

print("| stage 2 | seconds |\n| --- | --- |")
for (_, begin), (what, end) in pairwise(times):
    print(f"| {what} | {end - begin:.2f} |")
print(f"| all of it | {times[-1][1] - times[0][1]:.2f} |")
