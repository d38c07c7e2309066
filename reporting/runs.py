"""Reads runs, finished or not, from their directories, and compares them in tables."""

import dataclasses
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
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

KEY_METRICS = 2  # how many of the declared metrics are shown beside the monitored one
SEED_AND_REMARKS = ("seed", "fold", "notes", "tags")  # may differ within a group
PREDICTIONS = "predictions.csv"
LEVELS = 2  # how far below a given directory runs are looked for


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
        """What was logged, by metric: float64 (rows, 2), step and value.

        System metrics have minutes instead of steps.
        """
        return self.journal.columns | self.log.columns

    @cached_property
    def monitor(self) -> str:
        """The metric to compare runs by: that of `compare_by`, or else the monitored one."""
        return format_value(self.config.get("monitor") or "")

    @property
    def code(self) -> dict[str, str]:
        """Checksums of the code, by file, of a run of this project.

        Its script is called "script", to compare copies of a script that have other names.
        """
        code = self.config.get("code")
        if "run_token" not in self.config or not isinstance(code, dict):
            return {}
        match = re.search(r"([\w-]+)(\.py|\.main\()", str(self.config.get("command")))
        stem = match and match[1]
        script = next((file for file in code if Path(file).stem == stem), None)
        return {"script" if file == script else file: checksum for file, checksum in code.items()}

    @property
    def declared(self) -> dict[str, Any]:
        """The script's metrics, such as "loss", and which value is better: "min" or "max"."""
        declared = self.config.get("metrics")
        return declared if isinstance(declared, dict) else {}

    @property
    def key_metrics(self) -> list[str]:
        """The names of the metric to compare and of the first declared ones, without a prefix."""
        return [base_name(self.monitor), *list(self.declared)[:KEY_METRICS]]

    @property
    def sign(self) -> int | None:
        """`sign_of` the metric to compare."""
        return self.sign_of(self.monitor)

    def sign_of(self, metric: str) -> int | None:
        """1 if lower values of a metric are better, -1 if higher ones are; None if undeclared."""
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
        column = self.journal.columns.get(self.monitor, NOTHING)
        column = column[np.isfinite(column[:, 1])]
        scores = self.sign * column[:, 1]
        steps = column[scores == scores.min(initial=math.inf), 0]
        rows = map(self.journal.row, steps)
        # Of equal ones, the one that training keeps.
        return min(rows, key=lambda row: row.get("valid/loss", 0), default={})

    def compare_by(self, metric: str) -> None:
        """Compare the run by another metric than the monitored one.

        If the best epoch's figures lack it, its last value by the end of that epoch counts; if the
        epoch is unknown, its last value.
        """
        logged = self.journal.columns.get(metric, NOTHING)
        epochs = self.journal.columns.get("epoch", NOTHING)
        best_epoch = self.best.get("epoch", math.inf)
        later = epochs[epochs[:, 1] > best_epoch, 0]
        by_then = logged[logged[:, 0] < later.min(initial=math.inf), 1]
        if len(by_then):
            self.best.setdefault(metric, float(by_then[-1]))
        self.monitor = metric

    def metric_in(self, file: str) -> str:
        """The metric to compare: of validation data in `PREDICTIONS`, else of test data."""
        return self.monitor if file == PREDICTIONS else f"test/{base_name(self.monitor)}"

    @property
    def score(self) -> float | None:
        """The figure to rank by, negated if higher is better; None if the run can't be ranked."""
        figure = self.best.get(self.monitor, math.nan)
        if self.sign and math.isfinite(figure):
            return self.sign * figure
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that may tell runs apart."""
        hidden = {"metrics", "name"}
        if "run_token" in self.config:  # a run of this project
            options = dataclasses.fields(SharedSettings)
            hidden |= {option.name for option in options if not option.metadata["tells_apart"]}
            hidden |= {"run_token", *PROVENANCE}
        return {name: value for name, value in self.config.items() if name not in hidden}


SeedGroups = dict[str, list[RunFiles]]  # by a printable name
Table = list[list[Any]]  # rows; the first one is the header


@dataclasses.dataclass
class Collection:
    """What directories contain."""

    runs: list[RunFiles]  # the best first
    seed_groups: SeedGroups
    studies: list[Any]  # Optuna's
    problems: list[str]


def base_name(metric: str) -> str:
    """A metric's name without its prefix: "loss" for "valid/loss"."""
    return metric.split("/", 1)[-1]


def find_runs(directories: Sequence[Path], known: Sequence[RunFiles] = ()) -> list[RunFiles]:
    """The runs in or below these directories. Of `known` runs, only what is new is read.

    Raises `UserError` if a directory holds no run, or if none of the known runs is left.
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
    """If the runs' code differs, add a setting: a checksum of the files that differ."""
    changed = _differing_keys(run.code for run in runs)
    for run in runs:
        if changed and run.code:
            code = str([run.code.get(file) for file in changed])
            name = changed[0] if len(changed) == 1 else f"{len(changed)} files"
            run.config[f"code of {name}"] = f"{zlib.crc32(code.encode()):08x}"


def run_directories(directory: Path, levels: int = LEVELS) -> list[Path]:
    """The directories of runs: this one, or those up to this many levels below it.

    Raises `UserError` if the topmost one can't be read.
    """
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
    """The run in a directory. Its notes say what can't be read.

    Of the journal of a `known` run, only what is new is read. The W&B log is not read yet.
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
        elif "output_dir" in config:  # other programs do not lock their directory
            state = f"died {state}"
    return RunFiles(path, format_value(label), config, journal, log, metrics, notes, state)


def is_locked(directory: Path) -> bool:
    """Whether a run is using the directory: a run locks its directory until it ends."""
    try:
        system.unlock(directory, system.lock(directory))
    except BlockingIOError:
        return True
    except OSError:  # the directory can't be opened
        return False
    return False


def differing(runs: list[RunFiles]) -> list[str]:
    """The names of the settings that differ between the runs that have them."""
    return _differing_keys(run.settings for run in runs)


def _differing_keys(mappings: Iterable[dict[str, Any]]) -> list[str]:
    """The keys whose values differ between the mappings that have them."""
    values = defaultdict(set)
    for mapping in mappings:
        for key, value in mapping.items():
            values[key].add(json.dumps(value, sort_keys=True))
    return [key for key, distinct in values.items() if len(distinct) > 1]


def groups(runs: list[RunFiles]) -> SeedGroups:
    """Groups of two or more finished runs that differ in seed or fold only."""
    by_settings = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.path):  # of the same seed and fold, the last counts
        if run.metrics is None:
            continue
        settings = run.settings
        for name in SEED_AND_REMARKS:
            settings.pop(name, None)
        by_seed = by_settings[json.dumps(settings, sort_keys=True)]
        seed_and_fold = str((run.config.get("seed"), run.config.get("fold")))
        by_seed[seed_and_fold] = run
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
    """A figure's mean over seeds or folds."""

    mean: float
    sd: float  # of the sample
    low: float  # ends of the 95% interval of the mean
    high: float


def format_value(value: Any) -> str:
    """A value as text: floats to four digits, and control characters escaped."""
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
    """Mean ± standard deviation, and the 95% interval if it is given, with the same decimals.

    The mean has at least four significant digits, the deviation two.
    """
    total = Decimal(f"{average:.3e}") + Decimal(f"{deviation:.1e}")  # has the decimals of both
    decimals = max(0, -total.as_tuple().exponent)
    shown = [f"{number:.{decimals}f}" for number in (average, deviation, *interval)]
    text = f"{shown[0]} ± {shown[1]}"
    if interval:
        text += f" (95%: {shown[2]} to {shown[3]})"
    return text


def run_table(runs: list[RunFiles]) -> Table:
    """A row per run: its figures, and the settings that differ."""
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
