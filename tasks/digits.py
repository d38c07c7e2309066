"""Load a data set of 28×28 images: MNIST or one of its relatives, or built-in synthetic digits."""

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
from tasks.downloads import Sources, has_files
from tasks.folds import Folds


class ImageSet(NamedTuple):
    """Labelled grayscale images."""

    images: Tensor  # uint8 (examples, 1, 28, 28)
    labels: Tensor  # int64 (examples,), 0 to 9

    def subset(self, rows: slice | list[int], device: torch.device | None = None) -> "ImageSet":
        return ImageSet(self.images[rows].to(device), self.labels[rows].to(device))


class Digits(NamedTuple):
    """A data set of digit images, held in memory."""

    name: str  # "mnist", "fashion_mnist", "kmnist" or "synthetic"
    train: ImageSet
    test: ImageSet
    class_names: list[str]
    files: list[Path]  # what was read, or the code that draws the synthetic digits
    valid: ImageSet | None = None  # by `split_digits`


NO_FOLDS = Folds()
DIGIT_NAMES = [str(digit) for digit in range(10)]
MNIST_SHA256 = {  # of the published files, uncompressed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TORCHVISION_CLASS = {  # also the name of the folder
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
}


def load_digits(name: str, data_dir: str) -> Digits:
    """Load "mnist", "fashion_mnist" or "kmnist" from `data_dir`, or draw "synthetic" digits.

    Missing files are downloaded to `data_dir`. "auto" means MNIST or, with a loud warning,
    "synthetic". Raises `UserError` if files are missing or damaged.
    """
    if name != "synthetic":
        optional = name == "auto"
        name = "mnist" if optional else name
        directory = Path(data_dir) / TORCHVISION_CLASS[name] / "raw"
        files = [directory / file for file in MNIST_SHA256]
        if has_files(name, files, data_dir, lambda: _sources(name, directory), optional):
            return _read_digits(name, files)
    return synthetic_digits()


def split_digits(
    digits: Digits,
    valid_size: int,
    every: int,
    device: torch.device | None = None,
    folds: Folds = NO_FOLDS,
) -> Digits:
    """Hold out the last `valid_size` training images, then keep every `every`-th of each part.

    With `folds`, one of them is held out instead. The images kept are moved to `device`.
    """
    if folds.folds:
        if valid_size != 5000:  # the default
            raise UserError("--valid_size and --folds exclude each other: drop one of them")
        train_rows, valid_rows = folds.split(digits.train.labels.tolist())
    else:
        total = len(digits.train.labels)
        kept = total - valid_size
        if kept < 1:
            raise UserError(f"--valid_size {valid_size} leaves no training image of {total}")
        train_rows = slice(kept)
        valid_rows = slice(kept, None)
    thinned = slice(None, None, every)
    return digits._replace(
        train=digits.train.subset(train_rows).subset(thinned, device),
        valid=digits.train.subset(valid_rows).subset(thinned, device),
        test=digits.test.subset(thinned, device),
    )


def _torchvision_class(name: str) -> Any:
    import torchvision  # takes a second

    return getattr(torchvision.datasets, TORCHVISION_CLASS[name])


def _sources(name: str, directory: Path) -> Sources:
    """Path, URL and MD5 checksum of each file; they are published compressed."""
    published = _torchvision_class(name)
    return [
        (directory / file.removesuffix(".gz"), published.mirrors[0] + file, md5)
        for file, md5 in published.resources
    ]


def _read_digits(name: str, files: list[Path]) -> Digits:
    train_images, train_labels, test_images, test_labels = files
    train = _read_part(name, train_images, train_labels)
    test = _read_part(name, test_images, test_labels)
    class_names = DIGIT_NAMES if name == "mnist" else _torchvision_class(name).classes
    return Digits(name, train, test, class_names, files)


def _read_part(name: str, image_file: Path, label_file: Path) -> ImageSet:
    images = read_idx(image_file, (28, 28), 255, name)[:, None]
    labels = read_idx(label_file, (), 9, name).long()
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} contains {len(images):,} images, but {label_file} {len(labels):,} labels"
        )
    return ImageSet(images, labels)


def read_idx(
    file: Path,
    shape: tuple[int, ...],
    largest: int,
    name: str | None = None,
) -> Tensor:
    """uint8 (n, *shape), 0 to `largest`, from an IDX file: a magic number, the sizes, the data.

    `name` is that of a published data set. Raises `UserError` if the file is damaged.
    """
    header = np.fromfile(file, ">i4", 2 + len(shape)).tolist()
    data = np.fromfile(file, np.uint8, offset=4 * len(header))
    count, rest = divmod(len(data), math.prod(shape))
    magic_number = 0x801 + len(shape)  # 0x800 for uint8, plus the number of dimensions
    intact = header == [magic_number, count, *shape] and rest == 0 and count > 0
    if intact and name == "mnist" and count in (60_000, 10_000):  # as published
        intact = hashlib.sha256(file.read_bytes()).hexdigest() == MNIST_SHA256[file.name]
    if not intact or data.max() > largest:
        problem = "it is not an IDX file of 28×28 images or of labels from 0 to 9"
        if name:
            problem += (
                ", or differs from the published file (SHA-256); delete it to download it again"
            )
        raise UserError(f"{file} is damaged: {problem}")
    return torch.from_numpy(data.reshape(count, *shape))


def synthetic_digits(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Digits:
    """Digits in Pillow's built-in font, randomly deformed, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (train + test,), generator=generator)
    glyphs = _draw_glyphs()
    images = [_deformed(glyphs[chunk], generator) for chunk in labels.split(2_000)]
    digits = ImageSet(torch.cat(images), labels)
    return Digits(
        "synthetic",
        digits.subset(slice(train)),
        digits.subset(slice(train, None)),
        DIGIT_NAMES,
        [Path(__file__)],
    )


def _draw_glyphs() -> Tensor:
    """The digits upright and centered: float32 (10, 1, 56, 56) in 0..1.

    The side is twice that of the final images, so that thin strokes survive resampling.
    """
    font = ImageFont.load_default(size=44)
    glyphs = []
    for name in DIGIT_NAMES:
        canvas = Image.new("L", (56, 56))
        draw = ImageDraw.Draw(canvas)
        draw.text(
            (28, 28),
            name,
            fill=255,
            font=font,
            anchor="mm",
            stroke_width=1,
        )
        glyphs.append(np.array(canvas))
    return torch.from_numpy(np.stack(glyphs))[:, None] / 255


def _deformed(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (n, 1, 28, 28): each glyph rotated, sheared, scaled, moved and warped at random."""
    n = len(glyphs)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        fraction = torch.rand(n, *shape, generator=generator)
        return low + (high - low) * fraction

    affine = torch.eye(2, 3) + uniform(-0.3, 0.3, 2, 3)  # from image to glyph coordinates
    grid = F.affine_grid(affine, [n, 1, 28, 28], align_corners=False)
    warp = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=28, mode="bicubic")
    grid += warp.permute(0, 2, 3, 1)
    ink = F.grid_sample(glyphs, grid, align_corners=False)
    noise = 0.1 * torch.randn(ink.shape, generator=generator)
    brightness = uniform(0.6, 1.0, 1, 1, 1)
    pixels = (ink * brightness + noise).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8)
