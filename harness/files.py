"""Files that appear whole or not at all: written beside their place, flushed to disk, then renamed."""

import contextlib
import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from harness.errors import UserError

TEMPORARY = re.compile(
    r"\..+\.\d+\.unfinished"
)  # names of temporary files: .<name>.<process id>.unfinished


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, removed at the end of the block."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield temporary
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; at the end of the block it replaces `path` atomically."""
    with temporary_beside(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that replaces `path` at the end. Raises `UserError` if `path` holds other files."""
    with temporary_beside(path) as parent:
        temporary = parent / path.name
        temporary.mkdir(parents=True)
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _flush(file)
        if path.exists():
            ours = {file.name for file in temporary.iterdir()}
            theirs = {file.name for file in path.iterdir()} - ours if path.is_dir() else {path.name}
            if theirs:
                raise UserError(
                    f"{path} was not written by this run: move {list_names(theirs)} away", status=1
                )
            os.replace(path, parent / "before")
        os.replace(temporary, path)


def list_names(names: Iterable[str]) -> str:
    """Up to three names, and how many there are beside them."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if it can't be read, or holds no object."""
    try:
        content = (
            json.loads(path.read_text()) if path.is_file() else None
        )  # reading a pipe would wait
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as an indented JSON object."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as a CSV file with a header."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG."""
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` nested tensors and plain values, such as a state dict."""
    with replacing(path) as temporary:
        save_tensors(temporary, content)


def save_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save`, in place and not flushed to disk."""
    with path.open("wb") as file:  # a path would hide why the disk refuses
        torch.save(content, file)
