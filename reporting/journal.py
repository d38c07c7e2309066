"""Reads a run's journal into columns, as it grows."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 22  # bytes to parse at once
NOTHING = np.empty((0, 2))  # the column of a metric that was not logged


def is_number(value: Any) -> bool:
    """Whether `value` is a float, or an int that a float can hold."""
    if type(value) is int:  # not True or False
        return value.bit_length() < 1024
    return isinstance(value, float)


class Journal:
    """The numbers of a journal, which may be damaged or end in the middle of a row."""

    def __init__(self, path: Path):
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.columns: dict[str, np.ndarray] = {}  # by metric: float64 (rows, 2), step and value
        self.last_step = 0.0
        self.lines = 0
        self.unreadable = 0  # of the lines
        self.ends_early = False  # whether the last row is being written, or was cut by a crash
        self._bytes = 0  # read so far
        self._last_line = b""

    def read(self) -> None:
        """Read the rows that were added; all rows if the last line is no longer where it was."""
        with contextlib.suppress(OSError):
            if not self.path.is_file():  # reading a pipe would wait
                return
            with self.path.open("rb") as file:
                file.seek(self._bytes - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._clear()
                    file.seek(0)
                while lines := file.readlines(CHUNK):
                    is_complete = lines[-1].endswith(b"\n") or _parse(lines[-1:])
                    self.ends_early = not is_complete
                    if self.ends_early:
                        lines.pop()
                    self._add(lines)
                    if self.ends_early:
                        break  # the rest of the row may be there by now

    def _add(self, lines: list[bytes]) -> None:
        """Parse lines and append their rows to the columns."""
        if lines:
            self._last_line = lines[-1]
        self._bytes += sum(map(len, lines))
        lines = [line for line in lines if line.strip()]
        rows = _parse(lines)
        self.lines += len(lines)
        self.unreadable += len(lines) - len(rows)
        if rows:
            self.last_step = rows[-1]["step"]
        for name in set().union(*rows) - {"step"}:
            found = [row for row in rows if is_number(row.get(name))]
            if found:
                steps = [row["step"] for row in found]
                values = [row[name] for row in found]
                known = self.columns.get(name, NOTHING)
                new = np.array([steps, values], float).T
                self.columns[name] = np.vstack([known, new])

    def row(self, step: float) -> dict[str, float]:
        """The last numbers that were logged at a step."""
        numbers = {}
        for name, column in self.columns.items():
            values = column[column[:, 0] == step, 1]
            if len(values):
                numbers[name] = float(values[-1])
        return numbers


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines that are JSON objects with a finite step."""
    try:
        rows = json.loads(b"[%s]" % b",".join(lines))
    except (ValueError, RecursionError):
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [
        row
        for row in rows
        if isinstance(row, dict) and is_number(row.get("step")) and math.isfinite(row["step"])
    ]
