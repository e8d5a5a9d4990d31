"""The quick check: each script, run as a user runs it, learns within 200 updates.

Needs neither a network nor MNIST: the scripts learn digits that they draw themselves.
Run it alone with `python -m pytest test_smoke.py`.
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = ["mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"]


@pytest.fixture(scope="module")
def empty_dir(tmp_path_factory):
    """A data directory without MNIST, and no way to download it."""
    with pytest.MonkeyPatch.context() as patch:
        for proxy in ("http_proxy", "https_proxy"):
            patch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
        # On a GPU, four processes at once must share its memory.
        patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        yield tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def processes(empty_dir):
    """The scripts, all started at once: `python mlp_flax.py ...` and so on."""
    options = ["--train-examples", "5000", "--max-steps", "200"]
    return {
        script: subprocess.Popen(
            [sys.executable, HERE / f"{script}.py", "--data-dir", empty_dir, *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_accuracy_rises_above_chance(script, empty_dir, processes):
    module = importlib.import_module(script)
    before = module.main(module.Config(data_dir=empty_dir, max_steps=0))

    stdout, _ = processes[script].communicate()
    assert processes[script].returncode == 0
    pattern = r"final test accuracy: (\d+\.\d\d)% \(drawn digits, not MNIST\)"
    after = float(re.fullmatch(pattern, stdout.splitlines()[-1])[1]) / 100

    # Both on 2,000 digits that are never trained on; chance is 10%.
    assert before < 0.2
    assert after > 0.6
