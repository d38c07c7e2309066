"""The data of the curves, as page.js draws them."""

from typing import Any

import numpy as np

from reporting.journal import NOTHING
from reporting.runs import Collection, RunFiles

MAX_POINTS = 1000  # of a curve
ALL_POINTS = 40_000  # of a metric's curves of all runs


def describe(found: Collection) -> dict[str, Any]:
    """What page.js needs to know of runs, groups and metrics, apart from the curves."""
    described = {}
    logged = set()
    important = {}
    for run in found.runs:
        logged.update(run.columns)
        important |= dict.fromkeys([run.monitor, *run.key_metrics])
        described[str(run.path)] = {
            "name": run.label,
            "finished": run.metrics is not None,
            "batchSize": str(run.config.get("batch_size")),
            "journal": id(run.journal.columns),  # changes when it is read anew
            "processes": list(run.log.processes.values()),
        }
    groups = {}
    for name, members in found.seed_groups.items():
        groups[f"{name} (n = {len(members)})"] = [str(run.path) for run in members]
    return {
        "runs": described,
        "groups": groups,
        "metrics": sorted(logged),
        "important": list(important),
    }


def curves(
    runs: list[RunFiles],
    wanted: dict[str, dict[str, list[int | None]]],
) -> dict[str, Any]:
    """Curves by metric and run: all rows of each `wanted` metric, or those from one to another."""
    most = min(MAX_POINTS, max(200, ALL_POINTS // len(runs)))
    by_metric = {}
    for metric, bounds in wanted.items():
        by_metric[metric] = {}
        for run in runs:
            column = run.columns.get(metric, NOTHING)
            finite = column[np.isfinite(column[:, 1])]
            rows = slice(*bounds.get(str(run.path), [None]))
            if len(finite[rows]):
                by_metric[metric][str(run.path)] = thinned(finite[rows], most)
    return by_metric


def thinned(column: np.ndarray, most: int) -> list[list[float]]:
    """Step and value of each number in a column of a journal.

    Of more than `most`, those of as many parts: last step, mean, lowest, highest, count.
    """
    points = column
    if len(column) > most:
        bounds = np.linspace(0, len(column), most + 1).astype(int)
        starts = bounds[:-1]
        counts = np.diff(bounds)
        values = column[:, 1]
        shares = values / np.repeat(counts, counts)  # their sum does not overflow
        points = np.column_stack(
            [
                column[bounds[1:] - 1, 0],
                np.add.reduceat(shares, starts),
                np.minimum.reduceat(values, starts),
                np.maximum.reduceat(values, starts),
                counts,
            ]
        )
    return [
        [step, *(float(f"{value:.6g}") for value in values)] for step, *values in points.tolist()
    ]
