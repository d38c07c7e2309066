"""Collects what report.py shows: runs, their groups, sweeps, and what is wrong with their files."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from harness.directory import CONFIG_FILE
from harness.errors import UserError
from harness.files import list_names
from reporting.runs import Collection, RunFiles, find_runs, format_value, groups, sort_runs
from reporting.sweep import open_study


def collect(
    directories: list[Path], metric: str | None = None, known: Sequence[RunFiles] = ()
) -> Collection:
    """Read the runs and sweeps; of journals that are `known`, what is new.

    `metric` is what to compare in place of the monitored one. Raises `UserError` if a directory
    holds no run, or no run has the metric.
    """
    runs = find_runs(directories, known)
    studies = []
    problems = []
    files = []
    for directory in directories:
        files += [directory / "study.db", *sorted(directory.glob("*/study.db"))]
    for file in dict.fromkeys(files):  # a sweep may be named beside the directory above it
        if file.is_file():
            try:
                studies.append(open_study(file.parent, runs))
            except UserError as error:
                problems.append(f"{file.parent}: {error}")
    if metric:
        names = set()
        for run in runs:
            names.update(run.best, run.journal.columns)
            run.compare_by(metric)
        if metric not in names and not known:
            near = ", ".join(map(format_value, get_close_matches(metric, names, cutoff=0)))
            raise UserError(f"--metric {metric}: no run has it; the nearest names: {near}")
    runs = sort_runs(runs)
    for run in runs:
        problems += [f"{run.label}: {note}" for note in run.notes]
    undeclared = [run.label for run in runs if run.sign is None and (run.monitor or len(runs) > 1)]
    if undeclared:
        problems.append(
            f"Not ranked: {list_names(undeclared)}: {CONFIG_FILE} does not say whether lower or "
            f"higher is better in {metric or 'the monitored metric'}"
        )
    return Collection(runs, groups(runs), studies, problems)
