"""On the real MNIST, where MNIST_DIR names it: what a default run reaches."""

import re
import subprocess
import sys

from helpers import STAGE_1, STAGE_2, STAGE_3

# By number of steps: the test accuracy in percent that the article had logged by then, or
# that its listing gives when it is run today, whichever is higher. Early steps of one seed
# jump, most of all in stage 1, so those are left to the mean of five seeds in
# benchmarks/learning_curves.py.
ARTICLE = {
    STAGE_1: {5625: 95.1},
    STAGE_2: {1000: 92.0, 9375: 93.9},
    STAGE_3: {1: 31.1, 300: 95.3, 400: 95.4, 468: 95.4, 500: 95.5, 2340: 95.9},
}


def test_default_run_is_ahead_of_the_article(script, real_mnist):
    output = ""
    # The whole run, then its first steps with more evaluations, which change nothing.
    for options in ([], ["--max-steps=1"], ["--max-steps=1000", "--eval-every=100"]):
        command = [sys.executable, script.__file__, "--data-dir", real_mnist, *options]
        output += subprocess.check_output(command, text=True)
    final = re.search(r"^final test accuracy: (.*)% \(MNIST\)$", output, re.MULTILINE)
    assert float(final[1]) >= (98.3 if script is STAGE_2 else 98.1)
    logged = dict(re.findall(r"step (\d+) .* test accuracy (\d+\.\d\d)%", output))
    for step, accuracy in ARTICLE[script].items():
        assert float(logged[str(step)]) > accuracy, f"step {step}"
