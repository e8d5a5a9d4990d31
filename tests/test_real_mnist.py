"""On the real MNIST, where MNIST_DIR names it: the accuracies that README.md states."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

# Test accuracy in percent that the article logged, or that its listing gives when it
# is run today, whichever is higher: the figures to beat, by number of updates.
ARTICLE = {
    "mlp_numpy_api": (
        "100:83.6 200:89.4 300:90.5 400:91.7 500:92.0 600:92.5 700:93.0 800:93.3 "
        "900:93.3 1000:93.6 5625:95.1"
    ),
    "mlp_flax": "100:88.1 1000:92.0 9375:93.9",
    "mlp_flax_bn_dropout": "100:93.9 200:95.2 300:95.3 400:95.4 500:95.5 2340:95.9",
}


@pytest.mark.parametrize(
    ("script", "at_least"),
    [("mlp_numpy_api", 98.0), ("mlp_flax", 98.4), ("mlp_flax_bn_dropout", 98.2)],
)
def test_accuracy_of_a_default_run(script, at_least, real_mnist):
    command = [sys.executable, ROOT / f"{script}.py", "--data-dir", real_mnist]
    run = subprocess.run(
        [*command, "--eval-every", "100"], capture_output=True, text=True, check=True
    )
    last = run.stdout.splitlines()[-1]
    match = re.fullmatch(r"final test accuracy: (\d+\.\d\d)% \(MNIST\)", last)
    assert float(match[1]) >= at_least
    line = re.compile(r"step +(\d+) .* test accuracy (\d+\.\d\d)%")
    logged = {int(s): float(a) for s, a in line.findall(run.stdout)}
    for figure in ARTICLE[script].split():
        step, accuracy = figure.split(":")
        assert logged[min(int(step), max(logged))] > float(accuracy), f"step {step}"
