"""MNIST of common.py, whatever the files, the network or the disk are like."""

import errno
import gzip
import hashlib
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import idx
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
PACKED = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in FILES.items()}
DOTTED = {name.replace("-idx", ".idx"): content for name, content in FILES.items()}
DOTTED_PACKED = {name.replace("-idx", ".idx"): gz for name, gz in PACKED.items()}
DRAWN = "drawn digits, not MNIST"


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
    with pytest.raises(DataError) as caught:
        load_mnist(data_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Handler(BaseHTTPRequestHandler):
    """A mirror that answers as `server.behaviour` says."""

    def do_GET(self):
        behaviour, body = self.server.behaviour, PACKED[self.path.strip("/")]
        if behaviour == "404":
            return self.send_error(404)
        if behaviour == "silent":
            time.sleep(3)
        if behaviour == "error page":
            body = b"<html>Welcome to this hotel's network</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour in ("stops", "truncated"):
            body = body[: len(body) // 2]
        if self.command == "GET":
            self.wfile.write(body)
            time.sleep(3 if behaviour == "stops" else 0)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """The server that torchvision downloads from."""
    resources = [(name, hashlib.md5(gz).hexdigest()) for name, gz in PACKED.items()]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.behaviour = "good"
        server.handle_error = lambda *args: None  # clients that hang up are expected
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [url])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        socket.setdefaulttimeout(77)
        yield server
        server.shutdown()
    assert socket.getdefaulttimeout() == 77, "the timeout was not put back"
    socket.setdefaulttimeout(None)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(autouse=True)
def draw_only_twenty(monkeypatch):
    """And repeat them, to save time."""

    def draw(n, seed):
        return draw_digits(20, seed) * (n // 20)

    monkeypatch.setattr(common, "draw_digits", draw)


# Files that are there are read, wherever they are, and stay as they are.


@pytest.mark.parametrize("place", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("files", [FILES, PACKED, DOTTED, DOTTED_PACKED], ids=min)
def test_files_are_found_and_left_alone(place, files, no_network, tmp_path):
    write(tmp_path / place, files)
    if TRAIN_X not in files:
        (tmp_path / place / TRAIN_X).mkdir()  # some archives hold such a directory
    before = contents(tmp_path)
    train_set, test_set, name = load_mnist(str(tmp_path))
    assert contents(tmp_path) == before
    assert (len(train_set), len(test_set), name) == (20, 10, "MNIST")
    images, labels = numpy_collate(train_set + test_set)
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert np.array_equal(images, IMAGES.reshape(30, 784) / np.float32(255))
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (TRAIN_X, FILES[TRAIN_X][:4], "IDX file"),
        (TRAIN_X, idx(IMAGES[:0]), "0 values"),
        (TRAIN_X, FILES[TRAIN_X][:-1], "15679 values"),
        (TRAIN_Y, FILES[TRAIN_Y] + b"0", "21 values"),
        (TRAIN_X, b"\0\0\x0d\3" + FILES[TRAIN_X][4:], "IDX file"),
        (TRAIN_Y, idx(LABELS[:20, None]), "IDX file"),
        (TRAIN_X, idx(IMAGES[:20].reshape(20, 14, 56)), "(20, 14, 56)"),
        (TRAIN_X, idx(IMAGES[:19]), "20 labels"),
        (TEST_Y, idx(LABELS[20:] + 1), "label 10"),
        (TEST_Y, PACKED[f"{TEST_Y}.gz"], "IDX file"),
        (f"{TEST_Y}.gz", FILES[TEST_Y], "unpack"),
        (f"{TEST_Y}.gz", PACKED[f"{TEST_Y}.gz"][:-9], "unpack"),
        (f"{TEST_Y}.gz", PACKED[f"{TEST_Y}.gz"][:10] + b"noise", "unpack"),
    ],
)
def test_damaged_file_is_named_and_kept(name, content, problem, mirror, tmp_path):
    write(tmp_path, FILES)
    (tmp_path / name.removesuffix(".gz")).unlink()
    write(tmp_path, {name: content})
    before = contents(tmp_path)
    message = error_of_loading(tmp_path)
    assert str(tmp_path / name) in message
    assert problem in message
    assert "delete it" in message, "the remedy"
    assert contents(tmp_path) == before


# Files that are missing are downloaded or named.


def test_download_is_complete_and_the_only_one(mirror, tmp_path, monkeypatch):
    train_set, test_set, name = load_mnist(tmp_path)
    assert (len(train_set), len(test_set), name) == (20, 10, "MNIST")
    assert contents(tmp_path / "MNIST" / "raw") == FILES
    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("another one"))
    assert load_mnist(tmp_path)[2] == "MNIST"


def test_missing_files_are_completed(mirror, tmp_path):
    write(tmp_path / "MNIST" / "raw", {TEST_Y: idx(LABELS[:10][::-1])})
    _, test_set, name = load_mnist(tmp_path)
    assert name == "MNIST"
    assert [label for _, label in test_set] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_missing_files_are_named(no_network, tmp_path):
    write(tmp_path, {TRAIN_X: FILES[TRAIN_X], f"{TEST_Y}.gz": PACKED[f"{TEST_Y}.gz"]})
    message = error_of_loading(tmp_path)
    assert f"{tmp_path} lacks {TRAIN_Y}, {TEST_X}, and the download failed" in message


def test_other_files_are_named(no_network, tmp_path):
    write(tmp_path / "MNIST" / "processed", {"training.pt": b"of an old torchvision"})
    assert str(Path("processed", "training.pt")) in error_of_loading(tmp_path)


@pytest.mark.parametrize("directory", [".git", "MNIST/raw/.download-killed/MNIST/raw"])
def test_hidden_files_do_not_count(directory, no_network, tmp_path):
    write(tmp_path / directory, {".hidden": b"", TRAIN_X: b"half a file"})
    assert load_mnist(tmp_path)[2] == DRAWN


# Whatever the network does, there are digits in time.


def test_no_network(no_network, tmp_path, capsys):
    train_set, test_set, name = load_mnist(tmp_path)
    assert (len(train_set), len(test_set), name) == (10_000, 2_000, DRAWN)
    assert not np.array_equal(train_set[0][0], test_set[0][0])
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert f"drawing digits: {tmp_path} has no MNIST" in stderr
    assert "refused" in stderr


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("silent", "timed out"),
        ("stops", "timed out"),
        ("404", "404"),
        ("error page", "corrupted"),
        ("truncated", "corrupted"),
    ],
)
def test_bad_mirror(behaviour, reason, mirror, tmp_path, monkeypatch, capsys):
    mirror.behaviour = behaviour
    set_timeout = socket.setdefaulttimeout
    shorter = {3: 0.6, 77: 77}  # seconds
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda t: set_timeout(shorter[t]))
    assert load_mnist(tmp_path)[2] == DRAWN
    monkeypatch.setattr(socket, "setdefaulttimeout", set_timeout)
    assert contents(tmp_path / "MNIST" / "raw") == {}
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert reason in stderr.splitlines()[-1]


def test_download_without_stderr(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert load_mnist(tmp_path)[2] == "MNIST"


# Whatever the disk does, no broken file stays.


DISK_FAULTS = [(MNIST, "download", name) for name in "EACCES EDQUOT EFBIG EIO".split()]
DISK_FAULTS += [(MNIST, "download", "ENOSPC"), (MNIST, "download", "EROFS")]
DISK_FAULTS += [(Path, "replace", "ENOSPC")]


@pytest.mark.parametrize(("owner", "function", "name"), DISK_FAULTS)
def test_disk_full_or_read_only(owner, function, name, mirror, tmp_path, monkeypatch):
    code = getattr(errno, name)

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owner, function, fail)
    message = error_of_loading(tmp_path)
    assert str(tmp_path) in message
    assert os.strerror(code) in message
    assert contents(tmp_path / "MNIST" / "raw") == {}


def test_data_directory_is_a_file(mirror, tmp_path):
    write(tmp_path, {"data": b"mine"})
    assert f"directory {tmp_path / 'data'}: " in error_of_loading(tmp_path / "data")
    assert contents(tmp_path) == {"data": b"mine"}


def test_interrupted_download(mirror, tmp_path, monkeypatch):
    """A notebook's stop button is no failed download."""

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MNIST, "download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path)
    assert contents(tmp_path / "MNIST" / "raw") == {}


def test_two_runs_at_once(mirror, tmp_path, monkeypatch, capsys):
    def another_run_comes_first(self):
        monkeypatch.setattr(MNIST, "download", download)
        print("Downloading ...")  # as some releases of torchvision do
        assert load_mnist(tmp_path)[2] == "MNIST"
        download(self)

    download = MNIST.download
    monkeypatch.setattr(MNIST, "download", another_run_comes_first)
    assert load_mnist(tmp_path)[2] == "MNIST"
    assert contents(tmp_path / "MNIST" / "raw") == FILES
    assert capsys.readouterr().out == "", "stdout is for the log"


# The drawn digits, and the transform.


def test_drawn_digits_are_whole_and_varied():
    x, y = numpy_collate(draw_digits(500, seed=0))
    assert (x.shape, x.dtype, y.dtype) == ((500, 784), np.float32, np.int32)
    assert (x.min(), x.max(), set(y)) == (0, 1, set(range(10)))
    assert len(np.unique(x, axis=0)) == 500
    ink = x.reshape(-1, 28, 28) > 0.5
    assert ink[:, 1:-1, 1:-1].sum() > 0.999 * ink.sum(), "some are cut off"
    leans = [np.corrcoef(*one.nonzero())[0, 1] for one in ink[y == 1]]
    assert min(leans) < -0.2 and max(leans) > 0.2, "all are upright"
    rows_of_ones = ink[y == 1].any(axis=2)
    assert rows_of_ones.argmax(axis=1).std() > 1, "all have the same position"
    assert rows_of_ones.sum(axis=1).std() > 1, "all have the same size"

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
