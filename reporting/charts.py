"""The data of the charts, in plotly.js's format; the page's own JavaScript draws them."""

import math
from collections import defaultdict
from statistics import fmean, stdev
from typing import Any

from reporting.runs import RunFiles, SeedGroups

MAX_POINTS = 1000  # in a curve or chart


def finite(value: float) -> float | None:
    """`value` to six digits; None, which is null in JSON, if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def curves(runs: list[RunFiles], seed_groups: SeedGroups) -> dict[str, Any]:
    """For each metric, the curve of every run, and mean ± standard deviation of every group."""
    logged = set()
    names = [run.monitor for run in runs]
    for run in runs:
        logged.update(*run.rows)
        for name in run.key_metrics:
            names += [f"valid/{name}", f"train/{name}_step"]
    logged -= {"step", "epoch"}
    names += sorted(logged, key=lambda name: (not name.startswith("valid/"), name))
    metrics = {}
    for name in dict.fromkeys(names):
        if name not in logged:
            continue
        lines = []
        for i, run in enumerate(runs):
            points = [(row["step"], finite(row[name])) for row in run.rows if name in row]
            if points:
                lines.append({"run": i, "points": thinned(points)})
        bands = []
        for i, members in enumerate(seed_groups.values()):
            points = band(members, name)
            if points:
                bands.append({"group": i, "points": points})
        metrics[name] = {"runs": lines, "groups": bands}
    group_names = []
    grouped = []
    for name, members in seed_groups.items():
        group_names.append(f"{name} (n = {len(members)})")
        grouped += members
    return {
        "runs": [{"name": run.label, "isGrouped": run in grouped} for run in runs],
        "groups": group_names,
        "metrics": metrics,
        "overview": list(metrics)[:4],
    }


def thinned(points: list[Any]) -> list[Any]:
    """Up to `MAX_POINTS` of the points, at equal distances, with the last one."""
    every = max(1, math.ceil(len(points) / MAX_POINTS))
    first = (len(points) - 1) % every
    return points[first::every]


def band(runs: list[RunFiles], name: str) -> list[tuple]:
    """Step, mean, standard deviation and count of a metric, where at least two runs have it."""
    by_step = defaultdict(list)
    for run in runs:
        for row in run.rows:
            if math.isfinite(row.get(name, math.nan)):
                by_step[row["step"]].append(row[name])
    points = []
    for step, values in thinned(sorted(by_step.items())):
        if len(values) > 1:
            mean = finite(fmean(values))
            deviation = finite(stdev(values))
            points.append((step, mean, deviation, len(values)))
    return points
