"""NumPy batches for JAX from PyTorch's DataLoader, and MNIST.

The first half works with any dataset: a collate function, a sampler, a loader. The
second half reads MNIST. A dataset in memory is a plain list of (image, label) pairs, so
`train_set[:50_000]` and `train_set[50_000:]` split it for training and validation.
"""

import gzip
import io
import math
import socket
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence, Sized
from contextlib import redirect_stderr, redirect_stdout
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Sampler


def numpy_collate(batch: Sequence[Any]) -> Any:
    """Stack B samples: a list of (image, label) pairs becomes one pair of arrays.

    A sample is a number, an array or a torch tensor, or any tuple, list, dict or
    namedtuple of these. The batch has the same structure; its leaves are NumPy arrays
    (B, ...). Raises ValueError if samples differ in structure or shape.
    """
    return jax.tree.map(_stack, *batch)


def _stack(*rows: Any) -> np.ndarray:
    try:
        stacked = np.array(rows)  # for small rows twice as fast as np.stack
    except ValueError:
        shapes = {np.shape(row) for row in rows}
        raise ValueError(f"samples of different shapes: {shapes}") from None
    if stacked.dtype == object:
        types = {type(row).__name__ for row in rows}
        raise ValueError(f"samples of different structure: {types}")
    return stacked


class JAXRandomSampler(Sampler[int]):
    """Yields the indices of `data_source` in a random order, a new one each epoch.

    The order depends only on `rng_key` and the number of the epoch. Each iteration,
    even if it is not finished, is an epoch; the first is epoch 0.
    """

    def __init__(self, data_source: Sized, rng_key: jax.Array):
        self.data_source = data_source
        self.rng_key = rng_key
        self.start_at(epoch=0)

    def start_at(self, epoch: int, skip: int = 0) -> None:
        """Make the next iteration this epoch, without its first `skip` indices."""
        self.epoch = epoch
        self.skip = skip

    def __len__(self) -> int:
        return len(self.data_source)

    def __iter__(self) -> Iterator[int]:
        epoch_key = jax.random.fold_in(self.rng_key, self.epoch)
        order = np.asarray(jax.random.permutation(epoch_key, len(self)))
        indices = order[self.skip :].tolist()
        self.start_at(self.epoch + 1)
        return iter(indices)


def _is_key(value: Any) -> bool:
    """Return whether this is one JAX key, from jax.random.key or the older PRNGKey."""
    try:
        return isinstance(value, jax.Array) and jax.random.key_data(value).ndim == 1
    except TypeError:
        return False


class NumpyLoader(DataLoader):
    """A DataLoader that yields NumPy batches.

    `dataset` is anything with `__len__` and `__getitem__` or, without `shuffle`, an
    IterableDataset. With `shuffle`, `rng_key` determines the order, which changes every
    epoch. Other arguments are DataLoader's.

    Worker processes (`num_workers`) are spawned by default, because a forked copy of a
    process that runs JAX can deadlock. So the program needs a __main__ guard, and the
    dataset and its transforms must be importable (no lambdas). Each worker holds a copy
    of the dataset and takes seconds to start: at every epoch, unless you pass
    `persistent_workers=True`. With that, iterate over the loader in one place only.

    Raises TypeError if `rng_key` is not a JAX key but, say, a batch size, and
    ValueError if arguments conflict.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Any],
        rng_key: jax.Array | None = None,
        batch_size: int = 1,
        shuffle: bool = False,
        **kwargs: Any,
    ):
        if rng_key is not None and not _is_key(rng_key):
            raise TypeError(
                f"rng_key is {rng_key!r}, not a JAX key such as jax.random.key(0); "
                f"pass a batch size by name: batch_size={rng_key!r}"
            )
        if shuffle and rng_key is None:
            raise ValueError("shuffle=True needs an rng_key such as jax.random.key(0)")
        if rng_key is not None and not shuffle:
            raise ValueError("rng_key has no effect without shuffle=True")
        if shuffle and kwargs.get("sampler") is not None:
            raise ValueError("sampler and shuffle=True are mutually exclusive")
        if batch_size is None:
            raise ValueError("batch_size=None: iterate over the dataset itself instead")

        if shuffle:
            kwargs["sampler"] = JAXRandomSampler(dataset, rng_key)
        if kwargs.get("collate_fn") is None:
            kwargs["collate_fn"] = numpy_collate
        if kwargs.get("num_workers") and kwargs.get("multiprocessing_context") is None:
            kwargs["multiprocessing_context"] = "spawn"
        super().__init__(dataset, batch_size, **kwargs)

    def batches_from(self, step: int) -> Iterator[Any]:
        """Yield batches endlessly, starting where a run would be after `step` steps.

        Epoch follows epoch, each with a new order. If the first one starts midway, the
        examples before that point are skipped without being loaded.

        Raises ValueError if `step` is negative, if the order does not come from a key
        (a resumed run would see a different order), or if an epoch has no batches.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative")
        if not hasattr(self.sampler, "start_at"):
            raise ValueError(
                "batches_from needs shuffle=True and an rng_key; it cannot "
                f"resume the order of a {type(self.sampler).__name__}"
            )
        if len(self) == 0:
            raise ValueError(
                f"an epoch has no batches: {len(self.sampler)} examples, "
                f"batch_size={self.batch_size}, drop_last={self.drop_last}"
            )
        return self._endless_batches(step)

    def _endless_batches(self, step: int) -> Iterator[Any]:
        epoch, steps_done = divmod(step, len(self))
        self.sampler.start_at(epoch, skip=steps_done * self.batch_size)
        while True:
            yield from self  # an epoch
            epoch += 1
            self.sampler.start_at(epoch)


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DISK_ERRORS = {EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EROFS}
REMEDY = "replace the file, or delete it to have it downloaded"

Pairs = list[tuple[np.ndarray, np.int32]]


class DataError(Exception):
    """The data cannot be used; the message is one line that says what to do."""


class FlattenAndCast:
    """Transform: uint8 (..., 28, 28) or a grayscale PIL image to float32 (..., 784)."""

    def __call__(self, image: Any) -> np.ndarray:
        pixels = np.asarray(image)
        flat = pixels.reshape(*pixels.shape[:-2], -1)
        return np.divide(flat, 255, dtype=np.float32)


def load_mnist(data_dir: str | Path) -> tuple[Pairs, Pairs, str]:
    """Return the training set, the test set, and their name for the log.

    Each set is a list of pairs: an image, float32 (784,) in [0, 1], and its label, an
    np.int32 from 0 to 9.

    MNIST's four files may be in `data_dir`/MNIST/raw (torchvision's layout), in
    `data_dir`/raw or in `data_dir`, as they are or as .gz; they are never changed.
    Missing files are downloaded to `data_dir`/MNIST/raw. If that fails and the
    directory has no visible file, both sets are drawn digits, and stderr says why.

    Raises DataError if a file is damaged, if only some of them or other files are there
    and the download fails, or if the directory cannot be read or written.
    """
    data_dir = Path(data_dir)
    raw = data_dir / "MNIST" / "raw"
    try:
        missing = [name for name in MNIST_FILES if find_file(data_dir, name) is None]
        if missing:
            download_mnist(raw, missing)
        train_images, train_labels, test_images, test_labels = (
            find_file(data_dir, name) for name in MNIST_FILES
        )
        train_set = read_pairs(train_images, train_labels)
        test_set = read_pairs(test_images, test_labels)
        return train_set, test_set, "MNIST"
    except ConnectionError as error:
        reason = f"and the download failed: {error}"
        other_file = find_other_file(data_dir)
        if len(missing) < len(MNIST_FILES):
            raise DataError(
                f"{data_dir} lacks {', '.join(missing)}, {reason}"
            ) from error
        if other_file is not None:
            raise DataError(
                f"{data_dir} has no MNIST file, only others such as {other_file}, {reason}"
            ) from error
        print(f"drawing digits: {data_dir} has no MNIST, {reason}", file=sys.stderr)
        return draw_digits(10_000, 0), draw_digits(2_000, 1), "drawn digits, not MNIST"
    except OSError as error:
        raise DataError(f"cannot use the data directory {data_dir}: {error}") from error


def find_file(data_dir: Path, name: str) -> Path | None:
    """Return where the file `name` of MNIST_FILES is, or None if it is missing."""
    other_name = name.replace("-idx", ".idx")  # the spelling of some archives
    for directory in (data_dir / "MNIST" / "raw", data_dir / "raw", data_dir):
        for file_name in (name, f"{name}.gz", other_name, f"{other_name}.gz"):
            path = directory / file_name
            if path.is_file():
                return path
    return None


def find_other_file(data_dir: Path) -> Path | None:
    """Return a file in `data_dir`, or None; hidden files do not count."""
    for path in data_dir.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(data_dir).parts)
        if path.is_file() and not hidden:
            return path
    return None


def download_mnist(raw: Path, missing: Sequence[str]) -> None:
    """Download MNIST to a scratch directory, then move the missing files to `raw`.

    So each file appears complete or not at all. Raises ConnectionError if no mirror
    sends the files, and another OSError if they cannot be written.
    """
    from torchvision.datasets import MNIST  # here, since importing it takes a second

    raw.mkdir(parents=True, exist_ok=True)
    messages = sys.stderr or io.StringIO()  # stdout is for the log
    timeout = socket.getdefaulttimeout()
    with (
        TemporaryDirectory(dir=raw, prefix=".download-") as scratch,
        redirect_stdout(messages),
        redirect_stderr(messages),
    ):
        socket.setdefaulttimeout(3)  # seconds, for each address of a mirror
        try:
            MNIST(scratch, download=True)  # also verifies checksums
        except Exception as error:  # a mirror can fail with many types of exceptions
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            raise ConnectionError(" ".join(str(error).split())) from error
        finally:
            socket.setdefaulttimeout(timeout)
        for name in missing:
            Path(scratch, "MNIST", "raw", name).replace(raw / name)


def read_pairs(images_path: Path, labels_path: Path) -> Pairs:
    """Read images and labels, and pair them. Raises DataError if they do not match."""
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if images.shape != (len(labels), 28, 28):
        raise DataError(
            f"{images_path} has images of shape {images.shape}, "
            f"{labels_path} has {len(labels)} labels: {REMEDY}"
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path} has the label {labels.max()}: {REMEDY}")
    return make_pairs(images, labels)


def make_pairs(images: np.ndarray, labels: np.ndarray) -> Pairs:
    """Pair uint8 images (N, 28, 28) and labels (N,), as load_mnist returns them."""
    return list(zip(FlattenAndCast()(images), labels.astype(np.int32), strict=True))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read uint8 values with `ndim` dimensions from a file in MNIST's IDX format.

    The format: two zero bytes, 8 for unsigned bytes, `ndim`; then each dimension's size
    as a big-endian 32-bit integer; then the values. Source: "File formats for the MNIST
    database", on Yann LeCun's MNIST page.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} does not unpack ({error}): {REMEDY}") from error

    header_size = 4 + 4 * ndim
    if len(content) < header_size or content[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path} is not a {ndim}-dimensional IDX file: {REMEDY}")

    shape = struct.unpack(f">{ndim}I", content[4:header_size])
    values = np.frombuffer(content, np.uint8, offset=header_size)
    if values.size == 0 or values.size != math.prod(shape):
        raise DataError(f"{path} has {values.size} values for shape {shape}: {REMEDY}")
    return values.reshape(shape)


def draw_digits(n: int, seed: int) -> Pairs:
    """Draw `n` digits in Pillow's own font, at random positions, sizes and angles.

    They are much easier than MNIST: good for checking that a program works, but not a
    benchmark.
    """
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(18, 28)]
    labels = rng.integers(10, size=n)
    images = np.empty((n, 28, 28), np.uint8)
    for i in range(n):
        center = rng.uniform(11, 17, size=2)  # pixels
        font = fonts[rng.integers(len(fonts))]
        angle = rng.uniform(-20, 20)  # degrees
        canvas = Image.new("L", (28, 28))
        ImageDraw.Draw(canvas).text(center, str(labels[i]), 255, font, anchor="mm")
        images[i] = canvas.rotate(angle, Image.Resampling.BILINEAR)
    return make_pairs(images, labels)
