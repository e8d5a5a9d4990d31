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


@pytest.mark.parametrize("script", SCRIPTS)
def test_accuracy_rises_above_chance(script, tmp_path, monkeypatch):
    for proxy in ("http_proxy", "https_proxy"):  # nothing listens there: no download
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")

    module = importlib.import_module(script)
    before = module.main(module.Config(data_dir=tmp_path, max_steps=0))

    command = [sys.executable, str(HERE / f"{script}.py"), "--data-dir", str(tmp_path)]
    command += ["--train-examples", "5000", "--max-steps", "200"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    last_line = run.stdout.splitlines()[-1]
    pattern = r"final test accuracy: (\d+\.\d\d)% \(drawn digits, not MNIST\)"
    after = float(re.fullmatch(pattern, last_line)[1]) / 100

    # Both on 2,000 digits that are never trained on; chance is 10%.
    assert before < 0.2
    assert after > 0.6
