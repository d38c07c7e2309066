"""What comes in: real data, found or downloaded and verified, and the built-in stand-ins."""

import csv
import hashlib
import io
import os
import socket
import struct
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from grammar import minimal_pairs
from options import UserError, warn_loudly
from runtime import replacing


class Digits(NamedTuple):
    """A data set of 28×28 grey images, whole and in memory."""

    name: str  # "mnist", "fashion_mnist", "kmnist" or "synthetic"
    train_images: Tensor  # uint8 (examples, 28, 28)
    train_labels: Tensor  # int64 (examples,), 0 .. 9
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]
    files: list[Path]  # what was read; none for the built-in digits


class Part(NamedTuple):
    """Training, validation or test part of a data set of digits."""

    images: Tensor  # uint8 (examples, 1, 28, 28)
    labels: Tensor  # int64 (examples,)


# sha256 of the published files, unpacked. The class names are torchvision's, whose folder bears them.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def load_digits(name: str, data_dir: str) -> Digits:
    """The data set "mnist", "fashion_mnist" or "kmnist", from `data_dir` or else downloaded into it.

    "synthetic" is the built-in digits. "auto" is MNIST, and the built-in digits, with a loud warning, where
    MNIST can't be had. Raises `UserError` where a named data set can't be had, and where a file is damaged.
    """
    if name == "synthetic":
        return synthetic_digits()
    dataset = "mnist" if name == "auto" else name
    missing = [file.name for file in _idx_files(dataset, data_dir) if not file.is_file()]
    problem = _download_digits(dataset, data_dir) if missing else None
    if problem is None:
        return _read_digits(dataset, data_dir)
    problem = f"{', '.join(missing)} missing, and can't be downloaded: {problem}"
    if name == "auto":
        warn_loudly(
            f"MNIST is not in {data_dir}: {problem}.",
            "This run uses the BUILT-IN synthetic digits instead: its figures are not MNIST's.",
            "To use MNIST, name the directory that holds it: --data_dir DIR (DIR/MNIST/raw/...-ubyte).",
        )
        return synthetic_digits()
    raise UserError(
        f"{name} is not in {data_dir}: {problem}. Put the unpacked files into "
        f"{_idx_files(name, data_dir)[0].parent}, name another --data_dir, or use --dataset synthetic"
    )


def split_digits(digits: Digits, valid_size: int, every: int) -> list[Part]:
    """Training, validation and test part: the last `valid_size` training images are held out for validation.

    Then every `every`-th image of each part is kept. Raises `UserError` where none is left to train on.
    """
    kept = len(digits.train_images) - valid_size
    if kept < 1:
        raise UserError(f"--valid_size {valid_size} leaves no training image of {len(digits.train_images)}")
    whole = (
        (digits.train_images[:kept], digits.train_labels[:kept]),
        (digits.train_images[kept:], digits.train_labels[kept:]),
        (digits.test_images, digits.test_labels),
    )
    return [Part(images[::every, None], labels[::every]) for images, labels in whole]


def _idx_files(name: str, data_dir: str) -> list[Path]:
    """Where torchvision keeps a data set's four files: images and labels for training, then for testing."""
    return [Path(data_dir) / TORCHVISION_CLASS[name] / "raw" / file for file in MNIST_SHA256]


def _download_digits(name: str, data_dir: str) -> str | None:
    """Download into `data_dir`, all four files or none; what went wrong, or None."""
    import torchvision

    dataset = getattr(torchvision.datasets, TORCHVISION_CLASS[name])
    problem = why_unreachable(dataset.mirrors[0] + dataset.resources[0][0])
    if problem:
        return problem
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none: a connection that goes silent would hang for ever
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            dataset(scratch, download=True)
            for source, target in zip(_idx_files(name, scratch), _idx_files(name, data_dir)):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    finally:
        socket.setdefaulttimeout(timeout)
    return None


def why_unreachable(url: str, seconds: float = 4.0) -> str | None:
    """Why `url`'s server does not answer, or None if it does, within `seconds`; any answer will do."""
    host = urllib.parse.urlsplit(url).hostname
    outcome = [f"no answer from {host} within {seconds:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            outcome[0] = None
        except urllib.error.HTTPError:
            outcome[0] = None
        except OSError as error:
            outcome[0] = f"{host}: {getattr(error, 'reason', error)}"

    # In a thread, since no timeout covers the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def _read_digits(name: str, data_dir: str) -> Digits:
    files = _idx_files(name, data_dir)
    pairs = [_read_idx_pair(*two, published=name == "mnist") for two in (files[:2], files[2:])]
    classes = [str(digit) for digit in range(10)]
    if name != "mnist":
        import torchvision  # takes a second

        classes = getattr(torchvision.datasets, TORCHVISION_CLASS[name]).classes
    return Digits(name, *pairs[0], *pairs[1], classes, files)


def _read_idx_pair(images: Path, labels: Path, published: bool) -> tuple[Tensor, Tensor]:
    """uint8 (n, 28, 28) images and int64 (n,) labels of two IDX files; raises `UserError` unless both are whole.

    The format: big-endian 32-bit magic number (0x803 for bytes in 3 dimensions, 0x801 in 1), sizes, data.
    """
    parts = []
    for file, magic, shape in ((images, 0x803, (28, 28)), (labels, 0x801, ())):
        try:
            content = np.fromfile(file, np.uint8)
        except OSError as error:
            raise UserError(f"can't read {file}: {error.strerror}") from None
        head = 4 * (2 + len(shape))
        found_magic, count, *found_shape = struct.unpack(f">{head // 4}i", content[:head].tobytes().ljust(head, b"\0"))
        whole = head + count * (28 * 28 if shape else 1)
        if found_magic != magic or tuple(found_shape) != shape or count < 1:
            problem = "does not begin as an IDX file of 28×28 images or of labels does"
        elif len(content) != whole:
            problem = f"has {len(content):,} bytes where {whole:,} belong"
        elif not shape and content[head:].max() > 9:
            problem = f"holds the label {content[head:].max()}, above 9"
        elif published and count in (60_000, 10_000) and hashlib.sha256(content).hexdigest() != MNIST_SHA256[file.name]:
            problem = "differs from the published file (sha256)"
        else:
            parts.append(torch.from_numpy(content[head:].reshape(count, *shape)))
            continue
        raise UserError(f"{file} is damaged: it {problem}; delete it to have it downloaded again")
    if len(parts[0]) != len(parts[1]):
        raise UserError(f"{images} holds {len(parts[0]):,} images, but {labels} {len(parts[1]):,} labels")
    return parts[0], parts[1].long()


def synthetic_digits(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Digits:
    """Digits drawn here: Pillow's own font, randomly thick, turned, sheared, scaled, bent, shifted, noisy.

    The same arguments give the same images. About a second for the default sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (train + test,), generator=generator)
    glyphs = _glyphs()
    images = torch.cat([_deformed(glyphs, part, generator) for part in labels.split(2_000)])
    names = [str(digit) for digit in range(10)]
    return Digits("synthetic", images[:train], labels[:train], images[train:], labels[train:], names, [])


GLYPH_SIDE = 56  # drawn at twice the final size, so that thin strokes survive being turned


def _glyphs() -> Tensor:
    """float (thicknesses, 10, GLYPH_SIDE, GLYPH_SIDE) in 0..1: each digit upright and centred."""
    font = ImageFont.load_default(size=44)
    glyphs = torch.zeros(3, 10, GLYPH_SIDE, GLYPH_SIDE)
    for thickness in range(3):
        for digit in range(10):
            canvas = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
            middle = (GLYPH_SIDE / 2, GLYPH_SIDE / 2)
            ImageDraw.Draw(canvas).text(middle, str(digit), fill=255, font=font, anchor="mm", stroke_width=thickness)
            glyphs[thickness, digit] = torch.from_numpy(np.array(canvas))
    return glyphs / 255


def _deformed(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (n, 28, 28): the labels' glyphs, each deformed in its own way."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, shear = uniform(-0.35, 0.35), uniform(-0.25, 0.25)
    shrink_x, shrink_y = uniform(0.8, 1.3), uniform(0.8, 1.2)
    affine = torch.zeros(n, 2, 3)  # from places in the image to places in the glyph
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * shrink_x, (shear - angle.sin()) * shrink_x
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * shrink_y, angle.cos() * shrink_y
    affine[:, :, 2] = uniform(-0.15, 0.15, 2)
    places = F.affine_grid(affine, [n, 1, 28, 28], align_corners=False)
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 4, 4), size=28, mode="bicubic", align_corners=False)
    thickness = torch.randint(len(glyphs), (n,), generator=generator)
    places = places + bend.permute(0, 2, 3, 1)
    ink = F.grid_sample(glyphs[thickness, labels][:, None], places, align_corners=False)[:, 0]
    noise = 0.1 * torch.randn(ink.shape, generator=generator)
    return (ink * uniform(0.6, 1.0, 1, 1) + noise).clamp(0, 1).mul(255).round().to(torch.uint8)


class Sentences(NamedTuple):
    """Labelled sentences of one part of a corpus."""

    sentences: list[str]
    labels: list[int]  # indices of the corpus's class names
    sources: list[str]  # where each is from: a publication, or the rule of the built-in grammar


class Corpus(NamedTuple):
    """A corpus for classifying sentences."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # what validation consists of, where it has parts that are reported apart
    class_names: list[str]
    files: list[Path]  # what was read; none for the built-in sentences


COLA_URL = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip"
COLA_SHA256 = "2cf856f46df11c143d38e0cf2f9f34ff2fdb088c521cd859f5c4b9581683278b"
ACCEPTABILITY = ["unacceptable", "acceptable"]


def load_corpus(name: str, data_dir: str, train_file: str | None = None, valid_file: str | None = None) -> Corpus:
    """The corpus "cola", from `data_dir` or else downloaded into it, "files", the user's own, or "synthetic".

    "auto" is the user's files where they are named, else CoLA, else, with a loud warning, the built-in
    sentences. Raises `UserError` where a named corpus can't be had, and where a file is not as it should be.
    """
    if (train_file is None) != (valid_file is None):
        raise UserError("--train_file and --valid_file go together: name both")
    if train_file and valid_file:
        if name not in ("auto", "files"):
            raise UserError(f"--dataset {name} and --train_file exclude each other: leave one out")
        return _read_files(Path(train_file), Path(valid_file))
    if name == "files":
        raise UserError("--dataset files needs --train_file and --valid_file")
    if name == "synthetic":
        return synthetic_sentences()
    path, started = Path(data_dir) / "cola_public_1.1.zip", time.perf_counter()
    problem = None if path.exists() else _download_cola(path)
    if problem is None:
        return _read_cola(path)
    if name == "auto":
        warn_loudly(
            f"{path} is missing, and can't be downloaded: {problem}.",
            "This run uses the BUILT-IN synthetic sentences instead: its figures are not CoLA's.",
            f"Finding that out took {time.perf_counter() - started:.1f} s.",
            f"To use CoLA, put the file of {COLA_URL} into a directory and name that: --data_dir DIR.",
        )
        return synthetic_sentences()
    raise UserError(
        f"{path} is missing, and can't be downloaded: {problem}. Put the file of {COLA_URL} there, "
        "name another --data_dir, or use --dataset synthetic"
    )


def _download_cola(path: Path) -> str | None:
    """Download CoLA to `path`, whole or not at all; what went wrong, or None."""
    problem = why_unreachable(COLA_URL)
    if problem:
        return problem
    try:
        with urllib.request.urlopen(COLA_URL, timeout=20) as answer:
            content = answer.read()
        if hashlib.sha256(content).hexdigest() != COLA_SHA256:
            return "what the server sent is not the published file (sha256)"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        return str(error)
    return None


def _read_cola(path: Path) -> Corpus:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != COLA_SHA256:
        raise UserError(
            f"{path} is damaged: it differs from the published file (sha256); delete it to download it again"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        train, in_domain, out_of_domain = (
            parse_cola(archive.read(f"cola_public/raw/{part}.tsv"), f"{path}: {part}.tsv")
            for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev")
        )
    valid = Sentences(*(a + b for a, b in zip(in_domain, out_of_domain)))
    middle = len(in_domain.labels)
    domains = {"in_domain": slice(0, middle), "out_of_domain": slice(middle, len(valid.labels))}
    return Corpus("cola", train, valid, domains, ACCEPTABILITY, [path])


def _lines(content: bytes, name: str) -> list[str]:
    """The lines of a UTF-8 file, whose last one may lack its end. Raises `UserError` with file and line."""
    lines = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.decode().removesuffix("\r"))
        except UnicodeDecodeError:
            raise UserError(f"{name}, line {number}: the bytes are not UTF-8") from None
    return lines


def parse_cola(content: bytes, name: str) -> Sentences:
    """Read CoLA's format: source, label, the author's mark and sentence, tab-separated; quotes mean nothing.

    Raises `UserError` naming file and line.
    """
    rows = []
    for number, line in enumerate(_lines(content, name), start=1):
        columns = line.split("\t")
        if len(columns) != 4:
            raise UserError(f"{name}, line {number}: {len(columns)} columns where 4 belong")
        source, label, _, sentence = columns
        if label not in ("0", "1"):
            raise UserError(f"{name}, line {number}: the label is {label!r}, not 0 or 1")
        if not sentence.strip():
            raise UserError(f"{name}, line {number}: the sentence is empty")
        rows.append((sentence, int(label), source))
    return Sentences(*map(list, zip(*rows)))


def _read_files(train_file: Path, valid_file: Path) -> Corpus:
    """The user's own files, with as many classes as the training file has labels."""
    train, valid = _read_table(train_file), _read_table(valid_file)
    names = sorted(set(train.labels), key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))
    if len(names) < 2:
        raise UserError(f"{train_file}: every label is {names[0]!r}; training needs two classes or more")
    index = {label: i for i, label in enumerate(names)}
    for number, label in enumerate(valid.labels, start=2):
        if label not in index:
            raise UserError(f"{valid_file}, row {number}: the label {label!r} does not occur in {train_file}")
    train, valid = (part._replace(labels=[index[label] for label in part.labels]) for part in (train, valid))
    return Corpus("files", train, valid, {}, names, [train_file, valid_file])


def _read_table(path: Path) -> Sentences:
    """A file with a header that holds `sentence`, `label` and perhaps `source`; labels as they are written.

    A name that ends in .csv is comma-separated with quotes, any other tab-separated without.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    lines = _lines(content.removeprefix(b"\xef\xbb\xbf"), str(path))
    if path.suffix.lower() == ".csv":
        reader = csv.reader((f"{line}\n" for line in lines), strict=True)
        try:
            table = list(reader)
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    else:
        table = [line.split("\t") for line in lines]
    header, rows = table[0], table[1:]
    for column in ("sentence", "label"):
        if column not in header:
            raise UserError(f"{path}, row 1: the header has no column {column!r}, only {', '.join(header)}")
    if not rows:
        raise UserError(f"{path} holds no sentence")
    parsed = Sentences([], [], [])
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"{path}, row {number}: {len(row)} columns where the header has {len(header)}")
        fields = dict(zip(header, row))
        for column in ("sentence", "label"):
            if not fields[column].strip():
                raise UserError(f"{path}, row {number}: the {column} is empty")
        parsed.sentences.append(fields["sentence"])
        parsed.labels.append(fields["label"].strip())
        parsed.sources.append(fields.get("source", path.name))
    return parsed


def synthetic_sentences(train: int = 12_000, valid: int = 1_000, seed: int = 0) -> Corpus:
    """Sentences of the built-in grammar, half of them acceptable; no sentence is in both parts.

    Both sentences of a minimal pair are in the same part. The same arguments give the same sentences.
    """
    pairs = minimal_pairs((train + valid) // 2, seed)
    rows = [(sentence, label, rule) for good, bad, rule in pairs for sentence, label in ((good, 1), (bad, 0))]
    parts = (Sentences(*map(list, zip(*part))) for part in (rows[:train], rows[train:]))
    return Corpus("synthetic", *parts, {}, ACCEPTABILITY, [])
