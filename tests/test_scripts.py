"""What holds for all three scripts: log, options, seeds, evaluation."""

import re

import jax
import numpy as np
import pytest
from helpers import SCRIPTS, load

import common
from common import NumpyLoader


def trained(script, data_dir, **options):
    """Train for 20 updates; return what training returns, as NumPy arrays."""
    config = script.Config(data_dir=data_dir, batch_size=64, epochs=2, **options)
    state = script.train(config, *common.load_mnist(data_dir))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_seed_decides_everything_and_evaluation_changes_nothing(script, small_mnist):
    reference = trained(script, small_mnist)
    assert equal(reference, trained(script, small_mnist))
    assert equal(reference, trained(script, small_mnist, eval_every=3))
    assert not equal(reference, trained(script, small_mnist, seed=1))


def test_max_steps_ends_the_same_run_early(script, small_mnist, capsys):
    trained(script, small_mnist, eval_every=13)
    whole = [line for line in capsys.readouterr().out.splitlines() if " 13 " in line]
    trained(script, small_mnist, max_steps=13)
    assert capsys.readouterr().out.splitlines()[-1:] == whole


def test_log(script, small_mnist, capsys):
    options = {"batch_size": 100, "epochs": 2, "train_examples": 450}
    accuracy = script.main(script.Config(data_dir=small_mnist, eval_every=3, **options))
    data, device, parameters, *lines, last = capsys.readouterr().out.splitlines()
    assert data == "data: MNIST, 450 training and 300 test images"
    assert device == f"device: {jax.devices()[0].device_kind}"
    assert re.fullmatch(r"parameters: (669,706|671,754)", parameters)
    evaluation = re.compile(
        r"epoch (\d)  step +(\d+)  loss \d+\.\d{4}  train accuracy \d+\.\d\d%  "
        r"test accuracy (\d+\.\d\d%)  \(MNIST\)"
    )
    found = [evaluation.fullmatch(line).groups() for line in lines]
    assert [(epoch, step) for epoch, step, _ in found] == [
        ("1", "3"),
        ("2", "6"),
        ("2", "8"),
    ]
    assert last == f"final test accuracy: {found[-1][2]} (MNIST)"
    assert f"{accuracy:.2%}" == found[-1][2]


@pytest.mark.parametrize("name", SCRIPTS)
def test_accuracy_counts_a_smaller_last_batch_rightly(name):
    script = load(name)
    digits = common.draw_digits(103, seed=0)
    if name == "mlp_numpy_api":
        model = script.init_network_params(script.LAYER_SIZES, jax.random.key(0))
        predict, evaluate = script.predict, script.accuracy
    else:
        key = jax.random.key(0)
        keys = {"params": key, "dropout": key} if "dropout" in name else key
        model = script.create_train_state(keys, 1e-3, 10)
        predict, evaluate = script.apply_model, script.eval_model
    # All images get one class: the first 100 examples wrong, the last 3 right.
    image = digits.images[:1].repeat(103, axis=0)
    (x, _), *_ = NumpyLoader(digits, batch_size=103)
    guess = int(predict(model, np.repeat(x[:1], 2, axis=0))[0])
    labels = np.where(np.arange(103) < 100, (guess + 1) % 10, guess)
    dataset = common.ArrayDataset(image, labels, common.FlattenAndCast())
    for batch_size in (1, 10, 100, 103, 200):
        accuracy = evaluate(model, NumpyLoader(dataset, batch_size=batch_size))
        assert accuracy == pytest.approx(3 / 103)
