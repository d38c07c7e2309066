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
from reporting.charts import Figure, chart_text, finite, titled
from reporting.markup import chart, paragraph
from reporting.runs import RunFiles, base_name, format_value

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
    optuna.logging.disable_default_handler()
    directory = directory.resolve()
    file = quote(str(directory / "study.db"))
    url = f"sqlite:///file:{file}?mode=ro&uri=true"  # read-only: the search may be under way
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        study = optuna.load_study(study_name=None, storage=storage)
        trials = study.trials
        if "metric" not in study.user_attrs.get("sweep", ""):
            raise ValueError("it is not of sweep_offline.py")
    except Exception as error:  # SQLAlchemy's, SQLite's or Optuna's own
        raise UserError(f"study.db can't be read ({str(error).splitlines()[0][:100]})") from None
    by_directory = {run.path.resolve(): run for run in runs}
    for trial in trials:
        run = by_directory.get(directory / str(trial.user_attrs.get("run")))
        if run:
            run.label = f"trial {trial.number}"
            metric = study.user_attrs["sweep"]["metric"]
            direction = "max" if study.direction.name == "MAXIMIZE" else "min"
            defaults = {"monitor": metric, "metrics": {base_name(metric): direction}}
            run.config = defaults | trial.params | run.config
            if trial.state.name == "PRUNED":
                run.state = "pruned"
            elif trial.state.name == "FAIL":
                run.state = "failed"
                run.detail = f": {trial.user_attrs.get('error', 'no reason is known')}"
    return study


def show_sweep(study: Any, directory: Path) -> str:
    """A sweep: its trials over time, its parameters and their importances."""
    trials = study.trials
    metric = study.user_attrs["sweep"]["metric"]
    states = Counter(trial.state.name for trial in trials)
    counts = [f"{states[state]} {name}" for state, name in STATES.items() if state in states]
    content = paragraph(f"{len(trials)} trials: {', '.join(counts)}.")
    content += chart(history(study, trials, metric))
    if "COMPLETE" in states:
        content += chart(parallel_coordinates(study, metric))
    content += chart(parameters(trials, metric))
    importances = read_importances(directory)
    if importances and states["COMPLETE"] >= ENOUGH_TRIALS:
        return content + paragraph(f"Importances: {', '.join(importances)}.")
    return content + paragraph(
        "Importances are computed at the end of a search with "
        f"{ENOUGH_TRIALS} complete trials or more.",
        "soft",
    )


def read_importances(directory: Path) -> list[str]:
    """The importances that sweep_offline.py computes at the end of the search; empty before."""
    with contextlib.suppress(OSError, ValueError):
        _, *rows = csv.reader((directory / "importances.csv").read_text().splitlines())
        return [f"{format_value(name)} {float(share):.0%}" for name, share in rows]
    return []


def points(trials: list[Any], metric: str, parameter: str | None = None) -> list[Figure]:
    """The values of the complete trials and the last ones of the pruned trials, as two traces.

    The x axis is the parameter if there is one, otherwise the trial's number.
    """
    traces = []
    for state, symbol, color in (("COMPLETE", "circle", "#3b82c4"), ("PRUNED", "x", "#d9662b")):
        name = STATES[state]
        trace = {
            "x": [],
            "y": [],
            "text": [],
            "mode": "markers",
            "name": name,
            "legendgroup": state,
            "marker": {"symbol": symbol, "color": color, "size": 8},
            "hovertemplate": f"{chart_text(metric)} %{{y:.4g}}<br>%{{text}}<extra>{name}</extra>",
        }
        for trial in trials:
            if trial.state.name == state and trial.value is not None:
                lines = [f"trial {trial.number}"]
                for key, value in trial.params.items():
                    lines.append(chart_text(f"{key} = {format_value(value)}"))
                trace["x"].append(trial.params.get(parameter) if parameter else trial.number)
                trace["y"].append(finite(trial.value))
                trace["text"].append("<br>".join(lines))
        traces.append(trace)
    return traces


def history(study: Any, trials: list[Any], metric: str) -> Figure:
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
    layout = titled("Values over time", xaxis=titled("trial"), yaxis=titled(metric))
    return {"data": [*points(trials, metric), line], "layout": layout}


def parameters(trials: list[Any], metric: str) -> Figure:
    """A chart of each parameter against the metric."""
    spaces = {}
    for trial in trials:
        spaces |= trial.distributions
    rows = math.ceil(len(spaces) / 4)
    layout = titled(
        f"Each parameter against {metric}",
        height=90 + 230 * rows,
        grid={"rows": rows, "columns": min(4, len(spaces)), "pattern": "independent"},
    )
    data = []
    for i, (name, space) in enumerate(spaces.items(), start=1):
        for trace in points(trials, metric, name):
            trace |= {"xaxis": f"x{i}", "yaxis": f"y{i}", "showlegend": i == 1}
            data.append(trace)
        axis = titled(name, type="linear")
        if choices := getattr(space, "choices", None):
            axis |= {"type": "category", "categoryarray": choices}
        elif getattr(space, "log", False):
            axis |= {"type": "log", "dtick": 1, "exponentformat": "e"}
        suffix = "" if i == 1 else i
        layout |= {f"xaxis{suffix}": axis, f"yaxis{suffix}": {}}
    return {"data": data, "layout": layout}


def parallel_coordinates(study: Any, metric: str) -> Figure:
    """Optuna's parallel coordinates of the complete trials."""
    from optuna import visualization

    figure = visualization.plot_parallel_coordinate(study, target_name=metric)
    figure.layout.title = "Complete trials: a line from each parameter's value to the next"
    return json.loads(figure.to_json())
