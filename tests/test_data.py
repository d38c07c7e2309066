"""tasks/digits.py: complete, damaged, missing and downloaded files, and the synthetic digits."""

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

from harness.errors import UserError
from tasks.digits import MNIST_SHA256, load_digits, split_digits, synthetic_digits
from tasks.downloads import why_unreachable

SIZES = {"train": 30, "t10k": 20}
pytestmark = pytest.mark.quick


def write_mnist(root: Path, folder: str = "MNIST") -> Path:
    """Write a small random data set in MNIST's format; returns the directory of its files."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in SIZES.items():
        images, labels = random.integers(0, 256, (n, 28, 28)), random.integers(0, 10, n)
        header = struct.pack(">4i", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.astype(np.uint8).tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, n) + labels.astype(np.uint8).tobytes()
        )
    return raw


@pytest.mark.parametrize(
    "name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_reads_what_torchvision_reads(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    digits = load_digits(name, str(tmp_path))
    expected = getattr(torchvision.datasets, folder)(tmp_path, train=False)
    assert (digits.name, digits.train.images.shape) == (name, (30, 1, 28, 28))
    assert digits.valid is None
    assert digits.test.images.dtype == torch.uint8 and torch.equal(
        digits.test.images[:, 0], expected.data
    )
    assert torch.equal(digits.test.labels, expected.targets)
    assert len(digits.class_names) == 10 and len(digits.files) == 4


def test_auto_prefers_real_data(tmp_path):
    write_mnist(tmp_path)
    assert load_digits("auto", str(tmp_path)).name == "mnist"


DAMAGE = {
    "truncated": ("train-images-idx3-ubyte", lambda content: content[:-100]),
    "empty": ("t10k-images-idx3-ubyte", lambda content: b""),
    "with trailing bytes": ("t10k-labels-idx1-ubyte", lambda content: content + b"\0"),
    "with a wrong magic number": (
        "train-labels-idx1-ubyte",
        lambda content: b"\x1f\x8b" + content[2:],
    ),
    "with a wrong image size": (
        "train-images-idx3-ubyte",
        lambda content: content[:12] + struct.pack(">i", 27) + content[16:],
    ),
    "with a label 77": ("train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x4d"),
    "with a wrong count": (
        "t10k-labels-idx1-ubyte",
        lambda content: struct.pack(">2i", 0x801, 19) + content[9:],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_error_names_the_damaged_file(tmp_path, kind):
    raw = write_mnist(tmp_path)
    name, damage = DAMAGE[kind]
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    for dataset in ("mnist", "auto"):
        with pytest.raises(UserError) as error:
            load_digits(dataset, str(tmp_path))
        assert name in str(error.value) and error.value.status == 2


def test_wrong_content_of_the_right_size_is_detected(tmp_path):
    raw = write_mnist(tmp_path)
    content = struct.pack(">2i", 0x801, 10_000) + bytes(10_000)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(content)
    (raw / "t10k-images-idx3-ubyte").write_bytes(
        struct.pack(">4i", 0x803, 10_000, 28, 28) + bytes(7_840_000)
    )
    with pytest.raises(
        UserError, match=r"t10k-images-idx3-ubyte is damaged: .* or differs from the published"
    ):
        load_digits("mnist", str(tmp_path))


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[Path]:
    """The directory served by a loopback server from which torchvision downloads a small MNIST."""
    served = tmp_path / "served"
    served.mkdir()
    resources = []
    for file in sorted(write_mnist(tmp_path / "source").iterdir()):
        compressed = served / f"{file.name}.gz"
        compressed.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((compressed.name, hashlib.md5(compressed.read_bytes()).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=served)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"]
    )
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    yield served
    server.shutdown()


def test_missing_files_are_downloaded(tmp_path, mirror):
    digits = load_digits("mnist", str(tmp_path / "new"))
    assert digits.train.images.shape == (30, 1, 28, 28)
    left = sorted(path.name for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert left == sorted(MNIST_SHA256)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("kmnist", "KMNIST")])
def test_compressed_files_put_there_by_hand_are_unpacked(
    name, folder, tmp_path, mirror, monkeypatch
):
    """Without a network they had been missing. One file is there uncompressed, and stays as it is."""
    dataset = getattr(torchvision.datasets, folder)
    monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(dataset, "resources", torchvision.datasets.MNIST.resources)
    raw = tmp_path / folder / "raw"
    shutil.copytree(mirror, raw)
    first, last = (raw / f"{file}.gz" for file in (min(MNIST_SHA256), max(MNIST_SHA256)))
    first.with_suffix("").write_bytes(gzip.decompress(first.read_bytes()))
    first.unlink()
    published = last.read_bytes()
    last.write_bytes(gzip.compress(b"damaged"))
    before = sorted(raw.iterdir())
    problem = f"train-labels-idx1-ubyte, .* missing, .*{last.name} is not the published file"
    with pytest.raises(UserError, match=problem):
        load_digits(name, str(tmp_path))
    assert sorted(raw.iterdir()) == before
    last.write_bytes(published)
    assert load_digits(name, str(tmp_path)).train.images.shape == (30, 1, 28, 28)


def test_a_failed_download_leaves_no_files(tmp_path, mirror, capsys):
    compressed = mirror / "t10k-labels-idx1-ubyte.gz"
    compressed.write_bytes(compressed.read_bytes()[:10])
    with pytest.raises(UserError, match="can't be downloaded"):
        load_digits("mnist", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert load_digits("auto", str(tmp_path / "new")).name == "synthetic"
    assert "BUILT-IN" in capsys.readouterr().err


def test_an_unreachable_server_is_detected_quickly(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections but never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        started = time.perf_counter()
        problem = why_unreachable(url)
        assert 3 < time.perf_counter() - started < 60 and "127.0.0.1" in problem
    started = time.perf_counter()
    assert "refused" in why_unreachable(url)
    assert time.perf_counter() - started < 60


def test_validation_images_are_held_out_before_subsampling():
    digits = synthetic_digits(train=100, test=30)
    split = split_digits(digits, valid_size=40, every=7)
    assert torch.equal(split.train.images, digits.train.images[0:60:7])
    assert torch.equal(split.valid.labels, digits.train.labels[60:100:7])
    assert torch.equal(split.test.images, digits.test.images[0:30:7])


def test_splitting_moves_every_tensor():
    digits = split_digits(
        synthetic_digits(train=100, test=30), valid_size=40, every=1, device="meta"
    )
    assert {
        tensor.device.type for part in (digits.train, digits.valid, digits.test) for tensor in part
    } == {"meta"}


# --------------------------------------------------------------------------------------- synthetic digits


def test_synthetic_digits_are_reproducible():
    one = synthetic_digits()
    two, other = synthetic_digits(), synthetic_digits(train=50, test=10, seed=1)
    assert torch.equal(one.train.images, two.train.images) and torch.equal(
        one.test.labels, two.test.labels
    )
    assert [file.name for file in one.files] == ["digits.py"]
    assert not torch.equal(one.train.images[:50], other.train.images)
    assert one.train.images.shape == (20_000, 1, 28, 28) and one.test.images.dtype == torch.uint8
    assert torch.bincount(one.train.labels, minlength=10).min() > 1_800
    distinct = {hashlib.md5(image.numpy().tobytes()).digest() for image in one.train.images}
    assert not any(
        hashlib.md5(image.numpy().tobytes()).digest() in distinct for image in one.test.images
    )


def test_cli_reports_files_of_different_length(tmp_path):
    from conftest import call

    raw = write_mnist(tmp_path / "d")
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    done = call("train_mnist.py", "--data_dir", "d", "--output_dir", "out", cwd=tmp_path)
    (line,) = done.err.splitlines()
    assert done.status == 2 and "30 images" in line and "20 labels" in line
    assert not {"out", "runs", "wandb"} & {path.name for path in tmp_path.iterdir()}
