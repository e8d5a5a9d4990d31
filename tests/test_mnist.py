"""MNIST of common.py: found, downloaded or drawn, and damaged files refused."""

import gzip
import hashlib
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import error_of, idx
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_pil_image

import common
from common import DataError, FlattenAndCast, draw_digits, load_mnist, numpy_collate

IMAGES = np.random.default_rng(0).integers(256, size=(30, 28, 28), dtype=np.uint8)
LABELS = np.arange(30) % 10
TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = common.MNIST_FILES
FILES = {
    "train-images-idx3-ubyte": idx(IMAGES[:20]),
    "train-labels-idx1-ubyte": idx(LABELS[:20]),
    "t10k-images-idx3-ubyte": idx(IMAGES[20:]),
    "t10k-labels-idx1-ubyte": idx(LABELS[20:]),
}
USERS_TIMEOUT = 77  # seconds, of the sockets of a user's program
PACKED = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in FILES.items()}
DRAWN = "drawn digits, not MNIST"


def dotted(files):
    """The files with the names that some archives give them."""
    return {name.replace("-idx", ".idx"): content for name, content in files.items()}


LAYOUTS = {
    "plain": FILES,
    "packed": PACKED,
    "dotted": dotted(FILES),
    "dotted, packed": dotted(PACKED),
    "packed without .gz": {name.removesuffix(".gz"): gz for name, gz in PACKED.items()},
    "unpacked with .gz": {f"{name}.gz": content for name, content in FILES.items()},
}


def write(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def contents(directory):
    """Each path below the directory, with the bytes if it is a file."""
    return {
        path.relative_to(directory).as_posix(): path.is_file() and path.read_bytes()
        for path in directory.rglob("*")
    }


def error_of_loading(data_dir):
    with pytest.raises(DataError):
        load_mnist(data_dir)
    message = error_of(load_mnist, data_dir)
    assert "--data-dir" in message
    return message


class Handler(BaseHTTPRequestHandler):
    """A mirror that answers as `server.behavior` says."""

    def do_GET(self):
        behavior, body = self.server.behavior, PACKED[self.path.strip("/")]
        if behavior == "404":
            return self.send_error(404)
        if behavior == "silent":
            time.sleep(3)
        if behavior == "error page":
            body = b"<html>Welcome to this hotel's network</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behavior in ("stops", "truncated"):
            body = body[: len(body) // 2]
        if self.command == "GET":
            self.wfile.write(body)
            time.sleep(3 if behavior == "stops" else 0)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """The server that torchvision downloads from."""
    resources = [(name, hashlib.md5(gz).hexdigest()) for name, gz in PACKED.items()]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.behavior = "good"
        server.handle_error = lambda *args: None  # clients that hang up are expected
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [url])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        socket.setdefaulttimeout(USERS_TIMEOUT)
        yield server
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(None)
        server.shutdown()
    assert timeout == USERS_TIMEOUT, "the timeout was not put back"


@pytest.fixture(autouse=True)
def draw_only_twenty(monkeypatch):
    """Draw twenty digits and repeat them, to save time."""

    def draw(n, seed):
        return draw_digits(20, seed) * (n // 20)

    monkeypatch.setattr(common, "draw_digits", draw)


# Files that are there are read, wherever they are, and stay as they are.


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_found_and_left_alone(place, layout, no_network, tmp_path):
    write(tmp_path / place, LAYOUTS[layout])
    before = contents(tmp_path)
    train_set, test_set, name = load_mnist(str(tmp_path))
    assert contents(tmp_path) == before
    assert (len(train_set), len(test_set), name) == (20, 10, "MNIST")
    assert isinstance(train_set, list)
    images, labels = numpy_collate(train_set + test_set)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert np.array_equal(images, IMAGES.reshape(30, 784) / np.float32(255))
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TRAIN_X, b""),
        (TRAIN_X, FILES[TRAIN_X][:4]),
        (TRAIN_X, FILES[TRAIN_X][:-1]),
        (TRAIN_Y, FILES[TRAIN_Y] + b"0"),
        (TRAIN_X, b"\0\0\x0d\3" + FILES[TRAIN_X][4:]),  # 32-bit floats
        (TRAIN_Y, idx(LABELS[:20, None])),
        (TRAIN_X, idx(IMAGES[:20].reshape(20, 14, 56))),
        (TRAIN_X, idx(IMAGES[:19])),
        (TEST_X, idx(IMAGES[20:29])),
        (TEST_Y, idx(LABELS[20:] + 1)),  # labels 1 to 10
        (f"{TEST_Y}.gz", PACKED[f"{TEST_Y}.gz"][:-9]),
        (f"{TEST_Y}.gz", PACKED[f"{TEST_Y}.gz"][:10] + b"noise"),
        (f"{TEST_Y}.gz", PACKED[f"{TEST_Y}.gz"][:-8] + bytes(8)),  # no such checksum
    ],
)
def test_damaged_file_is_named_and_kept(name, content, mirror, tmp_path):
    """Although the mirror has a good one."""
    write(tmp_path, FILES)
    (tmp_path / name.removesuffix(".gz")).unlink()
    write(tmp_path, {name: content})
    before = contents(tmp_path)
    message = error_of_loading(tmp_path)
    assert str(tmp_path / name) in message
    assert "delete" in message, "the remedy"
    assert contents(tmp_path) == before


def test_no_images_at_all(no_network, tmp_path):
    write(tmp_path, {**FILES, TEST_X: idx(IMAGES[:0]), TEST_Y: idx(LABELS[:0])})
    assert str(tmp_path / TEST_X) in error_of_loading(tmp_path)


# Files that are missing are downloaded or named.


def test_download_is_complete_and_the_only_one(mirror, tmp_path):
    train_set, test_set, name = load_mnist(tmp_path)
    assert (len(train_set), len(test_set), name) == (20, 10, "MNIST")
    assert contents(tmp_path / "MNIST" / "raw") == FILES
    mirror.behavior = "404"
    assert load_mnist(tmp_path)[2] == "MNIST"


def test_missing_files_are_completed(mirror, tmp_path):
    mine = {TEST_Y: idx(LABELS[:10][::-1])}
    write(tmp_path / "MNIST" / "raw", mine)
    _, test_set, name = load_mnist(tmp_path)
    assert name == "MNIST"
    assert [label for _, label in test_set] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert contents(tmp_path / "MNIST" / "raw") == {**FILES, **mine}


def test_missing_files_are_named(no_network, tmp_path):
    """MNIST that is not whole is never replaced by drawn digits."""
    write(tmp_path, {TRAIN_X: FILES[TRAIN_X], f"{TEST_Y}.gz": PACKED[f"{TEST_Y}.gz"]})
    lacks, _, _ = error_of_loading(tmp_path).partition("download failed: ")
    assert str(tmp_path) in lacks
    assert [name for name in FILES if name in lacks] == [TRAIN_Y, TEST_X]


# Without a file and without a download, digits are drawn, and stderr says why.


def test_no_network(no_network, tmp_path, capsys):
    train_set, test_set, name = load_mnist(tmp_path)
    assert (len(train_set), len(test_set), name) == (10_000, 2_000, DRAWN)
    assert not np.array_equal(train_set[0][0], test_set[0][0])
    reason = capsys.readouterr().err.splitlines()[-1]
    expected = f"drawing digits: no MNIST in {tmp_path}; the download failed: "
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("behavior", "reason"),
    [
        ("silent", "timed out"),
        ("stops", "timed out"),
        ("404", "404"),
        ("error page", "corrupted"),
        ("truncated", "corrupted"),
    ],
)
def test_bad_mirror(behavior, reason, mirror, tmp_path, monkeypatch, capsys):
    mirror.behavior = behavior
    set_timeout = socket.setdefaulttimeout

    def set_shorter_timeout(seconds):
        set_timeout(seconds if seconds == USERS_TIMEOUT else 0.5)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "setdefaulttimeout", set_shorter_timeout)
        assert load_mnist(tmp_path)[2] == DRAWN
    assert contents(tmp_path / "MNIST" / "raw") == {}
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_directory_that_cannot_be_made(mirror, tmp_path, capsys):
    write(tmp_path, {"file": b"mine"})
    assert load_mnist(tmp_path / "file")[2] == DRAWN
    assert contents(tmp_path) == {"file": b"mine"}
    assert "download failed: " in capsys.readouterr().err.splitlines()[-1]


def test_interrupted_download(mirror, tmp_path, monkeypatch):
    """Ctrl-C is not a failed download."""

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MNIST, "download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path)
    assert contents(tmp_path / "MNIST" / "raw") == {}


# The drawn digits, and the transform.


def test_drawn_digits_are_whole_and_varied():
    x, y = numpy_collate(draw_digits(500, seed=0))
    assert (x.shape, x.dtype, y.dtype) == ((500, 784), np.float32, np.int32)
    assert (x.min(), x.max(), set(y)) == (0, 1, set(range(10)))
    assert len(np.unique(x, axis=0)) == 500
    ink = x.reshape(-1, 28, 28) > 0.5
    assert ink[:, 1:-1, 1:-1].sum() > 0.999 * ink.sum(), "some are cut off"

    same_x, same_y = numpy_collate(draw_digits(500, seed=0))
    assert np.array_equal(x, same_x) and np.array_equal(y, same_y)
    assert not np.array_equal(x, numpy_collate(draw_digits(500, seed=1))[0])


def test_transform():
    vector = IMAGES[0].ravel() / np.float32(255)
    for image in (IMAGES[0], to_pil_image(IMAGES[0]), torch.tensor(IMAGES[0])):
        assert FlattenAndCast()(image).dtype == np.float32
        assert np.array_equal(FlattenAndCast()(image), vector)
    batches = FlattenAndCast()(IMAGES.reshape(5, 6, 28, 28))
    assert batches.shape == (5, 6, 784)
    assert np.array_equal(batches[0, 0], vector)
