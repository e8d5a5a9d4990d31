"""Stage 2: the train state, its optimizer, and the jitted step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import load, run

import common

stage = load("mlp_flax")


@pytest.fixture
def state():
    return stage.create_train_state(jax.random.key(0), 1e-3, 10)


@pytest.fixture
def batch():
    return common.draw_digits(20, seed=0)[list(range(20))]


def test_model_takes_one_image_or_a_batch_of_any_width():
    model = stage.MLP(layer_sizes=(8, 4))
    variables = model.init(jax.random.key(0), jnp.ones(30))
    x = jax.random.normal(jax.random.key(1), (5, 30))
    logits = model.apply(variables, x)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(model.apply(variables, x[0]), logits[0], 1e-4, 1e-6)
    assert {p.shape for p in jax.tree.leaves(variables)} == {
        (30, 8),
        (8,),
        (8, 4),
        (4,),
    }


def test_step_moves_parameters_and_optimizer_state(state, batch):
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    logits = state.apply_fn({"params": state.params}, batch[0])
    log_probs = jax.nn.log_softmax(logits)
    expected = -np.mean([p[label] for p, label in zip(log_probs, batch[1])])
    new, loss = stage.train_step(state, *batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert new.step == 1
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before, (new.params, new.opt_state)
    )
    assert all(jax.tree.leaves(moved))


def test_step_donates_the_old_state(state, batch):
    stage.train_step(state, *batch)
    old = jax.tree.leaves((state.params, state.opt_state))
    assert all(leaf.is_deleted() for leaf in old)


def test_step_lowers_the_loss(state, batch):
    losses = []
    for _ in range(10):
        state, loss = stage.train_step(state, *batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_initialisation_and_optimizer_are_the_articles(state):
    """Flax's own initialisation, and Adam with its own betas."""
    for name, fan_in in (("layers_0", 784), ("layers_1", 512), ("layers_2", 512)):
        layer = state.params[name]
        assert np.isclose(layer["kernel"].std(), fan_in**-0.5, rtol=0.05)
        assert not layer["bias"].any()

    def random_like(i, p):
        return jax.random.normal(jax.random.key(i), p.shape)

    grads = [jax.tree.map(partial(random_like, i), state.params) for i in range(3)]
    reference = optax.adam(optax.linear_schedule(1e-3, 1e-5, 10))
    params, opt_state = state.params, reference.init(state.params)
    ours = jax.jit(lambda state, grad: state.apply_gradients(grads=grad))
    theirs = jax.jit(reference.update)
    for grad in grads:
        state = ours(state, grad)
        updates, opt_state = theirs(grad, opt_state)
        params = jax.tree.map(np.add, params, updates)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_schedule_spans_the_run(flax_script, small_mnist, monkeypatch):
    """Adam turns a gradient that never changes into steps of the learning rate."""
    created = []
    create = flax_script.create_train_state

    def spy(*args):
        created.append(create(*args))
        return jax.tree.map(jnp.copy, created[-1])  # train_step donates what it gets

    monkeypatch.setattr(flax_script, "create_train_state", spy)
    options = ["--epochs", 2, "--batch-size", 64, "--max-steps", 1]
    run(flax_script, small_mnist, *options, "--learning-rate", 0.01)
    tx, opt_state = created[0].tx, created[0].opt_state
    ones = jax.tree.map(jnp.ones_like, created[0].params)
    update = jax.jit(tx.update)
    rates = []
    for _ in range(21):  # 640 digits in batches of 64, twice
        updates, opt_state = update(ones, opt_state)
        rates.append(-float(jax.tree.leaves(updates)[0].mean()))
    np.testing.assert_allclose(rates, np.linspace(0.01, 1e-5, 21), rtol=1e-3)


def test_initial_learning_rates():
    for name, rate in (("mlp_flax", 1e-3), ("mlp_flax_bn_dropout", 3e-3)):
        assert load(name).make_parser().get_default("learning_rate") == rate
