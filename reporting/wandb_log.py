"""Reads from W&B's log files when a run's rows were logged, and its system metrics."""

import contextlib
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from reporting.journal import NOTHING

IGNORING_DAMAGE = contextlib.suppress(OSError, ValueError, DecodeError)


class WandbLog:
    """The times and system metrics of a run, as far as its log files are on this machine.

    Their directory, wandb/, is looked for where `WANDB_DIR` says, or else in the current directory,
    and beside the run's directory and its parent.
    """

    def __init__(self, path: Path):
        """`path` is the run's directory."""
        roots = [os.environ.get("WANDB_DIR", "."), *path.resolve().parents[:2]]
        self._directories = {Path(root, "wandb").resolve() for root in roots}
        self._read_bytes = {}  # by file
        self._start = None  # of the run, in seconds
        self.processes: dict[Path, float] = {}  # each one's first minute, by its file
        # By metric: float64 (rows, 2), step and minute of "minutes", minute and value of others.
        self.columns: dict[str, np.ndarray] = {}

    def read(self, config: dict[str, Any]) -> None:
        """Read the records that were added; `config` is the run's."""
        from harness import wandb_service  # it imports wandb, which takes a second

        files = set()
        run_id = str(config.get("id"))
        token = config.get("run_token")
        for directory in self._directories:
            with IGNORING_DAMAGE:
                files.update(wandb_service.log_files(run_id, token, directory))
        points = defaultdict(list)
        for file in sorted(files, key=wandb_service.start_of):
            start = self._read_bytes.get(file, wandb_service.HEADER)
            with IGNORING_DAMAGE:
                for offset, record in wandb_service.read_log(file, start):
                    self._read_bytes[file] = offset
                    time = _time(record)
                    if time is None:
                        continue
                    self._start = self._start or time
                    minute = max(0.0, time - self._start) / 60  # records may be out of order
                    first = self.processes.get(file, minute)
                    self.processes[file] = min(minute, first)
                    if record.HasField("history"):
                        step = record.history.step.num
                        points["minutes"].append((step, minute))
                    for item in record.stats.item:
                        value = float(item.value_json)
                        points[f"system/{item.key}"].append((minute, value))
        for name, new in points.items():
            known = self.columns.get(name, NOTHING)
            self.columns[name] = np.concatenate([known, new])


def _time(record: Any) -> float | None:
    """When a row or system metrics were logged, in seconds; None for other records."""
    if record.HasField("stats"):
        nanoseconds = record.stats.timestamp.ToNanoseconds()
        return nanoseconds / 1e9
    for item in record.history.item:
        if "_timestamp" in (item.key, *item.nested_key):
            return float(item.value_json)
    return None
