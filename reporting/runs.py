"""Reads runs, finished or not, from their directories and tabulates how they differ."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness.directory import CONFIG, JOURNAL, METRICS
from harness.errors import UserError
from harness.files import read_json
from harness.options import SharedSettings
from metrics import lower_is_better

# Figures shown beside the monitored one.
KEY_FIGURES = ("valid/loss", "valid/acc", "valid/mcc", "test/loss", "test/acc")
SEED_AND_REMARKS = ("seed", "name", "notes", "tags")  # may differ within a group of seeds


@dataclasses.dataclass
class RunFiles:
    """A run, as its files describe it."""

    path: Path
    label: str  # printable
    config: dict[str, Any]
    rows: list[dict[str, float]]  # of the journal, numbers only
    metrics: dict[str, Any] | None  # None until the run has finished
    notes: list[str]  # what is wrong with the files
    state: str = "finished"  # or "under way", "died", "pruned", "failed"
    detail: str = ""  # follows the state in tables: the step it has reached, or the error

    @property
    def monitor(self) -> str:
        """The metric that selects the best epoch, such as "valid/loss"."""
        return format_value(self.config.get("monitor") or "valid/loss")

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return format_value(self.config.get("dataset"))

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch so far, and its number as "epoch"."""
        if self.metrics is not None:
            figures = {name: value for name, value in self.metrics.items() if is_number(value)}
            figures["epoch"] = figures.pop("best/epoch", math.nan)
            return figures
        rows = [row for row in self.rows if math.isfinite(row.get(self.monitor, math.nan))]
        return min(rows, key=lambda row: sort_key(row[self.monitor], self.monitor), default={})

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that may tell runs apart, and library versions as "version of torch"."""
        hidden = {"versions"}
        for option in dataclasses.fields(SharedSettings):
            if not option.metadata["tells_apart"]:
                hidden.add(option.name)
        settings = {name: value for name, value in self.config.items() if name not in hidden}
        versions = self.config.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        return settings | {
            f"version of {library}": version for library, version in versions.items()
        }

    @property
    def seed(self) -> str:
        """The seed; "None" if the config has none."""
        return str(self.config.get("seed"))


SeedGroups = dict[str, list[RunFiles]]  # by a printable name
Table = tuple[list[str], list[list[Any]]]  # header and rows


def is_number(value: Any) -> bool:
    """Whether `value` is a float, or an int that a float can hold."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1024)


def sort_key(value: float, metric: str) -> float:
    """`value`, negated if higher is better, so that the best sorts first."""
    return value if lower_is_better(metric) else -value


def find_runs(directories: Iterable[Path]) -> list[RunFiles]:
    """The runs in these directories or directly beneath them.

    Raises `UserError` if a directory holds none.
    """
    paths = {}
    for directory in directories:
        if not directory.exists():
            raise UserError(f"{directory} does not exist")
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
        if holds_run(directory):
            children = [directory]
        else:
            children = sorted(filter(holds_run, directory.iterdir()))
        if not children:
            raise UserError(f"{directory} holds no run: no directory with {CONFIG} or {JOURNAL}")
        for child in children:
            paths.setdefault(child.resolve(), child)
    return [read_run(path) for path in paths.values()]


def sort_runs(runs: list[RunFiles]) -> list[RunFiles]:
    """The runs from best to worst; those that share a label get their path as label."""
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = format_value(str(run.path))
    return sorted(runs, key=rank)


def rank(run: RunFiles) -> tuple[bool, str, float]:
    """The sort key of a run: by monitored metric, the best first; runs without a figure last."""
    figure = run.best.get(run.monitor, math.nan)
    if not math.isfinite(figure):
        return True, run.monitor, 0.0
    return False, run.monitor, sort_key(figure, run.monitor)


def holds_run(directory: Path) -> bool:
    """Whether a run has written its config or its journal there."""
    return any((directory / name).is_file() for name in (CONFIG, JOURNAL))


def read_run(path: Path) -> RunFiles:
    """The run in a directory; its notes list the files that are missing or unreadable."""
    config = read_json(path / CONFIG)
    metrics = read_json(path / METRICS)
    notes = []
    if config is None:
        notes.append(f"no readable {CONFIG}")
        config = {}
    if metrics is None and (path / METRICS).exists():
        notes.append(f"no readable {METRICS}")
    rows = read_journal(path / JOURNAL, notes)
    label = format_value(config.get("name") or path.resolve().name)
    run = RunFiles(path, label, config, rows, metrics, notes)
    if metrics is None:
        run.state = "under way" if is_locked(path) else "died"
        last_step = rows[-1]["step"] if rows else 0
        run.detail = f" at step {last_step:,.0f}"
    return run


def read_journal(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The numbers in each row of a journal, which may be damaged or end in the middle of a line."""
    lines = []
    with contextlib.suppress(OSError):
        if path.is_file():  # reading a pipe would wait
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError, KeyError, RecursionError):
            cells = json.loads(line)
            row = {name: float(value) for name, value in cells.items() if is_number(value)}
            if math.isfinite(row["step"]):
                rows.append(row)
    if len(rows) < len(lines):
        notes.append(f"{len(lines) - len(rows)} of {len(lines)} rows of {JOURNAL} can't be read")
    return rows


def is_locked(directory: Path) -> bool:
    """Whether a process is using the directory: a run locks it exclusively until it ends."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released by the close below
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def differing(runs: list[RunFiles], ignored: Iterable[str] = ()) -> list[str]:
    """The names of the settings, save `ignored`, that differ between the runs that have them."""
    values = defaultdict(set)
    for run in runs:
        for name, value in run.settings.items():
            values[name].add(json.dumps(value, sort_keys=True))
    return [name for name, distinct in values.items() if len(distinct) > 1 and name not in ignored]


def groups(runs: list[RunFiles]) -> SeedGroups:
    """Groups of two or more runs that differ only in the seed."""
    by_settings = defaultdict(list)
    for run in runs:
        settings = {
            name: value for name, value in run.settings.items() if name not in SEED_AND_REMARKS
        }
        by_settings[json.dumps(settings, sort_keys=True)].append(run)
    seeded = [members for members in by_settings.values() if len({run.seed for run in members}) > 1]
    names = differing([members[0] for members in seeded], SEED_AND_REMARKS)
    named = {}
    for members in seeded:
        first = members[0]
        label = ", ".join(f"{name} {format_value(first.settings.get(name))}" for name in names)
        if not label:
            label = "all seeds" if len(members) == len(runs) else f"{first.label} and other seeds"
        if label in named:
            label += f", {first.label}"
        named[format_value(label)] = members
    return named


def one_per_seed(members: list[RunFiles]) -> list[RunFiles]:
    """The finished runs of a group, one per seed: of a repeated run, the last by path."""
    by_seed = {}
    for run in sorted(members, key=lambda run: run.path):
        if run.metrics is not None:
            by_seed[run.seed] = run
    return list(by_seed.values())


def format_value(value: Any) -> str:
    """A value from a file as it is shown: floats to four digits, control characters escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or value == []:
        return "–"
    string = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in string)


def format_seconds(value: float | None) -> str:
    """A duration in seconds, minutes or hours."""
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    if value < 6000:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"


def format_mean(values: list[float]) -> str:
    """Mean ± sample standard deviation of two or more values."""
    return f"{mean(values):.4g} ± {stdev(values):.2g}"


def run_table(runs: list[RunFiles]) -> Table:
    """Header and rows: the settings that differ, and the figures.

    The last column holds pairs: the time in seconds, and as text.
    """
    settings = differing(runs, ["name"])
    figures = shown_figures(runs)
    rows = []
    for run in runs:
        row = [run.label, run.state + run.detail]
        row += [run.settings.get(name) for name in settings]
        row += [run.best.get(name) for name in ("epoch", *figures)]
        seconds = run.best.get("seconds")
        rows.append([*row, (seconds, format_seconds(seconds))])
    return ["run", "state", *settings, "best epoch", *figures, "time"], rows


def shown_figures(runs: list[RunFiles]) -> list[str]:
    """The figures for a table, the monitored ones first."""
    names = dict.fromkeys([*(run.monitor for run in runs), *KEY_FIGURES])
    return [name for name in names if any(name in run.best for run in runs)]


def seed_table(runs: list[RunFiles], seed_groups: SeedGroups) -> Table:
    """Header and rows: each group's mean ± standard deviation over one finished run per seed."""
    figures = shown_figures(runs)
    rows = []
    for name, group in seed_groups.items():
        members = one_per_seed(group)
        row = [name, str(len(members))]
        for figure in figures:
            values = [run.best.get(figure, math.nan) for run in members]
            values = list(filter(math.isfinite, values))
            shown = format_mean(values) if len(values) > 1 else "–"
            if 1 < len(values) < len(members):
                shown += f" (n = {len(values)})"
            row.append(shown)
        rows.append(row)
    return ["runs that differ in the seed only", "n", *figures], rows
