"""Shows a sweep of sweep_offline.py, from its Optuna study."""

import html
import re
from collections import Counter
from pathlib import Path
from typing import Any

from harness.errors import UserError
from reporting.markup import paragraph
from reporting.runs import RunFiles, base_name, format_value

ENOUGH_TRIALS = 20  # complete ones; importances of fewer are chance


def open_study(directory: Path, runs: list[RunFiles]) -> Any:
    """The Optuna study of a sweep. Raises `UserError` if it can't be read.

    Completes those `runs` that are its trials, label, config and state, and moves them to the end.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed: pip install -r requirements-sweep.txt") from None
    directory = directory.resolve()
    file = (directory / "study.db").as_uri()
    url = f"sqlite:///{file}?mode=ro&uri=true"  # read-only: the search may be under way
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        [name] = optuna.get_all_study_names(storage)
        study = optuna.load_study(study_name=name, storage=storage)
        trials = study.trials
        if "metric" not in study.user_attrs.get("sweep", ""):
            raise ValueError("it is not of sweep_offline.py")
    except Exception as error:  # SQLAlchemy's, SQLite's or Optuna's own
        raise UserError(f"study.db can't be read ({str(error).splitlines()[0][:100]})") from None
    by_directory = {run.path.resolve(): run for run in runs}
    for trial in trials:
        run = by_directory.get(directory / str(trial.user_attrs.get("run")))
        if run:
            runs.remove(run)  # so that equal trials are in the order of the search
            runs.append(run)
            run.label = f"trial {trial.number}"
            metric = study.user_attrs["sweep"]["metric"]
            run.config = trial.user_attrs.get("parameters", {}) | run.config
            if metric:
                direction = "max" if study.direction.name == "MAXIMIZE" else "min"
                run.config["monitor"] = metric
                run.config["metrics"] = run.declared | {base_name(metric): direction}
            if trial.state.name == "PRUNED":
                run.state = "pruned"
            elif "error" in trial.user_attrs:
                run.state = f"failed: {trial.user_attrs['error']}"
    return study


def show_sweep(study: Any) -> str:
    """A sweep: its trials over time, its parameters and their importances."""
    from optuna import importance, visualization

    sweep = study.user_attrs["sweep"]
    metric = sweep["metric"]
    states = Counter(trial.state.name.lower() for trial in study.trials)
    counts = [f"{count} {state}" for state, count in states.items()]
    content = f"<h2>Sweep {html.escape(format_value(study.study_name))}</h2>"
    content += paragraph(f"{len(study.trials)} trials: {', '.join(counts)}.")
    if not metric or not states["complete"]:
        return content
    figures = [
        visualization.plot_optimization_history(study, target_name=metric),
        visualization.plot_slice(study, target_name=metric),
        visualization.plot_parallel_coordinate(study, target_name=metric),
    ]
    # Optuna does not know how the values of these were drawn: their importance would be 0.
    kinds = " ".join(parameter["distribution"] for parameter in sweep["parameters"].values())
    is_known = not re.search("normal|beta|probabilities", kinds)
    if states["complete"] >= ENOUGH_TRIALS and is_known:
        # Optuna's default is the best tenth: two trials of twenty.
        evaluator = importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
        figures.append(visualization.plot_param_importances(study, evaluator=evaluator))
    for figure in figures:
        data = html.escape(figure.to_json())  # drawn by page.js
        content += f'<div class="chart" data-figure="{data}"></div>'
    return content
