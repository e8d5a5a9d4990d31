"""Stage 3: dropout and batch statistics, in training and in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, equal, leaves

import common
from mlp_flax_bn_dropout import MLP, apply_model, create_train_state, train_step

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def batch():
    return common.numpy_collate(common.draw_digits(40, seed=0))


@pytest.fixture(scope="module")
def trained(batch):
    """A state after five steps; `step` copies it, because train_step donates it."""
    state = create_train_state(jax.random.key(0), 1e-3, 10)
    for _ in range(5):
        state, _ = train_step(state, *batch, KEY)
    return state


def step(state, batch, key=KEY):
    return train_step(jax.tree.map(jnp.copy, state), *batch, key)


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


def test_step_moves_every_leaf_and_donates_the_old_state(trained, batch):
    old = jax.tree.map(jnp.copy, trained)
    new, _ = train_step(old, *batch, KEY)
    pairs = zip(leaves(trained), leaves(new), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(variables(old)))
    assert new.step == 6


def test_loss_and_batch_stats_are_of_the_pass_before_the_update(
    trained, batch, training_pass
):
    logits, updates = training_pass
    new, loss = step(trained, batch)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    assert_close(loss, expected.mean())
    assert_close(new.batch_stats, updates["batch_stats"])


def test_key_and_step_determine_the_mask(trained, batch):
    loss = step(trained, batch)[1]
    assert step(trained, batch)[1] == loss
    assert step(trained, batch, jax.random.key(6))[1] != loss
    assert step(trained.replace(step=6), batch)[1] != loss


def test_dropout_drops_the_given_fractions(training_pass):
    """Zeros after dropout, of units that were on."""
    kept = training_pass[1]["intermediates"]
    for i, rate in enumerate((0.3, 0.4)):
        before = kept[f"layers_{i}"]["__call__"][0] > 0
        after = kept[f"dropouts_{i}"]["__call__"][0] > 0
        assert abs(1 - after.sum() / before.sum() - rate) < 0.03


def test_optimizer_knows_nothing_of_batch_stats(trained):
    params = [leaf.shape for leaf in leaves(trained.params)]
    moments = [leaf.shape for leaf in leaves(trained.opt_state) if leaf.shape]
    assert sorted(moments) == sorted(2 * params)


def test_initial_state_is_that_of_training_mode():
    """As in the article, whose init runs with train=True and two keys."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = jax.jit(MLP().init, static_argnames="train")
    expected = init(keys, jnp.zeros((1, 784)), train=True)["params"]
    state = create_train_state(jax.random.key(0), 1e-3, 10)
    assert_close(state.params, expected, 1e-5, 1e-7)
    for norm in state.batch_stats.values():
        assert not norm["mean"].any()
        assert (norm["var"] == 1).all()


# Evaluation, and the running averages.


def test_evaluation_is_image_by_image(trained, batch):
    """Neither dropout nor the other images of a batch change a prediction."""
    x = np.concatenate([batch[0], np.random.default_rng(0).random((60, 784), "f4")])
    predicted = apply_model(trained, x)
    assert equal(predicted, apply_model(trained, x))
    alone = [int(apply_model(trained, x[i : i + 1])[0]) for i in range(100)]
    assert predicted.tolist() == alone


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


def test_training_uses_those_of_the_batch_and_averages_them(trained, batch):
    """Without dropout. A tenth of the new average is the batch's."""
    updated = {}

    def of_the_batch(i, x):
        old, new = (
            trained.batch_stats[f"norms_{i}"],
            {"mean": x.mean(0), "var": x.var(0)},
        )
        updated[f"norms_{i}"] = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, new)
        return new["mean"], new["var"]

    expected = forward(trained, batch[0], of_the_batch)
    model, options = MLP(dropout_rates=(0.0, 0.0)), {"mutable": ["batch_stats"]}
    logits, updates = model.apply(variables(trained), batch[0], train=True, **options)
    assert_close(logits, expected, 1e-3, 1e-4)
    assert_close(updates["batch_stats"], updated, 1e-4, 1e-5)
