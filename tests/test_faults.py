"""Whatever the data, the network or the user does: one clear line, or it just works."""

import errno
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import torchvision
from helpers import ROOT, SCRIPTS, idx, load, write_mnist

import common
from common import NumpyLoader, UserError

TRAIN, TEST = common.draw_digits(200, seed=4), common.draw_digits(100, seed=5)
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
            if behaviour == "slow":
                time.sleep(0.3)
            if behaviour == "byte":
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    if stop.wait(0.05):
                        return None
            return self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # clients that hang up are expected
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    monkeypatch.setattr(common, "PATIENCE", 3)
    monkeypatch.setattr(urllib.request, "_opener", None)  # forgets an earlier proxy
    return lambda *urls: monkeypatch.setattr(
        torchvision.datasets.MNIST, "mirrors", list(urls)
    )


def raw_files(data_dir):
    return sorted(path.name for path in (data_dir / "MNIST" / "raw").iterdir())


def test_download_verify_read_train(archives, download_from, tmp_path, capsys):
    with mirror(archives) as (url, requested):
        download_from(url)
        train, test, name = common.load_mnist(tmp_path)
        assert (len(train), len(test), name) == (200, 100, "MNIST")
        assert np.array_equal(train.images, TRAIN.images)
        assert np.array_equal(test.labels, TEST.labels)
        assert raw_files(tmp_path) == sorted(common.MNIST_FILES)
        assert "warning" not in capsys.readouterr().err
        requested.clear()
        script = load("mlp_numpy_api")
        script.main(script.Config(data_dir=tmp_path, max_steps=2))
        assert "(MNIST)" in capsys.readouterr().out
        assert not requested, "the second run downloads nothing"


@pytest.mark.parametrize(
    "behaviour", ["silent", "byte", "missing", "page", "wrong", "truncated"]
)
def test_bad_mirror(behaviour, archives, download_from, tmp_path, capsys):
    with mirror(archives, behaviour) as (bad, _), mirror(archives) as (good, _):
        download_from(bad)
        start = time.monotonic()
        name = common.load_mnist(tmp_path)[2]
        assert name == "drawn digits, not MNIST"
        assert time.monotonic() - start < 30, "the mirror would hang for a minute"
        message = capsys.readouterr().err
        assert bad in message
        assert "drawn" in message
        assert raw_files(tmp_path) == []
        download_from(bad, good)  # the next mirror has it
        assert common.load_mnist(tmp_path)[2] == "MNIST"
        assert raw_files(tmp_path) == sorted(common.MNIST_FILES)


DOWNLOAD = """
import sys, torchvision, common
torchvision.datasets.MNIST.mirrors = [sys.argv[1]]
torchvision.datasets.MNIST.resources = [a.split("=") for a in sys.argv[3:]]
print(len(common.load_mnist(sys.argv[2])[0]))
"""


def start_download(url, data_dir):
    resources = [f"{name}={md5}" for name, md5 in torchvision.datasets.MNIST.resources]
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, url, data_dir, *resources],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_killed_while_downloading(archives, download_from, tmp_path):
    with mirror(archives, "byte") as (url, requested):
        download_from(url)
        process = start_download(url, tmp_path)
        while not requested:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.communicate()
    assert not set(raw_files(tmp_path)) & set(common.MNIST_FILES)
    with mirror(archives) as (url, _):
        download_from(url)
        assert common.load_mnist(tmp_path)[2] == "MNIST"
        assert raw_files(tmp_path) == sorted(common.MNIST_FILES)


def test_two_runs_at_once(archives, download_from, tmp_path):
    with mirror(archives, "slow") as (url, _):
        download_from(url)
        processes = [start_download(url, tmp_path) for _ in range(2)]
        outputs = [process.communicate()[0] for process in processes]
    # Older releases of torchvision print on stdout what they download.
    assert [output.splitlines()[-1:] for output in outputs] == [["200"]] * 2
    assert raw_files(tmp_path) == sorted(common.MNIST_FILES)


def test_missing_files_are_completed_or_named(archives, download_from, tmp_path):
    write_mnist(tmp_path, TRAIN, TEST)
    (tmp_path / "MNIST" / "raw" / LABELS).unlink()
    with mirror(archives, "missing") as (url, _):
        download_from(url)
        with pytest.raises(UserError, match=f"lacks {LABELS}, and the download failed"):
            common.load_mnist(tmp_path)
    with mirror(archives) as (url, requested):
        download_from(url)
        assert len(common.load_mnist(tmp_path)[0]) == 200
        assert set(requested) == {f"{LABELS}.gz"}


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (IMAGES, b"", "0 bytes"),
        (LABELS, b"", "0 bytes"),
        (IMAGES, idx(TRAIN.images)[:-1], "156815 bytes"),
        (LABELS, idx(TRAIN.labels)[:-1], "207 bytes"),
        (LABELS, idx(TRAIN.labels) + b"0", "209 bytes"),
        (IMAGES, b"\x00\x00\x08\x04" + idx(TRAIN.images)[4:], "2052"),
        (LABELS, idx(TRAIN.images), "2051"),
        (IMAGES, idx(TRAIN.images[:, :, 1:]), "28 x 27"),
        (IMAGES, idx(TRAIN.images[:0]), "no images"),
        (LABELS, idx(TRAIN.labels[:150]), "150 labels for the 200 images"),
        (LABELS, idx(np.where(np.arange(200) == 99, 10, TRAIN.labels)), "label 10"),
        ("t10k-images-idx3-ubyte", b"\x1f\x8b\x08\x00", "4 bytes"),
    ],
)
def test_damaged_file_is_named_and_never_replaced(name, content, fault, tmp_path):
    write_mnist(tmp_path, TRAIN, TEST)
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{fault}.*; delete it") as caught:
        common.load_mnist(tmp_path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def run_script(name, *options, monkeypatch):
    """Call a script's command line in this process; return its exit status."""
    script = load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        common.run(script.main, script.Config)
    return caught.value.code


def test_data_directory_is_a_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "data"
    file.write_text("not a directory")
    assert run_script("mlp_flax", "--data-dir", file, monkeypatch=monkeypatch) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith(
        f"mlp_flax.py: error: cannot use the data directory {file}"
    )
    assert stderr.count("\n") == 1
    assert file.read_text() == "not a directory"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize(
    "where",
    ["tempfile.mkdtemp", "torchvision.datasets.utils._urlretrieve", "os.replace"],
)
def test_disk_is_full_or_read_only(
    code, where, archives, download_from, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with mirror(archives) as (url, _):
        download_from(url)
        monkeypatch.setattr(where, fail)
        with pytest.raises(UserError, match=f"{tmp_path}: {os.strerror(code)}"):
            common.load_mnist(tmp_path)
    assert raw_files(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (["--epochs", "0"], "--epochs: must be a whole number from 1 "),
        (["--epochs", "2.5"], "--epochs: must be a whole number from 1 "),
        (["--batch-size", "0"], "--batch-size: must be a whole number from "),
        (["--batch-size", "641"], "--batch-size: must be at most 640"),
        (
            ["--batch-size", "9", "--train-examples", "8"],
            "--batch-size: must be at most 8",
        ),
        (
            ["--learning-rate", "-0.1"],
            "--learning-rate: must be a finite number above 0",
        ),
        (
            ["--learning-rate", "nan"],
            "--learning-rate: must be a finite number above 0",
        ),
        (
            ["--learning-rate", "inf"],
            "--learning-rate: must be a finite number above 0",
        ),
        (["--train-examples", "0"], "--train-examples: must be a whole number from 1 "),
        (["--train-examples", "641"], "--train-examples: must be at most 640"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 "),
        (["--eval-every", "0"], "--eval-every: must be a whole number from 1 "),
        (["--max-steps", "-1"], "--max-steps: must be a whole number from 0 "),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
    ],
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_option(name, options, allowed, small_mnist, monkeypatch, capsys):
    options = ["--data-dir", small_mnist, *options]
    assert run_script(name, *options, monkeypatch=monkeypatch) == 2
    usage, message = capsys.readouterr().err.rsplit("\n", 2)[:2]
    assert usage.startswith(f"usage: {name}.py")
    assert allowed in message


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("name", SCRIPTS)
def test_loss_that_is_not_finite(name, step, small_mnist, monkeypatch, capsys):
    options = ["--data-dir", small_mnist, "--learning-rate", "1e30"]
    options += ["--eval-every", str(step), "--batch-size", "32"]
    assert run_script(name, *options, monkeypatch=monkeypatch) == 1
    stdout, stderr = capsys.readouterr()
    assert "accuracy" not in stdout
    assert f"at step {step}; try a --learning-rate below 1e+30" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupt_says_how_far_it_got(name, small_mnist, monkeypatch, capsys):
    script, calls = load(name), []
    step = "sgd_update" if name == "mlp_numpy_api" else "train_step"
    real_step = getattr(script, step)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(script, step, interrupted)
    options = ["--data-dir", small_mnist, "--batch-size", "64", "--epochs", "2"]
    assert run_script(name, *options, monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err == f"{name}.py: interrupted after 7 of 20 updates\n"


def start_script(data_dir, *options):
    command = [sys.executable, ROOT / "mlp_flax.py", "--data-dir", data_dir, *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
def test_control_c(small_mnist):
    process = start_script(small_mnist, "--epochs", "100000")
    for line in process.stdout:
        if line.startswith("epoch 3"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.startswith("mlp_flax.py: interrupted after ")
    assert stderr.count("\n") == 1


def test_reader_of_a_pipe_that_leaves(small_mnist):
    process = start_script(small_mnist, "--epochs", "1000")
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait() == 0
    assert stderr == ""


class Squares:
    """A dataset that tells whether JAX computes in the process that reads it."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"square": np.float32(i * i), "jax": "jax" in sys.modules and backends()}


def backends():
    from jax._src import xla_bridge

    return len(xla_bridge._backends)


def test_workers_give_the_same_batches_without_a_fork(monkeypatch):
    jax.numpy.zeros(3).block_until_ready()  # JAX's threads run in this process
    assert backends() > 0
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork"))
    options = {"batch_size": 4, "shuffle": True}
    alone = NumpyLoader(Squares(), jax.random.key(0), **options)
    helped = NumpyLoader(Squares(), jax.random.key(0), num_workers=2, **options)
    for _ in range(2):  # epochs
        for expected, batch in zip(alone, helped, strict=True):
            assert np.array_equal(expected["square"], batch["square"])
            assert expected["jax"].all()
            assert not batch["jax"].any(), "JAX runs in a worker"


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([np.zeros(2), np.zeros(3)], r"sample: .*shapes, \[\(2,\), \(3,\)\]"),
        ([(1, np.zeros(2)), (1, np.zeros((2, 1)))], r"sample\[1\]: .*\(2,\), \(2, 1\)"),
        ([{"a": (0, None)}], r"sample\['a'\]\[1\]: NumPy cannot stack NoneType"),
        ([(1, 2), (1,)], r"sample: one batch has samples of \[1, 2\] fields"),
        ([{"a": 1}, {"b": 1}], "sample: .*different keys"),
    ],
)
def test_samples_that_cannot_be_stacked(samples, message):
    with pytest.raises(ValueError, match=message):
        list(NumpyLoader(samples, batch_size=2))
