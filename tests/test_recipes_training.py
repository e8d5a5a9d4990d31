"""Recipes that change the optimizer, what a run keeps, and what it logs."""

import json
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import STAGE_2, assert_close, assert_resumes, equal, leaves, run

TRAIN = ["--epochs", 4, "--batch-size", 64, "--eval-every", 5]  # as in `plain`


def full_like(params, value):
    return jax.tree.map(lambda p: jnp.full_like(p, value), params)


# accumulate


def test_two_half_batches_train_like_one_batch(recipe, plain, small_mnist):
    module = recipe("accumulate")
    halves = ["--epochs", 4, "--batch-size", 32, "--eval-every", 10]
    result = assert_resumes(module, small_mnist, *halves, "--max-steps", 40)
    for line, expected in zip(result.log, plain.log[:4], strict=True):
        assert float(line["loss"]) == pytest.approx(float(expected["loss"]), abs=2e-3)


def test_accumulated_gradients_are_averaged(recipe):
    """Adam alone would hide a sum. Its average mu has a tenth of what it was given."""
    state = recipe("accumulate").create_train_state(jax.random.key(0), 0.1, 100)
    update, opt_state = jax.jit(state.tx.update), state.opt_state
    for size in (1.0, 3.0):
        grads = full_like(state.params, size)
        _, opt_state = update(grads, opt_state, state.params)
    mu = optax.tree_utils.tree_get(opt_state, "mu")
    assert_close(mu, full_like(state.params, 0.1 * 2.0))


def test_accumulating_more_batches_than_there_are(recipe, small_mnist):
    module = recipe("accumulate")
    with pytest.raises(SystemExit, match="^error: 1 steps, but 2 for an update$"):
        run(module, small_mnist, *TRAIN, "--max-steps", 1)
    assert run(module, small_mnist, *TRAIN, "--epochs", 0).log == []

    run(module, small_mnist, *TRAIN, "--max-steps", 2, "--checkpoint", "two")
    module.ACCUMULATED_BATCHES = 4
    with pytest.raises(SystemExit, match="is from another run: .*batches 2,"):
        run(module, small_mnist, *TRAIN, "--checkpoint", "two")


# adamw


def test_adamw_decays_weights_by_warmup_and_cosine(recipe):
    """Without gradients, AdamW only decays, by 0.01 times the learning rate."""
    state = recipe("adamw").create_train_state(jax.random.key(0), 0.1, 100)
    state = state.replace(params=full_like(state.params, 1))
    step = jax.jit(
        lambda state: state.apply_gradients(grads=full_like(state.params, 0))
    )
    weights = []
    for _ in range(103):
        layer = state.params["layers_1"]
        weights.append(float(layer["kernel"][0, 0]))
        assert np.all(np.asarray(layer["bias"]) == 1)
        state = step(state)
    rates = np.array([1 - after / before for before, after in pairwise(weights)]) / 0.01
    np.testing.assert_allclose(rates[:6], np.linspace(0, 0.1, 6), atol=1e-4)
    cosine = 0.001 + 0.099 * (1 + np.cos(np.pi * np.arange(96) / 95)) / 2
    np.testing.assert_allclose(rates[5:101], cosine, atol=1e-4)
    np.testing.assert_allclose(rates[100:], 0.001, atol=1e-4)


@pytest.mark.parametrize(("size", "clipped"), [(1e3, True), (1e-6, False)])
def test_adamw_clips_gradients_before_adam(recipe, size, clipped):
    state = recipe("adamw").create_train_state(jax.random.key(0), 0.1, 100)
    grads = full_like(state.params, size)
    _, opt_state = jax.jit(state.tx.update)(grads, state.opt_state, state.params)
    mu = optax.tree_utils.tree_get(opt_state, "mu")  # 0.1 times what Adam was given
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in leaves(mu)))
    given = 1 if clipped else size * np.sqrt(sum(p.size for p in leaves(grads)))
    np.testing.assert_allclose(norm, 0.1 * given, rtol=1e-3)


@pytest.mark.parametrize("total_steps", [0, 3])
def test_adamw_in_a_run_too_short_for_a_warmup(recipe, total_steps):
    module = recipe("adamw")
    state = module.create_train_state(jax.random.key(0), 0.1, total_steps)
    grads = full_like(state.params, 1)
    updates, _ = jax.jit(state.tx.update)(grads, state.opt_state, state.params)
    assert_close(updates["layers_2"]["bias"], np.full(10, -0.1), 1e-4)


# finetune


def save_pretrained(path, *layer_sizes):
    """Save the checkpoint of a network with these layers; return its parameters."""
    rng = np.random.default_rng(0)
    params = {}
    for i, (m, n) in enumerate(pairwise(layer_sizes)):
        kernel = rng.normal(0, np.sqrt(2 / m), (m, n)).astype(np.float32)
        params[f"layers_{i}"] = {"kernel": kernel, "bias": np.zeros(n, np.float32)}
    STAGE_2.save_checkpoint(Path(path), "another run", {"params": params})
    return params


@pytest.mark.parametrize("classes", [10, 2])
def test_finetune(recipe, small_mnist, classes):
    """The last layer is new, the first is frozen."""
    module = recipe("finetune")
    old = save_pretrained("old", 784, 128, 128, classes)
    options = [*TRAIN, "--pretrained", "old"]
    state = run(module, small_mnist, *options, "--max-steps", 0).state
    init_key, _ = jax.random.split(jax.random.key(0))
    same_seed = module.create_train_state(init_key, 0.1, 1).params
    new = state.params.pop("layers_2")["kernel"]
    assert equal(state.params, {name: old[name] for name in ("layers_0", "layers_1")})
    # With its seed, the other run may have begun with the same last layer.
    for other in (old, same_seed):
        assert not np.array_equal(new, other["layers_2"]["kernel"])

    state = run(module, small_mnist, *options, "--max-steps", 3).state
    for name, layer in old.items():
        assert equal(state.params[name], layer) == (name == "layers_0")
    assert not np.array_equal(state.params["layers_2"]["kernel"], new)


def test_finetune_refuses_what_does_not_fit(recipe):
    module = recipe("finetune")
    state = module.create_train_state(jax.random.key(0), 0.1, 1)
    Path("text").write_text("no checkpoint")
    save_pretrained("narrow", 784, 128, 64, 10)
    save_pretrained("deep", 784, 128, 128, 128, 10)
    save_pretrained("shallow", 784, 128, 10)
    for file, message in {
        "text": "is not a checkpoint",
        "missing": "is not a checkpoint",
        "narrow": "layers_1 has shapes",
        "deep": "layers_3 has shapes",
        "shallow": "layers_1 has shapes",
    }.items():
        with pytest.raises(SystemExit, match=f"^error: {file}:? {message}.*$"):
            module.load_pretrained(Path(file), state)


def test_finetune_resumes_only_from_the_same_pretrained(recipe, small_mnist):
    module = recipe("finetune")
    for name in ("one", "two"):
        save_pretrained(name, 784, 128, 128, 10)
    options = [*TRAIN, "--max-steps", 1, "--checkpoint", "run", "--pretrained"]
    run(module, small_mnist, *options, "one")
    with pytest.raises(SystemExit, match="is from another run: .*, pretrained one$"):
        run(module, small_mnist, *options, "two")


def test_accumulate_adamw_and_finetune_together(recipe, small_mnist):
    module = recipe("finetune", "accumulate", "adamw")
    old = save_pretrained("old", 784, 128, 128, 10)
    state = assert_resumes(module, small_mnist, *TRAIN, "--pretrained", "old").state
    assert equal(state.params["layers_0"], old["layers_0"])
    assert not equal(state.params["layers_1"], old["layers_1"])
    assert optax.tree_utils.tree_get(state.opt_state, "gradient_step") == 20


# best


VALIDATION, TEST = 109, 650  # images
ACCURACIES = {0: 0.1, 4: 0.2, 8: 0.4, 12: 0.5, 16: 0.5, 20: 0.3, 24: 0.4, 28: 0.3}
# 8 steps an epoch, so two epochs after the best state are step 28.
STOPPED = [*TRAIN[:4], "--eval-every", 4]


@pytest.fixture
def best(recipe, monkeypatch):
    """The recipe, with validation accuracies that are made up: step 12 is best."""
    module = recipe("best")
    evaluate = module.eval_model
    module.tested = []  # the states that are evaluated on the test set

    def made_up(state, loader):
        if len(loader.dataset) == VALIDATION:
            return ACCURACIES[int(state.step)]
        if len(loader.dataset) == TEST:
            module.tested.append(leaves(state))
        return evaluate(state, loader)

    monkeypatch.setattr(module, "eval_model", made_up)
    return module


def files():
    return {path.name: path.read_bytes() for path in Path("runs").iterdir()}


def test_best_stops_early_and_tests_the_best_state(best, small_mnist):
    options = [*STOPPED, "--checkpoint", "runs/wd0.1"]
    whole = run(best, small_mnist, *options, record=True)
    assert "541 training images" in whole.lines[0]
    assert "step 12 " in whole.lines[4]
    assert "validation accuracy 50.00%" in whole.lines[4]
    assert "step 28 " in whole.lines[-3]
    assert whole.lines[-2] == "testing the state after step 12"
    assert len(best.tested) == 1, "the test set was not looked at once"
    assert equal(best.tested[0], whole.steps[12].before)
    assert equal(whole.state, whole.steps[12].before)
    assert files().keys() == {"wd0.1", "wd0.1.best"}

    # Started again, the run takes no step. Without a file, it is the same run.
    again = run(best, small_mnist, *options, record=True)
    assert again.steps == []
    in_memory = run(best, small_mnist, *STOPPED)
    for other in (again, in_memory):
        assert equal(other.state, whole.state)
        assert other.lines[-2:] == whole.lines[-2:]


def test_best_killed_at_a_save_and_resumed(best, small_mnist, monkeypatch):
    """Between the two saves of step 12, and again at step 24."""
    options = [*STOPPED, "--checkpoint", "runs/a"]
    whole = run(best, small_mnist, *options)
    expected = files()
    for path in Path("runs").iterdir():
        path.unlink()
    save, kills = best.save_checkpoint, [12, 24]

    def save_or_die(path, description, state):
        if path.name == "a" and state.step in kills:
            kills.remove(state.step)
            raise KeyboardInterrupt
        save(path, description, state)

    monkeypatch.setattr(best, "save_checkpoint", save_or_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(best, small_mnist, *options)
    assert run(best, small_mnist, *options).lines[-1] == whole.lines[-1]
    assert files() == expected


def test_best_ignores_an_old_best_file_of_a_run_that_is_gone(best, small_mnist):
    options = [*STOPPED, "--checkpoint", "runs/a"]
    run(best, small_mnist, *options)
    Path("runs/a").unlink()
    new = run(best, small_mnist, *options, "--max-steps", 0)
    assert new.lines[-2] == "testing the state after step 0"
    assert not np.array(new.state.step)
    new = run(best, small_mnist, *options, "--max-steps", 4)
    assert new.lines[-2] == "testing the state after step 4"


# log


def records():
    return [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]


def test_log_tells_runs_apart(recipe, plain, small_mnist, monkeypatch):
    """A run that is killed after it logs step 20, resumed, and another seed."""
    module = recipe("log")
    save = module.save_checkpoint

    def save_or_die(path, run, state):
        if state.step == 20:
            raise KeyboardInterrupt
        save(path, run, state)

    options = [*TRAIN, "--checkpoint", "saved"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_checkpoint", save_or_die)
        run(module, small_mnist, *options)
    resumed = run(module, small_mnist, *options)
    run(module, small_mnist, *TRAIN, "--seed", 1, "--max-steps", 5)
    assert [record["step"] for record in records()].count(20) == 2

    # As drop_duplicates(["run", "step"], keep="last") of pandas.
    unique = {(record["run"], record["step"]): record for record in records()}
    *first, other = unique.values()
    assert "seed 1," in other["run"]
    assert equal(resumed.state, plain.state)
    for record, line in zip(first, plain.log, strict=True):
        assert f"run: {record['run']}" == resumed.lines[0]
        assert str(record["epoch"]) == line["epoch"]
        assert str(record["step"]) == line["step"]
        assert f"{record['loss']:.4f}" == line["loss"]
        for split in ("train", "test"):
            assert f"{record[f'{split}_accuracy']:.2%}" == f"{line[split]}%"


def test_only_process_0_logs(recipe, small_mnist, monkeypatch):
    module = recipe("log")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(module, small_mnist, *TRAIN, "--max-steps", 1)
    assert not Path("log.jsonl").exists()
