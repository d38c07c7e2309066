"""examples/walkthrough.ipynb: what it leaves when it is executed, and the outputs that are kept in it.

To make these anew, where ipywidgets is not installed: python -m tests.test_walkthrough
"""

import csv
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPO, clean_environment

pytest.importorskip("ipykernel", reason="Jupyter is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")

NOTEBOOK = "examples/walkthrough.ipynb"
NEEDED = "train_mnist.py report.py sweep_offline.py metrics.py viz.py harness tasks reporting offline_sweep"
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(project: Path) -> Any:
    """The notebook, executed from top to bottom in a copy of the project, in its own directory as Jupyter does."""
    for name in NEEDED.split():
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, project / name)
    (project / "examples").mkdir()
    notebook = nbformat.read(REPO / NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        coalesce_streams=True,  # one text for each cell, in which a progress bar is its last line
        record_timing=False,
        resources={"metadata": {"path": str(project / "examples")}},
    )
    hint = "ignore:IProgress not found"  # tqdm's, to install ipywidgets, with the path of the machine's packages
    client.execute(env=clean_environment(project, PYTHONWARNINGS=hint))
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    return [out.text if "text" in out else out.data.get("text/plain", "") for out in cell.outputs]


def shown(cell: Any) -> list[Any]:
    """What a cell shows, without what differs from machine to machine: numbers, ids, the precision, progress bars."""
    result = []
    for out in cell.outputs:
        if WIDGET in out.get("data", {}):
            continue
        kinds = sorted(out.data) if "data" in out else out.name
        text = out.text if "text" in out else out.data["text/plain"]
        lines = [line for line in text.splitlines() if "%|" not in line and line.strip()]
        text = re.sub("bf16|fp32|[0-9a-f]{8}|[0-9][0-9.,]*", "#", "\n".join(lines))
        result.append((kinds, re.sub(" +", " ", text)))
    return result


@pytest.fixture(scope="module")
def kept() -> Any:
    return nbformat.read(REPO / NOTEBOOK, as_version=4)


def test_an_execution_leaves_what_the_notebook_says(kept, tmp_path):
    executed = execute(tmp_path)
    assert [shown(cell) for cell in code_cells(executed)] == [
        shown(cell) for cell in code_cells(kept)
    ]

    runs = tmp_path / "runs/notebook"
    (stopped,) = re.findall(r"stopped by SIGINT at step (\d+), saved", str(executed))
    assert 1500 <= int(stopped) < 4500  # in the midst of three epochs
    histories = []
    for name in ("whole", "stopped"):
        rows = [json.loads(line) for line in (runs / name / "history.jsonl").open()]
        histories.append([{**row, "train/examples_per_second": None} for row in rows])
    assert histories[0] == histories[1] and histories[0][-1]["step"] == 4500
    weights = [torch.load(runs / name / "model.pt") for name in ("whole", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    (compared,) = [cell for cell in code_cells(executed) if "torch.equal" in cell.source]
    assert texts(compared)[0].count("True") == len(weights[0]) == 6

    for name in ("whole", "stopped", "narrow"):
        assert json.loads((runs / name / "metrics.json").read_text())["test/acc"] > 0.3
    assert (runs / "report.html").stat().st_size > 10_000
    assert (
        len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3
    )  # of the first run and the two trials

    search = tmp_path / "runs/sweep-notebook"
    with (search / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert {float(trial["learning_rate"]) for trial in trials} == {0.002, 0.02}
    losses = [float(trial["valid/loss"]) for trial in trials]
    assert losses == sorted(losses)  # the best comes first
    for trial, loss in zip(trials, losses):
        metrics = json.loads((tmp_path / trial["output_dir"] / "metrics.json").read_text())
        assert metrics["valid/loss"] == loss


@pytest.mark.quick
def test_kept_outputs_can_be_read_on_a_code_host(kept):
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert (REPO / NOTEBOOK).stat().st_size < 500_000
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 3
    for cell in cells[1:]:  # the first one only prepares
        assert cell.outputs, cell.source
    for cell in cells:
        assert all(out.output_type != "error" for out in cell.outputs)
        for text in texts(cell):
            assert not re.search(r"(?<![\w.])/\w|\b[A-Z]:\\|-packages|\r|\x1b", text), text
            assert text.count("%|") <= 1  # a bar's last state


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        nbformat.write(execute(Path(directory)), REPO / NOTEBOOK)
