"""Settings for all tests, and the fixtures that several files use."""

import functools
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Most of the time would go into compiling. Many tests compile the same programs, so once
# is enough; and for so few steps, XLA need not optimize. On GPUs, also ask for the same
# bits each time, and for no rounding to TF32. All this is set before JAX is imported.
xla_flags = "--xla_backend_optimization_level=0 --xla_gpu_deterministic_ops=true"
if version("jaxlib").startswith(("0.6.", "0.7.", "0.8.", "0.9.", "0.10.")):
    # These also have an older code generator for CPUs, which takes a third of the time.
    xla_flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", xla_flags)
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
compiled = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# On a GPU, the processes that tests start must share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The developer's Git settings, such as signed commits, are not for these repositories.
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull

import pytest
from helpers import (
    ROOT,
    SMALL_LAYERS,
    STAGE_1,
    STAGE_2,
    STAGE_3,
    TWENTY_STEPS,
    apply,
    draw,
    import_file,
    run,
    write_mnist,
)
from torchvision.datasets import MNIST

import common


@pytest.fixture(scope="session", autouse=True)
def small_networks():
    """The scripts' own layers would take most of the time that is not compilation."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (STAGE_1, STAGE_2, STAGE_3):
            patch.setattr(script, "LAYER_SIZES", SMALL_LAYERS)
        yield


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A data directory with MNIST files of 650 training and 650 test digits.

    As many of both, so that their evaluations need one compiled program, not two.
    """
    data_dir = tmp_path_factory.mktemp("small_mnist")
    write_mnist(data_dir, draw(650, seed=2), draw(650, seed=3))
    return data_dir


@pytest.fixture(scope="session")
def batch():
    """Images, float32 (40, 784), and labels, int32 (40,)."""
    return common.numpy_collate(common.draw_digits(40, seed=0))


@pytest.fixture
def no_network(monkeypatch):
    """No mirror of MNIST answers: port 9 is the discard service, which nobody runs."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(params=[STAGE_1, STAGE_2, STAGE_3], ids=lambda script: script.__name__)
def script(request):
    """Each of the three scripts, as a module."""
    return request.param


@pytest.fixture(params=[STAGE_2, STAGE_3], ids=lambda script: script.__name__)
def flax_script(request):
    """Each of the two scripts that save checkpoints, as a module."""
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory with the checkpoint of each whole run, named like its script."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def whole_run(small_mnist, checkpoints):
    """A function that returns the whole run of a script, and runs each only once.

    20 steps, 10 an epoch, evaluated and saved after steps 7, 14 and 20.
    """

    @functools.cache
    def run_once(script):
        options = [*TWENTY_STEPS, "--eval-every", 7]
        if script is not STAGE_1:
            options += ["--checkpoint", checkpoints / script.__name__]
        return run(script, small_mnist, *options, record=True)

    return run_once


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that applies recipes to copies, and returns mlp_flax.py as a module.

    The copies are in `tmp_path`, which is the current directory. The module is
    `mlp_recipe`, and importable from there, as worker processes need it. Its network
    is the small one, too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def apply_and_import(*names):
        for file in ("common.py", "mlp_flax.py"):
            shutil.copy(ROOT / file, tmp_path)
        apply(tmp_path, *names)
        script = Path("mlp_flax.py")
        text = script.read_text().replace("(784, 512, 512, 10)", str(SMALL_LAYERS))
        script.write_text(text)
        shutil.copy(script, "mlp_recipe.py")
        return import_file("mlp_recipe.py", "mlp_recipe")

    return apply_and_import


@pytest.fixture(scope="session")
def plain(small_mnist):
    """40 steps of mlp_flax.py without a recipe, recorded, evaluated every 5."""
    options = ["--epochs", 4, "--batch-size", 64, "--eval-every", 5]
    return run(STAGE_2, small_mnist, *options, record=True)
