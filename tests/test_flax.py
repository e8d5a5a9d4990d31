"""Stage 2, and what stage 3 has in common with it: train state, optimizer, step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TWENTY_STEPS, assert_close, equal, leaves, run

import common
from mlp_flax import MLP, apply_model, create_train_state, train_step


@pytest.fixture
def state():
    return create_train_state(jax.random.key(0), 1e-3, 10)


@pytest.fixture(scope="module")
def batch():
    return common.numpy_collate(common.draw_digits(20, seed=0))


def test_init_infers_the_width_of_the_input():
    model, x = MLP(layer_sizes=(8, 4)), jnp.ones((5, 30))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.eval_shape(model.apply, variables, x).shape == (5, 4)
    shapes = {leaf.shape for leaf in jax.tree.leaves(variables)}
    assert shapes == {(30, 8), (8,), (8, 4), (4,)}


def test_relu_between_the_layers_alone():
    """With weights of 1, negative inputs vanish, and negative logits do not."""
    ones = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    params = {"layers_0": ones, "layers_1": {**ones, "bias": jnp.array([-5.0])}}
    x = jnp.array([[-3.0], [2.0]])
    logits = MLP(layer_sizes=(1, 1)).apply({"params": params}, x)
    assert logits.tolist() == [[-5.0], [-3.0]]


def test_initialisation_is_flaxs_own(state):
    for name, fan_in in (("layers_0", 784), ("layers_1", 512), ("layers_2", 512)):
        layer = state.params[name]
        assert np.isclose(layer["kernel"].std(), fan_in**-0.5, rtol=0.05)
        assert not layer["bias"].any()


def test_step(state, batch):
    """Returns the loss before the update, moves everything, donates the old state."""
    logits = state.apply_fn({"params": state.params}, batch[0])
    log_probs = jax.nn.log_softmax(logits)
    expected = -np.mean([p[label] for p, label in zip(log_probs, batch[1])])
    old = jax.tree.leaves((state.params, state.opt_state))
    before = leaves(old)
    new, loss = train_step(state, *batch)
    assert_close(loss, expected)
    after = leaves((new.params, new.opt_state))
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(leaf.is_deleted() for leaf in old)
    assert new.step == 1
    for _ in range(10):
        new, loss = train_step(new, *batch)
    assert loss < expected / 2


def test_label_without_an_output_makes_the_loss_nan(state, batch):
    _, loss = train_step(state, batch[0], np.full(20, 10))
    assert np.isnan(loss)


def test_apply_model_predicts_the_largest_logit(state, batch):
    logits = state.apply_fn({"params": state.params}, batch[0])
    predicted = apply_model(state, batch[0])
    assert predicted.dtype == jnp.int32
    assert equal(predicted, logits.argmax(axis=1))


def test_optimizer_is_adam_with_its_own_betas(state):
    reference = optax.adam(optax.linear_schedule(1e-3, 1e-5, 10))
    params, opt_state = state.params, reference.init(state.params)
    ours = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    theirs = jax.jit(reference.update)
    for size in (1.0, -3.0, 0.5):
        grads = jax.tree.map(lambda p: p + size, state.params)  # noqa: B023
        state = ours(state, grads)
        updates, opt_state = theirs(grads, opt_state)
        params = optax.apply_updates(params, updates)
    assert_close(state.params, params, 1e-6, 1e-7)


def test_schedule_spans_the_run(flax_script, small_mnist, monkeypatch):
    """Adam turns a gradient that never changes into steps of the learning rate."""
    create, created = flax_script.create_train_state, []

    def spy(*args):
        created.append(create(*args))
        return created[-1]

    monkeypatch.setattr(flax_script, "create_train_state", spy)
    run(flax_script, small_mnist, *TWENTY_STEPS, "--max-steps", 0)
    (state,) = created
    ones = jax.tree.map(jnp.ones_like, state.params)
    update, opt_state, rates = jax.jit(state.tx.update), state.opt_state, []
    for _ in range(21):
        updates, opt_state = update(ones, opt_state)
        rates.append(-float(jax.tree.leaves(updates)[0].mean()))
    np.testing.assert_allclose(rates, np.linspace(0.01, 1e-5, 21), rtol=1e-3)
