"""Stage 3: dropout and batch statistics, in training and in evaluation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import STAGE_3, assert_close
from pytorch_mnist import make_model

from mlp_flax_bn_dropout import MLP, apply_model, create_train_state, train_step

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def trained(batch):
    """A state after five steps. A step deletes its state: give it a copy."""
    state = create_train_state(jax.random.key(0), 1e-3, 10)
    for _ in range(5):
        state, _ = train_step(state, *batch, KEY)
    return state


@pytest.fixture
def model(trained):
    """The same network in PyTorch, without dropout."""
    model = make_model(stage=3)
    for dropout in modules(model, torch.nn.Dropout):
        dropout.p = 0.0
    for i, linear in enumerate(modules(model, torch.nn.Linear)):
        linear.weight.data = tensor(trained.params[f"layers_{i}"]["kernel"].T)
        linear.bias.data = tensor(trained.params[f"layers_{i}"]["bias"])
    for i, norm in enumerate(modules(model, torch.nn.BatchNorm1d)):
        norm.weight.data = tensor(trained.params[f"norms_{i}"]["scale"])
        norm.bias.data = tensor(trained.params[f"norms_{i}"]["bias"])
        norm.running_mean = tensor(trained.batch_stats[f"norms_{i}"]["mean"])
        norm.running_var = tensor(trained.batch_stats[f"norms_{i}"]["var"])
    return model


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def tensor(array):
    return torch.tensor(np.asarray(array))


def copy(state):
    return jax.tree.map(jnp.copy, state)


def test_evaluation_uses_running_averages(trained, batch, model):
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    apply = jax.jit(partial(trained.apply_fn, train=False))
    logits = apply(variables, batch[0])
    expected = model.eval()(tensor(batch[0])).detach()
    assert_close(logits, expected, 1e-3, 1e-4)
    predicted = apply_model(trained, batch[0])
    assert predicted.tolist() == expected.argmax(dim=1).tolist()


def test_training_uses_batch_statistics_and_updates_the_averages(trained, batch, model):
    """Without dropout; a step of SGD with a learning rate of 1 shows the gradient."""
    x, y = tensor(batch[0]), tensor(batch[1]).long()
    expected = torch.nn.functional.cross_entropy(model.train()(x), y)
    expected.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    sgd = optax.sgd(1.0)
    state = copy(trained).replace(
        apply_fn=MLP(STAGE_3.LAYER_SIZES, (0.0, 0.0)).apply,
        tx=sgd,
        opt_state=sgd.init(trained.params),
    )
    new, loss = train_step(state, *batch, KEY)
    assert_close(loss, expected.item(), 1e-4)
    for i, linear in enumerate(modules(model, torch.nn.Linear)):
        ours = [
            new.params[f"layers_{i}"]["kernel"].T,
            new.params[f"layers_{i}"]["bias"],
        ]
        theirs = [p.detach().numpy() for p in linear.parameters()]
        assert_close(ours, theirs, 1e-3, 1e-5)
    for i, norm in enumerate(modules(model, torch.nn.BatchNorm1d)):
        old, stats = trained.batch_stats[f"norms_{i}"], new.batch_stats[f"norms_{i}"]
        assert_close(stats["mean"], norm.running_mean, 1e-3, 1e-5)
        # PyTorch averages the unbiased variance, Flax the biased one.
        share_of_batch = norm.running_var.numpy() - 0.9 * old["var"]
        biased = share_of_batch * (len(x) - 1) / len(x)
        assert_close(stats["var"], 0.9 * old["var"] + biased, 1e-3, 1e-5)


def test_masks_are_new_at_every_step_and_those_of_the_key(trained, batch):
    def loss(step, key):
        return float(train_step(copy(trained).replace(step=step), *batch, key)[1])

    assert loss(5, KEY) == loss(5, KEY)
    assert len({loss(5, KEY), loss(6, KEY), loss(5, jax.random.key(6))}) == 3


def test_dropout_drops_the_given_fractions_before_batchnorm(trained, batch):
    _, updates = trained.apply_fn(
        {"params": trained.params, "batch_stats": trained.batch_stats},
        batch[0],
        train=True,
        rngs={"dropout": KEY},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    outputs, stats = jax.device_get((updates["intermediates"], updates["batch_stats"]))
    for i, rate in enumerate((0.3, 0.4)):
        before = outputs[f"layers_{i}"]["__call__"][0] > 0
        after = outputs[f"dropouts_{i}"]["__call__"][0]
        assert abs(1 - (after > 0).sum() / before.sum() - rate) < 0.03
        old = trained.batch_stats[f"norms_{i}"]["mean"]
        mean = 0.9 * old + 0.1 * after.mean(axis=0)
        assert_close(stats[f"norms_{i}"]["mean"], mean)


def test_old_state_is_donated(trained, batch):
    old = copy(trained)
    train_step(old, *batch, KEY)
    variables = (old.params, old.batch_stats)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables))
