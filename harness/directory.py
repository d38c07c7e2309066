"""The output directory of a run: created, locked against other processes, and checked."""

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
RESULTS = {
    JOURNAL,
    CHECKPOINT,
    PREVIOUS_CHECKPOINT,
    METRICS,
}  # what a run leaves once it has begun to train
PROBE_BYTES = 8 << 20  # a disk that can't take this much at the start counts as full


def newest_unfinished(task: str) -> Path | None:
    """The run of a script below runs/ that was at work last, of those that are not finished."""
    runs = [config.parent for config in Path("runs").glob(f"{task}-*/{CONFIG}")]
    unfinished = [run for run in runs if not (run / METRICS).exists()]
    return max(unfinished, key=lambda run: run.stat().st_mtime, default=None)


@contextlib.contextmanager
def output_directory(settings: SharedSettings) -> Iterator[Path]:
    """The directory of a run, locked during the block; undone if that raises without results. Raises `UserError`."""
    path = Path(settings.output_dir)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
            before = _check_content(path, settings.resume)
            with temporary_beside(path / "probe") as probe:
                probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            status = 1 if settings.resume else 2
            raise UserError(
                f"--output_dir {path}: can't write there ({error.strerror})", status
            ) from None
        for leftover in (
            path.iterdir() if before else ()
        ):  # of a process that was killed while writing
            if TEMPORARY.fullmatch(leftover.name):
                remove(leftover)
        new_run = not (path / CONFIG).exists()
        if new_run:  # keeps the run id if the run is killed early
            write_json(path / CONFIG, dataclasses.asdict(settings))
        try:
            yield path
        except BaseException as error:
            if isinstance(error, FileNotFoundError) and not path.exists():
                raise UserError(
                    f"--output_dir {path} was removed while the run was at work there", 1
                ) from None
            if new_run and not any((path / name).exists() for name in RESULTS - before):
                (path / CONFIG).unlink(missing_ok=True)
            raise


def _check_content(path: Path, resume: bool) -> set[str]:
    """The names of the files in the directory. Raises `UserError` unless they are those of a run to resume, or none."""
    names = {file.name for file in path.iterdir() if not TEMPORARY.fullmatch(file.name)}
    run = any((path / name).is_file() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))
    run = run or {"id", "output_dir", "resume"} <= (read_json(path / CONFIG) or {}).keys()
    if names and not run:
        problem = f"holds files that no run wrote ({list_names(names)}); choose another directory"
        raise UserError(f"--output_dir {path} {problem}")
    if names and not resume:
        problem = f"already holds another run ({CONFIG}); choose another directory, or continue that run: --resume"
        raise UserError(f"--output_dir {path} {problem}")
    return names


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create the directory and keep other processes out; remove it if the block raises and it is empty."""
    created = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise BlockingIOError  # while this process waited, another one has removed and created it again
        except BlockingIOError:
            problem = "another process is at work there; wait for it, or stop it"
            raise UserError(f"--output_dir {path}: {problem}") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # a directory that is not empty stays
                for directory in created:
                    directory.rmdir()
            raise
    finally:
        os.close(descriptor)
