"""The quick check of an installation: each script learns something in 100 steps.

    python test_smoke.py

takes half a minute and needs neither MNIST nor a network: the scripts train on
digits they draw themselves. If all scripts fail, then jax, torch, torchvision, numpy or
pillow is broken, and the last line of the traceback says which. If only mlp_flax.py and
mlp_flax_bn_dropout.py fail, it is flax or optax, or a version that does not fit jax.
"""

import functools
import importlib
import sys

import pytest

pytestmark = pytest.mark.filterwarnings("default")  # a warning is not a failure


@pytest.fixture(scope="module", autouse=True)
def drawn_digits():
    """No mirror of MNIST answers, so digits are drawn: to save time, few, and once."""
    common = importlib.import_module("common")
    datasets = importlib.import_module("torchvision.datasets")
    draw = common.draw_digits

    @functools.cache
    def draw_a_fifth(n, seed):
        return draw(n // 5, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(common, "draw_digits", draw_a_fifth)
        yield


@pytest.mark.parametrize("name", ["mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"])
def test_accuracy_rises_above_chance(name, tmp_path, capsys):
    script = importlib.import_module(name)
    options = ["--data-dir", str(tmp_path), "--batch-size", "32"]
    _, before = script.main([*options, "--epochs", "0"])
    _, after = script.main([*options, "--max-steps", "100"])

    # Both on 400 digits that are never trained on; chance is 10%.
    assert before < 0.25
    assert after > 0.4
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line == f"final test accuracy: {after:.2%} (drawn digits, not MNIST)"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
