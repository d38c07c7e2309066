"""data.py: files that are whole, damaged, missing or downloaded, and the built-in digits."""

import gzip
import hashlib
import http.server
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import data
from options import UserError

SIZES = {"train": 30, "t10k": 20}


def write_mnist(root: Path, folder: str = "MNIST") -> Path:
    """A small data set in MNIST's format, random; the directory of its files."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in SIZES.items():
        images, labels = random.integers(0, 256, (n, 28, 28)), random.integers(0, 10, n)
        head = struct.pack(">4i", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.astype(np.uint8).tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, n) + labels.astype(np.uint8).tobytes()
        )
    return raw


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_reads_what_torchvision_reads(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    digits = data.load_digits(name, str(tmp_path))
    expected = getattr(torchvision.datasets, folder)(tmp_path, train=False)
    assert (digits.name, digits.train_images.shape) == (name, (30, 28, 28))
    assert digits.test_images.dtype == torch.uint8 and torch.equal(digits.test_images, expected.data)
    assert torch.equal(digits.test_labels, expected.targets)
    assert len(digits.class_names) == 10 and len(digits.files) == 4


def test_auto_takes_the_real_data_that_is_there(tmp_path):
    write_mnist(tmp_path)
    assert data.load_digits("auto", str(tmp_path)).name == "mnist"


DAMAGE = {
    "cut short": ("train-images-idx3-ubyte", lambda content: content[:-100]),
    "empty": ("t10k-images-idx3-ubyte", lambda content: b""),
    "with a tail": ("t10k-labels-idx1-ubyte", lambda content: content + b"\0"),
    "of another kind": ("train-labels-idx1-ubyte", lambda content: b"\x1f\x8b" + content[2:]),
    "of another size": ("train-images-idx3-ubyte", lambda content: content[:12] + struct.pack(">i", 27) + content[16:]),
    "with a label 77": ("train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x4d"),
    "of another count": ("t10k-labels-idx1-ubyte", lambda content: struct.pack(">2i", 0x801, 19) + content[9:]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, kind):
    raw = write_mnist(tmp_path)
    name, damage = DAMAGE[kind]
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    for dataset in ("mnist", "auto"):
        with pytest.raises(UserError) as error:
            data.load_digits(dataset, str(tmp_path))
        assert name in str(error.value) and error.value.status == 2


def test_garbled_contents_of_the_published_size_are_found(tmp_path):
    raw = write_mnist(tmp_path)
    content = struct.pack(">2i", 0x801, 10_000) + bytes(10_000)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 10_000, 28, 28) + bytes(7_840_000))
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte is damaged: it differs from the published"):
        data.load_digits("mnist", str(tmp_path))


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[Path]:
    """A loopback server that torchvision downloads a small MNIST from; the folder that it serves."""
    served = tmp_path / "served"
    served.mkdir()
    resources = []
    for file in sorted(write_mnist(tmp_path / "source").iterdir()):
        packed = served / f"{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    yield served
    server.shutdown()


def test_downloads_what_is_not_there(tmp_path, mirror):
    digits = data.load_digits("mnist", str(tmp_path / "new"))
    assert digits.train_images.shape == (30, 28, 28)
    left = sorted(path.name for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert left == sorted(data.MNIST_SHA256)


def test_a_download_that_fails_leaves_no_file(tmp_path, mirror, capsys):
    packed = mirror / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:10])
    with pytest.raises(UserError, match="can't be downloaded"):
        data.load_digits("mnist", str(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())
    assert data.load_digits("auto", str(tmp_path / "new")).name == "synthetic"
    assert "BUILT-IN" in capsys.readouterr().err


def test_no_network_is_found_out_in_time(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        started = time.perf_counter()
        problem = data.why_unreachable(url)
        assert 3 < time.perf_counter() - started < 5 and "127.0.0.1" in problem
    started = time.perf_counter()
    assert "refused" in data.why_unreachable(url)
    assert time.perf_counter() - started < 1


def test_parts_are_held_out_then_sliced():
    digits = data.synthetic_digits(train=100, test=30)
    train, valid, test = data.split_digits(digits, valid_size=40, every=7)
    assert torch.equal(train.images[:, 0], digits.train_images[0:60:7])
    assert torch.equal(valid.labels, digits.train_labels[60:100:7])
    assert torch.equal(test.images[:, 0], digits.test_images[0:30:7])


# --------------------------------------------------------------------------------------- the built-in digits


def test_synthetic_digits_are_the_same_every_time_and_made_quickly():
    started = time.perf_counter()
    one = data.synthetic_digits()
    assert time.perf_counter() - started < 3
    two, other = data.synthetic_digits(), data.synthetic_digits(train=50, test=10, seed=1)
    assert torch.equal(one.train_images, two.train_images) and torch.equal(one.test_labels, two.test_labels)
    assert not torch.equal(one.train_images[:50], other.train_images)
    assert one.train_images.shape == (20_000, 28, 28) and one.test_images.dtype == torch.uint8
    assert torch.bincount(one.train_labels, minlength=10).min() > 1_800
    distinct = {hashlib.md5(image.numpy().tobytes()).digest() for image in one.train_images}
    assert not any(hashlib.md5(image.numpy().tobytes()).digest() in distinct for image in one.test_images)


def accuracy(model: torch.nn.Module, digits: data.Digits, learning_rate: float) -> float:
    """Test accuracy after three epochs over the digits."""
    torch.manual_seed(0)
    images, optimizer = digits.train_images[:, None] / 255, torch.optim.Adam(model.parameters(), learning_rate)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(128):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        hits = model(digits.test_images[:, None] / 255).argmax(1) == digits.test_labels
    return float(hits.float().mean())


def test_synthetic_digits_need_more_than_a_linear_model():
    import train_mnist

    digits = data.synthetic_digits()
    linear = accuracy(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), digits, 0.002)
    convolutional = accuracy(train_mnist.ConvNet([16, 32]), digits, 0.002)
    assert convolutional > 0.95 and linear < 0.8


def test_cli_names_the_damaged_file(tmp_path):
    from conftest import call

    raw = write_mnist(tmp_path / "d")
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    done = call("train_mnist.py", "--data_dir", "d", "--output_dir", "out", cwd=tmp_path)
    (line,) = done.err.splitlines()
    assert done.status == 2 and "30 images" in line and "20 labels" in line
    assert not {"out", "runs", "wandb"} & {path.name for path in tmp_path.iterdir()}
