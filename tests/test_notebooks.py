"""The scripts in a real Jupyter kernel: it outlives them, and shows one line where a terminal would."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, clean_environment

pytest.importorskip("ipykernel", reason="Jupyter is not installed")
jupyter_client = pytest.importorskip("jupyter_client", reason="Jupyter is not installed")

RUN = "--dataset synthetic --slice 40 --epochs 1 --watch off --log_every 5"
LONG = "--dataset synthetic --slice 40 --epochs 2000 --watch off --wandb disabled"


class Notebook:
    """A kernel that runs cells in a directory."""

    def __init__(self, directory: Path):
        environment = clean_environment(directory, PYTHONPATH=str(REPO))
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", cwd=str(directory), env=environment
        )

    def run(self, code: str, interrupt_at: str = "", times: int = 1) -> SimpleNamespace:
        """What a cell prints, and the lines of its error; Ctrl-C comes once it has printed `interrupt_at`."""
        sent = self.client.execute(code)
        out = ""
        error = None
        while True:
            message = self.client.get_iopub_msg(timeout=100)
            if message["parent_header"].get("msg_id") != sent:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                out += content["text"]
                if interrupt_at and interrupt_at in out:
                    interrupt_at = ""
                    for _ in range(times):
                        self.manager.interrupt_kernel()
                        time.sleep(0.05)
            elif message["msg_type"] == "error":
                error = content["traceback"]
            elif content.get("execution_state") == "idle":
                return SimpleNamespace(out=out, error=error)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    notebook.directory = Path(notebook.run("import os; print(os.getcwd())").out.strip())
    notebook.run("kept = 1")
    yield notebook
    assert notebook.run("print(kept)").out == "1\n"  # the kernel is the same to the end
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=True)


def test_run_magic_leaves_the_kernel_alive(notebook):
    """`os._exit` took the kernel with all its variables."""
    done = notebook.run(f"%run {REPO}/train_mnist.py {RUN} --wandb offline --output_dir magic")
    assert done.error is None and "Files of this run: magic" in done.out
    assert re.search(r"100%\|.*loss=", done.out)  # nothing was shown before an epoch's end
    mistake = notebook.run(f"%run {REPO}/train_mnist.py --epochz 1")
    assert mistake.error is None
    assert mistake.out == (
        "train_mnist.py: error: unknown option --epochz; did you mean --epochs? (--help lists the options)\n"
    )


def test_main_without_arguments_means_defaults(notebook):
    """It read the kernel's own `-f connection.json`."""
    code = "import train_mnist; print(train_mnist.options.parse(train_mnist.Settings).epochs)"
    assert notebook.run(code).out.startswith("5\n")
    (line,) = notebook.run("import report; report.main()").error
    assert line.startswith("error: the following arguments are required: RUN_DIRECTORY")


def test_a_mistake_is_one_line(notebook):
    done = notebook.run("import train_mnist; train_mnist.main(['--slice', '0'])")
    assert done.error == ["error: --slice: must be at least 1, got '0'"]


def test_what_a_run_changes_is_put_back(notebook):
    show = (
        "import logging, signal, torch\n"
        "print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, "
        "torch.utils.deterministic.fill_uninitialized_memory, logging.raiseExceptions, "
        "signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    )
    before = notebook.run(show).out
    notebook.run(f"import train_mnist; train_mnist.main({[*RUN.split(), '--wandb', 'offline']})")
    assert notebook.run(show).out == before
    assert before.startswith("False True True True ")


def test_an_interrupted_run_goes_on(notebook):
    call = f"train_mnist.main({[*LONG.split(), '--output_dir', 'interrupted']})"
    stopped = notebook.run(f"import train_mnist; {call}", interrupt_at="epoch 1:")
    (line,) = stopped.error
    problem, _, command = line.partition(". To go on: ")
    assert re.fullmatch(r"stopped by SIGINT at step \d+, saved", problem)
    assert command == "train_mnist.main(['--output_dir', 'interrupted', '--resume'])"
    resumed = notebook.run(command, interrupt_at="Resuming interrupted at epoch")
    assert resumed.error[0].startswith("stopped by SIGINT at step ")
    config = json.loads((notebook.directory / "interrupted/config.json").read_text())
    assert (config["epochs"], config["slice"], config["watch"]) == (2000, 40, "off")


@pytest.mark.parametrize("place", ["epoch 1:", "batch/s"])
def test_a_second_interrupt_is_immediate(place, notebook):
    """The kernel died: the second SIGINT had its default action."""
    call = f"train_mnist.main({LONG.split()})"
    for _ in range(3):  # the second one may come when IPython is showing the first, and hide it
        stopped = notebook.run(f"import train_mnist; {call}", interrupt_at=place, times=2)
        if stopped.error:
            break
    last = re.sub(r"\x1b\[[0-9;]*m", "", stopped.error[-1])
    assert last.startswith(
        ("KeyboardInterrupt", "stopped by SIGINT")
    )  # the first may be done by then


def test_the_handlers_of_an_interrupted_run_are_put_back(notebook):
    """SIGTERM stayed ignored, and a kernel that is asked to end never did."""
    show = "import signal; print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    before = notebook.run(show).out
    notebook.run(f"import train_mnist; train_mnist.main({LONG.split()})", interrupt_at="epoch 1:")
    assert notebook.run(show).out == before
    assert "SIG_IGN" not in before


def test_a_report_leaves_the_kernel_as_it_was(notebook):
    """Ctrl-C killed the kernel until the cell ended, and later runs had one thread."""
    run = notebook.directory / "reported"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "history.jsonl").write_text('{"step": 1, "epoch": 1, "valid/loss": 0.5}\n')
    show = "print(signal.getsignal(signal.SIGINT), torch.get_num_threads())"
    code = f"import signal, torch; torch.set_num_threads(2); {show}\n%run {REPO}/report.py reported\n{show}"
    done = notebook.run(f"{code}; torch.set_num_threads(1)")
    before, *_, page, after = [line for line in done.out.splitlines() if line]
    assert after == before and before.endswith("2") and page == "The page: report.html", done


def test_an_interrupt_ends_the_page_that_is_served(notebook):
    run = notebook.directory / "served"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "history.jsonl").write_text('{"step": 1, "epoch": 1, "valid/loss": 0.5}\n')
    show = (
        "import signal, threading; print(signal.getsignal(signal.SIGINT), threading.active_count())"
    )
    before = notebook.run(show).out
    done = notebook.run(f"%run {REPO}/report.py served --watch", interrupt_at="until Ctrl-C")
    assert done.error is None and len(done.out.splitlines()) == 1, done
    address = re.search(r"http://\S+", done.out)[0]
    time.sleep(0.5)
    ask = f"import urllib.request; urllib.request.urlopen({address!r}, timeout=5)"
    assert "Connection refused" in "".join(notebook.run(ask).error)
    assert notebook.run(show).out.split()[:-1] == before.split()[:-1]


def test_a_sweep_leaves_the_kernel_as_it_was(notebook):
    """Its SIGTERM handler and Optuna's log level stayed; in another thread there was an error of `signal.signal`."""
    (notebook.directory / "sweep.yaml").write_text(
        f"{{program: {REPO}/tests/objective.py, name: left, method: grid, metric: {{name: score, goal: maximize}}, "
        "parameters: {x: {values: [1, 2]}, y: {value: 0}}}"
    )
    show = "import optuna, signal; print(signal.getsignal(signal.SIGTERM), optuna.logging.get_verbosity())"
    search = "['sweep.yaml', '--count', '{}']"
    notebook.run("import optuna")  # which may print tqdm's hint to install ipywidgets
    before = notebook.run(show).out
    done = notebook.run(f"import sweep_offline; sweep_offline.main({search.format(1)})")
    assert done.error is None and "1 complete" in done.out
    assert notebook.run(show).out == before
    done = notebook.run(
        f"import asyncio; await asyncio.to_thread(sweep_offline.main, {search.format(2)})"
    )
    assert done.error is None and "2 complete" in done.out
    assert notebook.run(show).out == before
