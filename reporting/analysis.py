"""The slow sections of the page: sweeps, comparisons, and the predictions of a run."""

import base64
import html
from pathlib import Path

import torch

from harness.errors import UserError
from harness.script import in_ipython
from metrics import PER_CLASS, ConfusionMatrix
from reporting.comparison import compare_runs
from reporting.markup import paragraph, table
from reporting.predictions import Predictions, largest_first, read_predictions, show_examples
from reporting.runs import PREDICTIONS, Collection, RunFiles, seed_table
from reporting.sweep import show_sweep

SEEDS = (
    "Mean ± sample standard deviation over finished runs that differ in nothing but seed or fold, "
    "one of each; in parentheses the 95% interval of the mean, by Student's t, as if they were "
    "independent: folds share most of their training data."
)


def analyze(found: Collection) -> dict[str, str]:
    """Sections of the page, by the id of their element."""
    if not in_ipython():
        torch.set_num_threads(1)  # the tensors are small: several threads would wait for each other
    if len(found.runs) == 1:
        content = show_run(found.runs[0])
    else:
        content = compare_runs(found, PREDICTIONS)
        content += compare_runs(found, "test_predictions.csv")
    seeds = ""
    if found.seed_groups:
        means = table(seed_table(found))
        seeds = f"<h2>Over seeds or folds</h2>{paragraph(SEEDS, 'soft')}{means}"
    sweeps = "".join(map(show_sweep, found.studies))
    return {"sweeps": sweeps, "seeds": seeds, "analysis": content}


def show_run(run: RunFiles) -> str:
    """A single run: predictions, the pictures that the script has left, and settings."""
    content = ""
    try:
        if (run.path / PREDICTIONS).exists():
            content = show_predictions(read_predictions(run))
    except UserError as reason:
        content = paragraph(f"No predictions to show: {reason}.", "soft")
    for path in filter(Path.is_file, sorted(run.path.glob("*.png"))):
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.name)
        content += f'<img alt="{name}" title="{name}" src="data:image/png;base64,{data}">'
    settings = table([("setting", "value"), *run.config.items()])
    return f"{content}<h2>Settings</h2>{settings}"


def show_predictions(predictions: Predictions) -> str:
    """Figures of each class, and the predictions that are most wrong."""
    wrong = largest_first(predictions.losses, ~predictions.correct)
    per_class = ""
    heading = "Largest errors"
    if names := predictions.class_names:
        confusion = ConfusionMatrix(len(names))
        confusion.update(predictions.predictions, predictions.labels)
        per_class = f"<h3>Per class</h3>{table([PER_CLASS, *confusion.per_class(names)])}"
        heading = f"Worst of {len(wrong):,} mistakes in {len(predictions.labels):,} examples"
    examples = show_examples(predictions, wrong)
    validated = any(name.startswith("valid/") for name in predictions.run.best)
    part = "validation" if validated else "test"
    name = html.escape(predictions.run.label)
    title = f"Predictions of the {part} data: {name}"
    return f"<h2>{title}</h2>{per_class}<h3>{heading}</h3>{examples}"
