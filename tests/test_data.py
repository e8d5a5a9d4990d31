"""common.py, MNIST: whatever its files, the network or the disk do."""

import errno
import functools
import gzip
import hashlib
import os
import re
import socket
import tempfile
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers import idx, load, write_mnist

import common
from common import DataError

draw_digits = functools.cache(common.draw_digits)
TRAIN, TEST = draw_digits(200, seed=4), draw_digits(100, seed=5)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@contextmanager
def mirror(files, behaviour="good"):
    """A server on 127.0.0.1 that serves `files`, or misbehaves; yields URL and log."""
    requested, stop = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requested.append(self.path.strip("/"))
            body = files[requested[-1]]
            if behaviour == "silent":
                stop.wait(60)
            if behaviour == "missing":
                return self.send_error(404)
            if behaviour == "page":
                body = b"<html>Welcome to this hotel's network</html>"
            if behaviour == "wrong":
                body = gzip.compress(b"another file")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if behaviour == "truncated":
                body = body[: len(body) // 2]
            if behaviour == "stops" and self.command == "GET":
                self.wfile.write(body[: len(body) // 2])
                return stop.wait(60)
            return self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # clients that hang up are expected
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", requested
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """MNIST's four files, small, packed, and by name."""
    data_dir = tmp_path_factory.mktemp("archives")
    write_mnist(data_dir, TRAIN, TEST)
    raw = data_dir / "MNIST" / "raw"
    return {
        f"{n}.gz": gzip.compress((raw / n).read_bytes()) for n in common.MNIST_FILES
    }


@pytest.fixture
def download_from(archives, monkeypatch):
    """A function that makes torchvision download the small files from given URLs."""
    resources = [(n, hashlib.md5(data).hexdigest()) for n, data in archives.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(urllib.request, "_opener", None)  # forgets an earlier proxy
    return lambda *urls: monkeypatch.setattr(
        torchvision.datasets.MNIST, "mirrors", list(urls)
    )


@pytest.fixture(autouse=True)
def digits_drawn_once(monkeypatch):
    monkeypatch.setattr(common, "draw_digits", draw_digits)


@pytest.fixture
def timeouts(monkeypatch):
    """The socket timeouts that are set, and a fiftieth of each in force, to save time."""
    real, seen = socket.setdefaulttimeout, []

    def set_timeout(seconds):
        seen.append(seconds)
        real(seconds and seconds / 50)

    monkeypatch.setattr(socket, "setdefaulttimeout", set_timeout)
    return seen


def raw_files(data_dir):
    return sorted(path.name for path in (data_dir / "MNIST" / "raw").iterdir())


def test_download_verify_read_train(archives, download_from, tmp_path, capsys):
    with mirror(archives) as (url, requested):
        download_from(url)
        train, test, name = common.load_mnist(str(tmp_path))
        assert (len(train), len(test), name) == (200, 100, "MNIST")
        assert np.array_equal(train.images, TRAIN.images)
        assert np.array_equal(test.labels, TEST.labels)
        assert raw_files(tmp_path) == sorted(common.MNIST_FILES)
        stdout, stderr = capsys.readouterr()
        assert stdout == "", "stdout belongs to the log"
        assert "drawn" not in stderr
        requested.clear()
        load("mlp_numpy_api").main(["--data-dir", str(tmp_path), "--max-steps", "2"])
        assert "(MNIST)" in capsys.readouterr().out
        assert not requested, "the second run downloads nothing"


@pytest.mark.parametrize(
    "behaviour", ["silent", "stops", "missing", "page", "wrong", "truncated"]
)
def test_bad_mirror(behaviour, archives, download_from, timeouts, tmp_path, capsys):
    with mirror(archives, behaviour) as (bad, requested), mirror(archives) as (good, _):
        download_from(bad)
        train, test, name = common.load_mnist(tmp_path)
        assert requested
        assert (len(train), len(test)) == (10_000, 2_000)
        assert name == "drawn digits, not MNIST"
        assert not np.array_equal(train.images[:2000], test.images)
        # A dead mirror is given up soon, and other programs' sockets are left alone.
        assert 1 <= timeouts[0] <= 10
        assert timeouts[-1] is None
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        announcement = stderr.splitlines()[-1]
        assert "drawn digits" in announcement
        assert str(tmp_path) in announcement
        assert re.search(
            "(?i)time|404|corrupt|md5|got:|end|truncated|error", announcement
        )
        assert raw_files(tmp_path) == []
        download_from(good)
        assert common.load_mnist(tmp_path)[2] == "MNIST"
        assert raw_files(tmp_path) == sorted(common.MNIST_FILES)


def test_interrupted_while_downloading(archives, download_from, tmp_path, monkeypatch):
    """Whenever it is stopped, no file is there before all of them are."""
    seen = []
    unpack = torchvision.datasets.mnist.download_and_extract_archive

    def stop_at_the_last_file(*args, **kwargs):
        unpack(*args, **kwargs)
        seen.append(raw_files(tmp_path))
        if len(seen) == 4:
            raise KeyboardInterrupt

    with mirror(archives) as (url, _):
        download_from(url)
        with monkeypatch.context() as patch:
            patch.setattr(
                torchvision.datasets.mnist,
                "download_and_extract_archive",
                stop_at_the_last_file,
            )
            with pytest.raises(KeyboardInterrupt):
                common.load_mnist(tmp_path)
        for names in seen:
            (scratch,) = names  # on the disk on which the files shall be
            assert scratch not in common.MNIST_FILES
        # kill -9 would leave the scratch directory behind
        (tmp_path / "MNIST" / "raw" / scratch).mkdir(exist_ok=True)
        assert common.load_mnist(tmp_path)[2] == "MNIST"
    assert set(raw_files(tmp_path)) == {*common.MNIST_FILES, scratch}


@pytest.mark.parametrize("when", ["before", "after"])
def test_two_runs_at_once(when, archives, download_from, tmp_path, monkeypatch, capsys):
    """A second run downloads and reads the files while the first one does."""
    real, names = torchvision.datasets.MNIST, []

    class Slow(real):
        def __init__(self, *args, **kwargs):
            monkeypatch.setattr(torchvision.datasets, "MNIST", real)
            print("Downloading ...")  # as older releases do
            if when == "before":
                names.append(common.load_mnist(tmp_path)[2])
            super().__init__(*args, **kwargs)
            if when == "after":
                names.append(common.load_mnist(tmp_path)[2])

        raw_folder = property(lambda self: f"{self.root}/MNIST/raw")

    with mirror(archives) as (url, _):
        download_from(url)
        monkeypatch.setattr(torchvision.datasets, "MNIST", Slow)
        names.append(common.load_mnist(tmp_path)[2])
    assert names == ["MNIST"] * 2
    assert capsys.readouterr().out == "", "stdout belongs to the log"
    assert raw_files(tmp_path) == sorted(common.MNIST_FILES)


def test_missing_files_are_completed_or_named(archives, download_from, tmp_path):
    write_mnist(tmp_path, TRAIN, TEST)
    raw = tmp_path / "MNIST" / "raw"
    (raw / LABELS).unlink()
    mine = idx(TEST.labels[::-1])  # not what the mirror has: to be left alone
    (raw / "t10k-labels-idx1-ubyte").write_bytes(mine)
    with mirror(archives, "missing") as (url, _):
        download_from(url)
        with pytest.raises(DataError, match=f"{raw} lacks {LABELS}, and .*; add"):
            common.load_mnist(tmp_path)
    with mirror(archives) as (url, _):
        download_from(url)
        assert len(common.load_mnist(tmp_path)[0]) == 200
    assert raw_files(tmp_path) == sorted(common.MNIST_FILES)
    assert (raw / "t10k-labels-idx1-ubyte").read_bytes() == mine


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (IMAGES, b""),
        (LABELS, b""),
        (IMAGES, idx(TRAIN.images)[:-1]),
        (IMAGES, idx(TRAIN.images)[:-784]),
        (LABELS, idx(TRAIN.labels)[:-1]),
        (IMAGES, idx(TRAIN.images) + b"0"),
        (LABELS, idx(TRAIN.labels) + b"0"),
        (IMAGES, b"\x00\x00\x08\x04" + idx(TRAIN.images)[4:]),
        (LABELS, idx(TRAIN.labels[:200].reshape(200, 1))),
        (IMAGES, idx(TRAIN.images[:, :, 1:])),
        (IMAGES, idx(TRAIN.images.reshape(200, 14, 56))),
        (IMAGES, idx(TRAIN.images[:0])),
        (LABELS, idx(TRAIN.labels[:150])),
        (LABELS, idx(np.where(np.arange(200) == 99, 10, TRAIN.labels))),
        ("t10k-images-idx3-ubyte", b"\x1f\x8b\x08\x00"),
        ("t10k-labels-idx1-ubyte", idx(np.full(100, 255))),
    ],
)
def test_damaged_file_is_named_and_never_replaced(name, content, tmp_path):
    write_mnist(tmp_path, TRAIN, TEST)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path} is damaged; delete it") as caught:
        common.load_mnist(tmp_path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_both_files_of_a_split_are_empty(tmp_path):
    write_mnist(tmp_path, TRAIN, common.draw_digits(0, seed=0))
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is damaged"):
        common.load_mnist(tmp_path)


def test_data_directory_is_a_file(tmp_path):
    file = tmp_path / "data"
    file.write_text("not a directory")
    with pytest.raises(DataError, match=f"{file}: .*Not a directory|File exists"):
        common.load_mnist(file)
    assert file.read_text() == "not a directory"


@pytest.mark.parametrize(
    ("owner", "function", "code"),
    [
        (Path, "mkdir", errno.EACCES),
        (Path, "mkdir", errno.EROFS),
        (tempfile, "mkdtemp", errno.ENOSPC),
        (tempfile, "mkdtemp", errno.EACCES),
        (torchvision.datasets.utils, "_urlretrieve", errno.ENOSPC),
        (Path, "replace", errno.ENOSPC),
        (Path, "replace", errno.EACCES),
    ],
)
def test_disk_is_full_or_read_only(
    owner, function, code, archives, download_from, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with mirror(archives) as (url, _):
        download_from(url)
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, fail)
            with pytest.raises(DataError, match=f"{tmp_path}: .*{os.strerror(code)}"):
                common.load_mnist(tmp_path)
    if function != "mkdir":
        assert raw_files(tmp_path) == []


def test_file_that_cannot_be_read(tmp_path):
    write_mnist(tmp_path, TRAIN, TEST)
    path = tmp_path / "MNIST" / "raw" / LABELS
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=f"{tmp_path}: .*directory"):
        common.load_mnist(tmp_path)


def test_drawn_digits_follow_from_their_seed():
    draw = draw_digits.__wrapped__
    a, b, c = (draw(200, seed) for seed in (0, 0, 1))
    assert np.array_equal(a.images, b.images)
    assert np.array_equal(a.labels, b.labels)
    assert not np.array_equal(a.images, c.images)
    assert (a.images.shape, a.images.dtype) == ((200, 28, 28), np.uint8)
    assert a.labels.dtype == np.int32
    assert set(a.labels) == set(range(10))
    assert (a.images.max(axis=(1, 2)) > 128).all(), "no image is blank"


def test_drawn_digits_are_whole_and_varied():
    digits = common.draw_digits(2000, seed=0)
    edge = np.ones((28, 28), bool)
    edge[1:-1, 1:-1] = False
    cut_off = (digits.images[:, edge] > 128).any(axis=1)
    assert cut_off.mean() < 0.02
    ones = digits.images[digits.labels == 1].astype(float)
    assert len(np.unique(ones, axis=0)) > 0.99 * len(ones)
    rows, columns = np.mgrid[:28, :28]
    mass = ones.sum(axis=(1, 2))
    for centre in (
        (ones * rows).sum((1, 2)) / mass,
        (ones * columns).sum((1, 2)) / mass,
    ):
        assert 1 < centre.std() < 3
    tall = (ones.max(axis=2) > 128).sum(axis=1)
    assert tall.std() > 1
