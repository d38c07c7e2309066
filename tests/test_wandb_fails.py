"""W&B failures never harm training: the server refuses, errors, hangs or dies, W&B's service is killed or frozen."""

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

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
            while (
                not (cwd / "out/history.jsonl").exists()
                or (cwd / "out/history.jsonl").read_text().count("\n") < 6
            ):
                assert process.poll() is None and time.monotonic() < started + 100
                time.sleep(0.02)
            server.die() if how == "die" else setattr(server, "mode", how)
        out = killing.finish(process, timeout=300)
        seconds = time.monotonic() - started
    with serving() as again:
        again.history, again.runs = server.history, server.runs
        if when == "start":
            history = killing.sync(cwd, clean_environment(cwd), again)
        else:
            environment = clean_environment(cwd, **again.environment())
            killing.finish(killing.start(SCRIPT, cwd, environment, "--resume"))
            history = killing.on_server(again)
            assert (
                killing.finish(killing.start(SCRIPT, cwd, environment, "--resume")).count(
                    "is finished"
                )
                == 1
            )
    return SimpleNamespace(out=out, seconds=seconds, history=history, cwd=cwd)


@pytest.fixture
def reference(references) -> SimpleNamespace:
    return references[SCRIPT]


def test_failures_of_the_server(reference, tmp_path):
    """All in one test, because they mostly wait. At the start the run continues offline; later, W&B gets the rest."""
    ways = [("start", how) for how in AT_START] + [("mid-run", how) for how in MID_RUN]
    with ThreadPoolExecutor(len(ways)) as pool:
        runs = dict(zip(ways, pool.map(lambda way: fail(*way, tmp_path / "-".join(way)), ways)))
    for (when, how), run in runs.items():
        warning = "!!  W&B can't be used:" if when == "start" else "!!  W&B does not answer."
        assert run.out.count(warning) == 1 and "Traceback" not in run.out, (when, how, run.out)
        assert killing.differences(reference.out, run.cwd / "out") == [], (when, how)
        assert run.history == reference.history, (when, how)
        # W&B asks the server about each table, and waits 19 seconds for an answer.
        assert run.seconds < 280, (when, how)


@pytest.mark.parametrize(
    ("name", "warning"),
    [("SIGKILL", "!!  W&B has failed:"), ("SIGSTOP", "!!  W&B does not answer.")],
)
def test_training_survives_a_wandb_service_that_dies_or_hangs(name, warning, reference, tmp_path):
    # What a suspended service does not read has to fit into the socket: about 100 KB.
    process = killing.start(SCRIPT, tmp_path, clean_environment(tmp_path), "--watch", "off")
    while not (tmp_path / "out/history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    command = ["pgrep", "-P", str(process.pid), "wandb-core"]
    (service,) = subprocess.run(command, capture_output=True, text=True).stdout.split()
    os.kill(int(service), getattr(signal, name))
    out = killing.finish(process)
    assert killing.differences(reference.out, tmp_path / "out") == []
    assert out.count(warning) == out.count("!!  W&B") == 1 and "Traceback" not in out
    assert name == "SIGSTOP" or re.search(r"\(train_mnist\.py:\d+\)", out), out
    killing.finish(killing.start(SCRIPT, tmp_path, clean_environment(tmp_path), "--resume"))
    with serving() as server:
        steps = [
            row.get("_step") for row in killing.sync(tmp_path, clean_environment(tmp_path), server)
        ]
    assert steps == [row.get("_step") for row in reference.history]


def test_signal_while_the_wandb_run_is_closing(reference, tmp_path):
    with serving() as server:
        process = killing.start(
            SCRIPT, tmp_path, clean_environment(tmp_path, **server.environment())
        )
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
        killing.finish(
            killing.start(
                SCRIPT, tmp_path, clean_environment(tmp_path, **again.environment()), "--resume"
            )
        )
        assert killing.on_server(again) == reference.history
    assert killing.differences(reference.out, tmp_path / "out") == []


@pytest.mark.skipif(
    "stop_fn" not in wandb.Settings.model_fields,
    reason="the stop button of W&B before 0.26.1 stops a run as Ctrl-C does: docs/resume.md",
)
def test_stop_button_ends_the_run_cleanly(tmp_path):
    with serving() as server:
        server.stopped.add("same")  # W&B polls every 15 seconds
        # W&B takes a second to send the tables of an epoch: the epochs are longer.
        longer = "--epochs 9999 --slice 1 --batch_size 8".split()
        process = killing.start(
            SCRIPT, tmp_path, clean_environment(tmp_path, **server.environment()), *longer
        )
        out = killing.finish(process)
        assert (
            "stopped by W&B at step " in out
            and "To go on: python " in out
            and "Traceback" not in out
        )
        assert server.runs["same"]["exit"] == 0
