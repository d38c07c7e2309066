"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed."""

import contextlib
import csv
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, removed at the end of the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; at the end of the block it replaces `path` atomically."""
    with temporary_beside(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write to; at the end of the block it replaces `path`."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as parent:
        temporary = Path(parent) / path.name
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.replace(path, Path(parent) / "before")
        os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no file, or not a whole one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as an indented JSON object."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as a CSV file with a header."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG."""
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` nested tensors and plain values, such as a state dict."""
    with replacing(path) as temporary:
        save_tensors(temporary, content)


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` and flush to disk, in place. Raises the `OSError` that torch hides behind a `RuntimeError`."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
            file.flush()
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        os.fsync(file.fileno())
