"""What a run says about itself: how to go on, where it goes on, and one line for a mistake."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import warn_loudly
from tests import forking, killing
from tests.conftest import REPO, call, clean_environment

QUICK = f"{killing.DIGITS} --slice 20 --valid_size 1000 --batch_size 16 --wandb disabled".split()
LONG = [*QUICK, "--epochs", "200", "--notes", "it's a note"]


def start(cwd: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, REPO / "train_mnist.py", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forking.Popen(command, cwd=cwd, env=clean_environment(cwd), **streams)


def stop(process: subprocess.Popen, cwd: Path, number: signal.Signals = signal.SIGTERM) -> str:
    """Send a signal once the run has logged rows; return its last line."""
    deadline = time.monotonic() + 100
    while not any(journal.stat().st_size for journal in cwd.rglob("history.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    err = process.communicate(timeout=100)[1]
    assert process.returncode == 128 + number, err
    return err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("named", [["--output_dir", "my run"], []])
def test_a_stopped_run_says_what_to_type(number, named, tmp_path):
    """The line is pasted into a shell; the run that it starts says where it goes on."""
    last = stop(start(tmp_path, *LONG, *named), tmp_path, number)
    (out,) = (config.parent.relative_to(tmp_path) for config in tmp_path.rglob("config.json"))
    problem, _, command = last.partition(". To go on: ")
    assert problem.startswith(
        f"train_mnist.py: stopped by {number.name} at step "
    ) and problem.endswith(", saved")
    # What else was given stands in config.json.
    expected = ["python", str(REPO / "train_mnist.py"), "--output_dir", str(out), "--resume"]
    assert shlex.split(command) == expected

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=tmp_path,
        env=clean_environment(tmp_path, PATH=path),
        stdout=subprocess.PIPE,
        text=True,
    )
    resuming = next(line for line in process.stdout if line.startswith("Resuming"))
    process.kill()
    process.communicate()
    step = int(
        problem.split()[-2].rstrip(",")
    )  # 200 images, 13 batches an epoch, the last one has 8
    epochs, examples = divmod(step, 200)
    place = (epochs, 13) if examples == 0 else (epochs + 1, examples // 16 + 1)
    assert resuming == f"Resuming {out} at epoch {place[0]}, batch {place[1]} of 13\n"


def test_resume_needs_a_directory(tmp_path):
    done = call("train_mnist.py", "--resume", cwd=tmp_path)
    assert (done.status, done.err) == (2, "train_mnist.py: error: --resume needs --output_dir\n")


def test_no_warning_of_links_and_no_long_warning(tmp_path, capsys):
    arguments = [*QUICK[:-2], "--max_steps", "2", "--output_dir", "out", "--wandb", "offline"]
    done = call("train_mnist.py", *arguments, cwd=tmp_path, WANDB_CACHE_DIR="/proc/nowhere")
    assert done.status == 0 and "WARNING" not in done.err and "inked" not in done.err
    files = next((tmp_path / "wandb").glob("offline-run-*")) / "files"
    for name in ("model.pt", "model.onnx"):
        assert (files / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
        assert not (files / name).is_symlink()
    assert all(len(line) <= 120 for line in done.out.splitlines() if "can't write to" in line)

    warn_loudly(f"W&B has failed: {'a long reason ' * 30}", "Training continues.")
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) > 6
        and max(map(len, lines)) <= 120
        and all(line[:2] in ("", "!!") for line in lines)
    )


def test_two_processes_on_one_new_directory(tmp_path):
    for attempt in range(3):
        arguments = [*QUICK, "--max_steps", "2", "--output_dir", f"new/{attempt}"]
        processes = [start(tmp_path, *arguments) for _ in range(2)]
        errors = [process.communicate(timeout=100)[1] for process in processes]
        (loser,) = (i for i, process in enumerate(processes) if process.returncode)
        assert processes[loser].returncode == 2
        (line,) = errors[loser].splitlines()
        assert "another process is using it" in line or "already holds another run" in line
        assert (tmp_path / f"new/{attempt}/metrics.json").exists()


def test_a_directory_that_is_taken_away_is_one_line(tmp_path):
    process = start(tmp_path, *LONG, "--output_dir", "out")
    while not (tmp_path / "out/curves.png").exists():
        assert process.poll() is None
        time.sleep(0.02)
    (tmp_path / "out").rename(tmp_path / "moved")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in out + err
    line = err.splitlines()[-1]
    assert line.startswith("train_mnist.py: error: out/")
    assert line.endswith(": No such file or directory")


def test_a_slash_in_an_id_leaves_nothing_behind(tmp_path):
    done = call("train_mnist.py", *QUICK, "--id", "../../x", cwd=tmp_path)
    assert done.status == 2 and done.err.splitlines()[-1].endswith(
        "W&B: Run ID cannot contain the characters: :;,#?/'"
    )
    assert not list(tmp_path.rglob("mnist-*"))


def test_long_values_are_shortened(tmp_path):
    done = call("train_mnist.py", "--epochs", "9" * 100_000, cwd=tmp_path)
    (line,) = done.err.splitlines()
    assert done.status == 2 and len(line) < 2000 and "--epochs: " in line
