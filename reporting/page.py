"""Makes the page: one HTML file that needs nothing else and requests nothing."""

import base64
import html
import json
import secrets
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from harness.errors import UserError
from metrics import PER_CLASS, ConfusionMatrix
from reporting.charts import MAX_POINTS, curves
from reporting.comparison import compare_runs
from reporting.markup import paragraph, table
from reporting.predictions import (
    Predictions,
    largest_first,
    read_predictions,
    show_examples,
)
from reporting.runs import RunFiles, SeedGroups, run_table, seed_table
from reporting.sweep import show_sweep

# Only the page's own scripts may run, and nothing is fetched. plotly.js needs 'unsafe-eval' for
# parallel coordinates.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'nonce-{}' 'unsafe-eval'"
)

BEGINNING = '<!doctype html>\n<html lang="en"><head><meta name="generator" content="report.py">'


def make_page(
    runs: list[RunFiles], seed_groups: SeedGroups, studies: list[Any], problems: list[str]
) -> str:
    """The page on `runs`, the best first, and on the sweeps' Optuna `studies`.

    It begins with `problems`, which say what could not be read.
    """
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    content = ""
    for problem in problems:
        content += paragraph(problem, "soft")
    for study in studies:
        content += show_sweep(study)
    content += show_runs(runs, seed_groups)
    content += show_curves(runs, seed_groups)
    if len(runs) > 1:
        content += compare_runs(runs, seed_groups)
        content += compare_runs(runs, seed_groups, "test_predictions.csv")
    else:
        content += show_run(runs[0])
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    code = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    nonce = secrets.token_urlsafe(16)
    return f"""{BEGINNING}
<meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body><h1>{html.escape(title)}</h1>
{content}
<script nonce="{nonce}">{get_plotlyjs()}</script>
<script nonce="{nonce}">{code}</script></body></html>
"""


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


def show_curves(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The element in which page.js draws the curves, their data, and the controls."""
    data = curves(runs, seed_groups)
    if not data["metrics"]:
        return ""
    remark = (
        "Drag to zoom, double-click to zoom out. A click in the legend hides or shows a run. "
        f"Of curves of more than {MAX_POINTS:,} points, some at equal distances are drawn. Lines "
        "with a band are the mean ± standard deviation over seeds or folds."
    )
    return f"""<h2>Curves</h2>{paragraph(remark, "soft")}
<div class="controls"><label>Metric <select id="metric"></select></label>
<label><input type="checkbox" id="log"> log scale</label>
<label><input type="checkbox" id="each"> each run, too</label></div>
<div id="curves" data-curves="{html.escape(json.dumps(data))}"></div>"""


def show_run(run: RunFiles) -> str:
    """A single run: predictions, the pictures that the script has left, and settings."""
    try:
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
