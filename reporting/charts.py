"""The data of the charts, in plotly.js's format; the page's own JavaScript draws them."""

import html
import math
from collections import defaultdict
from statistics import fmean, stdev
from typing import Any

from metrics import calibration
from reporting.predictions import Predictions
from reporting.runs import RunFiles, SeedGroups

MAX_POINTS = 300_000  # in all curves together
SHORT = 500  # points in a curve that is never thinned
OVERVIEW = ("valid/loss", "train/loss_step", "valid/acc", "train/acc_step")  # after the monitored
Figure = dict[str, Any]  # data and layout of a chart, as plotly.js takes them


def chart_text(string: str, longest: int = 48) -> str:
    """Text for plotly.js, which interprets HTML; a long string is shortened in the middle."""
    if len(string) > longest:
        string = f"{string[: longest // 2]}…{string[1 - longest // 2 :]}"
    return html.escape(string, quote=False)


def finite(value: float) -> float | None:
    """`value` to six digits; None, which is null in JSON, if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def curves(runs: list[RunFiles], seed_groups: SeedGroups) -> dict[str, Any]:
    """For each metric, the curve of every run, and mean ± standard deviation of every group."""
    total = 4 * sum(len(run.rows) for run in runs)  # most rows have about four metrics
    every = math.ceil(total / MAX_POINTS)
    names = set()
    for run in runs:
        names.update(*run.rows)
    names -= {"step", "epoch"}
    metrics = {}
    for name in sorted(names, key=lambda name: (not name.startswith("valid/"), name)):
        lines = []
        for i, run in enumerate(runs):
            rows = thinned([row for row in run.rows if name in row], every)
            if rows:
                steps = [int(row["step"]) for row in rows]
                values = [finite(row[name]) for row in rows]
                lines.append({"run": i, "x": steps, "y": values})
        bands = []
        for i, members in enumerate(seed_groups.values()):
            points = band(members, name, every)
            if points:
                steps, means, deviations, counts = zip(*points)
                bands.append(
                    {
                        "group": i,
                        "x": steps,
                        "y": means,
                        "sd": deviations,
                        "n": counts,
                    }
                )
        metrics[name] = {"runs": lines, "groups": bands}
    group_names = []
    group_of = {}
    for i, (name, members) in enumerate(seed_groups.items()):
        group_names.append(chart_text(f"{name} (n = {len(members)})"))
        group_of.update((run.path, i) for run in members)
    shown_first = dict.fromkeys([*(run.monitor for run in runs), *OVERVIEW])
    return {
        "runs": [{"name": chart_text(run.label), "group": group_of.get(run.path)} for run in runs],
        "groups": group_names,
        "metrics": metrics,
        "overview": [name for name in shown_first if name in metrics][:4],
        "thinned": every > 1,
    }


def thinned(points: list[Any], every: int) -> list[Any]:
    """Every so many of the points, with the last one; all points of a short curve."""
    if len(points) <= SHORT:
        return points
    return points[(len(points) - 1) % every :: every]


def band(runs: list[RunFiles], name: str, every: int) -> list[tuple]:
    """Step, mean, standard deviation and count of a metric, where at least two runs have it."""
    by_step = defaultdict(list)
    for run in runs:
        for row in run.rows:
            if math.isfinite(row.get(name, math.nan)):
                by_step[int(row["step"])].append(row[name])
    points = []
    for step, values in thinned(sorted(by_step.items()), every):
        if len(values) > 1:
            mean = fmean(values)
            deviation = stdev(values, mean)
            points.append((step, finite(mean), finite(deviation), len(values)))
    return points


def titled(title: str, **options: Any) -> dict[str, Any]:
    """The layout of a chart or an axis."""
    return {"title": {"text": chart_text(title)}, **options}


def confusion(predictions: Predictions) -> Figure:
    """A confusion matrix with a row per label: shade and hover text give the share of the row."""
    names = [chart_text(name, 20) for name in predictions.class_names]
    counts = predictions.confusion.counts
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    heatmap = {
        "type": "heatmap",
        "z": shares.tolist(),
        "text": counts.tolist(),
        "x": names,
        "y": names,
        "texttemplate": "%{text}" if len(names) <= 20 else "",
        "showscale": False,
        "colorscale": [[0, "rgba(47,111,181,0)"], [1, "rgba(47,111,181,1)"]],
        "hovertemplate": "label %{y}<br>prediction %{x}<br>"
        "%{text} examples, %{z:.1%} of the label<extra></extra>",
    }
    xaxis = titled("prediction", type="category", showgrid=False)
    yaxis = titled("label", type="category", showgrid=False, autorange="reversed")
    return {"data": [heatmap], "layout": titled("Confusion matrix", xaxis=xaxis, yaxis=yaxis)}


def reliability(predictions: Predictions) -> Figure:
    """A reliability diagram: accuracy by the probability that the model gave its predictions."""
    counts, confidences, accuracies = calibration(predictions.probabilities, predictions.labels)
    used = counts > 0
    diagonal = {
        "x": [0, 1],
        "y": [0, 1],
        "mode": "lines",
        "line": {"dash": "dot", "color": "#888"},
        "name": "perfect calibration",
        "hoverinfo": "skip",
    }
    points = {
        "x": confidences[used].tolist(),
        "y": accuracies[used].tolist(),
        "customdata": counts[used].tolist(),
        "mode": "markers",
        "name": "this model",
        "marker": {"size": (4 + 20 * (counts[used] / counts.max()).sqrt()).tolist()},
        "hovertemplate": "mean probability %{x:.1%}<br>accuracy %{y:.1%}<br>"
        "%{customdata:,} examples<extra></extra>",
    }
    axis = {"range": [0, 1.03], "tickformat": ".0%"}
    layout = titled(
        "Calibration",
        legend={"x": 0, "y": 1},
        xaxis=titled("probability of the predicted class", **axis),
        yaxis=titled("accuracy", **axis),
    )
    return {"data": [diagonal, points], "layout": layout}
