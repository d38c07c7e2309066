"""The page: one HTML file that needs nothing else and asks for nothing."""

import html
import json
import secrets
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from harness.errors import UserError
from reporting import charts
from reporting.comparison import MOST_SHOWN, compare_runs
from reporting.markup import cell, details, paragraph, table
from reporting.predictions import read_predictions, show_examples
from reporting.runs import MARK, Run, groups, run_table, seconds, seed_table, text

# Only the page's own scripts may run, and nothing is fetched. plotly.js compiles code for parallel coordinates.
POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'nonce-{}' 'unsafe-eval'"


def make_page(runs: list[Run], sweeps: list[dict[str, Any]], problems: list[str]) -> str:
    """The page over `runs`, sorted from the best, and over the sweeps they belong to; `problems` stand at its top."""
    seeds = groups(runs)
    figures: dict[str, Any] = {}  # the data of the charts, by the id of the element that holds it
    title = text(runs[0].label) if len(runs) == 1 else f"{len(runs)} runs"
    title = ", ".join(f"Sweep {text(sweep['name'])}" for sweep in sweeps) or title
    sections = [overview(runs), *(paragraph(text(problem), "soft") for problem in problems)]
    sections += [show_sweep(sweep, figures) for sweep in sweeps]
    sections += [show_runs(runs, seeds), show_curves(runs, seeds, figures)]
    sections.append(compare_runs(runs, seeds) if len(runs) > 1 else show_run(runs[0], figures))
    sections.append(every_figure(runs))
    nonce, here = secrets.token_urlsafe(16), Path(__file__).parent
    style, code = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    data = "".join(
        f'<script type="application/json" id="{name}">{as_json(figures[name])}</script>'
        for name in figures
    )
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body><h1>{html.escape(title)}</h1>
{"".join(sections)}
{data}
<script nonce="{nonce}">{get_plotlyjs()}</script>
<script nonce="{nonce}">{code}</script></body></html>
"""


def as_json(content: Any) -> str:
    """JSON in which nothing can end the <script> that holds it."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def place(figures: dict[str, Any], figure: dict[str, Any]) -> str:
    """The element for a chart, whose data is added to `figures`."""
    name = f"figure-{len(figures)}"
    figures[name] = figure
    return f'<div class="chart" data-figure="{name}"></div>'


def overview(runs: list[Run]) -> str:
    """How many runs there are in which states, the best of each monitored metric, and what is wrong with files."""
    states = [run.state.split(" at ")[0].split(":")[0] for run in runs]
    words = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) + "."
    best = {run.monitor: run for run in reversed(runs) if run.monitor in run.best}
    words += "".join(
        f" Best {metric}: {text(run.best[metric])} ({text(run.label)})."
        for metric, run in best.items()
    )
    notes = (paragraph(f"{text(run.label)}: {note}.", "soft") for run in runs for note in run.notes)
    return paragraph(words) + "".join(notes)


def show_runs(runs: list[Run], seeds: dict[str, list[Run]]) -> str:
    """The tables of the runs, and of means over seeds."""
    header, rows = run_table(runs)
    for row in rows:
        row[-1] = cell(row[-1], seconds(row[-1]))
    remark = (
        "Settings that are the same in all runs, or concern only logging, are left out. Figures are those of the best "
        "epoch by the monitored metric; of a run that has not finished, the best so far. A click on a head sorts."
    )
    best = 0 if len({run.monitor for run in runs}) == 1 < len(runs) else None
    parts = ["<h2>Runs</h2>", paragraph(remark, "soft"), table(header, rows, best)]
    if seeds:
        remark = "Mean ± sample standard deviation over finished runs that differ in nothing but the seed, one per seed."
        parts += ["<h2>Over seeds</h2>", paragraph(remark, "soft"), table(*seed_table(runs, seeds))]
    return "".join(parts)


def show_curves(runs: list[Run], seeds: dict[str, list[Run]], figures: dict[str, Any]) -> str:
    """The place of the curves, and what chooses among them."""
    curves = charts.curves(runs, seeds)
    if not curves["metrics"]:
        return ""
    figures["curves-data"] = curves
    remark = "Drag to zoom, double-click to zoom out. A click in the legend hides or shows a run."
    remark += " Lines with a band are the mean ± standard deviation over seeds." if seeds else ""
    remark += (
        " Of long curves, only points at equal distances are drawn." if curves["thinned"] else ""
    )
    return f"""<h2>Curves</h2>{paragraph(remark, "soft")}
<div class="controls"><label>Metric <select id="metric"></select></label>
<label><input type="checkbox" id="log"> log scale</label>
<label{"" if seeds else " hidden"}><input type="checkbox" id="each"> each seed, too</label></div>
<div id="curves"></div>"""


def show_sweep(sweep: dict[str, Any], figures: dict[str, Any]) -> str:
    """A sweep: its values over time, its parameters, and their importances."""
    parts = [paragraph(sweep["summary"]), *(place(figures, figure) for figure in sweep["figures"])]
    shares = ", ".join(f"{text(name)} {share:.0%}" for name, share in sweep["importances"])
    none = f"Importances are computed at the end of a search with {sweep['enough']} complete trials or more."
    return "".join(parts) + (
        paragraph(f"Importances: {shares}.") if shares else paragraph(none, "soft")
    )


def show_run(run: Run, figures: dict[str, Any]) -> str:
    """What there is to see of a single run: confusion matrix, calibration, mistakes, attributions, settings."""
    parts = []
    try:
        of = read_predictions(run.path)
        drawn = (
            charts.confusion(of, run.class_names(of.probabilities.shape[1])),
            charts.reliability(of),
        )
        wrong = (~of.correct).nonzero().flatten()
        surest = wrong[of.probabilities[wrong].max(1).values.argsort(descending=True, stable=True)]
        parts += [
            '<h2>Predictions</h2><div class="pair">',
            *(place(figures, chart) for chart in drawn),
            "</div>",
        ]
        parts += [
            "<h2>Most confident mistakes</h2>",
            paragraph(f"{len(wrong):,} of {len(of.labels):,} are wrong."),
        ]
        parts.append(show_examples(run, of, surest[:MOST_SHOWN].tolist()))
    except UserError as reason:
        parts.append(paragraph(f"No predictions to show: {reason}.", "soft"))
    if (run.path / "attributions.html").is_file():
        content = html.escape(
            (run.path / "attributions.html").read_text(encoding="utf-8", errors="replace")
        )
        parts.append(
            f'<h2>Attributions</h2><iframe sandbox title="attributions" srcdoc="{content}"></iframe>'
        )
    versions = {name: value for name, value in run.settings.items() if name not in run.config}
    settings = [
        [name, text(value)] for name, value in (run.config | versions).items() if name != "versions"
    ]
    return "".join(parts) + "<h2>Settings</h2>" + table(["setting", "value"], settings)


def every_figure(runs: list[Run]) -> str:
    """All figures of all runs, for those who miss one above."""
    names = sorted({name for run in runs for name in run.best if name not in ("epoch", "step")})
    rows = [[run.label, *(run.best.get(name) for name in names)] for run in runs]
    return details("Every figure", table(["run", *names], rows)) if names else ""
