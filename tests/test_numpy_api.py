"""Stage 1: the hand-written loss, gradient, forward pass, update and schedule."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import equal, load, run

import common

stage = load("mlp_numpy_api")
SIZES = [784, 32, 16, 10]


@pytest.fixture
def params():
    layers = stage.init_network_params(SIZES, jax.random.key(0))
    return [(w, 0.1 + b) for w, b in layers]  # biases that a forward pass must notice


@pytest.fixture
def batch():
    digits = common.draw_digits(20, seed=0)
    return digits[list(range(20))]


def test_init(params):
    layers = stage.init_network_params(SIZES, jax.random.key(0))
    assert [(w.shape, b.shape) for w, b in layers] == [
        ((32, 784), (32,)),
        ((16, 32), (16,)),
        ((10, 16), (10,)),
    ]
    assert not any(b.any() for _, b in layers)
    w, _ = stage.random_layer_params(784, 512, jax.random.key(0))
    assert np.isclose(w.std(), np.sqrt(2 / 784), rtol=0.01)
    assert stage.LAYER_SIZES == (784, 512, 512, 10)
    # Keys are split: the first weights of two layers are not the same numbers.
    equal_layers = stage.init_network_params([16, 16, 16], jax.random.key(0))
    assert not np.array_equal(equal_layers[0][0], equal_layers[1][0])


def test_batched_forward_is_the_forward_pass_of_each_image(params, batch):
    x, _ = batch
    one_by_one = jnp.stack([stage.model_forward(params, image) for image in x])
    assert one_by_one.shape == (20, 10)
    np.testing.assert_allclose(
        stage.batched_forward(params, x), one_by_one, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(TypeError):
        stage.model_forward(params, x)  # a batch without vmap: a shape error


def test_loss_is_optax_cross_entropy(params, batch):
    x, y = batch
    expected = optax.softmax_cross_entropy_with_integer_labels(
        stage.batched_forward(params, x), y
    ).mean()
    np.testing.assert_allclose(stage.loss(params, x, y), expected, 1e-6)
    np.testing.assert_allclose(stage.loss(params, x, stage.one_hot(y)), expected, 1e-6)


def test_loss_survives_large_logits(params, batch):
    x, y = batch
    large = jax.tree.map(lambda p: 100 * p, params)
    assert np.isfinite(stage.loss(large, x, stage.one_hot(y)))


def test_gradient_is_pytorchs(params, batch):
    x, y = batch
    grads = jax.grad(stage.loss)(params, x, stage.one_hot(y))

    leaves = [torch.tensor(np.asarray(p), requires_grad=True) for p in sum(params, ())]
    h = torch.from_numpy(x)
    for i in range(0, len(leaves), 2):
        h = torch.nn.functional.linear(h, leaves[i], leaves[i + 1])
        h = h if i == len(leaves) - 2 else torch.relu(h)
    torch.nn.functional.cross_entropy(h, torch.from_numpy(y).long()).backward()

    for ours, theirs in zip(sum(grads, ()), leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_update_goes_down_the_gradient(params, batch):
    x, y = batch
    grads = jax.grad(stage.loss)(params, x, stage.one_hot(y))
    updated = stage.sgd_update(params, x, y, 0.5)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        updated,
        expected,
    )
    assert stage.loss(updated, x, stage.one_hot(y)) < stage.loss(
        params, x, stage.one_hot(y)
    )


def test_update_takes_layers_of_three_arrays(params, batch):
    x, y = batch
    triples = [(w, b, jnp.ones(3)) for w, b in params]
    updated = stage.sgd_update(triples, x, y, 0.5)
    for (w, b, extra), (new_w, new_b) in zip(
        updated, stage.sgd_update(params, x, y, 0.5), strict=True
    ):
        np.testing.assert_allclose(w, new_w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(b, new_b, rtol=1e-5, atol=1e-6)
        assert np.array_equal(extra, jnp.ones(3))


def test_learning_rate_decays_each_step_from_initial_to_final(small_mnist):
    result = run(stage, small_mnist, "--epochs", 2, "--batch-size", 64)
    rates = [step.rest[0] for step in result.steps]
    expected = np.geomspace(0.3, stage.FINAL_LEARNING_RATE, 21)
    np.testing.assert_allclose(rates, expected[:20])
    assert all(isinstance(rate, float) for rate in rates)
    rates = [
        step.rest[0]
        for step in run(
            stage, small_mnist, "--learning-rate", 0.1, "--max-steps", 2
        ).steps
    ]
    total = 5 * (640 // 32)  # --max-steps stops early on the same schedule
    expected = np.geomspace(0.1, stage.FINAL_LEARNING_RATE, total + 1)
    np.testing.assert_allclose(rates, expected[:2])


def test_another_learning_rate_compiles_nothing_anew(params, batch):
    stage.sgd_update(params, *batch, 0.5)
    compiled = stage.sgd_update._cache_size()
    for lr in (0.4, 0.3, 0.2):
        stage.sgd_update(params, *batch, lr)
    assert stage.sgd_update._cache_size() == compiled


def test_training_goes_on_from_the_updated_parameters(small_mnist):
    steps = run(stage, small_mnist, "--max-steps", 3).steps
    for step, following in pairwise(steps):
        params = list(zip(step.before[::2], step.before[1::2]))
        assert equal(
            stage.sgd_update(params, step.x, step.y, *step.rest), following.before
        )
