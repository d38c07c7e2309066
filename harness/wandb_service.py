"""W&B's background service and its log files: mode, start, reading, repair, end.

Each process of a run leaves a log file, `wandb/*run-*-<id>/run-<id>.wandb`. `wandb sync` uploads
them in order, but stops at one that a crash truncated. A file is a header and blocks of 32 KB in
the record format of LevelDB (https://github.com/google/leveldb/blob/main/doc/log_format.md), each
record a protobuf. What W&B does not document here has a fallback, which is reported once.
"""

import contextlib
import functools
import glob
import inspect
import json
import os
import struct
import tempfile
import threading
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb

from harness.errors import UserError

try:
    from wandb.proto.wandb_internal_pb2 import Record
except ImportError:
    Record = None

SERVICE_TIMEOUT = 35  # seconds; W&B waits 30 for its service to start
CACHE_BYTES = 1 << 20  # a cache that can't take this much counts as full
FLUSH_SETTING = "x_transaction_log_flush_interval"
# What is lost without a setting: the first is new in W&B 0.31, the other in 0.26.1.
LOST_WITHOUT = {
    FLUSH_SETTING: "a crash may lose the last seconds of W&B's log",
    "stop_fn": "its stop button stops a run as Ctrl-C does",
}
SERVICE_PROCESS = ("_connection", "_proc", "_process")  # attributes that lead to it
TOKEN = "run_token"  # in W&B's config: random, of one run; its id is unique in a project only
BLOCK = 32768
HEADER = 7  # bytes, of a file and of a chunk
WHOLE, LAST = 1, 4  # kinds of chunks of a record; 2 is the first, 3 one in the middle


@functools.cache
def report_change(loss: str) -> None:
    """Say once what is lost because this version of W&B is different."""
    print(f"wandb {wandb.__version__}: {loss}.")


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this version of W&B has; says once what is lost without the others."""
    known = wandb.Settings.model_fields
    losses = [LOST_WITHOUT[name] for name in settings if name not in known]
    if losses:
        report_change(", and ".join(losses))
    return {name: settings[name] for name in settings if name in known}


def has_credentials() -> bool:
    """Whether an API key or an identity token is configured. Never prompts."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    # W&B before 0.30
    return bool(wandb.api.api_key or wandb.setup().settings.identity_token_file)


def raised_by_wandb(error: Exception) -> bool:
    """Whether an exception comes from W&B's code."""
    return any(
        frame.f_globals.get("__name__", "").startswith("wandb.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Turn what W&B raises before a run has started into a `UserError`, unless it is clear."""
    try:
        yield
    except Exception as error:
        clear = ("harness", "wandb.errors")
        if not raised_by_wandb(error) or type(error).__module__.startswith(clear):
            raise
        close()
        raise UserError(
            f"W&B can't start: {str(error) or type(error).__name__}; "
            "see its environment variables and settings, or use --wandb disabled"
        ) from None


@starting()
def find_mode(choice: str) -> str:
    """The mode for `wandb.init` that `--wandb` stands for. Never prompts.

    "auto" is what `WANDB_MODE` or W&B's settings files say; by default online if credentials are
    configured, else offline. Raises `UserError` if `choice` is "online" and there are no
    credentials.
    """
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B rejects an empty one
    mode = choice
    if choice == "auto":
        find_caches()  # without one, the service would log to the terminal
        start()
        mode = wandb.setup().settings.mode
    if mode != "online":
        return mode
    try:
        if has_credentials():
            return "online"
        problem = "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        problem = f"the API key is invalid: {error}"
    if choice == "online":
        raise UserError(f"--wandb online: {problem}; run `wandb login`, or use --wandb offline")
    print(f"W&B is offline: {problem}.")
    return "offline"


def start() -> None:
    """Start the service. Raises `UserError` if it does not start: W&B may wait for it forever."""
    errors: list[Exception] = []

    def setup() -> None:
        try:
            wandb.setup()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=setup, daemon=True)
    thread.start()
    thread.join(SERVICE_TIMEOUT)
    if thread.is_alive():
        raise UserError(
            f"W&B's service did not start within {SERVICE_TIMEOUT} seconds: "
            "is there room in the temporary directory? --wandb disabled does without it",
            1,
        )
    if errors:
        raise errors[0]


def kill() -> None:
    """Kill the service, so that what waits for it ends with an error."""
    process: Any = wandb.setup()
    for name in SERVICE_PROCESS:
        process = getattr(process, name, None)
    if process is None:
        report_change("a run may wait for W&B forever")
    else:
        process.kill()


def find_caches() -> None:
    """Let W&B use another directory for each cache that it can't write.

    Such as in a container, with the home directory of another user.
    """
    caches = {
        "WANDB_CACHE_DIR": wandb.env.get_cache_dir(),
        "WANDB_DATA_DIR": wandb.env.get_data_dir(),
    }
    beside_logs = os.path.abspath(os.path.join(wandb.env.get_dir(""), "wandb"))
    for name, directory in caches.items():
        problem = _write_error(directory)
        if not problem:
            continue
        # `wandb sync` uploads artifacts from the data directory: it has to last as the logs do.
        if name == "WANDB_DATA_DIR" and not _write_error(beside_logs):
            os.environ[name] = beside_logs
        else:
            os.environ[name] = tempfile.mkdtemp(prefix="wandb-")
        print(f"W&B can't write to {directory} ({problem}): {name} is now {os.environ[name]}.")


def _write_error(directory: str) -> str | None:
    """Why a directory, which may be new, can't take `CACHE_BYTES`; None if it can."""
    path = Path(directory)
    existing = next(part for part in (path, *path.parents) if part.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(CACHE_BYTES))
    except OSError as error:
        return error.strerror
    return None


def log_files(run_id: str, token: str | None, directory: Path | None = None) -> list[Path]:
    """The log files of a run, oldest first; other runs with the same id have another token.

    `directory` has W&B's files; by default it is the one that this process uses.
    """
    name = glob.escape(run_id)
    directory = directory or Path(wandb.setup().settings.wandb_dir)
    # Directories are [offline-]run-<time>-<id>; a second one of the same second has -1 appended.
    files = directory.glob(f"*run-*-{name}*/run-{name}.wandb")
    own = [file for file in files if file.is_file() and _has_token(file, token)]
    return sorted(own, key=start_of)


def start_of(log: Path) -> str:
    """When the process of a log file started, to sort by."""
    return log.parent.name.removeprefix("offline-")


def _has_token(file: Path, token: str | None) -> bool:
    """Whether a log has this token, or ends before its token and its first row."""
    for _, record in read_log(file):
        for item in (*record.run.config.update, *record.config.update):
            if item.key == TOKEN:
                return json.loads(item.value_json) == token
        if record.HasField("history"):
            return token is None  # the run was begun before runs had tokens
    return True


def read_log(file: Path, start: int = HEADER) -> Iterator[tuple[int, Any]]:
    """Each record with the offset of its end, up to the first that is truncated or damaged.

    `start` is the end of the record before the first one to read.
    """
    if Record is None:
        report_change("its log files can't be read, so that a resumed run may log rows twice")
        return
    chunks = []
    with file.open("rb") as log:
        log.seek(start)
        while True:
            room = BLOCK - log.tell() % BLOCK
            if room < HEADER:  # of a chunk: the rest is padding
                log.seek(room, os.SEEK_CUR)
            header = log.read(HEADER)
            if len(header) < HEADER:
                return
            checksum, length, kind = struct.unpack("<IHB", header)
            data = log.read(length)
            if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
                return
            chunks.append(data)
            if kind in (WHOLE, LAST):
                yield log.tell(), Record.FromString(b"".join(chunks))
                chunks = []


def repair_log(file: Path) -> None:
    """Cut off an unfinished record, and have `wandb sync` skip a file without history.

    It may stop at either.
    """
    has_rows = False
    for offset, record in read_log(file):
        end = offset
        has_rows = has_rows or record.HasField("history")
    if has_rows:
        os.truncate(file, end)
    elif Record:
        synced_marker(file).touch()


def synced_marker(file: Path) -> Path:
    """The empty file that makes `wandb sync` skip this log file."""
    return file.with_name(f"{file.name}.synced")


def logged_rows(files: list[Path]) -> dict[int, tuple[dict[str, Any], Path]]:
    """The rows in log files, by step: values as W&B stores them, and the media's directory.

    Without W&B's own entries, such as the time.
    """
    rows = {}
    for file in files:
        for _, record in read_log(file):
            if not record.HasField("history"):
                continue
            values = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                mapping = values
                for key in outer:
                    mapping = mapping.setdefault(key, {})
                mapping[name] = json.loads(item.value_json)
            logged = {name: values[name] for name in values if not name.startswith("_")}
            rows[int(values["_step"])] = logged, file.parent / "files"
    return rows


def is_complete(run_id: str, token: str | None, mode: str, last_step: int) -> bool:
    """Whether W&B has all of a finished run: on its server, or if offline in its log files."""
    logs = log_files(run_id, token)
    if mode == "online":
        return all(synced_marker(log).exists() for log in logs)
    return mode == "disabled" or not logs or last_step in logged_rows(logs)


def close() -> None:
    """Detach from a service that is gone; otherwise W&B complains at exit."""
    with contextlib.suppress(Exception, SystemExit):  # an older W&B raises the service's status
        wandb.teardown()
