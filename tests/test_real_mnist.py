"""On the real MNIST, where MNIST_DIR names it: what the default runs reach."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT, load

README = (ROOT / "README.md").read_text()

# Test accuracy in percent that the article logged, or that its listing gives when it
# is run today, whichever is higher: the figures to beat, by number of steps.
ARTICLE = {
    "mlp_numpy_api": (
        "100:83.6 200:89.4 300:90.5 400:91.7 500:92.0 600:92.5 700:93.0 800:93.3 "
        "900:93.3 1000:93.6 5625:95.1"
    ),
    "mlp_flax": "100:88.1 1000:92.0 9375:93.9",
    "mlp_flax_bn_dropout": (
        "100:93.9 200:95.2 300:95.3 400:95.4 468:95.4 600:95.5 2340:95.9"
    ),
}


def output_of(script, *options):
    command = [sys.executable, ROOT / f"{script}.py", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("script", "at_least"),
    [("mlp_numpy_api", 98.2), ("mlp_flax", 98.4), ("mlp_flax_bn_dropout", 98.2)],
)
def test_default_run_is_ahead_of_the_article_all_the_way(script, at_least, real_mnist):
    output = output_of(script, "--data-dir", real_mnist)
    match = re.search(r"\nfinal test accuracy: (\d+\.\d\d)% \(MNIST\)\n$", output)
    assert float(match[1]) >= at_least

    if script == "mlp_flax":  # on another processor, its figures may be others
        lines = re.findall(r"^    (data: .*|epoch .*|final .*)$", README, re.MULTILINE)
        assert len(lines) == 4
        for line in lines:
            numbers = re.sub(r"\d+\.\d+", "#", line)
            assert numbers in re.sub(r"\d+\.\d+", "#", output)

    # Its first steps again, with more evaluations, which change nothing about them.
    early = ["--max-steps", "1000", "--eval-every", "100"]
    output += output_of(script, "--data-dir", real_mnist, *early)
    line = re.compile(r"step +(\d+) .* test accuracy (\d+\.\d\d)%")
    logged = {int(step): float(accuracy) for step, accuracy in line.findall(output)}
    for figure in ARTICLE[script].split():
        step, accuracy = figure.split(":")
        assert logged[int(step)] > float(accuracy), f"step {step}"


def test_accuracy_after_one_step(real_mnist):
    """The first line of the article's log of stage 3 says 31.1%."""
    script = load("mlp_flax_bn_dropout")
    assert script.main(["--data-dir", str(real_mnist), "--max-steps", "1"]) > 0.311
