"""Stage 2, and what stage 3 has in common with it: model, step, optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import STAGE_2, assert_close
from pytorch_mnist import make_model

from mlp_flax import apply_model, create_train_state, train_step


@pytest.fixture
def state():
    return create_train_state(jax.random.key(0), 1e-3, 10)


def test_loss_and_gradient_are_pytorchs(state, batch):
    """After a step of SGD with a learning rate of 1, in place of Adam."""
    model, layers = make_model(stage=2), state.params.values()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for linear, layer in zip(linears, layers, strict=True):
        linear.weight.data = torch.tensor(np.asarray(layer["kernel"])).T
        linear.bias.data = torch.tensor(np.asarray(layer["bias"]))
    logits = model(torch.tensor(batch[0]))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(batch[1]).long())
    expected.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    predicted = apply_model(state, batch[0])
    assert predicted.dtype == jnp.int32
    assert predicted.tolist() == logits.argmax(dim=1).tolist()
    sgd = optax.sgd(1.0)
    state = state.replace(tx=sgd, opt_state=sgd.init(state.params))
    new, loss = train_step(state, *batch)
    assert new.step == 1
    assert_close(loss, expected.item())
    for linear, layer in zip(linears, new.params.values(), strict=True):
        ours = [layer["kernel"].T, layer["bias"]]
        assert_close(ours, [p.detach().numpy() for p in linear.parameters()], 1e-4)


def test_old_state_is_donated(state, batch):
    train_step(state, *batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_optimizer_is_adam_and_its_schedule_spans_the_run(flax_script, whole_run):
    state = whole_run(flax_script).state
    final_rate = 1e-4 if flax_script is STAGE_2 else 5e-5
    reference = optax.adam(optax.linear_schedule(0.01, final_rate, 20))
    ours, theirs = state.tx.init(state.params), reference.init(state.params)
    update, reference_update = jax.jit(state.tx.update), jax.jit(reference.update)
    for size in 7 * (1.0, -3.0, 0.5):  # 21 updates, one past the schedule
        grads = jax.tree.map(lambda p: p + size, state.params)  # noqa: B023
        updates, ours = update(grads, ours)
        expected, theirs = reference_update(grads, theirs)
        assert_close(updates, expected, 1e-5, 1e-8)
