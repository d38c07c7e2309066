"""What W&B does not document and a run relies on, each with a fallback: its log files, its hooks, one of its settings.

Each process of a run leaves a log file, `wandb/*run-*-<id>/run-<id>.wandb`. `wandb sync` uploads them in order, but
stops at one that a crash truncated. A file is a header and blocks of 32 KB in the record format of LevelDB
(https://github.com/google/leveldb/blob/main/doc/log_format.md), each record a protobuf.
"""

import functools
import glob
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import wandb

try:
    from wandb.proto.wandb_internal_pb2 import Record
except ImportError:
    Record = None

FLUSH_SETTING, LOG_METHOD, TORCH_HISTORY = "x_transaction_log_flush_interval", "_log", "_torch"
SERVICE_PROCESS = ("_connection", "_proc", "_process")  # attributes that lead to it
BLOCK, HEADER = 32768, b":W&B"
WHOLE, FIRST, LAST = 1, 2, 4  # kinds of chunks of a record; 3 is one in the middle


def settings() -> dict[str, Any]:
    """Settings that let a crash lose next to nothing of W&B's log, by default its last 15 seconds."""
    if FLUSH_SETTING in wandb.Settings.model_fields:
        return {FLUSH_SETTING: 0.05}
    _report("a crash may lose the last seconds of W&B's log")
    return {}


def intercept_hooks(run: wandb.Run, log: Callable[..., None]) -> Callable[..., None]:
    """Let the hooks of `run.watch`, and W&B's own `run.log`, call `log`; returns what they called before."""
    if not hasattr(run, LOG_METHOD):
        _report("the histograms of run.watch may be logged with another step")
        return log
    before = getattr(run, LOG_METHOD)
    setattr(run, LOG_METHOD, log)
    return before


def allow_histograms(run: wandb.Run) -> None:
    """Exempt the histograms of `run.watch` from deterministic algorithms: there is none on CUDA."""
    history = getattr(run, TORCH_HISTORY, None)
    if not hasattr(history, "log_tensor_stats"):
        _report("on CUDA, run.watch needs --deterministic false")
        return
    log_tensor_stats = history.log_tensor_stats

    def log_histogram(*arguments: Any) -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            log_tensor_stats(*arguments)
        finally:
            torch.use_deterministic_algorithms(deterministic)

    history.log_tensor_stats = log_histogram


@functools.cache
def _report(loss: str) -> None:
    """Say once what is lost because W&B has changed."""
    print(f"wandb {wandb.__version__} differs from the versions that this was tested with: {loss}.")


def kill_service() -> None:
    """Kill W&B's service, so that what waits for it ends with an error."""
    process = functools.reduce(
        lambda owner, name: getattr(owner, name, None), SERVICE_PROCESS, wandb.setup()
    )
    if process is None:
        _report("a run may wait for W&B forever")
    else:
        process.kill()


def log_files(run_id: str) -> list[Path]:
    """The log files of a run, oldest first."""
    name = glob.escape(run_id)
    files = Path(wandb.setup().settings.wandb_dir).glob(f"*run-*-{name}*/run-{name}.wandb")
    # Directories are named [offline-]run-<time>-<id>; a second one within the same second has -1 appended.
    return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def read(file: Path) -> Iterator[tuple[int, Any]]:
    """Each record with the offset of its end, up to the first that is truncated or damaged."""
    if Record is None:
        _report("its log files can't be read, so that a resumed run may log rows twice")
        return
    content = file.read_bytes()
    at, parts = 7, []
    while content.startswith(HEADER):
        if BLOCK - at % BLOCK < 7:  # no room for another chunk: the rest is padding
            at += BLOCK - at % BLOCK
        if at + 7 > len(content):
            return
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + 7 : at + 7 + length]
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        at += 7 + length
        parts = [data] if kind in (WHOLE, FIRST) else [*parts, data]
        if kind in (WHOLE, LAST):
            yield at, Record.FromString(b"".join(parts))


def repair(file: Path) -> None:
    """Cut off an unfinished record. `wandb sync` may stop at a file without history, and is made to skip it."""
    records = list(read(file))
    if Record is None:
        return
    if not any(record.HasField("history") for _, record in records):
        synced_marker(file).touch()
    elif records[-1][0] < file.stat().st_size:
        os.truncate(file, records[-1][0])


def synced_marker(file: Path) -> Path:
    """The empty file that makes `wandb sync` skip this log file."""
    return file.with_name(f"{file.name}.synced")


def history(files: list[Path]) -> dict[int, tuple[dict[str, Any], Path]]:
    """The rows of history in these log files, by step: values in W&B's format, and where the media of the row are."""
    rows = {}
    for file in files:
        for _, record in read(file):
            if record.HasField("history"):
                values: dict[str, Any] = {}
                for item in record.history.item:
                    *outer, name = item.nested_key or [item.key]
                    place = values
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[name] = json.loads(item.value_json)
                rows[int(values["_step"])] = values, file.parent / "files"
    return rows
