"""Stage 3: dropout and batch statistics, in training and in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import arrays, equal, leaves, load

import common

stage = load("mlp_flax_bn_dropout")
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def batch():
    return arrays(common.draw_digits(40, seed=0))


@pytest.fixture(scope="module")
def trained(batch):
    """A state after five steps; `step` copies it, because train_step donates it."""
    state = stage.create_train_state(jax.random.key(0), 1e-3, 10)
    for _ in range(5):
        state, _ = stage.train_step(state, *batch, KEY)
    return state


def step(state, batch, key=KEY):
    return stage.train_step(jax.tree.map(jnp.copy, state), *batch, key)


def variables(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


def test_step_moves_every_leaf_and_donates_the_old_state(trained, batch):
    old = jax.tree.map(jnp.copy, trained)
    new, _ = stage.train_step(old, *batch, KEY)
    pairs = zip(leaves(trained), leaves(new), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.batch_stats))


def test_loss_is_of_the_parameters_before_the_step(trained, batch):
    x, y = batch
    logits, _ = stage.MLP().apply(
        variables(trained),
        x,
        train=True,
        rngs={"dropout": jax.random.fold_in(KEY, trained.step)},
        mutable=["batch_stats"],
    )
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    new, loss = step(trained, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert new.step == 6


def test_dropout_key_determines_the_mask(trained, batch):
    (a, loss_a), (b, loss_b), (c, loss_c) = (
        step(trained, batch, key) for key in (KEY, KEY, jax.random.key(6))
    )
    assert loss_a == loss_b != loss_c
    assert equal(a.params, b.params)
    assert not equal(a.params, c.params)


def test_every_step_has_a_new_mask(trained, batch):
    losses = {float(step(trained.replace(step=i), batch)[1]) for i in range(4)}
    assert len(losses) == 4


def test_optimizer_knows_nothing_of_batch_stats(trained):
    params = [leaf.shape for leaf in leaves(trained.params)]
    moments = [leaf.shape for leaf in leaves(trained.opt_state) if leaf.shape]
    assert sorted(moments) == sorted(2 * params)
    assert len(jax.tree.leaves(trained.batch_stats)) == 4


def test_evaluation_is_image_by_image(trained, batch):
    """Neither dropout nor the other images of a batch change a prediction."""
    x = np.concatenate([batch[0], np.random.default_rng(0).random((60, 784), "f4")])
    predicted = stage.apply_model(trained, x)
    assert equal(predicted, stage.apply_model(trained, x))
    alone = [int(stage.apply_model(trained, x[i : i + 1])[0]) for i in range(100)]
    assert predicted.tolist() == alone


def test_initial_state_is_that_of_training_mode():
    """As in the article, whose init runs with train=True and two keys."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    expected = stage.MLP().init(keys, jnp.zeros((1, 784)), train=True)["params"]
    state = stage.create_train_state(jax.random.key(0), 1e-3, 10)
    for a, b in zip(leaves(state.params), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    means, variances = leaves(state.batch_stats)[::2], leaves(state.batch_stats)[1::2]
    assert not np.any(means)
    assert np.all(np.array(variances) == 1)


def as_torch(state, rates):
    """The same network with the same weights in PyTorch."""

    def tensor(array):
        return torch.tensor(np.asarray(array))

    layers = []
    for i in range(3):
        dense = state.params[f"layers_{i}"]
        linear = torch.nn.Linear(*dense["kernel"].shape)
        linear.weight.data = tensor(dense["kernel"].T)
        linear.bias.data = tensor(dense["bias"])
        layers.append(linear)
        if i < 2:
            norm = torch.nn.BatchNorm1d(512, eps=1e-5, momentum=0.1)
            norm.weight.data = tensor(state.params[f"norms_{i}"]["scale"])
            norm.bias.data = tensor(state.params[f"norms_{i}"]["bias"])
            norm.running_mean = tensor(state.batch_stats[f"norms_{i}"]["mean"])
            norm.running_var = tensor(state.batch_stats[f"norms_{i}"]["var"])
            layers += [torch.nn.ReLU(), torch.nn.Dropout(rates[i]), norm]
    return torch.nn.Sequential(*layers)


def test_evaluation_equals_pytorch(trained, batch):
    x, _ = batch
    ours = trained.apply_fn(variables(trained), x, train=False)
    theirs = as_torch(trained, stage.DROPOUT_RATES).eval()(torch.tensor(x))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert equal(stage.apply_model(trained, x), theirs.argmax(1).int().numpy())


def test_running_statistics_equal_pytorch(trained, batch):
    """Without dropout, which draws differently; PyTorch's variance divides by n - 1."""
    x, _ = batch
    network = as_torch(trained, (0.0, 0.0)).train()
    network(torch.tensor(x))
    model = stage.MLP(dropout_rates=(0.0, 0.0))
    _, updates = model.apply(variables(trained), x, train=True, mutable=["batch_stats"])
    for name, norm in (("norms_0", network[3]), ("norms_1", network[7])):
        stats, old = (
            updates["batch_stats"][name],
            0.9 * trained.batch_stats[name]["var"],
        )
        biased = old + (norm.running_var.numpy() - old) * (len(x) - 1) / len(x)
        np.testing.assert_allclose(stats["mean"], norm.running_mean, 1e-4, 1e-5)
        np.testing.assert_allclose(stats["var"], biased, 1e-4, 1e-5)


def test_dropout_drops_the_given_fractions(trained, batch):
    """Counted where the network drops: zeros after dropout, of units that were on."""
    _, kept = stage.MLP().apply(
        variables(trained),
        batch[0],
        train=True,
        rngs={"dropout": KEY},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    for i, rate in enumerate((0.3, 0.4)):
        before = kept["intermediates"][f"layers_{i}"]["__call__"][0] > 0
        after = kept["intermediates"][f"dropouts_{i}"]["__call__"][0] > 0
        assert abs(1 - after.sum() / before.sum() - rate) < 0.03
