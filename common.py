"""MNIST as NumPy batches for JAX: dataset, collate, sampler, loader.

PyTorch's DataLoader does the loading; what comes out is NumPy, never a torch tensor.
The first half does this for any map-style dataset; the second half is MNIST.
"""

import errno
import socket
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Sampler


class ArrayDataset(Dataset):
    """Images (N, ...), labels (N, ...) in memory; `transform` takes one or a batch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | list[int]) -> tuple[Any, Any]:
        images = self.images.take(index, axis=0)  # twice as fast as images[index]
        return self.transform(images), self.labels.take(index, axis=0)

    def __getitems__(self, indices: list[int]) -> tuple[Any, Any]:
        """Cut a whole batch by one indexing; DataLoader prefers this, if it exists."""
        return self[indices]


def numpy_collate(batch: Sequence[Any]) -> Any:
    """Stack a list of samples leaf by leaf: B of ((784,), ()) become ((B, 784), (B,)).

    A sample is any pytree (tuple, dict, namedtuple) of arrays, numbers, torch tensors.
    Raises ValueError if samples differ in structure or shape.
    """
    if isinstance(batch, tuple):  # no list of samples: ArrayDataset has stacked them
        return batch
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batch)


class JAXRandomSampler(Sampler[int]):
    """A fresh permutation of `data_source` each epoch, from `rng_key` and `epoch` alone."""

    def __init__(self, data_source: Sized, rng_key: jax.Array):
        self.data_source, self.rng_key = data_source, rng_key
        self.epoch = 0  # counts up by itself, and may be set

    def __len__(self) -> int:
        return len(self.data_source)

    def __iter__(self) -> Iterator[int]:
        key = jax.random.fold_in(self.rng_key, self.epoch)
        self.epoch += 1
        # The order of random numbers: jax.random.permutation takes ten times as long.
        bits = np.asarray(jax.random.bits(key, (len(self),), "uint32"))
        return iter(bits.argsort(kind="stable").tolist())


class NumpyLoader(DataLoader):
    """A DataLoader that yields NumPy batches, from any map-style dataset.

    With `shuffle`, `rng_key` decides the order, another one each epoch. `kwargs` go to
    DataLoader; with `num_workers`, a program needs `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        dataset: Dataset,
        rng_key: jax.Array | None = None,
        batch_size: int = 1,
        shuffle: bool = False,
        **kwargs: Any,
    ):
        if shuffle:
            if rng_key is None:
                raise ValueError("shuffle=True needs an rng_key, as jax.random.key(0)")
            kwargs["sampler"] = JAXRandomSampler(dataset, rng_key)
        if kwargs.get("num_workers"):
            # A forked copy of a process in which JAX runs can deadlock.
            kwargs.setdefault("multiprocessing_context", "spawn")
            kwargs.setdefault("persistent_workers", True)  # a spawn takes seconds
        kwargs.setdefault("collate_fn", numpy_collate)
        super().__init__(dataset, batch_size, **kwargs)

    def batches_from(self, step: int) -> Iterator[Any]:
        """Yield the batches that follow `step` steps, epoch after epoch, without end.

        To begin in the middle of an epoch, its first batches are loaded and skipped.
        """
        epoch, skip = divmod(step, len(self))
        while True:
            self.sampler.epoch = epoch
            yield from islice(self, skip, None)
            epoch, skip = epoch + 1, 0


MNIST_FILES = [
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


class DataError(Exception):
    """The data cannot be used; the message names the file and the remedy."""


class FlattenAndCast:
    """Transform: uint8 (..., 28, 28) or a PIL image to float32 (..., 784) in [0, 1]."""

    def __call__(self, image: Any) -> np.ndarray:
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:-2], -1) / np.float32(255)


def load_mnist(data_dir: str | Path) -> tuple[ArrayDataset, ArrayDataset, str]:
    """Return the training set, the test set, and what to call them in the log.

    MNIST is read from `data_dir`/MNIST/raw, torchvision's layout; what is missing there
    is downloaded. If none can be had, the sets are drawn digits, and stderr says why.
    Images are float32 (784,) in [0, 1], labels int32 from 0 to 9. Raises DataError.
    """
    raw = Path(data_dir, "MNIST", "raw")
    try:
        missing = [name for name in MNIST_FILES if not (raw / name).exists()]
        if missing:
            download_mnist(raw, missing)
        return read_mnist(raw, "train"), read_mnist(raw, "t10k"), "MNIST"
    except ConnectionError as error:
        reason = f"{raw} lacks {', '.join(missing)}, and the download failed: {error}"
        if len(missing) < len(MNIST_FILES):
            raise DataError(f"{reason}; add them or use another directory") from error
        print(f"training on drawn digits, because {reason}", file=sys.stderr)
        return draw_digits(10_000, 0), draw_digits(2_000, 1), "drawn digits, not MNIST"
    except OSError as error:
        raise DataError(f"cannot use the data directory {data_dir}: {error}") from error


def download_mnist(raw: Path, missing: list[str]) -> None:
    """Download to a scratch directory, then move what is missing: files appear whole.

    Raises ConnectionError if no mirror has them, another OSError if the disk is full.
    """
    from torchvision.datasets import MNIST  # imported late: that takes a second

    raw.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=raw) as scratch, redirect_stdout(sys.stderr):
        socket.setdefaulttimeout(5)  # seconds; without it, a wait may never end
        try:
            MNIST(scratch, download=True)  # checks the files, too
        except Exception as error:  # each fault of a mirror has a type of its own
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise ConnectionError(" ".join(str(error).split())) from error
        finally:
            socket.setdefaulttimeout(None)
        for name in missing:
            Path(scratch, "MNIST", "raw", name).replace(raw / name)


def read_mnist(raw: Path, split: str) -> ArrayDataset:
    """Read a split, "train" or "t10k", from IDX files: a header, then the bytes."""
    images_file, labels_file = (raw / name for name in MNIST_FILES if split in name)
    pixels = np.fromfile(images_file, np.uint8)[16:]
    labels = np.fromfile(labels_file, np.uint8)[8:]
    n = pixels.size // 784
    for path, header, valid in (
        (images_file, [0x0803, n, 28, 28], 0 < pixels.size == n * 784),
        (labels_file, [0x0801, n], labels.size == n and labels.max(initial=0) <= 9),
    ):
        if not valid or np.fromfile(path, ">i4", len(header)).tolist() != header:
            raise DataError(f"{path} is damaged; delete it to have it downloaded anew")
    images = pixels.reshape(n, 28, 28)
    return ArrayDataset(images, labels.astype(np.int32), FlattenAndCast())


def draw_digits(n: int, seed: int) -> ArrayDataset:
    """Draw `n` digits in Pillow's own font, much easier than MNIST: no benchmark."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(18, 28)]
    labels = rng.integers(10, size=n, dtype=np.int32)
    images = np.empty((n, 28, 28), np.uint8)
    for image, label in zip(images, labels):
        canvas = Image.new("L", (28, 28))
        place, font = rng.uniform(11, 17, size=2), fonts[rng.integers(10)]
        ImageDraw.Draw(canvas).text(place, str(label), 255, font, anchor="mm")
        image[:] = canvas.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    return ArrayDataset(images, labels, FlattenAndCast())
