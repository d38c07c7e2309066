"""Shows a sweep of sweep_offline.py, from its Optuna study."""

import contextlib
import csv
import json
import math
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.errors import UserError
from reporting.charts import add_chart, chart_text, finite
from reporting.markup import paragraph
from reporting.runs import RunFiles, format_value

ENOUGH_TRIALS = 20  # complete ones; importances of fewer are chance
STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "under way",
    "WAITING": "waiting",
}


def open_study(directory: Path, runs: list[RunFiles]) -> Any:
    """The Optuna study of a sweep. Raises `UserError` if it can't be read.

    Completes those `runs` that are its trials: label, config and state.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed: pip install -r requirements-sweep.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directory = directory.resolve()
    file = quote(str(directory / "study.db"))
    url = f"sqlite:///file:{file}?mode=ro&uri=true"  # read-only: the search may be under way
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        study = optuna.load_study(study_name=None, storage=storage)
        trials = study.get_trials(deepcopy=False)
        if not isinstance(study.user_attrs.get("sweep"), dict) or len(study.directions) > 1:
            raise ValueError("it is not of sweep_offline.py")
    except Exception as error:  # SQLAlchemy's, SQLite's or Optuna's own
        raise UserError(f"study.db can't be read ({str(error).splitlines()[0][:100]})") from None
    by_directory = {run.path.resolve(): run for run in runs}
    for trial in trials:
        run = by_directory.get(directory / str(trial.user_attrs.get("run")))
        if run:
            run.label = f"trial {trial.number}"
            run.config = {"monitor": sweep_metric(study)} | trial.params | run.config
            if trial.state.name == "PRUNED":
                run.state = "pruned"
            elif trial.state.name == "FAIL":
                run.state = "failed"
                run.detail = f": {trial.user_attrs.get('error', 'no reason is known')}"
    return study


def sweep_metric(study: Any) -> str:
    """The name of the metric that a sweep searches by."""
    return str(study.user_attrs["sweep"].get("metric", "value"))


def show_sweep(study: Any, directory: Path, figures: dict[str, Any]) -> str:
    """A sweep: its trials over time, its parameters and their importances."""
    trials = study.get_trials(deepcopy=False)
    metric = chart_text(sweep_metric(study))
    states = Counter(trial.state.name for trial in trials)
    counts = [f"{states[state]} {name}" for state, name in STATES.items() if state in states]
    parts = [
        paragraph(f"{len(trials)} trials: {', '.join(counts)}."),
        add_chart(figures, history(study, trials, metric)),
    ]
    if "COMPLETE" in states:
        parts.append(add_chart(figures, parallel_coordinates(study)))
    parts.append(add_chart(figures, parameters(trials, metric)))
    importances = read_importances(directory)
    if importances and states["COMPLETE"] >= ENOUGH_TRIALS:
        parts.append(paragraph(f"Importances: {', '.join(importances)}."))
    else:
        remark = (
            "Importances are computed at the end of a search with "
            f"{ENOUGH_TRIALS} complete trials or more."
        )
        parts.append(paragraph(remark, "soft"))
    return "".join(parts)


def read_importances(directory: Path) -> list[str]:
    """The importances that sweep_offline.py computes at the end of the search; empty before."""
    with (
        contextlib.suppress(OSError, ValueError, csv.Error),
        (directory / "importances.csv").open(newline="") as file,
    ):
        _, *rows = csv.reader(file)
        return [f"{format_value(name)} {float(share):.0%}" for name, share in rows]
    return []


def points(trials: list[Any], positions: list[Any], metric: str) -> list[dict[str, Any]]:
    """A trace of the complete trials and one of the pruned ones, at their last reported values.

    `positions` are their places on the x axis.
    """
    traces = []
    for state, symbol, color in (("COMPLETE", "circle", "#3b82c4"), ("PRUNED", "x", "#d9662b")):
        trace = {
            "x": [],
            "y": [],
            "text": [],
            "mode": "markers",
            "name": STATES[state],
            "legendgroup": state,
            "marker": {"symbol": symbol, "color": color, "size": 8},
            "hovertemplate": f"{metric} %{{y:.4g}}<br>%{{text}}<extra>{STATES[state]}</extra>",
        }
        for trial, position in zip(trials, positions):
            if trial.state.name == state and trial.value is not None:
                lines = [f"trial {trial.number}"]
                for name, value in trial.params.items():
                    lines.append(chart_text(f"{name} = {format_value(value)}"))
                trace["x"].append(position)
                trace["y"].append(finite(trial.value))
                trace["text"].append("<br>".join(lines))
        traces.append(trace)
    return traces


def history(study: Any, trials: list[Any], metric: str) -> dict[str, Any]:
    """A chart of the trials' values and of the best so far."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    better = max if study.direction.name == "MAXIMIZE" else min
    best = accumulate((trial.value for trial in complete), better)
    line = {
        "x": [trial.number for trial in complete],
        "y": [finite(value) for value in best],
        "mode": "lines",
        "name": "best so far",
        "line": {"shape": "hv", "color": "#2e9d6a"},
    }
    layout = {
        "title": {"text": "Values over time"},
        "xaxis": {"title": {"text": "trial"}},
        "yaxis": {"title": {"text": metric}},
    }
    numbers = [trial.number for trial in trials]
    return {"data": [*points(trials, numbers, metric), line], "layout": layout}


def parameters(trials: list[Any], metric: str) -> dict[str, Any]:
    """A chart of each parameter against the metric."""
    spaces = {}
    for trial in trials:
        spaces |= trial.distributions
    panels = max(1, len(spaces))
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    data = []
    layout = {
        "title": {"text": f"Each parameter against {metric}"},
        "height": 90 + 230 * rows,
        "grid": {"rows": rows, "columns": columns, "pattern": "independent"},
    }
    for i, (name, space) in enumerate(spaces.items(), start=1):
        for trace in points(trials, [trial.params.get(name) for trial in trials], metric):
            trace |= {"xaxis": f"x{i}", "yaxis": f"y{i}", "showlegend": i == 1}
            data.append(trace)
        axis = {"title": {"text": chart_text(name)}, "type": "linear"}
        if choices := getattr(space, "choices", None):
            axis |= {"type": "category", "categoryarray": choices}
        elif getattr(space, "log", False):
            axis |= {"type": "log", "dtick": 1, "exponentformat": "e"}
        suffix = "" if i == 1 else i
        layout |= {f"xaxis{suffix}": axis, f"yaxis{suffix}": {}}
    return {"data": data, "layout": layout}


def parallel_coordinates(study: Any) -> dict[str, Any]:
    """Optuna's parallel coordinates of the complete trials."""
    from optuna import visualization

    metric = sweep_metric(study)
    figure = json.loads(visualization.plot_parallel_coordinate(study, target_name=metric).to_json())
    title = "Complete trials: a line from each parameter's value to the next"
    figure["layout"]["title"] = {"text": title}
    return figure
