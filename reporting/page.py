"""Makes the page: HTML that works as a file on its own, or with report.py's server."""

import html
import json
import secrets
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from reporting.markup import paragraph, table
from reporting.runs import Collection, run_table

# Only the page's own scripts may run, and only the server is asked. plotly.js needs 'unsafe-eval'
# for parallel coordinates.
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "connect-src 'self'; script-src 'nonce-{}' 'unsafe-eval'"
)

BEGINNING = '<!doctype html>\n<html lang="en"><head><meta name="generator" content="report.py">'

CONTROLS = """<h2>Curves</h2><form class="controls">
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
<p class="soft"><span id="state"></span> <span id="remark"></span></p>
<div id="panels"></div><ul id="legend"></ul>
<p class="soft">Drag to zoom, double-click to zoom out. Bands are the mean ± standard deviation over
seeds or folds. The address of this page keeps what is chosen above.</p>"""


def make_page(runs: int, data: dict[str, Any] | None, **sections: str) -> str:
    """The page of so many runs; without `data`, it asks the server for curves and sections."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    code = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    nonce = secrets.token_urlsafe(16)
    return f"""{BEGINNING}
<meta charset="utf-8"><title>Runs</title>
<meta http-equiv="Content-Security-Policy" content="{POLICY.format(nonce)}">
<meta name="viewport" content="width=device-width"><style>{style}</style></head>
<body data-runs="{runs}" data-curves="{html.escape(json.dumps(data))}"><h1></h1>
<div id="tables">{sections.get("tables", "")}</div>
<div id="curves">{CONTROLS}</div>
<div id="seeds">{sections.get("seeds", "")}</div>
<div id="sweeps">{sections.get("sweeps", "")}</div>
<div id="analysis">{sections.get("analysis", "")}</div>
<script nonce="{nonce}">{get_plotlyjs()}</script>
<script nonce="{nonce}">{code}</script></body></html>
"""


def show_tables(found: Collection) -> str:
    """What could not be read, and the table of the runs."""
    remark = (
        "The best run by the metric that is compared comes first. Settings that are the same in "
        "all runs, or concern only logging, are left out. Figures are those of the best epoch; of "
        "a run that has not finished, the best so far; without validation data, of the last epoch; "
        "a figure of --metric that metrics.json lacks is the last one logged by then. The epoch "
        "was chosen on the validation data, so figures under valid/ are too optimistic. Click a "
        "heading to sort."
    )
    content = "".join(paragraph(problem, "soft") for problem in found.problems)
    return f"<h2>Runs</h2>{table(run_table(found.runs))}{content}{paragraph(remark, 'soft')}"
