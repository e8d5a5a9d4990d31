"""Stage 1: the hand-written loss, gradient, forward pass, update and schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import arrays, equal, load, record, run

import common

stage = load("mlp_numpy_api")
SIZES = [784, 32, 16, 10]


@pytest.fixture
def params():
    layers = stage.init_network_params(SIZES, jax.random.key(0))
    return [(w, 0.1 + b) for w, b in layers]  # biases that a forward pass must notice


@pytest.fixture(scope="module")
def batch():
    return arrays(common.draw_digits(20, seed=0))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_init():
    layers = stage.init_network_params(SIZES, jax.random.key(0))
    shapes = [(w.shape, b.shape) for w, b in layers]
    assert shapes == [((32, 784), (32,)), ((16, 32), (16,)), ((10, 16), (10,))]
    assert not any(b.any() for _, b in layers)
    w, _ = stage.random_layer_params(784, 512, jax.random.key(0))
    assert np.isclose(w.std(), np.sqrt(2 / 784), rtol=0.01)
    assert stage.LAYER_SIZES == (784, 512, 512, 10)


def test_each_layer_has_a_key_of_its_own():
    (first, _), (second, _) = stage.init_network_params([16] * 3, jax.random.key(0))
    assert not np.array_equal(first, second)


def test_batched_forward_is_the_forward_pass_of_each_image(params, batch):
    x, _ = batch
    one_by_one = jnp.stack([stage.model_forward(params, image) for image in x])
    assert one_by_one.shape == (20, 10)
    assert_close(stage.batched_forward(params, x), one_by_one, atol=1e-5)
    with pytest.raises(TypeError):
        stage.model_forward(params, x)  # a batch without vmap: a shape error


def test_relu():
    assert stage.relu(jnp.array([-2.0, 0.0, 3.0])).tolist() == [0, 0, 3]


def test_one_hot():
    rows = stage.one_hot(jnp.array([2, 0]), 3)
    assert rows.dtype == jnp.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_loss_is_optax_cross_entropy(params, batch):
    x, y = batch
    logits = stage.batched_forward(params, x)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    assert_close(stage.loss(params, x, y), expected)


def test_loss_survives_large_logits(params, batch):
    large = jax.tree.map(lambda p: 100 * p, params)
    assert np.isfinite(stage.loss(large, *batch))


def test_gradient_is_pytorchs(params, batch):
    x, y = batch
    grads = jax.grad(stage.loss)(params, x, y)

    layers = [
        [torch.tensor(np.asarray(a), requires_grad=True) for a in layer]
        for layer in params
    ]
    h = torch.from_numpy(x)
    for w, b in layers[:-1]:
        h = torch.relu(torch.nn.functional.linear(h, w, b))
    logits = torch.nn.functional.linear(h, *layers[-1])
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long()).backward()

    theirs = [[a.grad.numpy() for a in layer] for layer in layers]
    assert_close(grads, theirs, rtol=1e-4)


def test_update_goes_down_the_gradient(params, batch):
    grads = jax.grad(stage.loss)(params, *batch)
    updated = stage.sgd_update(params, *batch, 0.5)
    assert_close(updated, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
    assert stage.loss(updated, *batch) < stage.loss(params, *batch)


def test_update_takes_any_pytree(params, batch, monkeypatch):
    """The lesson of the stage: it does not care how many arrays a layer holds."""
    monkeypatch.setattr(
        stage, "batched_forward", lambda p, x: jnp.zeros((len(x), 10)) + p["bias"]
    )
    tree = {"bias": jnp.zeros(10), "unused": [jnp.ones(3)]}
    updated = stage.sgd_update(tree, *batch, 1.0)
    assert updated["bias"].any()
    assert equal(updated["unused"], tree["unused"])


def test_learning_rate_decays_each_step_from_initial_to_final(whole_run):
    rates = [step.rest[0] for step in whole_run(stage).steps]
    expected = np.geomspace(0.3, stage.FINAL_LEARNING_RATE, 21)
    np.testing.assert_allclose(rates, expected[:20])
    assert all(isinstance(rate, float) for rate in rates)


def test_max_steps_stops_early_on_the_same_schedule(small_mnist):
    with record(stage) as steps:
        run(stage, small_mnist, "--learning-rate", 0.1, "--max-steps", 2)
    expected = np.geomspace(0.1, stage.FINAL_LEARNING_RATE, 5 * (640 // 32) + 1)
    np.testing.assert_allclose([step.rest[0] for step in steps], expected[:2])


def test_another_learning_rate_does_not_recompile(params, batch, caplog):
    stage.sgd_update(params, *batch, 0.5)
    with jax.log_compiles():
        for lr in (0.4, 0.3, 0.2):
            stage.sgd_update(params, *batch, lr)
    assert "Compiling" not in caplog.text
    with jax.log_compiles():
        stage.sgd_update(params, batch[0][:7], batch[1][:7], 0.5)
    assert "Compiling" in caplog.text


def test_training_goes_on_from_the_updated_parameters(whole_run):
    first, second, *_ = whole_run(stage).steps
    params = list(zip(first.before[::2], first.before[1::2]))
    updated = stage.sgd_update(params, first.x, first.y, *first.rest)
    assert equal(updated, second.before)
