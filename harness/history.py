"""The rows that a run logs: everything to W&B, the numbers also to `history.jsonl`; each row once, and only whole."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import wandb

from harness import wandb_internals
from harness.errors import UserError
from harness.files import replacing
from harness.wandb_run import lost_runs, tolerate_wandb_errors


class History:
    """Collects what is logged for a step and writes the row when it is complete: when the next batch begins.

    So a process that dies leaves no half of a row, and a resumed one logs what is missing, and only that.
    """

    def __init__(self, run: wandb.Run, journal: Path | None, wandb_step: int = -1):
        """`journal` is None on all ranks but 0; W&B already has the rows up to `wandb_step`. Replaces `run.log`."""
        self.step = 0
        self._row: dict[str, Any] = {}
        self._rows: list[dict[str, float]] = []
        self._run, self._journal, self._wandb_step = run, journal, wandb_step
        self._checksum = zlib.crc32(journal.read_bytes()) if journal and journal.exists() else 0
        if not run.disabled:
            self._log_to_wandb, self._handing_over = run.log, False
            self._log_from_hook = wandb_internals.intercept_hooks(run, self._log)
        run.log = self.log

    def log(
        self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        """Add numbers, media or charts to the row of `step`, by default the current one; `commit` completes it."""
        if step is not None and step != self.step:
            self.begin_row(step)
        self._row.update(data)
        if commit:
            self.commit()

    @property
    def rows(self) -> list[dict[str, float]]:
        """The numbers of all rows so far, those before a resume and the current one included, each with its step."""
        return [*self._rows, {"step": self.step, **_numbers(self._row)}]

    def begin_row(self, step: int) -> None:
        """Complete the current row; what is logged from now on belongs to `step`."""
        self.commit()
        self.step = step

    def commit(self) -> None:
        """Write the current row. Raises `OSError` if the journal can't be written; W&B never raises."""
        row, self._row = self._row, {}
        if self._journal and (numbers := _numbers(row)):
            self._rows.append({"step": self.step, **numbers})
            line = json.dumps(self._rows[-1]) + "\n"
            with self._journal.open("a") as journal:
                journal.write(line)
            self._checksum = zlib.crc32(line.encode(), self._checksum)
        self._send(row, self.step)

    def take_over(self, rows: list[dict[str, float]]) -> None:
        """Continue after these rows of the journal; W&B gets those it has lost, with their media if a log has them."""
        self._rows = rows
        for step, values in _lost_rows(self._run, rows, self._wandb_step):
            self._send(values, step)

    def state_dict(self) -> dict[str, Any]:
        """The length of the journal in bytes, flushed to disk, its CRC-32, and the numbers of the current row."""
        with self._journal.open("ab") as journal:
            os.fsync(journal.fileno())
            length = journal.tell()
        return {
            "journal": length,
            "checksum": self._checksum,
            "step": self.step,
            "row": _numbers(self._row),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the row that `state_dict` found incomplete."""
        self.step, self._row = state["step"], dict(state["row"])

    def _log(self, data: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        if self._handing_over:
            self._log_from_hook(data, *arguments, **options)
        else:
            self._row.update(data)

    def _send(self, row: Mapping[str, Any], step: int) -> None:
        if not row or self._run.disabled or step <= self._wandb_step:
            return
        self._handing_over = True
        for values in (row, _numbers(row)):  # if the media can't be stored, at least the numbers
            if self._run.id in lost_runs:
                break
            with tolerate_wandb_errors(self._run):
                self._log_to_wandb(
                    {}, step=step
                )  # W&B names media files after the row that is open
                self._log_to_wandb(values, step=step, commit=True)
                break
        self._handing_over = False


def rewind(journal: Path, state: Mapping[str, Any]) -> list[dict[str, float]]:
    """Cut the journal to its length in `state` and return its rows. Raises `UserError` if they are damaged."""
    content = journal.read_bytes()[: state["journal"]] if journal.is_file() else b""
    if (len(content), zlib.crc32(content)) != (state["journal"], state["checksum"]):
        problem = "does not go with the checkpoint: rows are missing or damaged; choose another --output_dir"
        raise UserError(f"{journal} {problem}", status=1)
    with replacing(journal) as temporary:
        temporary.write_bytes(content)
    return [json.loads(line) for line in content.splitlines()]


def _lost_rows(
    run: wandb.Run, rows: list[dict[str, float]], last_step: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps and values of `rows` after `last_step`, with their media if a W&B log on this machine has them."""
    if run.disabled or not (rows or last_step >= 0):
        return
    logs = [log for log in wandb_internals.log_files(run.id) if log != Path(run.settings.sync_file)]
    local = wandb_internals.history(logs)
    if run.offline and last_step >= 0:  # or the summary would lack what earlier processes logged
        with tolerate_wandb_errors(run):
            for step in sorted(step for step in local if step <= last_step):
                run.summary.update(
                    {key: value for key, value in local[step][0].items() if key[0] != "_"}
                )
    lost = [row for row in rows if row["step"] > last_step]
    if lost and run.offline and not local:
        print("W&B's own log of this run is not in wandb/: its numbers are logged again.")
    for row in lost:
        values, files = local.get(row["step"], (row, Path()))
        media = [value for value in values.values() if isinstance(value, dict)]
        names = [
            name
            for value in media
            for name in (*value.get("filenames", ()), value.get("path"))
            if name
        ]
        with tolerate_wandb_errors(run):
            for name in names:
                if (files / name).exists():
                    copy = Path(run.dir, name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    run.save(shutil.copyfile(files / name, copy), base_path=run.dir, policy="now")
        yield (
            row["step"],
            {
                key: value
                for key, value in values.items()
                if key != "step" and not key.startswith("_")
            },
        )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a row, also those in tensors and arrays, as Python's numbers."""
    numbers = {}
    for name, value in row.items():
        if isinstance(value, Real) or getattr(value, "ndim", None) == 0:
            number = value.item() if hasattr(value, "item") else value
            numbers[name] = number if isinstance(number, int) else float(number)
    return numbers
