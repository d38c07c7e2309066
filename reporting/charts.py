"""The data of the charts, as plotly.js takes it; the page's own JavaScript draws them."""

import html
import math
from statistics import fmean
from typing import Any

import torch

from metrics import calibration
from reporting.predictions import Predictions
from reporting.runs import Run, text

POINTS, SHORT = 300_000, 500  # in all curves together; in a curve that is never thinned
OVERVIEW = (
    "valid/loss",
    "train/loss_step",
    "valid/acc",
    "train/acc_step",
)  # after the monitored metrics


def label(words: str, longest: int = 48) -> str:
    """Text for a chart, in which plotly.js would interpret HTML; long words are shortened in the middle."""
    half = longest // 2
    return html.escape(
        words if len(words) <= longest else f"{words[:half]}…{words[1 - half :]}", quote=False
    )


def finite(value: float) -> float | None:
    """`value` to six digits; None, which JSON has a word for, if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def curves(runs: list[Run], groups: dict[str, list[Run]]) -> dict[str, Any]:
    """For each metric the curve of every run, and of every group of seeds its mean and standard deviation."""
    names = dict.fromkeys(
        name for run in runs for row in run.rows for name in row if name not in ("step", "epoch")
    )
    total = sum(len(run.rows) * 4 for run in runs)
    every = -(-total // POINTS)
    metrics: dict[str, Any] = {}
    for name in sorted(names, key=lambda name: (not name.startswith("valid/"), name)):
        lines = []
        for i, run in enumerate(runs):
            rows = [row for row in run.rows if name in row]
            rows = thinned(rows, every)
            if rows:
                x, y = [int(row["step"]) for row in rows], [finite(row[name]) for row in rows]
                lines.append({"run": i, "x": x, "y": y})
        bands = [
            {"group": i, **band(members, name, every)} for i, members in enumerate(groups.values())
        ]
        metrics[name] = {"runs": lines, "groups": [band for band in bands if band["x"]]}
    monitored = list(dict.fromkeys(run.monitor for run in runs))
    overview = [name for name in dict.fromkeys([*monitored, *OVERVIEW]) if name in metrics][:4]
    grouped = {id(run): i for i, members in enumerate(groups.values()) for run in members}
    return {
        "runs": [{"name": label(text(run.label)), "group": grouped.get(id(run))} for run in runs],
        "groups": [label(text(f"{name} (n = {len(members)})")) for name, members in groups.items()],
        "metrics": metrics,
        "overview": overview,
        "thinned": every > 1,
    }


def thinned(points: list[Any], every: int) -> list[Any]:
    """The last of so many points; all of a short curve."""
    return points[::-every][::-1] if len(points) > SHORT else points


def band(runs: list[Run], name: str, every: int) -> dict[str, list[float]]:
    """Mean and standard deviation of a metric at each step that two runs or more have reached, and their number."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if math.isfinite(row.get(name, math.nan)):
                at.setdefault(int(row["step"]), []).append(row[name])
    points = []
    for step, values in thinned(sorted(at.items()), every):
        if len(values) > 1:
            middle = fmean(values)  # statistics.stdev is exact, and far slower
            deviation = math.sqrt(
                sum((value - middle) ** 2 for value in values) / (len(values) - 1)
            )
            points.append((step, finite(middle), finite(deviation), len(values)))
    return dict(zip(("x", "y", "sd", "n"), map(list, zip(*points)))) if points else {"x": []}


def confusion(predictions: Predictions, class_names: list[str]) -> dict[str, Any]:
    """A confusion matrix with a row per label: shade and hover text give the share of the row."""
    classes = len(class_names)
    cells = torch.bincount(
        predictions.labels * classes + predictions.predictions, minlength=classes**2
    )
    counts = cells.view(classes, classes)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    names = [label(text(name), 20) for name in class_names]
    heatmap = {
        "type": "heatmap", "z": shares.tolist(), "text": counts.tolist(), "x": names, "y": names,
        "texttemplate": "%{text}" if classes <= 20 else "", "showscale": False,
        "colorscale": [[0, "rgba(47,111,181,0)"], [1, "rgba(47,111,181,1)"]],
        "hovertemplate": "label %{y}<br>prediction %{x}<br>%{text} examples, %{z:.1%} of the label<extra></extra>",
    }  # fmt: skip
    axis = {"type": "category", "showgrid": False}
    layout = {"title": {"text": "Confusion matrix"}, "xaxis": {**axis, "title": {"text": "prediction"}},
              "yaxis": {**axis, "title": {"text": "label"}, "autorange": "reversed"}}  # fmt: skip
    return {"data": [heatmap], "layout": layout}


def reliability(predictions: Predictions) -> dict[str, Any]:
    """A reliability diagram: the accuracy of the predictions, by the probability that the model gave them."""
    counts, confidences, accuracies = calibration(predictions.probabilities, predictions.labels)
    used = counts > 0
    diagonal = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": {"dash": "dot", "color": "#888"},
                "name": "perfect calibration", "hoverinfo": "skip"}  # fmt: skip
    points = {
        "x": confidences[used].tolist(), "y": accuracies[used].tolist(), "customdata": counts[used].tolist(),
        "mode": "markers", "name": "this model",
        "marker": {"size": (4 + 20 * (counts[used] / counts.max()).sqrt()).tolist()},
        "hovertemplate": "mean probability %{x:.1%}<br>accuracy %{y:.1%}<br>%{customdata:,} examples<extra></extra>",
    }  # fmt: skip
    layout = {
        "title": {"text": "Calibration"}, "legend": {"x": 0, "y": 1},
        "xaxis": {"title": {"text": "probability of the predicted class"}, "range": [0, 1.03], "tickformat": ".0%"},
        "yaxis": {"title": {"text": "accuracy"}, "range": [0, 1.03], "tickformat": ".0%"},
    }  # fmt: skip
    return {"data": [diagonal, points], "layout": layout}
