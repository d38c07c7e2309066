"""The layout keeps its promises: parts can be copied on their own, and train_mnist.py serves as a template."""

import ast
import difflib
import graphlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forking, killing
from tests.conftest import REPO, call, clean_environment, finished_run

EXAMPLE = "examples/train_tabular.py"
UNINSTALLED = """
import importlib.metadata, sys

class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}")

def version(library, installed=importlib.metadata.version):
    if library in ("transformers", "torchvision"):
        raise importlib.metadata.PackageNotFoundError(library)
    return installed(library)

sys.meta_path.insert(0, Uninstalled())
importlib.metadata.version = version
"""


def imported(file: Path) -> set[str]:
    """The modules of the project that a file imports, as paths: harness/session.py."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{name.replace('.', '/')}.py" for name in names} & {
        str(p.relative_to(REPO)) for p in REPO.rglob("*.py")
    }


def test_tasks_and_metrics_do_without_wandb():
    modules = ", ".join(
        ["metrics", *(f"tasks.{file.stem}" for file in (REPO / "tasks").glob("[a-z]*.py"))]
    )
    program = f"import sys, {modules}; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO).returncode == 0


def test_tests_see_no_gpu(tmp_path):
    """Neither in runs that are forked nor in new processes, unless they are of the marker `gpu`."""
    program = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"
    for popen in (subprocess.Popen, forking.Popen):
        environment = clean_environment(tmp_path)
        done = forking.run(
            [sys.executable, "-c", program], popen, cwd=tmp_path, env=environment, text=True
        )
        assert done.stdout == "False 0\n", done.stderr


def test_imports_point_downwards():
    assert not imported(REPO / "metrics.py")
    assert imported(REPO / "viz.py") <= {"metrics.py"}
    for package, allowed in (
        ("harness", ("harness/", "metrics.py")),
        ("tasks", ("harness/", "tasks/", "metrics.py")),
        ("offline_sweep", ("harness/", "offline_sweep/")),
    ):
        for file in (REPO / package).rglob("*.py"):
            assert all(name.startswith(allowed) for name in imported(file)), file


def test_imports_go_in_no_circle():
    folders = ("harness", "tasks", "offline_sweep", "reporting")
    files = [*REPO.glob("*.py"), *(file for name in folders for file in (REPO / name).glob("*.py"))]
    graph = {str(file.relative_to(REPO)): imported(file) for file in files}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_example_differs_from_its_template_in_few_lines():
    """Outside the sections on settings, data, model and evaluation, for regression with one loss."""

    def rest(file: Path) -> list[str]:
        lines = file.read_text().splitlines()
        return lines[
            next(
                i for i, line in enumerate(lines) if line.startswith("# ---") and "training" in line
            ) :
        ]

    matcher = difflib.SequenceMatcher(
        None, rest(REPO / "train_mnist.py"), rest(REPO / EXAMPLE), autojunk=False
    )
    assert (
        sum(max(b - a, d - c) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal") <= 50
    )


def test_example_learns_and_survives_kills(tmp_path, monkeypatch):
    monkeypatch.setitem(
        killing.ARGUMENTS, EXAMPLE, "--epochs 4 --batch_size 48 --checkpoint_every 7"
    )
    outs = []
    for name in ("reference", "killed"):
        cwd = tmp_path / name
        cwd.mkdir()
        environment = clean_environment(cwd)
        if name == "reference":
            duration = killing.timed(EXAMPLE, cwd, environment)
        else:
            assert killing.killed_and_resumed(EXAMPLE, cwd, environment, duration, random.Random(0))
        outs.append(cwd / "out")
    assert killing.differences(*outs) == []
    assert killing.outcome(outs[0])["metrics.json"]["test/r2"] > 0.9


@pytest.mark.parametrize("script", [EXAMPLE, "train_mnist.py"])
def test_copy_needs_only_what_it_imports(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(UNINSTALLED)
    arguments = "--max_steps 2 --batch_size 16".split()
    if script == "train_mnist.py":
        arguments += "--dataset synthetic --slice 100".split()
    run = finished_run(script, tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    assert run.config["versions"].keys() == {"python", "torch", "wandb", "numpy"}
    (dataset,) = (
        r["artifact"]
        for r in run.records
        if r["type"] == "artifact" and r["artifact"]["type"] == "dataset"
    )
    assert dataset["name"] == run.metrics["dataset"]


def test_example_answers_options_at_once(tmp_path):
    done = call(EXAMPLE, "--hiden", "8", "8", cwd=tmp_path)
    assert (done.status, done.err.splitlines()) == (
        2,
        [
            "train_tabular.py: error: unknown option --hiden; did you mean --hidden? (--help lists the options)"
        ],
    )
