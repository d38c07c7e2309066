"""The project on Windows, as `windows.py` imitates it. Nothing started there before: `import fcntl` failed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, clean_environment, made_once

pytestmark = pytest.mark.skipif(os.name == "nt", reason="windows_session.py runs there as it is")


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What `windows_session.py` has printed, written and returned."""

    def run(cwd: Path) -> SimpleNamespace:
        (cwd / "drive_d").mkdir()
        environment = clean_environment(cwd, WANDB_DIR=str(cwd / "drive_d"))
        command = [sys.executable, REPO / "tests/windows.py", REPO / "tests/windows_session.py"]
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        return SimpleNamespace(cwd=cwd, err=done.stderr, results=results)

    return made_once(tmp_path_factory, "windows", run)


@pytest.fixture
def out(session: SimpleNamespace) -> Callable[[str], str]:
    """What an action printed; it came to its end."""

    def read(action: str) -> str:
        printed, end = session.results[action]
        assert end == ""
        return printed

    return read


def end(session: SimpleNamespace, action: str) -> str:
    """The line with which an action was stopped or refused."""
    return session.results[action][1]


def test_both_scripts_run(session, out):
    """`import fcntl`, `os.register_at_fork`, `SIGALRM`; fsync of a file opened to read; TypeError of CDLL(None)."""
    assert "test accuracy" in out("plain") and "best epoch 1" in out("cola")
    for name in ("plain/model.onnx", "cola/model/model.safetensors", "cola/metrics.json"):
        assert (session.cwd / name).exists()
    assert (
        "Traceback" not in session.err and "!!" not in session.err
    )  # at exit, SIGCHLD was missing


def test_a_running_run_is_locked_and_leaves_no_file(session, out):
    """The lock was `flock` of an opened directory, which Windows refuses. A killed run's lock file keeps nobody out."""
    problem = "another process is using it; wait for it, or stop it"
    assert end(session, "in use") == f"--output_dir plain: {problem}"
    assert "under way at step" in out("report under way")
    assert "Resuming stopped" in out("resumed")  # beside a .lock that nobody had open
    assert session.results["left"] == []


def test_ctrl_break_stops_a_run_that_resumes_identically(session, out):
    """Ctrl-Break killed a run. A journal with CRLF, as text files have it, did not match its checksum."""
    assert "at step" in end(session, "stopped") and "saved. To go on:" in end(session, "stopped")
    assert session.results["same weights"] is True
    for run in ("plain", "stopped"):
        assert b"\r" not in (session.cwd / run / "history.jsonl").read_bytes()


def test_the_stop_timeout_holds_without_setitimer(session):
    """`SIGALRM` and `setitimer` are missing."""
    assert "and --stop_timeout 0.2 seconds have passed" in end(session, "late")


def test_the_last_line_names_files_on_another_drive(session, out):
    """`os.path.relpath` raised ValueError when all the training was done."""
    assert f"upload it: wandb sync {session.cwd / 'drive_d'}" in out("resumed")


def test_an_id_that_is_no_file_name_is_refused_at_once(session):
    """Windows takes what follows a colon for a hidden stream of the file before it."""
    assert end(session, "colon").startswith(
        "Run ID cannot contain the characters: :"
    )  # W&B's own rule


def test_a_data_loader_with_workers_works(session):
    """`pthread_sigmask` is missing."""
    assert session.results["loaded"] == [[0], [1], [2], [3]]


def test_a_sweep_starts_prunes_and_records_its_trials(session, out):
    """`pass_fds`, `killpg` and /usr/bin/env are missing. A pruned trial that was killed has status 1."""
    lines = out("sweep").splitlines()
    assert lines[0].startswith("trial 0: complete, score 3.0000")
    assert lines[2].startswith("trial 2: pruned after 2 epochs")
    (directory,) = (session.cwd / "runs").glob("sweep-Mixed*")
    # "mixed case" would be the same directory.
    assert directory.name.startswith("sweep-Mixed~20Case~")
    for file in [*directory.glob("*.json"), *directory.glob("*.yaml")]:
        assert b"\r" not in file.read_bytes()


def test_names_that_differ_have_directories_that_differ(session, out):
    """The sweeps "a" and "a.": Windows leaves out a dot at the end of a name."""
    out("no console")
    directories = [path.name for path in (session.cwd / "runs").glob("sweep-a*")]
    assert len(directories) == len({name.rstrip(".").lower() for name in directories}) == 2


def test_trials_that_do_not_react_to_ctrl_break_are_killed(session, out):
    """Those that ignore it when the search stops, and one to prune where no console passes it on."""
    assert end(session, "deaf") == str(128 + signal.SIGUSR2)  # which stands for Ctrl-Break
    assert session.results["deaf trial ended"] is True  # it would have slept for a minute
    lines = out("no console").splitlines()
    assert lines[0].startswith("trial 0: complete, score 3.0000")
    assert lines[2].startswith("trial 2: pruned after 2 epochs")


def test_ctrl_break_is_left_to_the_training_process(session):
    """It ended the workers of a DataLoader, so that a run could not go on to its checkpoint."""
    assert session.results["worker"] == {"ignores Ctrl-Break": True, "begun": True}


def test_the_printed_command_sets_a_variable_as_the_prompt_does(out):
    """`X=1 python ...` is no command there."""
    shown = out("no console").splitlines()[-1]
    assert re.fullmatch(
        r'to repeat the best run: set "WANDB_SWEEP_PARAM_PATH=runs.sweep-a.\w+-0.yaml" && '
        r"python deaf.py",
        shown,
    )


def test_the_printed_command_has_quotes_that_the_prompt_knows(out):
    """It had single quotes, which cmd.exe takes for letters."""
    line = 'to repeat the best run: python trial.py "--note=two words" --x=3'
    assert line in out("sweep").splitlines()


def test_a_trial_keeps_its_lock_when_the_search_is_gone(session):
    """`pass_fds` is refused there; the lock is passed on as standard input."""
    assert session.results["kept lock"] is True


def test_a_file_that_another_program_reads_is_replaced_when_it_is_closed(session):
    """A virus scanner, or a report, ended the run with PermissionError."""
    assert session.results["replaced"] == 2


def test_report_compares_the_runs(session, out):
    """`import fcntl`."""
    lines = out("report").splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["finished", "finished"]
    assert (session.cwd / "report.html").exists()
