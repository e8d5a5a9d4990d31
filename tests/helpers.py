"""What several tests need: the three scripts, and MNIST files of any content."""

import importlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SCRIPTS = ["mlp_numpy_api", "mlp_flax", "mlp_flax_bn_dropout"]


def load(script):
    return importlib.import_module(script)


def write_idx(path, array):
    """Write an array of bytes as an IDX file, MNIST's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4")
    path.write_bytes(header.tobytes() + array.astype(np.uint8).tobytes())


def write_mnist(data_dir, train, test):
    """Write two datasets of common.draw_digits in torchvision's layout."""
    for split, digits in (("train", train), ("t10k", test)):
        raw = data_dir / "MNIST" / "raw"
        write_idx(raw / f"{split}-images-idx3-ubyte", digits.images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", digits.labels)
