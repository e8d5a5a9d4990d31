"""Stage 1: initial parameters, forward pass, loss, update and schedule by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import STAGE_1, assert_close, leaves
from pytorch_mnist import make_model

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
    layers = init_network_params(STAGE_1.LAYER_SIZES, jax.random.key(0))
    return [(w, 0.1 + b) for w, b in layers]  # biases that a forward pass must notice


def test_init():
    """He's variance, zero biases, and a key of its own for each layer."""
    layers = init_network_params([784, 512, 512, 512, 10], jax.random.key(0))
    shapes = [(w.shape, b.shape) for w, b in layers]
    square = ((512, 512), (512,))
    assert shapes == [((512, 784), (512,)), square, square, ((10, 512), (10,))]
    (first, _), (second, _), (third, _), _ = layers
    assert np.isclose(first.std(), np.sqrt(2 / 784), rtol=0.01)
    assert abs(first.mean()) < 0.001
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


def test_loss_and_update_are_pytorchs(params, batch):
    """SGD's update with a learning rate of 0.5 shows the gradient, too."""
    model = make_model(stage=1)
    tensors = list(model.parameters())
    for tensor, array in zip(tensors, jax.tree.leaves(params), strict=True):
        tensor.data = torch.tensor(np.asarray(array))
    logits = model(torch.tensor(batch[0]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(batch[1]).long())
    expected.backward()
    torch.optim.SGD(tensors, lr=0.5).step()

    updated, batch_loss = sgd_update(params, *batch, 0.5)
    assert_close(batched_forward(params, batch[0]), logits.detach(), 1e-4, 1e-5)
    assert_close([jax.jit(loss)(params, *batch), batch_loss], 2 * [expected.item()])
    tensors = [tensor.detach().numpy() for tensor in tensors]
    assert_close(jax.tree.leaves(updated), tensors, rtol=1e-4)


def test_loss_of_large_logits_is_finite(params, batch):
    assert np.isfinite(loss(jax.tree.map(lambda p: 100 * p, params), *batch))


def test_update_takes_layers_with_any_number_of_arrays(batch, monkeypatch):
    """Parameters are a pytree: here, each layer also has a scale of its outputs."""

    def scaled_loss(params, x, y):
        return loss([(w * scale[:, None], b) for w, b, scale in params], x, y)

    layers = init_network_params([784, 10], jax.random.key(0))
    params = [(w, b, np.ones(10, np.float32)) for w, b in layers]
    monkeypatch.setattr(STAGE_1, "loss", scaled_loss)
    updated, _ = sgd_update(params, *batch, 0.5)
    assert jax.tree.structure(updated) == jax.tree.structure(params)
    assert not any(map(np.array_equal, leaves(updated), leaves(params)))


def test_another_learning_rate_does_not_recompile(params, batch, monkeypatch):
    traces = []

    def traced_loss(*args):
        traces.append(args)
        return loss(*args)

    monkeypatch.setattr(STAGE_1, "loss", traced_loss)
    x, y = batch
    for lr in (0.5, 0.4):
        sgd_update(params, x[:7], y[:7], lr)  # a batch size that is new
    assert len(traces) == 1


def test_learning_rate_falls_exponentially_to_a_third(whole_run):
    """The end is a third of --learning-rate, here 0.01, not the default's 0.1."""
    rates = [step.rest[0] for step in whole_run(STAGE_1).steps]
    np.testing.assert_allclose(rates, np.geomspace(0.01, 0.01 / 3, 21)[:20], rtol=1e-6)
