"""The output directory of a run: created, checked, and locked against other processes."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from harness.errors import UserError
from harness.files import TEMPORARY, list_names, read_json, remove, temporary_beside, write_json
from harness.options import SharedSettings

CONFIG, JOURNAL, METRICS = "config.json", "history.jsonl", "metrics.json"
CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoint.pt", "checkpoint.previous.pt"
RESULTS = (JOURNAL, CHECKPOINT, PREVIOUS_CHECKPOINT, METRICS)  # what a run leaves once it has begun to train
PROBE_BYTES = 8 << 20  # a disk that can't take this much at the start counts as full


@contextlib.contextmanager
def output_directory(settings: SharedSettings) -> Iterator[Path]:
    """The directory for the files of a run, created if it is missing, and locked while the block runs.

    Raises `UserError` if files can't be written there, if it holds anything but a run to resume, or if another process
    has locked it. If the block raises before there are results, nothing is left.
    """
    path, created, new_run, before = Path(settings.output_dir), [], False, set()
    try:
        created += [p for p in (path, *path.parents) if not p.exists()]
        before |= _check_content(path, settings.resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with temporary_beside(path / "probe") as probe:
                probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            status = 1 if settings.resume else 2
            raise UserError(f"--output_dir {path}: can't write there ({error.strerror})", status) from None
        with _locked(path):
            for leftover in path.iterdir() if before else ():  # of a process that was killed while writing
                if TEMPORARY.fullmatch(leftover.name):
                    remove(leftover)
            if not (path / CONFIG).exists():  # keeps the run id if the run is killed early
                write_json(path / CONFIG, dataclasses.asdict(settings))
                new_run = True
            yield path
    except BaseException:
        if new_run and not any((path / name).exists() for name in RESULTS if name not in before):
            (path / CONFIG).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a directory that is not empty stays
            for directory in created:
                directory.rmdir()
        raise


def _check_content(path: Path, resume: bool) -> set[str]:
    """The names of the files of a run in the directory.

    Raises `UserError` if there is anything else, or a run and not `resume`.
    """
    names = {file.name for file in path.iterdir() if not TEMPORARY.fullmatch(file.name)} if path.is_dir() else set()
    run = any((path / name).is_file() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))
    run = run or {"id", "output_dir", "resume"} <= (read_json(path / CONFIG) or {}).keys()
    if names and not run:
        raise UserError(
            f"--output_dir {path} holds files that no run wrote ({list_names(names)}); choose another directory"
        )
    if names and not resume:
        problem = f"--output_dir {path} already holds another run ({CONFIG})"
        raise UserError(f"{problem}; choose another directory, or continue that run: --resume")
    return names


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out; the system releases the lock however this one ends. Raises `UserError`."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # other errors: a file system without locks
                problem = f"--output_dir {directory}: another process is at work there"
                raise UserError(f"{problem}; wait for it, or stop it") from None
        yield
    finally:
        os.close(descriptor)
