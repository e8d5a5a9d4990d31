"""Stage 3: dropout and batch statistics, in training and in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import load, run

import common

stage = load("mlp_flax_bn_dropout")
KEY = jax.random.key(5)


@pytest.fixture
def state():
    return stage.create_train_state(jax.random.key(0), jax.random.key(1), 1e-3, 10)


@pytest.fixture
def batch():
    return common.draw_digits(40, seed=0)[list(range(40))]


def copy(state):
    return jax.tree.map(jnp.copy, state)  # train_step donates what it is given


def differ(a, b):
    return [not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)))]


def test_statistics_move_in_training_and_stand_still_in_evaluation(state, batch):
    before = jax.tree.map(np.array, state.batch_stats)
    state, _ = stage.train_step(state, *batch, KEY)
    after = jax.tree.map(np.array, state.batch_stats)
    assert len(differ(before, after)) == 4
    assert all(differ(before, after))
    stage.apply_model(state, batch[0])
    assert not any(differ(after, state.batch_stats))


def test_evaluation_is_deterministic_and_image_by_image(state, batch):
    """Neither dropout nor the other images of a batch change a prediction."""
    for _ in range(5):
        state, _ = stage.train_step(state, *batch, KEY)
    x = np.concatenate([batch[0], np.random.default_rng(0).random((200, 784), "f4")])
    predicted = stage.apply_model(state, x)
    assert np.array_equal(predicted, stage.apply_model(state, x))
    alone = [int(stage.apply_model(state, x[i : i + 1])[0]) for i in range(0, 240, 4)]
    assert predicted[::4].tolist() == alone


def test_dropout_key_decides_which_units_are_dropped(state, batch):
    (a, loss_a), (b, loss_b), (c, loss_c) = (
        stage.train_step(copy(state), *batch, key)
        for key in (KEY, KEY, jax.random.key(6))
    )
    assert loss_a == loss_b != loss_c
    assert not any(differ(a.params, b.params))
    assert any(differ(a.params, c.params))


def test_every_step_drops_other_units(state, batch):
    losses = [
        float(stage.train_step(copy(state).replace(step=step), *batch, KEY)[1])
        for step in range(4)
    ]
    assert len(set(losses)) == 4


def test_optimizer_knows_nothing_of_batch_stats(state):
    params = [p.shape for p in jax.tree.leaves(state.params)]
    moments = [m.shape for m in jax.tree.leaves(state.opt_state) if m.shape]
    assert sorted(moments) == sorted(2 * params)
    assert "batch_stats" not in state.params
    assert len(jax.tree.leaves(state.batch_stats)) == 4


def as_torch(state, rates):
    """The same network with the same weights in PyTorch."""
    layers = []
    for i, width in enumerate((784, 512, 512)):
        dense = state.params[f"layers_{i}"]
        linear = torch.nn.Linear(width, dense["bias"].size)
        linear.weight.data = torch.tensor(np.asarray(dense["kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.asarray(dense["bias"]))
        layers.append(linear)
        if i < 2:
            norm = torch.nn.BatchNorm1d(512, eps=1e-5, momentum=0.1)
            scale, stats = state.params[f"norms_{i}"], state.batch_stats[f"norms_{i}"]
            norm.weight.data = torch.tensor(np.asarray(scale["scale"]))
            norm.bias.data = torch.tensor(np.asarray(scale["bias"]))
            norm.running_mean = torch.tensor(np.asarray(stats["mean"]))
            norm.running_var = torch.tensor(np.asarray(stats["var"]))
            layers += [torch.nn.ReLU(), torch.nn.Dropout(rates[i]), norm]
    return torch.nn.Sequential(*layers)


def test_evaluation_equals_pytorch(state, batch):
    x = batch[0]
    for _ in range(5):
        state, _ = stage.train_step(state, *batch, KEY)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    ours = state.apply_fn(variables, x, train=False)
    theirs = as_torch(state, stage.DROPOUT_RATES).eval()(torch.tensor(x))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert np.array_equal(stage.apply_model(state, x), theirs.argmax(1).numpy())


def test_running_statistics_equal_pytorch(state, batch):
    """Without dropout, which draws differently; PyTorch's variance divides by n - 1."""
    x = batch[0]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    network = as_torch(state, (0.0, 0.0)).train()
    network(torch.tensor(x))
    model = stage.MLP(dropout_rates=(0.0, 0.0))
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    for i, norm in enumerate(network[j] for j in (3, 7)):
        stats = updates["batch_stats"][f"norms_{i}"]
        biased = 0.9 + (norm.running_var - 0.9) * (len(x) - 1) / len(x)
        np.testing.assert_allclose(stats["mean"], norm.running_mean, 1e-4, 1e-5)
        np.testing.assert_allclose(stats["var"], biased, 1e-4, 1e-5)


def test_dropout_drops_the_given_fractions(state, batch):
    """Counted where the network drops: zeros after dropout, of units that were on."""
    model = stage.MLP()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, kept = model.apply(
        variables,
        batch[0],
        train=True,
        rngs={"dropout": KEY},
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    for i, rate in enumerate((0.3, 0.4)):
        before = kept["intermediates"][f"layers_{i}"]["__call__"][0] > 0
        after = kept["intermediates"][f"dropouts_{i}"]["__call__"][0] > 0
        fraction = 1 - after.sum() / before.sum()
        assert abs(fraction - rate) < 0.03


def test_a_batch_of_one_image_is_refused(small_mnist, capsys):
    with pytest.raises(SystemExit) as caught:
        run(stage, small_mnist, "--batch-size", 1)
    assert caught.value.code == 2
    assert "argument --batch-size: invalid value 1" in capsys.readouterr().err


def test_loss_and_statistics_are_of_the_parameters_before_the_step(state, batch):
    """The loss that train_step returns, computed by hand from the same masks."""
    x, y = batch
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, _ = stage.MLP().apply(
        variables,
        x,
        train=True,
        rngs={"dropout": jax.random.fold_in(KEY, state.step)},
        mutable=["batch_stats"],
    )
    log_probs = jax.nn.log_softmax(logits)
    expected = -np.mean([p[label] for p, label in zip(log_probs, y)])
    new, loss = stage.train_step(copy(state), x, y, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert new.step == 1


def test_step_moves_every_leaf_and_donates_the_old_state(state, batch):
    before = jax.tree.map(np.array, state)
    new, _ = stage.train_step(state, *batch, KEY)
    assert all(differ(before, new))
    old = jax.tree.leaves((state.params, state.opt_state, state.batch_stats))
    assert all(leaf.is_deleted() for leaf in old)
