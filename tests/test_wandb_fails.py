"""W&B failures never harm training: the server refuses, errors, hangs or dies, or W&B's service is killed."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import killing
from tests.conftest import clean_environment
from tests.wandb_server import serving

SCRIPT = "train_mnist.py"
AT_START = ("refuse", "error", "hang", "forbidden")
MID_RUN = ("die", "error", "hang")


def fail(when: str, how: str, cwd: Path) -> SimpleNamespace:
    """A run whose server fails at the start or mid-run, and its history once the server works again."""
    cwd.mkdir()
    with serving() as server:
        environment = clean_environment(cwd, **server.environment())
        if when == "start":
            server.mode = how
            if how == "refuse":
                environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"
        started = time.monotonic()
        process = killing.start(SCRIPT, cwd, environment)
        if when == "mid-run":
            while not (cwd / "out/history.jsonl").exists() or (cwd / "out/history.jsonl").read_text().count("\n") < 6:
                assert process.poll() is None and time.monotonic() < started + 100
                time.sleep(0.02)
            server.die() if how == "die" else setattr(server, "mode", how)
        out = killing.finish(process)
        seconds = time.monotonic() - started
    with serving() as again:
        again.history, again.runs = server.history, server.runs
        if when == "start":
            history = killing.sync(cwd, clean_environment(cwd), again)
        else:
            environment = clean_environment(cwd, **again.environment())
            killing.finish(killing.start(SCRIPT, cwd, environment, "--resume"))
            history = killing.on_server(again)
            assert killing.finish(killing.start(SCRIPT, cwd, environment, "--resume")).count("is finished") == 1
    return SimpleNamespace(out=out, seconds=seconds, history=history, cwd=cwd)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A reference run and one run per failure, in parallel because they mostly wait."""
    directory = tmp_path_factory.mktemp("fails")
    reference = directory / "reference"
    reference.mkdir()
    killing.timed(SCRIPT, reference, clean_environment(reference))
    with serving() as server:
        history = killing.sync(reference, clean_environment(reference), server)
    failures = [("start", how) for how in AT_START] + [("mid-run", how) for how in MID_RUN]
    with ThreadPoolExecutor(len(failures)) as pool:
        failed = pool.map(lambda way: fail(*way, directory / "-".join(way)), failures)
        return {"reference": SimpleNamespace(cwd=reference, history=history), **dict(zip(failures, failed))}


@pytest.mark.parametrize("how", AT_START)
def test_run_continues_offline_without_a_server(how, runs):
    run = runs["start", how]
    assert killing.differences(runs["reference"].cwd / "out", run.cwd / "out") == []
    assert run.out.count("!!  W&B can't be used:") == 1 and "Traceback" not in run.out
    assert run.history == runs["reference"].history
    assert run.seconds < 200


@pytest.mark.parametrize("how", MID_RUN)
def test_server_that_fails_mid_run_gets_the_rest_later(how, runs):
    run = runs["mid-run", how]
    assert killing.differences(runs["reference"].cwd / "out", run.cwd / "out") == []
    assert run.out.count("!!  W&B does not answer.") == 1 and "Traceback" not in run.out
    assert run.history == runs["reference"].history
    assert run.seconds < 200


def test_training_survives_a_killed_wandb_service(runs, tmp_path):
    process = killing.start(SCRIPT, tmp_path, clean_environment(tmp_path))
    while not (tmp_path / "out/history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    (service,) = subprocess.run(
        ["pgrep", "-P", str(process.pid), "wandb-core"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(service), signal.SIGKILL)
    out = killing.finish(process)
    assert killing.differences(runs["reference"].cwd / "out", tmp_path / "out") == []
    assert out.count("!!  W&B has failed:") == 1
    killing.finish(killing.start(SCRIPT, tmp_path, clean_environment(tmp_path), "--resume"))
    with serving() as server:
        steps = [row.get("_step") for row in killing.sync(tmp_path, clean_environment(tmp_path), server)]
    assert steps == [row.get("_step") for row in runs["reference"].history]


def test_signal_while_the_wandb_run_is_closing(runs, tmp_path):
    with serving() as server:
        process = killing.start(SCRIPT, tmp_path, clean_environment(tmp_path, **server.environment()))
        while not (tmp_path / "out/predictions.csv").exists():
            assert process.poll() is None
            time.sleep(0.02)
        server.mode = "hang"
        while not (tmp_path / "out/model.onnx").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(1)  # by now W&B is waiting for the server
        process.terminate()
        out = process.communicate(timeout=100)[0].decode()
        assert process.returncode == 128 + signal.SIGTERM, out
        assert "stopped by SIGTERM" in out and "Traceback" not in out
    with serving() as again:
        again.history, again.runs = server.history, server.runs
        killing.finish(killing.start(SCRIPT, tmp_path, clean_environment(tmp_path, **again.environment()), "--resume"))
        assert killing.on_server(again) == runs["reference"].history
    assert killing.differences(runs["reference"].cwd / "out", tmp_path / "out") == []


def test_stop_button_ends_the_run_cleanly(tmp_path):
    with serving() as server:
        server.stopped.add("same")  # W&B polls every 15 seconds
        process = killing.start(
            SCRIPT, tmp_path, clean_environment(tmp_path, **server.environment()), "--epochs", "9999"
        )
        out = killing.finish(process)
        assert "stopped by W&B at step " in out and "To go on: python " in out and "Traceback" not in out
        assert server.runs["same"]["exit"] == 0
