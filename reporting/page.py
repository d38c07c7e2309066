"""Makes the page: one HTML file that needs nothing else and requests nothing."""

import html
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from harness.errors import UserError
from reporting.charts import confusion, curves, reliability
from reporting.comparison import MOST_SHOWN, compare_runs
from reporting.markup import MARK, chart, details, embedded_json, paragraph, table
from reporting.predictions import read_predictions, show_examples
from reporting.runs import RunFiles, SeedGroups, format_value, run_table, seed_table
from reporting.sweep import show_sweep

# Only the page's own scripts may run, and nothing is fetched. plotly.js needs 'unsafe-eval' for
# parallel coordinates.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'nonce-{}' 'unsafe-eval'"
)


def make_page(
    runs: list[RunFiles], seed_groups: SeedGroups, studies: dict[Path, Any], problems: list[str]
) -> str:
    """The page on `runs`, the best first, and on the sweeps' Optuna `studies` by directory.

    It begins with `problems`, which say what could not be read.
    """
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    if studies:
        title = ", ".join(f"Sweep {format_value(study.study_name)}" for study in studies.values())
    content = overview(runs)
    for problem in problems:
        content += paragraph(problem, "soft")
    for study in studies.values():
        content += show_sweep(study)
    content += show_runs(runs, seed_groups)
    content += show_curves(runs, seed_groups)
    content += compare_runs(runs, seed_groups) if len(runs) > 1 else show_run(runs[0])
    content += every_figure(runs)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    code = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    nonce = secrets.token_urlsafe(16)
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body><h1>{html.escape(title)}</h1>
{content}
<script nonce="{nonce}">{get_plotlyjs()}</script>
<script nonce="{nonce}">{code}</script></body></html>
"""


def overview(runs: list[RunFiles]) -> str:
    """How many runs are in which state, and the best by each metric."""
    states = Counter(run.state for run in runs)
    summary = ", ".join(f"{number} {state}" for state, number in states.items()) + "."
    best = {run.monitor: run for run in reversed(runs) if run.monitor in run.best}
    for metric, run in best.items():
        summary += f" Best {metric}: {format_value(run.best[metric])} ({run.label})."
    return paragraph(summary)


def show_runs(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The tables of the runs, and of means over seeds."""
    header, rows = run_table(runs)
    remark = (
        "Settings that are the same in all runs, or concern only logging, are left out. Figures "
        "are those of the best epoch by the monitored metric; of a run that has not finished, the "
        "best so far. A click on a head sorts."
    )
    has_best = len(runs) > 1 and len({run.monitor for run in runs}) == 1
    content = f"<h2>Runs</h2>{paragraph(remark, 'soft')}{table(header, rows, has_best)}"
    if seed_groups:
        remark = (
            "Mean ± sample standard deviation over finished runs that differ in nothing but the "
            "seed, one per seed."
        )
        means = table(*seed_table(runs, seed_groups))
        content += f"<h2>Over seeds</h2>{paragraph(remark, 'soft')}{means}"
    return content


def show_curves(runs: list[RunFiles], seed_groups: SeedGroups) -> str:
    """The element in which page.js draws the curves, their data, and the controls."""
    data = curves(runs, seed_groups)
    if not data["metrics"]:
        return ""
    remark = "Drag to zoom, double-click to zoom out. A click in the legend hides or shows a run."
    hidden = " hidden"
    if seed_groups:
        remark += " Lines with a band are the mean ± standard deviation over seeds."
        hidden = ""
    if data["thinned"]:
        remark += " Of long curves, only points at equal distances are drawn."
    return f"""<h2>Curves</h2>{paragraph(remark, "soft")}
<div class="controls"><label>Metric <select id="metric"></select></label>
<label><input type="checkbox" id="log"> log scale</label>
<label{hidden}><input type="checkbox" id="each"> each seed, too</label></div>
<div id="curves"></div>{embedded_json("curves-data", data)}"""


def show_run(run: RunFiles) -> str:
    """A single run: confusion matrix, calibration, mistakes, attributions and settings."""
    try:
        content = show_predictions(run)
    except UserError as reason:
        content = paragraph(f"No predictions to show: {reason}.", "soft")
    path = run.path / "attributions.html"
    if path.is_file():
        source = html.escape(path.read_text(encoding="utf-8", errors="replace"))
        content += "<h2>Attributions</h2>"
        content += f'<iframe sandbox title="attributions" srcdoc="{source}"></iframe>'
    settings = run.config | run.settings  # which has the versions one by one
    settings.pop("versions", None)
    rows = [[name, format_value(value)] for name, value in settings.items()]
    return f"{content}<h2>Settings</h2>{table(['setting', 'value'], rows)}"


def show_predictions(run: RunFiles) -> str:
    """Confusion matrix, calibration and mistakes. Raises `UserError` without predictions."""
    predictions = read_predictions(run)
    charts = chart(confusion(predictions)) + chart(reliability(predictions))
    wrong = (~predictions.correct).nonzero().flatten()
    confidence = predictions.probabilities[wrong].max(1).values
    surest = wrong[confidence.argsort(descending=True, stable=True)].tolist()
    summary = paragraph(f"{len(wrong):,} of {len(predictions.labels):,} are wrong.")
    examples = show_examples(predictions, surest[:MOST_SHOWN])
    return (
        f'<h2>Predictions</h2><div class="pair">{charts}</div>'
        f"<h2>Most confident mistakes</h2>{summary}{examples}"
    )


def every_figure(runs: list[RunFiles]) -> str:
    """All figures of all runs, for those who miss one above."""
    names = sorted(set().union(*(run.best for run in runs)) - {"epoch", "step"})
    if not names:
        return ""
    rows = [[run.label, *(run.best.get(name) for name in names)] for run in runs]
    return details("Every figure", table(["run", *names], rows))
