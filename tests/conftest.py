import functools
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Every run of a script compiles the same programs: once for all tests is enough. Older
# releases of JAX read wrong programs from the cache, so there it takes longer.
COMPILED = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
if tuple(map(int, version("jax").split(".")[:2])) >= (0, 7):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "MNIST_DIR" not in os.environ:  # the tests compile more than they compute
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# On a GPU, the processes that tests start must share its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import optax
from helpers import SCRIPTS, load, write_mnist

import common


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """One model, optimizer and jitted init for all runs, so that each is traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.cache(jax.jit))
        for name in ("adam", "linear_schedule"):
            patch.setattr(optax, name, functools.cache(getattr(optax, name)))
        for script in map(load, SCRIPTS[1:]):
            patch.setattr(script, "MLP", functools.cache(script.MLP))
        yield


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """A data directory with MNIST files of 640 training and 300 test digits."""
    data_dir = tmp_path_factory.mktemp("small_mnist")
    write_mnist(
        data_dir, common.draw_digits(640, seed=2), common.draw_digits(300, seed=3)
    )
    return data_dir


@pytest.fixture(scope="session")
def real_mnist():
    """The directory that MNIST_DIR names, or a skipped test."""
    if "MNIST_DIR" not in os.environ:
        pytest.skip("MNIST_DIR does not name a directory with MNIST")
    return Path(os.environ["MNIST_DIR"])


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the three scripts, as a module."""
    return load(request.param)


@pytest.fixture(params=SCRIPTS[1:])
def flax_script(request):
    """Each of the two scripts that save checkpoints, as a module."""
    return load(request.param)
