"""What several tests need: the three scripts, and MNIST files of any content."""

import importlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"]


def load(script):
    return importlib.import_module(script)


def idx(array):
    """The bytes of an IDX file, MNIST's format, that holds `array` as uint8."""
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(data_dir, train, test):
    """Write two datasets of common.draw_digits in torchvision's layout."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, digits in (("train", train), ("t10k", test)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(digits.images))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(digits.labels))
