"""The layout keeps its promises: parts can be copied on their own."""

import ast
import graphlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forking
from tests.conftest import REPO, clean_environment


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


@pytest.mark.quick
def test_the_process_of_the_tests_has_no_thread_of_an_allocator():
    """pyarrow's ended one worker in five runs, where pandas is installed. The processes of the tests inherit the variable."""
    importlib.import_module("sklearn.metrics")  # which imports pandas, and that pyarrow
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]  # on Linux
    assert not [name for name in names if "jemalloc" in name]
    for process in (dict(os.environ), clean_environment(Path())):
        assert process["JE_ARROW_MALLOC_CONF"] == "background_thread:false"


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


def test_text_is_utf8_whatever_the_locale():
    """Under a Korean locale, files that others had written in UTF-8 could not be read."""
    folders = ("harness", "tasks", "reporting", "examples")
    files = [REPO / "report.py", *REPO.glob("train_*.py")]
    files += [file for name in folders for file in (REPO / name).glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            owner, _, name = ast.unparse(node.func).rpartition(".")
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            if name not in ("open", "read_text", "write_text") or modes in (
                ["rb"],
                ["rb+"],
                ["wb"],
                ["ab"],
            ):
                continue
            # These have functions of their own by those names; without an owner, it is harness.files.
            of_text = owner not in ("os", "Image", "files") and (owner or name == "open")
            named = [keyword.value.value for keyword in node.keywords if keyword.arg == "encoding"]
            utf8 = named in (["utf-8"], ["utf-8-sig"])  # the latter skips a byte order mark
            assert not of_text or utf8, f"{file.name}: {ast.unparse(node)}"


def test_imports_go_in_no_circle():
    folders = ("harness", "tasks", "offline_sweep", "reporting")
    files = [*REPO.glob("*.py"), *(file for name in folders for file in (REPO / name).glob("*.py"))]
    graph = {str(file.relative_to(REPO)): imported(file) for file in files}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
