"""Reads runs, finished or not, from their directories and tabulates how they differ."""

import dataclasses
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from harness import system
from harness.directory import CONFIG_FILE, JOURNAL_FILE, METRICS_FILE
from harness.errors import UserError
from harness.files import read_json
from harness.options import PROVENANCE, SharedSettings
from reporting.journal import NOTHING, Journal, is_number
from reporting.wandb_log import WandbLog

KEY_METRICS = 2  # of those that a script declares, shown beside the monitored one
SEED_AND_REMARKS = ("seed", "fold", "notes", "tags")  # may differ within a group
PREDICTIONS = "predictions.csv"
LEVELS = 2  # of directories below a given one that may hold runs


@dataclasses.dataclass
class RunFiles:
    """A run, as its files describe it."""

    path: Path
    label: str  # printable
    config: dict[str, Any]
    journal: Journal
    log: WandbLog
    metrics: dict[str, Any] | None  # None until the run has finished
    notes: list[str]  # what is wrong with the files
    state: str = "finished"  # or "under way", "died", "pruned", "failed", and a detail

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What was logged, by metric: float64 (rows, 2).

        The first column is the step, that of system metrics the minute.
        """
        return self.journal.columns | self.log.columns

    @cached_property
    def monitor(self) -> str:
        """The metric that runs are compared by: that of `compare_by`, or the monitored one."""
        return format_value(self.config.get("monitor") or "")

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the code, by file, of a run of this project; its script is "script"."""
        code = self.config.get("code")
        if "run_token" not in self.config or not isinstance(code, dict):
            return {}
        # So that variants of a script under other names are compared.
        script = re.search(r"([\w-]+)(\.py|\.main\()", str(self.config.get("command")))
        own = script and next((file for file in code if Path(file).stem == script[1]), None)
        return {"script" if file == own else file: checksum for file, checksum in code.items()}

    @property
    def declared(self) -> dict[str, Any]:
        """The script's metrics, such as "loss", and which value is better: "min" or "max"."""
        declared = self.config.get("metrics")
        return declared if isinstance(declared, dict) else {}

    @property
    def key_metrics(self) -> list[str]:
        """The metric to compare and the first declared ones, without "valid/"."""
        return [base_name(self.monitor), *list(self.declared)[:KEY_METRICS]]

    @property
    def sign(self) -> int | None:
        """`sign_of` the metric to compare."""
        return self.sign_of(self.monitor)

    def sign_of(self, metric: str) -> int | None:
        """1 if lower is better in a metric, -1 if higher is; None if not declared."""
        direction = self.declared.get(base_name(metric))
        return {"min": 1, "max": -1}.get(str(direction))

    @cached_property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch so far, and its number as "epoch"."""
        if self.metrics is not None:
            figures = {name: value for name, value in self.metrics.items() if is_number(value)}
            if "best/epoch" in figures:
                figures["epoch"] = figures.pop("best/epoch")
            return figures
        if self.sign is None:
            return {}
        figures = self.journal.columns.get(self.monitor, NOTHING)
        figures = figures[np.isfinite(figures[:, 1])]
        scores = self.sign * figures[:, 1]
        rows = map(self.journal.row, figures[scores == scores.min(initial=math.inf), 0])
        return min(rows, key=lambda row: row.get("valid/loss", 0), default={})  # as `Best`

    def compare_by(self, metric: str) -> None:
        """Compare the run by another metric than the monitored one.

        Unless it is among the figures of the best epoch, the last value logged by the end of this
        epoch counts, or the last one if the epoch is unknown.
        """
        logged = self.journal.columns.get(metric, NOTHING)
        epochs = self.journal.columns.get("epoch", NOTHING)
        later = epochs[epochs[:, 1] > self.best.get("epoch", math.inf), 0]
        by_then = logged[logged[:, 0] < later.min(initial=math.inf), 1]
        if len(by_then):
            self.best.setdefault(metric, float(by_then[-1]))
        self.monitor = metric

    def metric_in(self, file: str) -> str:
        """The metric to compare of the data in a file: `PREDICTIONS`, or that of the test data."""
        return self.monitor if file == PREDICTIONS else f"test/{base_name(self.monitor)}"

    @property
    def score(self) -> float | None:
        """The figure to compare, negated if higher is better; None if the run can't be ranked."""
        figure = self.best.get(self.monitor, math.nan)
        if self.sign and math.isfinite(figure):
            return self.sign * figure
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that may tell runs apart."""
        hidden = {"metrics", "name"}
        if "run_token" in self.config:  # it is of this project's scripts
            options = dataclasses.fields(SharedSettings)
            hidden = {option.name for option in options if not option.metadata["tells_apart"]}
            hidden |= {"metrics", "run_token", "name", *PROVENANCE}
        return {name: value for name, value in self.config.items() if name not in hidden}


SeedGroups = dict[str, list[RunFiles]]  # by a printable name
Table = list[list[Any]]  # rows; the first one is the header


@dataclasses.dataclass
class Collection:
    """What is in some directories."""

    runs: list[RunFiles]  # the best first
    seed_groups: SeedGroups
    studies: list[Any]  # Optuna's
    problems: list[str]


def base_name(metric: str) -> str:
    """A metric's name without its prefix: "loss" for "valid/loss"."""
    return metric.split("/", 1)[-1]


def find_runs(directories: Sequence[Path], known: Sequence[RunFiles] = ()) -> list[RunFiles]:
    """The runs in or below these directories; of `known` ones, what is new is read.

    Raises `UserError` if a directory holds no run.
    """
    by_path = {run.path: run for run in known}
    paths = {}
    for directory in directories:
        gone = known and not directory.exists()
        found = [] if gone else run_directories(directory)
        if not found and not known:
            raise UserError(
                f"{directory} holds no run: no directory with {CONFIG_FILE} or {JOURNAL_FILE}"
            )
        for path in found:
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise UserError("no runs are left")
    runs = [read_run(path, by_path.get(path)) for path in paths.values()]
    _compare_code(runs)
    return runs


def _compare_code(runs: list[RunFiles]) -> None:
    """Make the code a setting that differs between runs, if a file does; else leave it out."""
    checksums = defaultdict(set)
    for run in runs:
        for file, checksum in run.code.items():
            checksums[file].add(str(checksum))
    changed = [file for file, distinct in checksums.items() if len(distinct) > 1]
    for run in runs:
        if changed and run.code:
            code = str([run.code.get(file) for file in changed])
            name = changed[0] if len(changed) == 1 else f"{len(changed)} files"
            run.config[f"code of {name}"] = f"{zlib.crc32(code.encode()):08x}"


def run_directories(directory: Path, levels: int = LEVELS) -> list[Path]:
    """The directories of runs: this one, or those up to so many levels below it."""
    try:
        if any((directory / name).is_file() for name in (CONFIG_FILE, JOURNAL_FILE)):
            return [directory]
        children = sorted(filter(Path.is_dir, directory.iterdir()))
    except OSError as error:
        if levels < LEVELS:
            return []
        raise UserError(f"{directory}: {error.strerror}") from None
    found = []
    for child in children:
        if levels and child.name != "wandb":
            found += run_directories(child, levels - 1)
    return found


def sort_runs(runs: list[RunFiles]) -> list[RunFiles]:
    """The runs, by the metric to compare, from best to worst; those that can't be ranked come last.

    Runs that share a label get their path added to it.
    """
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label += format_value(f" ({run.path})")
    return sorted(runs, key=lambda run: (run.score is None, run.monitor, run.score or 0.0))


def read_run(path: Path, known: RunFiles | None = None) -> RunFiles:
    """The run in a directory; its notes list the files that are missing or unreadable.

    If the run is `known`, only what is new of its journal is read. Its W&B log is not read yet.
    """
    config = read_json(path / CONFIG_FILE)
    metrics = read_json(path / METRICS_FILE)
    notes = []
    for name, content in ((CONFIG_FILE, config), (METRICS_FILE, metrics)):
        if content is None and (path / name).exists():
            notes.append(f"no readable {name}")
    config = config or {}
    versions = config.pop("versions", None)
    if isinstance(versions, dict):
        for library, version in versions.items():
            config[f"version of {library}"] = version
    journal = known.journal if known else Journal(path / JOURNAL_FILE)
    journal.read()
    is_same = known and known.config.get("run_token") == config.get("run_token")
    log = known.log if is_same else WandbLog(path)
    unreadable = journal.unreadable + journal.ends_early
    if unreadable:
        lines = journal.lines + journal.ends_early
        notes.append(f"{unreadable} of {lines} rows of {JOURNAL_FILE} can't be read")
    label = path.resolve().name
    if name := config.get("name"):
        label = f"{name} ({label})"
    state = "finished"
    if metrics is None:
        state = f"at step {journal.last_step:,.0f}"
        if is_locked(path):
            state = f"under way {state}"
        elif "output_dir" in config:  # other programs don't lock their directory
            state = f"died {state}"
    return RunFiles(path, format_value(label), config, journal, log, metrics, notes, state)


def is_locked(directory: Path) -> bool:
    """Whether a process is using the directory: a run locks it exclusively until it ends."""
    try:
        system.unlock(directory, system.lock(directory))
    except OSError as error:  # any other one: the directory can't be opened
        return isinstance(error, BlockingIOError)
    return False


def differing(runs: list[RunFiles]) -> list[str]:
    """The names of the settings that differ between the runs that have them."""
    values = defaultdict(set)
    for run in runs:
        for name, value in run.settings.items():
            values[name].add(json.dumps(value, sort_keys=True))
    return [name for name, distinct in values.items() if len(distinct) > 1]


def groups(runs: list[RunFiles]) -> SeedGroups:
    """Groups of two or more finished runs that differ only in seed or fold, one of each."""
    by_settings = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.path):  # of a repeated run, the last one counts
        if run.metrics is None:
            continue
        settings = run.settings
        for name in SEED_AND_REMARKS:
            settings.pop(name, None)
        by_seed = by_settings[json.dumps(settings, sort_keys=True)]
        by_seed[str((run.config.get("seed"), run.config.get("fold")))] = run
    names = [name for name in differing(runs) if name not in SEED_AND_REMARKS]
    named = {}
    for by_seed in by_settings.values():
        members = list(by_seed.values())
        if len(members) < 2:
            continue
        first = members[0]
        parts = [f"{name} {format_value(first.settings.get(name))}" for name in names]
        label = ", ".join(parts) or "all but seed and fold alike"
        if label in named:
            label += f", {first.label}"
        named[format_value(label)] = members
    return named


@dataclasses.dataclass
class Mean:
    """The mean of a figure over seeds or folds."""

    mean: float
    sd: float  # of the sample
    low: float  # ends of the 95% interval of the mean
    high: float


def format_value(value: Any) -> str:
    """A value as it is shown: floats to four digits, control characters escaped."""
    if isinstance(value, Mean):
        return format_mean(*dataclasses.astuple(value))
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e9:
            return f"{value:.0f}"
        return f"{value:.4g}"
    if value is None:
        return "–"
    string = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in string)


def format_mean(average: float, deviation: float, *interval: float) -> str:
    """Mean ± standard deviation, and the 95% interval, all with the same decimals.

    The mean has at least four digits, the deviation two.
    """
    rounded = Decimal(f"{average:.3e}") + Decimal(f"{deviation:.1e}")  # has the decimals of both
    decimals = max(0, -rounded.as_tuple().exponent)
    shown = [f"{number:.{decimals}f}" for number in (average, deviation, *interval)]
    text = f"{shown[0]} ± {shown[1]}"
    return f"{text} (95%: {shown[2]} to {shown[3]})" if interval else text


def run_table(runs: list[RunFiles]) -> Table:
    """The settings that differ, and the figures."""
    settings = differing(runs)
    figures = shown_figures(runs)
    taken = {"directory", "run", "state", "seconds", *figures}
    names = [f"{name} (setting)" if name in taken else name for name in settings]
    rows = [["run", "state", "best epoch", *figures, "seconds", *names]]
    for run in runs:
        row = [run.label, run.state]
        row += map(run.best.get, ["epoch", *figures, "seconds"])
        row += map(run.settings.get, settings)
        rows.append(row)
    return rows


def shown_figures(runs: list[RunFiles]) -> list[str]:
    """The figures for a table: those to compare, then the key metrics of validation and test."""
    names = dict.fromkeys(run.monitor for run in runs)
    for part in ("valid", "test"):
        for run in runs:
            for name in run.key_metrics:
                names[f"{part}/{name}"] = None
    return [name for name in names if any(name in run.best for run in runs)]


def seed_table(found: Collection) -> Table:
    """Each group's mean ± standard deviation, and the 95% interval of the mean."""
    from metrics import mean_interval  # imports torch, which `report.py --watch` does without

    figures = shown_figures(found.runs)
    rows = [["runs that differ in seed or fold only", "n", *figures]]
    for name, members in found.seed_groups.items():
        row = [name, len(members)]
        for figure in figures:
            values = [run.best.get(figure, math.nan) for run in members]
            average = None
            if all(map(math.isfinite, values)):
                average = Mean(mean(values), stdev(values), *mean_interval(values))
            row.append(average)
        rows.append(row)
    return rows
