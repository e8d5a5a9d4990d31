"""Stage 3: dropout and batch statistics, in training and in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from mlp_flax_bn_dropout import MLP, apply_model, create_train_state, train_step

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def trained(batch):
    """A state after five steps. A test that takes another one copies it first."""
    state = create_train_state(jax.random.key(0), 1e-3, 10)
    for _ in range(5):
        state, _ = train_step(state, *batch, KEY)
    return state


def variables(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


@pytest.fixture(scope="module")
def training_pass(trained, batch):
    """The logits and what each layer returns, with the key of the sixth step."""
    rngs = {"dropout": jax.random.fold_in(KEY, 5)}
    mutable = ["batch_stats", "intermediates"]
    options = {"rngs": rngs, "mutable": mutable, "capture_intermediates": True}
    return MLP().apply(variables(trained), batch[0], train=True, **options)


# Training.


def test_step_uses_the_mask_of_key_and_step_and_donates_the_old_state(
    trained, batch, training_pass
):
    """It returns loss and batch statistics of the parameters before the update."""
    logits, updates = training_pass
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    old = jax.tree.map(jnp.copy, trained)
    new, loss = train_step(old, *batch, KEY)
    assert_close(loss, expected.mean())
    assert_close(new.batch_stats, updates["batch_stats"])
    assert new.step == 6
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables(old)))


def test_dropout_drops_the_given_fractions(training_pass):
    """Zeros after dropout, of units that were on."""
    kept = training_pass[1]["intermediates"]
    for i, rate in enumerate((0.3, 0.4)):
        before = kept[f"layers_{i}"]["__call__"][0] > 0
        after = kept[f"dropouts_{i}"]["__call__"][0] > 0
        assert abs(1 - after.sum() / before.sum() - rate) < 0.03


# Evaluation, and the running averages.


def forward(state, x, statistics):
    """The network in NumPy; `statistics` gives mean and variance of a hidden layer."""
    params = jax.tree.map(np.asarray, state.params)
    for i in range(2):
        x = np.maximum(
            x @ params[f"layers_{i}"]["kernel"] + params[f"layers_{i}"]["bias"], 0
        )
        mean, var = statistics(i, x)
        norm = params[f"norms_{i}"]
        x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    return x @ params["layers_2"]["kernel"] + params["layers_2"]["bias"]


def test_evaluation_uses_running_averages(trained, batch):
    def running(i, x):
        stats = trained.batch_stats[f"norms_{i}"]
        return stats["mean"], stats["var"]

    logits = forward(trained, batch[0], running)
    ours = trained.apply_fn(variables(trained), batch[0], train=False)
    assert_close(ours, logits, 1e-3, 1e-4)
    assert apply_model(trained, batch[0]).tolist() == logits.argmax(axis=1).tolist()


def test_training_uses_batch_statistics_and_updates_the_averages(trained, batch):
    """Without dropout. A tenth of the new average is the batch's."""
    updated = {}

    def of_the_batch(i, x):
        old = trained.batch_stats[f"norms_{i}"]
        new = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
        updated[f"norms_{i}"] = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, new)
        return new["mean"], new["var"]

    expected = forward(trained, batch[0], of_the_batch)
    model, options = MLP(dropout_rates=(0.0, 0.0)), {"mutable": ["batch_stats"]}
    logits, updates = model.apply(variables(trained), batch[0], train=True, **options)
    assert_close(logits, expected, 1e-3, 1e-4)
    assert_close(updates["batch_stats"], updated, 1e-4, 1e-5)
