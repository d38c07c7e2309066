"""Atomic file writes: to a temporary name in the same directory, flushed to disk, then renamed."""

import contextlib
import csv
import json
import os
import re
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from PIL import Image

from harness.errors import UserError
from harness.system import replace

if TYPE_CHECKING:  # torch takes a second and much memory, and report.py --watch does without
    from torch import Tensor, nn

TEMPORARY = re.compile(r"\..+\.\d+\.unfinished")  # .<name>.<random number>.unfinished


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, removed at the end of the block."""
    # Process ids repeat: containers on two nodes may both be process 1.
    temporary = path.with_name(f".{path.name}.{secrets.randbits(64)}.unfinished")
    try:
        yield temporary
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; at the end of the block it replaces `path` atomically."""
    with temporary_beside(path) as temporary:
        yield temporary
        flush(temporary)
        replace(temporary, path)


def flush(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb+") as file:  # Windows flushes no file that is only read
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that replaces `path` at the end of the block.

    Raises `UserError` if `path` holds other files.
    """
    with temporary_beside(path) as parent:
        temporary = parent / path.name
        temporary.mkdir(parents=True)
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            flush(file)
        if path.exists():
            if others := set(os.listdir(path)) - set(os.listdir(temporary)):
                raise UserError(
                    f"{path} was not written by this run: move {list_names(others)} away", status=1
                )
            replace(path, parent / "before")
        replace(temporary, path)


def list_names(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if it can't be read, or holds no object."""
    if not path.is_file():  # reading a pipe would wait
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as an indented JSON object."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_csv(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as a CSV file with a header."""
    rows = zip(*columns.values(), strict=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG."""
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def write_tensors(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """`torch.save` nested tensors and plain values; an existing file is kept as `previous`.

    Raises `pickle.UnpicklingError`, and writes nothing, if `read_tensors` would refuse the file.
    """
    import torch

    with temporary_beside(path) as temporary:
        with temporary.open("wb") as file:  # a path would hide why the disk refuses
            torch.save(content, file)
        flush(temporary)
        torch.load(temporary, "cpu", mmap=True, weights_only=True)  # reads no tensor
        if previous and path.exists():
            replace(path, previous)
        replace(temporary, path)


def write_onnx(path: Path, model: "nn.Module", output: str, **inputs: "Tensor") -> None:
    """Export a model with its weights to one ONNX file, on the CPU.

    `inputs` are examples by the names of the model's inputs; the size of the batch stays dynamic.
    """
    import torch

    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the exporter's own
        program = torch.onnx.export(
            model.cpu().to(memory_format=torch.contiguous_format),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            dynamo=True,  # torch's default since 2.9
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of the source code on this machine
    with replacing(path) as temporary:
        program.save(temporary, external_data=False)


def load_weights(model: "nn.Module", source: str) -> None:
    """Load the weights in a file, or in model.pt of a run's directory. Raises `UserError`."""
    path = Path(source)
    if path.is_dir():
        path /= "model.pt"
    try:
        content = read_tensors(path)
        model.load_state_dict(content.get("model", content))  # of a checkpoint, or the file itself
    except Exception as error:  # torch raises arbitrary exceptions
        raise UserError(
            f"{path} does not hold the weights of this model: {shorten(str(error), 300)}"
        ) from None


def read_tensors(path: Path) -> Any:
    """What `write_tensors` wrote, on the CPU. Raises one of many exceptions if it is damaged."""
    import torch

    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # torch.load does not compare the checksums
        # torch.load would read a part that is marked as a directory as if it were empty.
        if damaged or any(part.external_attr for part in archive.infolist()):
            raise ValueError("it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)
