"""MNIST as NumPy batches for JAX: dataset, collate, sampler, loader.

torch.utils.data does the loading, and what comes out is NumPy, never a torch tensor.
Nothing here knows about models or training. The last part is what a script needs
around its `main`: options, and errors that read as one line.
"""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import math
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn, get_args

import jax
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_NAME, DRAWN_NAME = "MNIST", "drawn digits, not MNIST"
DATA_DIR = Path(__file__).resolve().parent / "data"
PATIENCE = 10  # seconds that a mirror gets to send the next MIN_BYTES
MIN_BYTES = 50_000
# Errors for which the disk, not the network, is to blame.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}


class UserError(Exception):
    """A fault in the data or in training; `run` shows it as one line and exits with 1."""


class OptionError(Exception):
    """An option's value that does not suit the data; `run` exits with 2."""


class FlattenAndCast:
    """Transform: an image of 28 x 28 bytes to a float32 vector (784,) in [0, 1].

    Takes a PIL image or whatever NumPy takes for an array. Axes in front are kept, so
    that a batch of images, uint8 (B, 28, 28), becomes (B, 784) in one call.
    """

    def __call__(self, image: Any) -> np.ndarray:
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:-2], -1) / np.float32(255)


class Batch(tuple):
    """The fields of a batch that is stacked already; `numpy_collate` hands them on."""


class ArrayDataset(Dataset):
    """Images in memory, from which a whole batch is cut by one indexing.

    Args:
        images: (N, ...), for example uint8 (N, 28, 28).
        labels: (N, ...), for example integers (N,).
        transform: called with one image, or with a batch of them.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: Callable[[np.ndarray], np.ndarray],
    ):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
        # take() is what [index] does with a list, only faster
        images = self.images.take(index, axis=0)
        return self.transform(images), self.labels.take(index, axis=0)

    def __getitems__(self, indices: list[int]) -> Batch:
        """What DataLoader calls, where it exists, in place of B times __getitem__."""
        return Batch(self[indices])


def numpy_collate(batch: Sequence[Any], field: str = "sample") -> Any:
    """Stack samples to NumPy arrays, keeping tuples, lists and dicts around them.

    B samples (image (784,), label ()) become (images (B, 784), labels (B,)).

    Raises:
        ValueError: samples differ in structure or shape, or NumPy cannot stack them;
            the message names the field, sample[0] for the images.
    """
    if isinstance(batch, Batch):
        return tuple(batch)
    first = batch[0]
    if isinstance(first, Mapping):
        if any(sample.keys() != first.keys() for sample in batch):
            raise ValueError(f"{field}: the dicts of one batch have different keys")
        return {
            key: numpy_collate([sample[key] for sample in batch], f"{field}[{key!r}]")
            for key in first
        }
    if isinstance(first, (tuple, list)):
        lengths = sorted({len(sample) for sample in batch})
        if len(lengths) > 1:
            raise ValueError(f"{field}: one batch has samples of {lengths} fields")
        columns = [
            numpy_collate(column, f"{field}[{i}]")
            for i, column in enumerate(zip(*batch))
        ]
        named = hasattr(first, "_fields")  # a namedtuple takes its fields one by one
        return type(first)(*columns) if named else type(first)(columns)
    arrays = [np.asarray(sample) for sample in batch]
    if any(array.dtype == object for array in arrays):
        raise ValueError(f"{field}: NumPy cannot stack {type(first).__name__} objects")
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(f"{field}: one batch has arrays of different shapes, {shapes}")
    return np.stack(arrays)


class JAXRandomSampler(Sampler[int]):
    """A fresh permutation of range(len(data_source)) each epoch, decided by the key.

    The order follows from `rng_key` and the number of the epoch alone, whatever was
    drawn before. Epochs count up by themselves; `set_epoch` goes to a given one.

    NumPy draws the permutation, seeded with the bits of the key: `jax.random` would
    sort 60,000 numbers for it, which takes many times longer on a CPU and would make
    the loader wait behind training on a GPU.
    """

    def __init__(self, data_source: Sized, rng_key: jax.Array):
        self.data_source = data_source
        self.key_data = np.asarray(jax.random.key_data(rng_key)).tolist()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data_source)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([*self.key_data, self.epoch])
        self.epoch += 1
        return iter(rng.permutation(len(self)).tolist())


class NumpyLoader(DataLoader):
    """A torch DataLoader that yields NumPy batches, from any map-style dataset.

    Args:
        dataset: anything with __len__ and __getitem__.
        rng_key: decides the order where `shuffle` is true.
        batch_size: examples in a batch; if the sizes do not divide evenly, the last
            one is smaller, or absent with `drop_last=True`.
        shuffle: a new order each epoch; without it, the order of the dataset.
        **kwargs: for DataLoader. Workers (`num_workers=2`) are spawned, because a
            fork of a process in which JAX runs can deadlock: guard the program with
            `if __name__ == "__main__"`.

    Raises:
        ValueError: `shuffle` without `rng_key`.
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
                raise ValueError(
                    "shuffle=True needs an rng_key, as in jax.random.key(0)"
                )
            kwargs["sampler"] = JAXRandomSampler(dataset, rng_key)
        if kwargs.get("num_workers"):
            kwargs.setdefault("multiprocessing_context", "spawn")
            kwargs.setdefault("persistent_workers", True)  # spawning takes seconds
        kwargs.setdefault("collate_fn", numpy_collate)
        super().__init__(dataset, batch_size=batch_size, **kwargs)


def load_mnist(data_dir: str | Path = DATA_DIR) -> tuple[Dataset, Dataset, str]:
    """Return the training set, the test set, and what they are called in the log.

    MNIST is read from `data_dir`/MNIST/raw, torchvision's layout; files that are not
    there are downloaded. Where that is impossible and none is there, the sets are
    10,000 and 2,000 drawn digits, which a message on stderr says, with the reason.
    An example is an image, float32 (784,) in [0, 1], and a label, int32.

    Raises:
        UserError: a file is damaged or missing, or the directory cannot be used.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    try:
        reason = download_mnist(raw)
        missing = [name for name in MNIST_FILES if not (raw / name).exists()]
        if not missing:
            return read_mnist(raw, "train"), read_mnist(raw, "t10k"), MNIST_NAME
    except OSError as error:
        raise UserError(
            f"cannot use the data directory {data_dir}: {error.strerror} "
            f"({error.filename or raw}); name another one with --data-dir"
        ) from error
    if len(missing) < len(MNIST_FILES):
        raise UserError(
            f"{raw} lacks {', '.join(missing)}, and the download failed ({reason}); "
            "add what is missing or name another directory with --data-dir"
        )
    print(
        f"warning: no MNIST in {data_dir}, and the download failed ({reason})\n"
        "warning: training on digits drawn from a font instead; "
        "no accuracy below is an MNIST result",
        file=sys.stderr,
    )
    return draw_digits(10_000, seed=0), draw_digits(2_000, seed=1), DRAWN_NAME


def download_mnist(raw: Path) -> str:
    """Download the files that `raw` lacks; return why that failed, or "".

    A file appears in `raw` whole and verified or not at all: torchvision downloads,
    checks and unpacks it in a scratch directory, from which it is moved.

    Raises:
        OSError: the disk, not the network, is at fault.
    """
    if all((raw / name).exists() for name in MNIST_FILES):
        return ""
    # Importing torchvision takes more than a second, and only this needs it.
    from torchvision.datasets import MNIST

    raw.mkdir(parents=True, exist_ok=True)
    failures = []
    for mirror in MNIST.mirrors:
        try:
            for archive, md5 in MNIST.resources:
                if not (raw / archive.removesuffix(".gz")).exists():
                    download_file(mirror + archive, md5, raw)
            for leftover in raw.glob("download-*"):  # of runs that were killed
                shutil.rmtree(leftover, ignore_errors=True)
            return ""
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            failures.append(f"{mirror}: {error}")
    return "; ".join(failures)


def download_file(url: str, md5: str, raw: Path) -> None:
    """Put the unpacked file behind `url` into `raw`.

    torchvision sets no timeout, and a socket's own would start anew with each byte. So
    it works in a thread, which is left behind once too little arrives.

    Raises:
        ConnectionError: the mirror does not answer, or not with this file.
        OSError: the disk is at fault.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    name = url.rpartition("/")[2].removesuffix(".gz")
    errors = []

    def work(directory: str) -> None:
        try:
            download_and_extract_archive(url, directory, md5=md5)
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    with tempfile.TemporaryDirectory(
        dir=raw, prefix="download-", ignore_cleanup_errors=True
    ) as scratch:
        thread = threading.Thread(target=work, args=(scratch,), daemon=True)
        thread.start()
        received = 0
        while thread.is_alive():
            thread.join(PATIENCE)
            before = received
            received = sum(file.stat().st_size for file in Path(scratch).iterdir())
            if thread.is_alive() and received - before < MIN_BYTES:
                raise ConnectionError(f"next to nothing arrived in {PATIENCE} seconds")
        if errors and getattr(errors[0], "errno", None) in DISK_ERRORS:
            raise errors[0]
        if errors:
            raise ConnectionError(str(errors[0])) from errors[0]
        os.replace(Path(scratch) / name, raw / name)


def read_mnist(raw: Path, split: str) -> ArrayDataset:
    """Read and check one split, "train" or "t10k"; UserError names a damaged file."""
    image_file, label_file = (raw / f for f in MNIST_FILES if f.startswith(split))
    images, labels = read_idx(image_file, ndim=3), read_idx(label_file, ndim=1)
    if images.shape[1:] != (28, 28):
        damaged(image_file, "holds images of {} x {} pixels".format(*images.shape[1:]))
    if len(images) == 0:
        damaged(image_file, "holds no images")
    if len(images) != len(labels):
        damaged(
            label_file,
            f"holds {len(labels)} labels for the {len(images)} images in {image_file.name}",
        )
    if labels.max() > 9:
        damaged(label_file, f"holds the label {labels.max()}, and 9 is the highest")
    return ArrayDataset(images, labels.astype(np.int32), FlattenAndCast())


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes, which says its shape in its header: uint8, `ndim` axes.

    The format is described at http://yann.lecun.com/exdb/mnist/.
    """
    content = path.read_bytes()
    header_size = 4 * (1 + ndim)
    if len(content) < header_size:
        damaged(path, f"holds {len(content)} bytes, less than a header")
    magic, *shape = np.frombuffer(content, ">u4", 1 + ndim).tolist()
    if magic != 0x0800 + ndim:
        damaged(path, f"begins with the number {magic}, not with {0x0800 + ndim}")
    expected = header_size + math.prod(shape)
    if len(content) != expected:
        damaged(path, f"holds {len(content)} bytes, and its header says {expected}")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def damaged(path: Path, fault: str) -> NoReturn:
    raise UserError(f"{path} {fault}; delete it and run again to download it anew")


def draw_digits(count: int, seed: int) -> ArrayDataset:
    """Draw `count` digits from Pillow's own font, shifted, scaled and rotated.

    28 x 28 bytes, white on black like MNIST's, but much easier: not a benchmark, only
    something to learn where MNIST cannot be had. The same `seed`, the same digits.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=28)
    glyphs = []
    for digit in "0123456789":
        glyphs.append(Image.new("L", (56, 56)))
        ImageDraw.Draw(glyphs[-1]).text((28, 28), digit, 255, font, anchor="mm")

    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count, dtype=np.int32)
    scales, angles = rng.uniform(0.7, 1.1, count), rng.uniform(-0.4, 0.4, count)
    shifts = rng.uniform(-4, 4, (count, 2))
    images = np.empty((count, 28, 28), np.uint8)
    for i in range(count):
        # Image.transform wants the way back: from a pixel here to one of the glyph.
        cos, sin = np.cos(angles[i]) / scales[i], np.sin(angles[i]) / scales[i]
        dx, dy = 14 + shifts[i]
        matrix = (
            cos,
            sin,
            28 - cos * dx - sin * dy,
            -sin,
            cos,
            28 + sin * dx - cos * dy,
        )
        images[i] = glyphs[labels[i]].transform(
            (28, 28), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
    return ArrayDataset(images, labels, FlattenAndCast())


class Checkpoints:
    """The last two states of a run, saved in a directory with Orbax.

    Args:
        directory: new, empty, or one in which a run saved before.
        run: what must not change if a resumed run is to be the same run: a dict of
            numbers, strings and lists, compared with the one saved.

    Raises, as do its methods:
        UserError: the directory cannot be used, or what it holds does not belong to
            this run or is damaged. Nothing that it holds is changed then.
    """

    def __init__(self, directory: Path, run: dict[str, Any]):
        import orbax.checkpoint as ocp  # only a run that saves pays for this import

        self.directory, self.run, self.ocp = Path(directory).absolute(), run, ocp
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(2),
            enable_async_checkpointing=False,  # training reuses the state's memory
            cleanup_tmp_directories=True,  # of a run that was killed while saving
        )
        with self.explain("use", "name another one with --checkpoint-dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            foreign = [
                path.name
                for path in self.directory.iterdir()
                if not path.name.partition(".orbax-checkpoint-tmp")[0].isdecimal()
                and not path.name.startswith(".")
            ]
            if foreign:
                raise FileExistsError(f"it holds {min(foreign)}, no checkpoint")
            if not os.access(self.directory, os.W_OK):
                raise PermissionError(os.strerror(errno.EACCES))
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def restore(self, state: Any) -> Any:
        """Return the last saved state, or `state` itself if nothing was saved."""
        step, args = self.manager.latest_step(), self.ocp.args
        if step is None:
            return state
        with self.explain(
            f"read step {step} in", f"delete {self.directory / str(step)}"
        ):
            saved = self.manager.restore(
                step, args=args.Composite(run=args.JsonRestore())
            ).run
        checksum = saved.pop("checksum", None)
        for name in self.run | saved:
            if self.run.get(name) != saved.get(name):
                raise UserError(
                    f"the checkpoints in {self.directory} are of a run with {name} "
                    f"{saved.get(name)}, not {self.run.get(name)}; "
                    "name another directory with --checkpoint-dir"
                )
        with self.explain(
            f"read step {step} in", f"delete {self.directory / str(step)}"
        ):
            state = self.manager.restore(
                step, args=args.Composite(state=args.StandardRestore(state))
            ).state
            if tree_checksum(state) != checksum:
                raise ValueError("its checksum is wrong")
        print(f"resuming from step {step} in {self.directory}")
        return state

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays as the state after `step` updates."""
        args = self.ocp.args
        run = {**self.run, "checksum": tree_checksum(state)}
        with self.explain("save to", "free some space or name another directory"):
            needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if shutil.disk_usage(self.directory).free < needed:  # before Orbax begins
                raise OSError(os.strerror(errno.ENOSPC))
            self.manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(state), run=args.JsonSave(run)
                ),
            )

    @contextlib.contextmanager
    def explain(self, action: str, remedy: str) -> Iterator[None]:
        """Turn whatever Orbax raises for a fault into a UserError of one line."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"cannot {action} the checkpoint directory {self.directory}: "
                f"{reason}; {remedy}"
            ) from error


def tree_checksum(tree: Any) -> int:
    """CRC-32 of a pytree's leaves, because Orbax restores flipped bits unnoticed."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return checksum


def first_examples(dataset: Dataset, count: int | None, batch_size: int) -> Dataset:
    """The first `count` examples (None: all), or OptionError if they do not suffice."""
    if count is not None and count > len(dataset):
        raise OptionError(
            f"argument --train-examples: must be at most {len(dataset)}, not {count}"
        )
    count = count or len(dataset)
    if batch_size > count:
        raise OptionError(
            f"argument --batch-size: must be at most {count}, the number of training "
            f"images, not {batch_size}"
        )
    return dataset if count == len(dataset) else Subset(dataset, range(count))


def whole_number(allowed: range) -> Callable[[str], int]:
    """An argparse type: a whole number out of `allowed`."""

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) in allowed:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {allowed[0]} to {allowed[-1]}, not {text!r}"
        )

    return parse


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf:
        return number
    raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")


def run(main: Callable[[Any], object], config_class: type) -> None:
    """Call `main` with the options of the command line, as a `config_class`, and exit.

    A field `epochs: Annotated[int, "passes over the data"] = 5` of that dataclass makes
    an option `--epochs N`, whose help and default it states. Whole numbers must be 1
    or more, unless the annotation goes on with a range; floats must be above 0.

    Exit status: 0, or 1 for a UserError, 2 for a wrong option, 130 for Ctrl-C. None of
    these prints a traceback, nor does a reader that closes the pipe on stdout.
    """
    parser = argparse.ArgumentParser(
        description=(inspect.getmodule(main).__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    for field in dataclasses.fields(config_class):
        kind, (help_text, *limits) = get_args(field.type)[0], field.type.__metadata__
        allowed = limits[0] if limits else range(1, 2**32)
        parse, metavar = {
            Path: (Path, "DIR"),
            Path | None: (Path, "DIR"),
            float: (positive_number, "X"),
            str: (str, "TEXT"),
        }.get(kind, (whole_number(allowed), "N"))
        if field.default is not None:
            help_text += " (default: %(default)s)"
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=parse,
            metavar=metavar,
            default=field.default,
            help=help_text,
        )
    config = config_class(**vars(parser.parse_args()))
    sys.stdout.reconfigure(line_buffering=True)  # lines come as they are printed
    try:
        main(config)
    except OptionError as error:
        parser.error(str(error))
    except UserError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"{parser.prog}: interrupted {interrupt}".rstrip() + "\n")
    except BrokenPipeError:  # as in `python mlp_flax.py | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
