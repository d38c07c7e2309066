"""The output directory of a run: created, checked, and locked against other processes."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from harness import system
from harness.errors import UserError, warn_loudly
from harness.files import (
    TEMPORARY,
    list_names,
    read_json,
    read_tensors,
    remove,
    temporary_beside,
    write_json,
)

CONFIG_FILE, JOURNAL_FILE, METRICS_FILE = "config.json", "history.jsonl", "metrics.json"
CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoint.pt", "checkpoint.previous.pt"
# Of a run that has begun to train.
RESULTS = {JOURNAL_FILE, CHECKPOINT, PREVIOUS_CHECKPOINT, METRICS_FILE}
# What every checkpoint holds, beside the state of the script's other objects.
CONTENT = {"model", "position", "history", "processes", "settings", "data", "seconds"}
LOCKED: set[int] = set()  # descriptors of the locked directories
PROBE_BYTES = 8 << 20  # a disk that can't take this much at the start counts as full


@contextlib.contextmanager
def output_directory(path: Path, resume: bool, config: Mapping[str, Any]) -> Iterator[None]:
    """Create or check the directory of a run, and lock it during the block.

    A new one gets `config`, which keeps the run id if the run is killed early. What was created is
    removed if the block raises without results. Raises `UserError`.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
            before = _check_content(path, resume)
            with temporary_beside(path / "probe") as probe:
                probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            raise UserError(
                f"--output_dir {path}: can't write there ({error.strerror})", 1 if resume else 2
            ) from None
        for name in before:
            if TEMPORARY.fullmatch(name):  # of a process that was killed while writing
                remove(path / name)
        new_run = not (path / CONFIG_FILE).exists()
        if new_run:
            write_json(path / CONFIG_FILE, config)
        try:
            yield
        except BaseException:
            if new_run and not any((path / name).exists() for name in RESULTS - before):
                (path / CONFIG_FILE).unlink(missing_ok=True)
            raise


def _check_content(path: Path, resume: bool) -> set[str]:
    """The names in the directory. Raises `UserError` if they are not of a run to resume."""
    names = set(os.listdir(path)) - {system.LOCK_FILE}
    lasting = {name for name in names if not TEMPORARY.fullmatch(name)}
    config = read_json(path / CONFIG_FILE) or {}
    has_checkpoint = {CHECKPOINT, PREVIOUS_CHECKPOINT} & names
    is_run = has_checkpoint or {"id", "output_dir", "resume"} <= config.keys()
    if lasting and not is_run:
        raise UserError(
            f"--output_dir {path} holds files that no run wrote ({list_names(lasting)}); "
            "choose another directory"
        )
    if lasting and not resume:
        raise UserError(
            f"--output_dir {path} already holds another run ({CONFIG_FILE}); "
            "choose another directory, or continue that run: --resume"
        )
    return names


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create the directory and keep other processes out; remove it if the block leaves it empty."""
    created = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for attempt in (1, 2):
        try:
            descriptor = system.lock(path)
            break
        except BlockingIOError:
            if attempt == 2:
                problem = "another process is using it; wait for it, or stop it"
                raise UserError(f"--output_dir {path}: {problem}") from None
            time.sleep(0.1)  # `report.py --watch` takes the lock for a moment, to see if it can
    LOCKED.add(descriptor)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a directory that is not empty stays
            for directory in created:
                directory.rmdir()
        raise
    finally:
        LOCKED.discard(descriptor)
        system.unlock(path, descriptor)


def _unlock_in_child() -> None:
    """A DataLoader's worker may outlive a killed run for seconds, and must not hold its lock."""
    while LOCKED:
        os.close(LOCKED.pop())


if not system.WINDOWS:
    os.register_at_fork(after_in_child=_unlock_in_child)


def read_checkpoint(output_dir: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint, None if there is none.

    Raises `UserError` if all are damaged.
    """
    problems = []
    for path in (output_dir / CHECKPOINT, output_dir / PREVIOUS_CHECKPOINT):
        if not path.is_file():
            continue
        try:
            state = read_tensors(path)
            if missing := CONTENT - set(state):
                raise ValueError(
                    f"it is not a checkpoint of this script: it has no {list_names(missing)}"
                )
        except Exception as error:  # zlib, pickle and others have their own for damaged files
            reason = shorten(str(error), 200) or type(error).__name__
            problems.append(f"{path} can't be read: {reason}")
            continue
        if problems:
            warn_loudly(*problems, f"Going on from {path}, which is older.")
        # The next save must not keep a damaged one as the previous one.
        system.replace(path, output_dir / CHECKPOINT)
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}; to start over, give another --output_dir", 1)
    journal = output_dir / JOURNAL_FILE
    if journal.exists() and journal.stat().st_size and not (output_dir / METRICS_FILE).exists():
        raise UserError(f"{output_dir} has lost its checkpoint; give another --output_dir", 1)
    return None
