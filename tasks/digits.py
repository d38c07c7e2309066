"""Data sets of 28×28 images: MNIST and its relatives from disk or downloaded, or built-in synthetic digits."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from harness.errors import UserError
from tasks.downloads import has_files


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
        parts = (
            ImageSet(*(tensor.to(device) for tensor in part))
            for part in (self.train, self.valid, self.test)
        )
        return Digits(self.name, *parts, self.class_names, self.files)


GLYPH_SIDE = 56  # twice the final size, so that thin strokes survive resampling
NO_IMAGES = ImageSet(
    torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
)
DIGIT_NAMES = [str(digit) for digit in range(10)]
MNIST_SHA256 = {  # of the published files, uncompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TORCHVISION_CLASS = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
}  # also the folder name


def load_digits(name: str, data_dir: str) -> Digits:
    """Load "mnist", "fashion_mnist" or "kmnist" from `data_dir`, downloading it there if needed, or "synthetic".

    "auto" is MNIST or, with a loud warning, "synthetic". Raises `UserError` if files are missing or damaged.
    """
    if name != "synthetic":
        kind = "mnist" if name == "auto" else name
        raw = Path(data_dir) / TORCHVISION_CLASS[kind] / "raw"
        files = [raw / file for file in MNIST_SHA256]
        if has_files(kind, files, data_dir, lambda: _sources(kind, raw), optional=name == "auto"):
            return _read_digits(kind, files)
    return synthetic_digits()


def split_digits(digits: Digits, valid_size: int, every: int) -> Digits:
    """Hold out the last `valid_size` training images as `valid`, then keep every `every`-th image of each part."""
    images, labels = digits.train
    kept = len(images) - valid_size
    if kept < 1:
        raise UserError(f"--valid_size {valid_size} leaves no training image of {len(images)}")
    parts = (
        ImageSet(images[:kept], labels[:kept]),
        ImageSet(images[kept:], labels[kept:]),
        digits.test,
    )
    thinned = (ImageSet(images[::every], labels[::every]) for images, labels in parts)
    return Digits(digits.name, *thinned, digits.class_names, digits.files)


def _torchvision_class(name: str) -> Any:
    import torchvision  # takes a second

    return getattr(torchvision.datasets, TORCHVISION_CLASS[name])


def _sources(name: str, directory: Path) -> dict[Path, tuple[str, str]]:
    """Where each file is published, compressed, and the MD5 checksum of that."""
    kind = _torchvision_class(name)
    return {
        directory / file.removesuffix(".gz"): (kind.mirrors[0] + file, md5)
        for file, md5 in kind.resources
    }


def _read_digits(name: str, files: list[Path]) -> Digits:
    parts = []
    for image_file, label_file in (files[:2], files[2:]):
        images, labels = (
            _read_idx(image_file, name, (28, 28))[:, None],
            _read_idx(label_file, name, ()).long(),
        )
        if len(images) != len(labels):
            raise UserError(
                f"{image_file} contains {len(images):,} images, but {label_file} {len(labels):,} labels"
            )
        if labels.max() > 9:
            raise UserError(f"{label_file} contains the label {labels.max()}, above 9")
        parts.append(ImageSet(images, labels))
    class_names = DIGIT_NAMES if name == "mnist" else _torchvision_class(name).classes
    return Digits(name, parts[0], NO_IMAGES, parts[1], class_names, files)


def _read_idx(file: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """uint8 (n, *shape) from an IDX file: 0x801 and the number of dimensions after the first, sizes, data."""
    header = np.fromfile(file, ">i4", 2 + len(shape)).tolist()
    count, rest = divmod(file.stat().st_size - 4 * len(header), math.prod(shape))
    problem = f"its size or its header is not that of an IDX file of {'28×28 images' if shape else 'labels'}"
    if count > 0 and rest == 0 and header == [0x801 + len(shape), count, *shape]:
        content = np.fromfile(file, np.uint8)
        published = name == "mnist" and count in (60_000, 10_000)
        if not published or hashlib.sha256(content).hexdigest() == MNIST_SHA256[file.name]:
            return torch.from_numpy(content[4 * len(header) :].reshape(count, *shape))
        problem = "it differs from the published file (SHA-256)"
    raise UserError(f"{file} is damaged: {problem}; delete it to download it again")


def synthetic_digits(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Digits:
    """Digits in Pillow's built-in font, randomly deformed; the same arguments give the same images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (train + test,), generator=generator)
    font = ImageFont.load_default(size=44)
    glyphs = torch.zeros(
        3, 10, GLYPH_SIDE, GLYPH_SIDE
    )  # each digit upright and centered, in three stroke widths
    for stroke_width in range(3):
        for digit in range(10):
            canvas = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
            style = {"fill": 255, "font": font, "anchor": "mm", "stroke_width": stroke_width}
            ImageDraw.Draw(canvas).text((GLYPH_SIDE / 2, GLYPH_SIDE / 2), str(digit), **style)
            glyphs[stroke_width, digit] = torch.from_numpy(np.array(canvas)) / 255
    images = torch.cat([_deformed(glyphs, chunk, generator) for chunk in labels.split(2_000)])
    parts = ImageSet(images[:train], labels[:train]), ImageSet(images[train:], labels[train:])
    return Digits("synthetic", parts[0], NO_IMAGES, parts[1], DIGIT_NAMES, [Path(__file__)])


def _deformed(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (n, 1, 28, 28): the glyph of each label, of one stroke width and deformed at random."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, shear, shrink_x, shrink_y = (
        uniform(-0.35, 0.35),
        uniform(-0.25, 0.25),
        uniform(0.8, 1.3),
        uniform(0.8, 1.2),
    )
    affine = torch.zeros(n, 2, 3)  # from image to glyph coordinates
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * shrink_x, (shear - angle.sin()) * shrink_x
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * shrink_y, angle.cos() * shrink_y
    affine[:, :, 2] = uniform(-0.15, 0.15, 2)
    warp = F.interpolate(
        uniform(-0.12, 0.12, 2, 4, 4), size=28, mode="bicubic", align_corners=False
    )
    stroke_width = torch.randint(len(glyphs), (n,), generator=generator)
    grid = F.affine_grid(affine, [n, 1, 28, 28], align_corners=False) + warp.permute(0, 2, 3, 1)
    ink = F.grid_sample(glyphs[stroke_width, labels][:, None], grid, align_corners=False)
    noise = 0.1 * torch.randn(ink.shape, generator=generator)
    return (ink * uniform(0.6, 1.0, 1, 1, 1) + noise).clamp(0, 1).mul(255).round().to(torch.uint8)
