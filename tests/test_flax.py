"""Stage 2, and what stage 3 has in common with it: train state, optimizer, step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from mlp_flax import MLP, apply_model, create_train_state, train_step


@pytest.fixture
def state():
    return create_train_state(jax.random.key(0), 1e-3, 10)


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


def test_step_returns_the_loss_before_and_donates_the_old_state(state, batch):
    logits = state.apply_fn({"params": state.params}, batch[0])
    log_probs = jax.nn.log_softmax(logits)
    expected = -np.mean([p[label] for p, label in zip(log_probs, batch[1])])
    new, loss = train_step(state, *batch)
    assert_close(loss, expected)
    assert new.step == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_label_without_an_output_makes_the_loss_nan(state, batch):
    _, loss = train_step(state, batch[0], np.full_like(batch[1], 10))
    assert np.isnan(loss)


def test_apply_model_predicts_the_largest_logit(state, batch):
    logits = state.apply_fn({"params": state.params}, batch[0])
    predicted = apply_model(state, batch[0])
    assert predicted.dtype == jnp.int32
    assert predicted.tolist() == logits.argmax(axis=1).tolist()


def test_optimizer_is_adam_and_its_schedule_spans_the_run(flax_script, whole_run):
    state = whole_run(flax_script).state
    reference = optax.adam(optax.linear_schedule(0.01, 1e-5, 20))
    ours, theirs = state.tx.init(state.params), reference.init(state.params)
    update, reference_update = jax.jit(state.tx.update), jax.jit(reference.update)
    for size in 7 * (1.0, -3.0, 0.5):
        grads = jax.tree.map(lambda p: p + size, state.params)  # noqa: B023
        updates, ours = update(grads, ours)
        expected, theirs = reference_update(grads, theirs)
        assert_close(updates, expected, 1e-5, 1e-8)
