"""Time training in each way: python benchmarks/training.py --data-dir DIR"""

from functools import partial

import bench
import jax
import numpy as np
import torch
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from pytorch_mnist import SETTINGS, make_train_loader, make_training, train_epoch

from common import NumpyLoader


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def scan(step, state, data, order):
    """Return the state after an epoch; order (steps, B) holds the indices."""
    x, y = data
    return jax.lax.scan(lambda s, i: (step(s, x[i], y[i]), None), state, order)[0]


def pytorch(stage, steps, make_batches, compiled=False, **options):
    model, *rest = make_training(stage, steps, **options)
    if compiled:
        model.compile()
    while True:
        train_epoch(model, *rest, make_batches())
        yield


def nnx_step(modules, x, y):
    model, optimizer = modules
    optimizer.update(model, nnx.grad(lambda m: cross_entropy(m(x), y).mean())(model))
    return modules


def start_nnx(functional, steps):
    """Return what bench.start does, for stage 2 in Flax NNX."""
    linear = partial(nnx.Linear, rngs=nnx.Rngs(0))
    hidden = linear(784, 512), nnx.relu, linear(512, 512), nnx.relu
    model = nnx.Sequential(*hidden, linear(512, 10))
    modules = model, nnx.Optimizer(model, bench.start(2, steps)[0].tx, wrt=nnx.Param)
    if not functional:
        return modules, nnx.jit(nnx_step)
    graph, state = nnx.split(modules)

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        return nnx.state(nnx_step(nnx.merge(graph, state), x, y))

    return state, step


args, train_set = bench.setup(__doc__)
data = train_set.__getitems__([*range(60_000)])
tensors = torch.from_numpy(data[0]), torch.from_numpy(data[1]).long()
for stage, (batch_size, *_) in SETTINGS.items():
    loader = NumpyLoader(train_set, bench.KEY, batch_size, shuffle=True, drop_last=True)
    whole = [jax.device_put((data, np.stack([*loader.batch_sampler])))]
    fastest = partial(bench.cut, torch.randperm, batch_size, *tensors)
    start = partial(bench.start, stage, len(loader))
    peer = partial(pytorch, stage, len(loader))
    state, step = start()
    works = {
        "epoch": bench.repeat(loader.__iter__, *start()),
        "loading alone": bench.repeat(loader.__iter__),
        "batches ready": bench.repeat([*loader].__iter__, *start()),
        "one `lax.scan`": bench.repeat(whole.__iter__, state, partial(scan, step)),
        "PyTorch, usual": peer(make_train_loader(args.data_dir, batch_size).__iter__),
        "PyTorch, fastest": peer(fastest, fused=True),
        "PyTorch, fastest, compiled": peer(fastest, compiled=True, fused=True),
    }
    if stage == 2:
        for name, functional in (("jit", False), ("split", True)):
            started = start_nnx(functional, len(loader))
            works[f"Flax NNX, `nnx.{name}`"] = bench.repeat(loader.__iter__, *started)
    bench.compare(f"stage {stage}", works, args.rounds)
