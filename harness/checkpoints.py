"""Checkpoints: all that training needs to continue as if it had never been interrupted, on this or more processes."""

import dataclasses
import os
import random
import struct
import textwrap
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from harness import distributed
from harness.directory import CHECKPOINT, JOURNAL, METRICS, PREVIOUS_CHECKPOINT
from harness.errors import Stopped, UserError, warn_loudly
from harness.files import save_tensors, temporary_beside
from harness.options import RUN_OPTIONS, SharedSettings
from harness.progress import Meter, Progress

if TYPE_CHECKING:
    from harness.session import Session

SEAL, SEAL_MAGIC = (
    struct.Struct("<4sI"),
    b"seal",
)  # ends a checkpoint: magic bytes, and the CRC-32 of all before
CONTENT = (
    "model",
    "position",
    "history",
    "processes",
    "settings",
    "data",
)  # beside what a script adds
# Settings that do not affect the numbers of a run, and placeholders that are resolved at start-up.
MAY_CHANGE = (*RUN_OPTIONS, "data_dir", "checkpoint_every", "watch", "watch_every", "log_model")
PLACEHOLDERS = {
    "dataset": "auto",
    "device": "auto",
    "precision": "auto",
    "model": None,
    "learning_rate": None,
}


class Checkpoints:
    """Saves the state of training to `checkpoint.pt`, and restores it when a run is resumed.

    The checkpoint of an epoch's end is saved after its last batch and before validation, which a resumed run repeats.
    """

    def __init__(
        self,
        session: "Session",
        progress: Progress,
        *,
        data: Any,
        model: nn.Module,
        meter: Meter,
        **stateful: Any,
    ):
        """`data`: nested sequences with the tensors to train on. `stateful`: what else has a `state_dict`."""
        self._session, self._progress, self._meter = session, progress, meter
        self._stateful = {
            "model": model,
            **stateful,
            "position": progress,
            "history": session.history,
        }
        self._fingerprint = fingerprint(data)
        if distributed.world_size() > 1:
            checksums = (self._fingerprint, fingerprint(list(model.state_dict().values())))
            if len(set(distributed.gather(checksums))) > 1:
                problem = "the processes do not have the same data and model"
                raise UserError(f"{problem}: give all of them the same files")

    def restore_or_begin(self) -> None:
        """Restore the checkpoint of a resumed run; save that of a new one. Raises `UserError` if the data differ."""
        checkpoint = self._session.checkpoint
        if checkpoint is None:
            self._save()
            return
        if checkpoint["data"] != self._fingerprint:
            raise UserError("--resume: the data are not those that the run was begun with")
        try:
            self._restore(checkpoint)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            problem = f"its checkpoint is not of this model or version ({textwrap.shorten(str(error), 200)})"
            raise UserError(
                f"--resume: {self._session.output_dir} can't be resumed: {problem}"
            ) from None
        self._session.stop_requests.saved_step = self._progress.step
        print(f"Resuming {self._session.output_dir} at {self._progress}")

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises one of several exceptions if the state does not fit."""
        for name, thing in self._stateful.items():
            thing.load_state_dict(checkpoint[name])
        processes, rank = checkpoint["processes"], distributed.rank()
        meters = [process["meter"] for process in processes]
        if len(processes) == distributed.world_size():
            self._meter.load_state_dict(meters[rank])
            _set_random_state(processes[rank]["random"])
            return
        numbers = (
            f"begun with {len(processes)} process(es) and goes on with {distributed.world_size()}"
        )
        print(f"The run was {numbers}: the batches are the same; rounding and dropout differ.")
        self._meter.load_state_dict(*meters if rank == 0 else [meters[0] | {"sums": {}}])

    def save_if_due(self) -> None:
        """Save every `--checkpoint_every` batches, at the end of an epoch, and on a request to stop: then raise it."""
        progress, settings, requests = (
            self._progress,
            self._session.settings,
            self._session.stop_requests,
        )
        # Ranks agree on stopping, but not after every batch: communication takes time.
        agree = distributed.world_size() == 1 or progress.row_is_due
        stops = distributed.gather(requests.first and requests.first.status) if agree else []
        stopping = [status for status in stops if status is not None]
        if stopping or progress.epoch_ends or progress.batch % settings.checkpoint_every == 0:
            self._save()
        if stopping:
            status = max(stopping)
            requests.add("a signal to another process" if status else "another process", status)
            reason = f"{requests.first.reason} at step {progress.step}, saved"
            raise Stopped(reason, status, ends_launcher=status > 0 and requests.signal is None)

    def _save(self) -> None:
        """Write `checkpoint.pt` and keep the one before; rank 0 writes, the others contribute their state."""
        if (
            not self._progress.epoch_ends
        ):  # at an epoch's end the row still lacks the validation metrics
            self._session.history.commit()
        processes = distributed.gather(
            {"meter": self._meter.state_dict(), "random": _random_state()}
        )
        if distributed.rank() > 0:
            return
        state = {name: thing.state_dict() for name, thing in self._stateful.items()}
        settings = dataclasses.asdict(self._session.settings)
        state |= {"processes": processes, "settings": settings, "data": self._fingerprint}
        state["seconds"] = time.perf_counter() - self._session.started
        path = self._session.output_dir / CHECKPOINT
        with (
            self._session.stop_requests.writing(self._progress.step),
            temporary_beside(path) as temporary,
        ):
            save_tensors(temporary, state)
            _seal(temporary)
            if path.exists():
                os.replace(path, path.with_name(PREVIOUS_CHECKPOINT))
            os.replace(temporary, path)


def load(output_dir: Path, settings: SharedSettings) -> dict[str, Any] | None:
    """The newest readable checkpoint, or None; `settings` become those of the run. Raises `UserError`."""
    paths = [
        path
        for path in (output_dir / CHECKPOINT, output_dir / PREVIOUS_CHECKPOINT)
        if path.is_file()
    ]
    problems = []
    for path in paths:
        try:
            state = _read(path)
        except (
            Exception
        ) as error:  # zlib, lzma, pickle and others all have their own for damaged files
            problems.append(
                f"{path} can't be read: {textwrap.shorten(str(error), 200) or type(error).__name__}"
            )
            continue
        if problems:
            warn_loudly(*problems, f"Going on from {path}, which is older.")
        os.replace(
            path, output_dir / CHECKPOINT
        )  # or the next save would keep a damaged one as the previous
        _adopt_settings(settings, state["settings"], output_dir)
        return state
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; to start over, give another --output_dir", status=1
        )
    journal = output_dir / JOURNAL
    if journal.exists() and journal.stat().st_size and not (output_dir / METRICS).exists():
        raise UserError(
            f"{output_dir} has lost its checkpoint; give another --output_dir", status=1
        )
    return None


def _seal(path: Path) -> None:
    """Append a checksum of the whole file as the comment of its zip archive, which torch.load ignores."""
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, zero so far
        file.write(struct.pack("<H", SEAL.size))
        file.flush()
        file.write(SEAL.pack(SEAL_MAGIC, _checksum(file, file.tell())))
        file.flush()
        os.fsync(file.fileno())


def _checksum(file: BinaryIO, length: int) -> int:
    """CRC-32 of the first `length` bytes of a file."""
    file.seek(0)
    checksum = 0
    while chunk := file.read(min(length, 1 << 20)):  # a mapped file would count as memory
        checksum, length = zlib.crc32(chunk, checksum), length - len(chunk)
    return checksum


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint. Raises one of many exceptions if the file is damaged, or is something else."""
    length = max(0, path.stat().st_size - SEAL.size)
    with path.open("rb") as file:
        file.seek(length)
        magic, checksum = SEAL.unpack(file.read().ljust(SEAL.size))
        if magic != SEAL_MAGIC or _checksum(file, length) != checksum:
            raise ValueError("it is damaged, or not a checkpoint of this script")
    state = torch.load(path, map_location="cpu", weights_only=True)
    missing = (
        [name for name in CONTENT if name not in state] if isinstance(state, dict) else CONTENT
    )
    if missing:
        raise ValueError(f"it is not a checkpoint of this script: it has no {missing[0]!r}")
    return state


def _adopt_settings(settings: SharedSettings, used: Mapping[str, Any], output_dir: Path) -> None:
    """Set `settings` to those that a run used, but for those that may change. Raises `UserError` if others differ."""
    requested = dataclasses.asdict(settings)
    run = f"--resume: the run in {output_dir}"
    if others := sorted(used.keys() ^ requested.keys()):
        names = ", ".join(f"--{name}" for name in others)
        raise UserError(f"{run} is of another script or version: its options differ ({names})")
    differ = [
        f"--{name} was {used[name]!r}, is {requested[name]!r}"
        for name in used.keys() - set(MAY_CHANGE)
        if requested[name] not in (used[name], PLACEHOLDERS.get(name, used[name]))
    ]
    if differ and "WANDB_SWEEP_ID" not in os.environ:  # a sweep may set them in W&B's config only
        raise UserError(f"{run} was begun with other settings: {'; '.join(sorted(differ))}")
    for name, value in used.items():
        if name not in MAY_CHANGE or name in ("project", "entity", "id") or requested[name] is None:
            setattr(settings, name, value)


def fingerprint(data: Any, checksum: int = 0) -> int:
    """A checksum of all tensors in nested sequences. Raises `TypeError` for what would go unchecked."""
    if isinstance(data, Tensor):
        return zlib.crc32(data.cpu().contiguous().numpy(), checksum)
    if isinstance(data, (list, tuple)):
        for part in data:
            checksum = fingerprint(part, checksum)
    elif not isinstance(data, (str, int, float, Path, type(None))):
        raise TypeError(
            f"Checkpoints(data=...) must be tensors in lists and tuples, not {type(data).__name__}"
        )
    return checksum


def _random_state() -> dict[str, Any]:
    """The state of every global random generator, in types that `weights_only` loads."""
    kind, keys, *rest = np.random.get_state()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        # Of this rank's device, by kind: "cuda" or "mps".
        "accelerator": {accelerator.type: torch.get_device_module(accelerator).get_rng_state()}
        if accelerator
        else {},
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator and accelerator.type in state["accelerator"]:
        torch.get_device_module(accelerator).set_rng_state(state["accelerator"][accelerator.type])
