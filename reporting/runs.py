"""Runs read from their directories, however far they have come, and what differs between them."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from harness.directory import CONFIG, JOURNAL, METRICS
from harness.errors import UserError
from harness.files import read_json
from harness.options import RUN_OPTIONS
from metrics import lower_is_better

KEY_FIGURES = (
    "valid/loss",
    "valid/acc",
    "valid/mcc",
    "test/loss",
    "test/acc",
)  # shown beside the monitored one
MARK = "<!-- written by report.py -->"  # near the beginning of every page
IDENTITY = set(RUN_OPTIONS) - {"name", "group", "notes", "tags"}  # what tells nothing about a run
LOGGING = {
    "log_every",
    "watch",
    "watch_every",
    "checkpoint_every",
    "log_model",
    "data_dir",
}  # nor does this


@dataclass
class Run:
    """A run as its files show it."""

    path: Path
    label: str
    config: dict[str, Any]
    rows: list[dict[str, float]]  # of the journal, numbers only
    metrics: dict[str, Any] | None  # None until the run has finished
    state: str  # "finished", "under way", or where it died
    notes: list[str] = field(default_factory=list)  # what is wrong with its files

    @property
    def monitor(self) -> str:
        """The metric that selects the best epoch, such as "valid/loss"."""
        return str(self.config.get("monitor") or "valid/loss")

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch, and its number as "epoch": so far, if the run has not finished."""
        if self.metrics is not None:
            figures = {name: value for name, value in self.metrics.items() if is_number(value)}
            return {"epoch": figures.pop("best/epoch", math.nan), **figures}
        rows = [row for row in self.rows if math.isfinite(row.get(self.monitor, math.nan))]
        return min(rows, key=lambda row: ascending(row[self.monitor], self.monitor), default={})

    @property
    def last_step(self) -> str:
        """How far the journal goes."""
        return f"step {self.rows[-1]['step']:,.0f}" if self.rows else "step 0"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that may tell runs apart, and the versions of the libraries as "version of torch"."""
        settings = {
            name: value
            for name, value in self.config.items()
            if name not in IDENTITY | LOGGING | {"versions"}
        }
        versions = self.config.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        return settings | {
            f"version of {library}": version for library, version in versions.items()
        }

    def class_names(self, classes: int) -> list[str]:
        """The names of the classes, as far as the run has left them; else their indices."""
        names = (self.metrics or {}).get("class_names")
        return [
            *map(
                str, names if isinstance(names, list) and len(names) == classes else range(classes)
            )
        ]


def is_number(value: Any) -> bool:
    """Whether `value` is a float, or an int that a float can hold."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 1024)


def ascending(value: float, metric: str) -> float:
    """`value`, with its sign changed if higher is better: the least is the best."""
    return value if lower_is_better(metric) else -value


def find_runs(directories: Iterable[Path]) -> list[Run]:
    """The runs in these directories or directly beneath them, the best first; raises `UserError` if there is none."""
    found: dict[Path, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise UserError(
                f"{directory} is not a directory"
                if directory.exists()
                else f"{directory} does not exist"
            )
        children = (
            [directory] if holds_run(directory) else sorted(filter(holds_run, directory.iterdir()))
        )
        if not children:
            raise UserError(f"{directory} holds no run: no directory with {CONFIG} or {JOURNAL}")
        found |= {child.resolve(): child for child in children if child.resolve() not in found}
    return sort_runs([read_run(path) for path in found.values()])


def sort_runs(runs: list[Run]) -> list[Run]:
    """The runs in order, the best first; those with the same label get their path as label."""
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = str(run.path)
    return sorted(runs, key=rank)


def rank(run: Run) -> tuple[bool, str, float]:
    """A key to sort by: the runs with the same monitored figure together, the best first; those without one last."""
    figure = run.best.get(run.monitor, math.nan)
    known = math.isfinite(figure)
    return not known, run.monitor, ascending(figure, run.monitor) if known else 0.0


def holds_run(directory: Path) -> bool:
    """Whether a run has written its settings or its journal there."""
    return any((directory / name).is_file() for name in (CONFIG, JOURNAL))


def read_run(path: Path) -> Run:
    """The run in a directory; what is missing or unreadable is said in its notes."""
    config, metrics, notes = read_json(path / CONFIG), read_json(path / METRICS), []
    if config is None:
        notes.append(f"no readable {CONFIG}")
    if metrics is None and (path / METRICS).exists():
        notes.append(f"no readable {METRICS}")
    rows = read_journal(path / JOURNAL, notes)
    label = str((config or {}).get("name") or path.resolve().name)
    run = Run(path, label, config or {}, rows, metrics, "finished", notes)
    if metrics is None:
        run.state = (
            f"under way at {run.last_step}" if is_locked(path) else f"died at {run.last_step}"
        )
    return run


def read_journal(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """The numbers of the rows of a journal, which may be damaged or end in the middle of a line."""
    try:
        lines = (
            path.read_text(encoding="utf-8", errors="replace").splitlines()
            if path.is_file()
            else []
        )
    except OSError:
        return []
    rows, damaged = [], 0
    for line in lines:
        try:
            row = {
                name: float(value) for name, value in json.loads(line).items() if is_number(value)
            }
            if not math.isfinite(row["step"]):
                raise ValueError("no step")
            rows.append(row)
        except (ValueError, AttributeError, KeyError, OverflowError, RecursionError):
            damaged += 1
    if damaged:
        notes.append(f"{damaged} of {len(lines)} rows of {JOURNAL} can't be read")
    return rows


def is_locked(directory: Path) -> bool:
    """Whether a process is at work in the directory: a run keeps an exclusive lock on it until it ends."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once, by closing
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def differing(runs: list[Run]) -> list[str]:
    """The settings that are not the same in all the runs that have them, in their order."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(json.dumps(value, sort_keys=True))
    return [name for name, distinct in values.items() if len(distinct) > 1]


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, two or more together, by what sets the group apart from the others."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        rest = {
            name: value
            for name, value in run.settings.items()
            if name not in ("seed", "name", "notes", "tags")
        }
        if rest:
            by_settings.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    seeded = [
        members
        for members in by_settings.values()
        if len({str(run.config.get("seed")) for run in members}) > 1
    ]
    names = [
        name
        for name in differing([members[0] for members in seeded])
        if name not in ("seed", "name")
    ]
    named = {}
    for first, *others in seeded:
        label = ", ".join(f"{name} {text(first.settings.get(name))}" for name in names)
        label = label or (
            f"{first.label} and other seeds" if len(others) + 1 < len(runs) else "all seeds"
        )
        named[label if label not in named else f"{label}, {first.label}"] = [first, *others]
    return named


def one_per_seed(members: list[Run]) -> list[Run]:
    """The finished runs of a group, for each seed the last by name: a run that was repeated counts once."""
    finished = sorted(
        (run for run in members if run.metrics is not None), key=lambda run: str(run.path)
    )
    return [*{str(run.config.get("seed")): run for run in finished}.values()]


def text(value: Any) -> str:
    """A value of a file as it is shown: numbers to four digits, and no control characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    words = (
        "–"
        if value is None or value == []
        else value
        if isinstance(value, str)
        else json.dumps(value)
    )
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)


def seconds(value: float | None) -> str:
    """A duration in the largest unit that fits."""
    if value is None or not math.isfinite(value):
        return text(value)
    return (
        f"{value:.1f} s"
        if value < 100
        else f"{value / 60:.1f} min"
        if value < 6000
        else f"{value / 3600:.1f} h"
    )


def run_table(runs: list[Run]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: what differs between the settings, and the figures. The last column is a time in seconds."""
    settings = [name for name in differing(runs) if name != "name"]
    figures = shown_figures(runs)
    header = ["run", "state", *settings, "best epoch", *figures, "time"]
    shown = ["epoch", *figures, "seconds"]
    return header, [
        [
            run.label,
            run.state,
            *(run.settings.get(name) for name in settings),
            *(run.best.get(name) for name in shown),
        ]
        for run in runs
    ]


def shown_figures(runs: list[Run]) -> list[str]:
    """The figures for a table, the monitored ones first."""
    names = dict.fromkeys([*(run.monitor for run in runs), *KEY_FIGURES])
    return [name for name in names if any(name in run.best for run in runs)]


def seed_table(runs: list[Run], seeds: dict[str, list[Run]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean ± sample standard deviation over finished runs that differ in the seed only."""
    figures = shown_figures(runs)
    rows = []
    for name, group in seeds.items():
        members = one_per_seed(group)
        row = [name, str(len(members))]
        for figure in figures:
            values = [
                run.best[figure] for run in members if math.isfinite(run.best.get(figure, math.nan))
            ]
            few = f" (n = {len(values)})" if len(values) < len(members) else ""
            row.append(f"{mean(values):.4g} ± {stdev(values):.2g}{few}" if len(values) > 1 else "–")
        rows.append(row)
    return ["runs that differ in the seed only", "n", *figures], rows
