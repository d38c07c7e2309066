"""Makes the page: one HTML file that needs nothing else and requests nothing."""

import base64
import html
import json
import secrets
from collections import defaultdict
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from harness.errors import UserError
from metrics import PER_CLASS, ConfusionMatrix
from reporting.charts import curves, describe
from reporting.collection import Collection
from reporting.comparison import compare_runs
from reporting.markup import paragraph, table
from reporting.predictions import (
    Predictions,
    largest_first,
    read_predictions,
    show_examples,
)
from reporting.runs import PREDICTIONS, RunFiles, SeedGroups, run_table, seed_table
from reporting.sweep import show_sweep

# Only the page's own scripts may run, and only report.py's server is asked. plotly.js needs 'unsafe-eval' for
# parallel coordinates.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "connect-src 'self'; script-src 'nonce-{}' 'unsafe-eval'"
)

BEGINNING = '<!doctype html>\n<html lang="en"><head><meta name="generator" content="report.py">'


CONTROLS = """<h2>Curves</h2><p class="soft">Drag to zoom, double-click to zoom out. Training is
dotted where a chart has validation, too. Bands are the mean ± standard deviation over seeds or
folds. The address of this page keeps what is chosen here.</p><form class="controls">
<label>Charts <input name="charts" list="names" placeholder="regular expression"></label>
<datalist id="names"></datalist>
<label>Runs <input name="runs" placeholder="regular expression"></label>
<label>x-axis <select name="x"><option>examples<option>epochs<option>batches<option>minutes</select>
</label><label>Smoothing <input name="smoothing" type="range" min="0" max="0.99" step="0.01">
<output></output></label>
<label><input name="logX" type="checkbox"> log x</label>
<label><input name="logY" type="checkbox"> log y</label>
<label><input name="together" type="checkbox"> training with validation</label>
<label id="each"><input name="each" type="checkbox"> each run of a group</label></form>
<p id="remark" class="soft"></p><div id="panels"></div><ul id="legend"></ul>"""


def make_page(
    title: str, data: dict[str, Any] | None = None, sections: dict[str, str] | None = None
) -> str:
    """The page of the curves' `data` and of other `sections`.

    Without these, it asks report.py's server for them.
    """
    sections = defaultdict(str, sections or {})
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    code = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    nonce = secrets.token_urlsafe(16)
    return f"""{BEGINNING}
<meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body data-curves="{html.escape(json.dumps(data))}"><h1>{html.escape(title)}</h1>
<div id="tables">{sections["tables"]}</div><div id="sweeps">{sections["sweeps"]}</div>
<div id="curves">{CONTROLS}</div><div id="analysis">{sections["analysis"]}</div>
<script nonce="{nonce}">{get_plotlyjs()}</script>
<script nonce="{nonce}">{code}</script></body></html>
"""


def whole_page(found: Collection) -> str:
    """The page as a file that needs no server."""
    for run in found.runs:
        run.log.read()
    sections = {
        "tables": tables(found.runs, found.seed_groups, found.problems),
        "sweeps": sweeps(found.studies),
        "analysis": analysis(found.runs, found.seed_groups),
    }
    data = {**describe(found.runs, found.seed_groups), "curves": curves(found.runs)}
    title = found.runs[0].label if len(found.runs) == 1 else f"{len(found.runs)} runs"
    return make_page(title, data, sections)


def tables(runs: list[RunFiles], seed_groups: SeedGroups, problems: list[str]) -> str:
    """What could not be read, the tables of the runs, and of means over seeds or folds."""
    content = "".join(paragraph(problem, "soft") for problem in problems)
    return content + show_runs(runs, seed_groups)


def sweeps(studies: list[Any]) -> str:
    """The sweeps, from their Optuna studies."""
    return "".join(map(show_sweep, studies))


def analysis(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The comparison of several runs, or the predictions and settings of one; may take seconds."""
    if len(runs) == 1:
        return show_run(runs[0])
    content = compare_runs(runs, seed_groups)
    return content + compare_runs(runs, seed_groups, "test_predictions.csv")


def show_runs(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The tables of the runs, and of means over seeds or folds."""
    remark = (
        "The best by the monitored metric is first. Settings that are the same in all runs, or "
        "concern only logging, are left out. Figures are those of the best epoch; of a run that "
        "has not finished, the best so far; without validation data, of the last epoch. Validation "
        "data chose the epoch: figures under valid/ are too optimistic. Click a heading to sort."
    )
    content = f"<h2>Runs</h2>{paragraph(remark, 'soft')}{table(run_table(runs))}"
    if seed_groups:
        remark = (
            "Mean ± sample standard deviation over finished runs that differ in nothing but seed "
            "or fold, one of each; in parentheses the 95% interval of the mean, by Student's t, as "
            "if they were independent: folds share most of their training data."
        )
        means = table(seed_table(runs, seed_groups))
        content += f"<h2>Over seeds or folds</h2>{paragraph(remark, 'soft')}{means}"
    return content


def show_run(run: RunFiles) -> str:
    """A single run: predictions, the pictures that the script has left, and settings."""
    content = ""
    try:
        if (run.path / PREDICTIONS).exists():
            content = show_predictions(read_predictions(run))
    except UserError as reason:
        content = paragraph(f"No predictions to show: {reason}.", "soft")
    for path in sorted(run.path.glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.name)
        content += f'<img alt="{name}" title="{name}" src="data:image/png;base64,{data}">'
    settings = table([("setting", "value"), *run.config.items()])
    return f"{content}<h2>Settings</h2>{settings}"


def show_predictions(predictions: Predictions) -> str:
    """Figures of each class, and the predictions that are most wrong."""
    wrong = largest_first(predictions.losses, ~predictions.correct)
    per_class = ""
    if names := predictions.class_names:
        confusion = ConfusionMatrix(len(names))
        confusion.update(predictions.predictions, predictions.labels)
        per_class = f"<h3>Per class</h3>{table([PER_CLASS, *confusion.per_class(names)])}"
    heading = f"Worst of {len(wrong):,} mistakes in {len(predictions.labels):,} examples"
    if predictions.probabilities is None:
        heading = "Largest errors"
    examples = show_examples(predictions, wrong)
    validated = any(name.startswith("valid/") for name in predictions.run.best)
    part = "validation" if validated else "test"
    return f"<h2>Predictions of the {part} data</h2>{per_class}<h3>{heading}</h3>{examples}"
