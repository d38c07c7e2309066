"""Data sets of 28×28 images: MNIST and its relatives from disk or downloaded, or built-in synthetic digits."""

import hashlib
import math
import os
import socket
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from harness.errors import UserError, warn_loudly
from tasks.downloads import DOWNLOAD_ERRORS, reason, why_unreachable


class ImageSet(NamedTuple):
    """Labelled grayscale images."""

    images: Tensor  # uint8 (examples, 1, 28, 28)
    labels: Tensor  # int64 (examples,), 0 to 9


class Digits(NamedTuple):
    """A data set of digit images, held in memory."""

    name: str  # "mnist", "fashion_mnist", "kmnist" or "synthetic"
    train: ImageSet
    valid: ImageSet  # empty until `split_digits`
    test: ImageSet
    class_names: list[str]
    files: list[Path]  # what was read, or the code that draws the synthetic digits

    def to(self, device: torch.device | str) -> "Digits":
        """The same data set with all tensors on `device`."""
        train, valid, test = (
            ImageSet(part.images.to(device), part.labels.to(device)) for part in (self.train, self.valid, self.test)
        )
        return self._replace(train=train, valid=valid, test=test)


# SHA-256 of the published files, uncompressed.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # also the folder name


def load_digits(name: str, data_dir: str) -> Digits:
    """Load "mnist", "fashion_mnist" or "kmnist" from `data_dir`, downloading it there if needed.

    "synthetic" gives the built-in digits. "auto" gives MNIST, or the built-in digits with a loud warning if MNIST
    is not available. `valid` is empty. Raises `UserError` if a named data set is not available or a file is damaged.
    """
    if name == "synthetic":
        return synthetic_digits()
    if Path(data_dir).is_file():
        raise UserError(f"--data_dir {data_dir} is a file: pass a directory")
    dataset = "mnist" if name == "auto" else name
    missing = [file.name for file in _idx_files(dataset, data_dir) if not file.is_file()]
    problem = _download_digits(dataset, data_dir) if missing else None
    if problem is None:
        return _read_digits(dataset, data_dir)
    problem = f"{', '.join(missing)} missing, and can't be downloaded: {problem}"
    if name == "auto":
        warn_loudly(
            f"MNIST is not in {data_dir}: {problem}.",
            "This run uses the BUILT-IN synthetic digits instead: its metrics are not comparable to MNIST's.",
            "To use MNIST, pass the directory that contains it: --data_dir DIR (DIR/MNIST/raw/...-ubyte).",
        )
        return synthetic_digits()
    raise UserError(
        f"{name} is not in {data_dir}: {problem}. Put the uncompressed files into "
        f"{_idx_files(name, data_dir)[0].parent}, pass another --data_dir, or use --dataset synthetic"
    )


def split_digits(digits: Digits, valid_size: int, every: int) -> Digits:
    """Hold out the last `valid_size` training images as `valid`, then keep every `every`-th image of each part.

    Raises `UserError` if no training image is left.
    """
    images, labels = digits.train
    kept = len(images) - valid_size
    if kept < 1:
        raise UserError(f"--valid_size {valid_size} leaves no training image of {len(images)}")
    train, valid, test = (
        ImageSet(part.images[::every], part.labels[::every])
        for part in (ImageSet(images[:kept], labels[:kept]), ImageSet(images[kept:], labels[kept:]), digits.test)
    )
    return digits._replace(train=train, valid=valid, test=test)


def _idx_files(name: str, data_dir: str) -> list[Path]:
    """The four files in torchvision's layout: training images and labels, then test images and labels."""
    return [Path(data_dir) / TORCHVISION_CLASS[name] / "raw" / file for file in MNIST_SHA256]


def _download_digits(name: str, data_dir: str) -> str | None:
    """Download all four files into `data_dir`, or none. Returns what went wrong, or None on success."""
    import torchvision

    dataset = getattr(torchvision.datasets, TORCHVISION_CLASS[name])
    problem = why_unreachable(dataset.mirrors[0] + dataset.resources[0][0])
    if problem:
        return problem
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets no timeout: a stalled connection would hang forever
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            dataset(scratch, download=True)
            for source, target in zip(_idx_files(name, scratch), _idx_files(name, data_dir)):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
    except (*DOWNLOAD_ERRORS, RuntimeError) as error:
        return reason(error)
    finally:
        socket.setdefaulttimeout(default_timeout)
    return None


def _read_digits(name: str, data_dir: str) -> Digits:
    files = _idx_files(name, data_dir)
    train, test = (_read_image_set(*pair, published=name == "mnist") for pair in (files[:2], files[2:]))
    class_names = [str(digit) for digit in range(10)]
    if name != "mnist":
        import torchvision  # takes a second

        class_names = getattr(torchvision.datasets, TORCHVISION_CLASS[name]).classes
    return _unsplit(name, train, test, class_names, files)


def _unsplit(name: str, train: ImageSet, test: ImageSet, class_names: list[str], files: list[Path]) -> Digits:
    return Digits(name, train, ImageSet(train.images[:0], train.labels[:0]), test, class_names, files)


def _read_image_set(image_file: Path, label_file: Path, published: bool) -> ImageSet:
    images, labels = _read_idx(image_file, (1, 28, 28), published), _read_idx(label_file, (), published)
    if len(images) != len(labels):
        raise UserError(f"{image_file} contains {len(images):,} images, but {label_file} {len(labels):,} labels")
    return ImageSet(images, labels.long())


def _read_idx(file: Path, shape: tuple[int, ...], published: bool) -> Tensor:
    """uint8 (n, *shape) from an IDX file; raises `UserError` if it is unreadable, damaged or not the `published` one.

    The format: big-endian 32-bit magic number (0x803 for images, 0x801 for labels), sizes, data.
    """
    magic, size = (0x803, (28, 28)) if shape else (0x801, ())
    header = 4 * (2 + len(size))
    try:
        start, bytes_found = np.fromfile(file, np.uint8, header).tobytes(), file.stat().st_size
        found_magic, count, *found_size = struct.unpack(f">{header // 4}i", start.ljust(header, b"\0"))
        expected_bytes = header + count * math.prod(size)
        content = np.fromfile(file, np.uint8, expected_bytes if bytes_found == expected_bytes else 0)
    except OSError as error:
        raise UserError(f"can't read {file}: {error.strerror}") from None
    if found_magic != magic or tuple(found_size) != size or count < 1:
        problem = f"does not have the header of an IDX file of {'28×28 images' if shape else 'labels'}"
    elif len(content) != expected_bytes:
        problem = f"has {bytes_found:,} bytes instead of {expected_bytes:,}"
    elif not shape and content[header:].max() > 9:
        problem = f"contains the label {content[header:].max()}, above 9"
    elif published and count in (60_000, 10_000) and hashlib.sha256(content).hexdigest() != MNIST_SHA256[file.name]:
        problem = "differs from the published file (SHA-256)"
    else:
        return torch.from_numpy(content[header:].reshape(count, *shape))
    raise UserError(f"{file} is damaged: it {problem}; delete it to download it again")


def synthetic_digits(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Digits:
    """Digits in Pillow's built-in font with random stroke width, rotation, shear, scale, warp, shift and noise.

    `valid` is empty. The same arguments give the same images. The default sizes take about a second.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (train + test,), generator=generator)
    glyphs = _glyphs()
    images = torch.cat([_deformed(glyphs, chunk, generator) for chunk in labels.split(2_000)])
    class_names = [str(digit) for digit in range(10)]
    parts = ImageSet(images[:train], labels[:train]), ImageSet(images[train:], labels[train:])
    return _unsplit("synthetic", *parts, class_names, [Path(__file__)])


GLYPH_SIDE = 56  # twice the final size, so that thin strokes survive resampling


def _glyphs() -> Tensor:
    """float32 (stroke widths, 10, GLYPH_SIDE, GLYPH_SIDE) in 0..1: each digit upright and centered."""
    font = ImageFont.load_default(size=44)
    glyphs = torch.zeros(3, 10, GLYPH_SIDE, GLYPH_SIDE)
    for stroke_width in range(3):
        for digit in range(10):
            canvas = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
            center = (GLYPH_SIDE / 2, GLYPH_SIDE / 2)
            ImageDraw.Draw(canvas).text(center, str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke_width)
            glyphs[stroke_width, digit] = torch.from_numpy(np.array(canvas))
    return glyphs / 255


def _deformed(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (n, 1, 28, 28): the glyph of each label, individually deformed."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.25, 0.25)
    shrink_x, shrink_y = uniform(0.8, 1.3), uniform(0.8, 1.2)
    affine = torch.zeros(n, 2, 3)  # from image to glyph coordinates
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * shrink_x, (shear - angle.sin()) * shrink_x
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * shrink_y, angle.cos() * shrink_y
    affine[:, :, 2] = uniform(-0.15, 0.15, 2)
    grid = F.affine_grid(affine, [n, 1, 28, 28], align_corners=False)
    warp = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=28, mode="bicubic", align_corners=False)
    stroke_width = torch.randint(len(glyphs), (n,), generator=generator)
    grid = grid + warp.permute(0, 2, 3, 1)
    ink = F.grid_sample(glyphs[stroke_width, labels][:, None], grid, align_corners=False)
    noise = 0.1 * torch.randn(ink.shape, generator=generator)
    return (ink * uniform(0.6, 1.0, 1, 1, 1) + noise).clamp(0, 1).mul(255).round().to(torch.uint8)
