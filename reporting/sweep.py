"""A sweep of sweep_offline.py, from its Optuna study."""

import contextlib
import csv
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.errors import UserError
from reporting.charts import finite, label
from reporting.runs import Run, text

ENOUGH_TRIALS = 20  # complete ones; of fewer, importances are chance
STATES = {
    "COMPLETE": "complete",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "under way",
    "WAITING": "waiting",
}


def open_study(directory: Path, runs: list[Run]) -> Any:
    """The Optuna study of a sweep; gives `runs` what their trials know. Raises `UserError` if it can't be read."""
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed: pip install -r requirements-sweep.txt") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        file = quote(
            str((directory / "study.db").resolve())
        )  # read only: the search may be under way
        storage = optuna.storages.RDBStorage(
            f"sqlite:///file:{file}?mode=ro&uri=true", skip_table_creation=True
        )
        study = optuna.load_study(study_name=None, storage=storage)
        trials = study.get_trials(deepcopy=False)
        if not isinstance(study.user_attrs.get("sweep"), dict) or len(study.directions) > 1:
            raise ValueError("it is not of sweep_offline.py")
    except Exception as error:  # SQLAlchemy's, SQLite's or Optuna's own: the file holds no study
        raise UserError(f"study.db can't be read ({str(error).splitlines()[0][:100]})") from None
    by_directory = {
        run.path.name: run for run in runs if run.path.resolve().parent == directory.resolve()
    }
    for trial in trials:
        run = by_directory.get(str(trial.user_attrs.get("run")))
        if run:
            run.label = f"trial {trial.number}"
            run.config = {"monitor": sweep_metric(study), **trial.params, **run.config}
            if trial.state.name == "PRUNED":
                run.state = f"pruned at {run.last_step}"
            elif trial.state.name == "FAIL":
                run.state = f"failed: {trial.user_attrs.get('error', 'no reason is known')}"
    return study


def sweep_metric(study: Any) -> str:
    """The name of the metric that a sweep searches by."""
    return str(study.user_attrs["sweep"].get("metric", "value"))


def sweep_charts(study: Any, directory: Path) -> dict[str, Any]:
    """What the page shows of a sweep: charts, importances, counts."""
    trials = study.get_trials(deepcopy=False)
    metric = sweep_metric(study)
    states = [trial.state.name for trial in trials]
    counts = ", ".join(
        f"{states.count(state)} {words}" for state, words in STATES.items() if state in states
    )
    enough = states.count("COMPLETE") >= ENOUGH_TRIALS
    figures = [
        history(trials, metric, study.direction.name == "MAXIMIZE"),
        parameters(trials, metric),
    ]
    if "COMPLETE" in states:
        figures.insert(1, parallel_coordinates(study, metric))
    return {
        "name": study.study_name,
        "summary": f"{len(trials)} trials: {counts}.",
        "figures": figures,
        "importances": read_importances(directory) if enough else [],
        "enough": ENOUGH_TRIALS,
    }


def read_importances(directory: Path) -> list[tuple[str, float]]:
    """The importances that sweep_offline.py has computed at the end of the search; empty before."""
    with (
        contextlib.suppress(OSError, ValueError, csv.Error),
        (directory / "importances.csv").open(newline="") as file,
    ):
        return [(name, float(share)) for name, share in list(csv.reader(file))[1:]]
    return []


def marks(
    trials: list[Any], metric: str, horizontal: Callable[[Any], Any], **axes: Any
) -> list[dict[str, Any]]:
    """A point for each trial: complete ones, and pruned ones with the last value that they reported."""
    traces = []
    for state, symbol, colour in (("COMPLETE", "circle", "#3b82c4"), ("PRUNED", "x", "#d9662b")):
        shown = [trial for trial in trials if trial.state.name == state and trial.value is not None]
        names = [
            "<br>".join(label(f"{k} = {text(v)}") for k, v in trial.params.items())
            for trial in shown
        ]
        traces.append({
            "x": [horizontal(trial) for trial in shown], "y": [finite(trial.value) for trial in shown],
            "text": [f"trial {trial.number}<br>{name}" for trial, name in zip(shown, names)], "mode": "markers",
            "name": STATES[state], "legendgroup": state, "marker": {"symbol": symbol, "color": colour, "size": 8},
            "hovertemplate": f"{label(metric)} %{{y:.4g}}<br>%{{text}}<extra>{STATES[state]}</extra>", **axes,
        })  # fmt: skip
    return traces


def history(trials: list[Any], metric: str, maximize: bool) -> dict[str, Any]:
    """A chart of the trials' values and of the best so far."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = accumulate((trial.value for trial in complete), max if maximize else min)
    line = {"x": [trial.number for trial in complete], "y": [*map(finite, best)], "mode": "lines",
            "name": "best so far", "line": {"shape": "hv", "color": "#2e9d6a"}}  # fmt: skip
    layout = {"title": {"text": "Values over time"}, "xaxis": {"title": {"text": "trial"}}}
    layout["yaxis"] = {"title": {"text": label(metric)}}
    return {"data": [*marks(trials, metric, lambda trial: trial.number), line], "layout": layout}


def parameters(trials: list[Any], metric: str) -> dict[str, Any]:
    """A chart of each parameter against the metric."""
    spaces = {name: space for trial in trials for name, space in trial.distributions.items()}
    columns = min(4, len(spaces)) or 1
    rows = -(-len(spaces) // columns) or 1
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "title": {"text": f"Each parameter against {label(metric)}"},
        "height": 90 + 230 * rows,
    }
    layout["grid"] = {"rows": rows, "columns": columns, "pattern": "independent"}
    for i, (name, space) in enumerate(spaces.items(), start=1):
        choices = getattr(space, "choices", None)
        panel = {"xaxis": f"x{i}", "yaxis": f"y{i}", "showlegend": i == 1}
        data += marks(trials, metric, lambda trial, name=name: trial.params.get(name), **panel)
        axis = {"title": {"text": label(name)}, "type": "category" if choices else "linear"}
        if choices:
            axis["categoryarray"] = choices
        elif getattr(space, "log", False):
            axis |= {"type": "log", "dtick": 1, "exponentformat": "e"}
        layout |= {"xaxis" if i == 1 else f"xaxis{i}": axis, "yaxis" if i == 1 else f"yaxis{i}": {}}
    return {"data": data, "layout": layout}


def parallel_coordinates(study: Any, metric: str) -> dict[str, Any]:
    """Optuna's parallel coordinates of the complete trials."""
    from optuna import visualization

    figure = json.loads(visualization.plot_parallel_coordinate(study, target_name=metric).to_json())
    figure["layout"]["title"] = {
        "text": "Complete trials: a line from each parameter's value to the next"
    }
    return figure
