"""Stage 1: the hand-written loss, gradient, forward pass, update and schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import STAGE_1, assert_close, equal

from mlp_numpy_api import (
    batched_forward,
    init_network_params,
    loss,
    model_forward,
    one_hot,
    sgd_update,
)


@pytest.fixture(scope="module")
def params():
    layers = init_network_params([784, 32, 16, 10], jax.random.key(0))
    return [(w, 0.1 + b) for w, b in layers]  # biases that a forward pass must notice


def test_init():
    """He's variance, zero biases, and a key of its own for each layer."""
    layers = init_network_params([784, 512, 512, 512, 10], jax.random.key(0))
    shapes = [(w.shape, b.shape) for w, b in layers]
    square = ((512, 512), (512,))
    assert shapes == [((512, 784), (512,)), square, square, ((10, 512), (10,))]
    (first, _), (second, _), (third, _), _ = layers
    assert np.isclose(first.std(), np.sqrt(2 / 784), rtol=0.01)
    assert not np.array_equal(second, third)
    assert not any(b.any() for _, b in layers)


def test_one_hot():
    """A class out of range becomes zeros, which add nothing to the loss."""
    rows = one_hot(jnp.array([2, 0, -1, 3]), 3)
    assert rows.dtype == jnp.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_forward_pass_is_written_for_one_image(params, batch):
    x, _ = batch
    one = model_forward(params, x[0])
    assert_close(batched_forward(params, x)[0], one, atol=1e-5)
    with pytest.raises(TypeError):
        model_forward(params, x)  # a batch without vmap: a shape error


def test_loss_gradient_and_update_are_pytorchs(params, batch):
    x, y = batch
    layers = [
        [torch.tensor(np.asarray(a), requires_grad=True) for a in layer]
        for layer in params
    ]
    h = torch.from_numpy(x)
    for w, b in layers[:-1]:
        h = torch.relu(torch.nn.functional.linear(h, w, b))
    logits = torch.nn.functional.linear(h, *layers[-1])
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long())
    expected.backward()

    tensors = [tensor for layer in layers for tensor in layer]
    grads = [tensor.grad.numpy() for tensor in tensors]
    assert_close(loss(params, x, y), expected.item())
    assert_close(jax.tree.leaves(jax.grad(loss)(params, x, y)), grads, rtol=1e-4)
    torch.optim.SGD(tensors, lr=0.5).step()
    updated = jax.tree.leaves(sgd_update(params, x, y, 0.5))
    assert_close(updated, [tensor.detach().numpy() for tensor in tensors], rtol=1e-4)


def test_loss_of_large_logits_is_finite(params, batch):
    assert np.isfinite(loss(jax.tree.map(lambda p: 100 * p, params), *batch))


def test_run_decays_the_learning_rate_from_initial_to_final(whole_run):
    rates = [step.rest[0] for step in whole_run(STAGE_1).steps]
    expected = np.geomspace(0.01, STAGE_1.FINAL_LEARNING_RATE, 21)
    np.testing.assert_allclose(rates, expected[:20])
    assert all(isinstance(rate, float) for rate in rates)


def test_run_goes_on_from_updated_parameters_and_logs_the_loss_before(whole_run):
    """Stages 2 and 3 log what train_step returns, which their own tests look at."""
    steps = whole_run(STAGE_1).steps
    params = [list(zip(step.before[::2], step.before[1::2])) for step in steps]
    for i in (0, 6):
        updated = sgd_update(params[i], steps[i].x, steps[i].y, *steps[i].rest)
        assert equal(updated, params[i + 1])
    for line in whole_run(STAGE_1).log:
        i = int(line["step"]) - 1
        expected = loss(params[i], steps[i].x, steps[i].y)
        assert float(line["loss"]) == pytest.approx(float(expected), abs=1e-4)


def test_another_learning_rate_does_not_recompile(params, batch, caplog):
    sgd_update(params, *batch, 0.5)
    with jax.log_compiles():
        sgd_update(params, *batch, 0.4)
    assert "Compiling" not in caplog.text
    with jax.log_compiles():
        sgd_update(params, batch[0][:7], batch[1][:7], 0.5)
    assert "Compiling" in caplog.text
