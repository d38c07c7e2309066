"""A killed or stopped run resumes exactly: same weights, same files, one continuous W&B history."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.directory import PROBE_BYTES, read_checkpoint
from harness.errors import UserError
from tests import killing
from tests.conftest import call, clean_environment
from tests.wandb_server import serving

SCRIPTS = tuple(killing.ARGUMENTS)


@pytest.fixture
def copied(references, tmp_path: Path) -> Path:
    """A copy of the finished train_mnist.py run, for tests to damage."""
    shutil.copytree(references["train_mnist.py"].cwd, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def wait_for_rows(cwd: Path, rows: int) -> None:
    journal = cwd / "out/history.jsonl"
    deadline = time.monotonic() + 100
    while not journal.exists() or journal.read_text().count("\n") < rows:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)


def resume(cwd: Path, *more: str, **environment: str) -> SimpleNamespace:
    process = killing.start(
        "train_mnist.py", cwd, clean_environment(cwd, **environment), "--resume", *more
    )
    out = process.communicate(timeout=100)[0].decode()
    return SimpleNamespace(status=process.returncode, out=out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments(script, references, tmp_path):
    """Beside W&B's log of a finished train_mnist.py with the same id: its steps had been taken for the run's own."""
    reference = references[script]
    (finished,) = references["train_mnist.py"].cwd.glob("wandb/offline-run-*")

    def kill_and_resume(number: int) -> tuple[list[str], list[str], bool]:
        cwd = tmp_path / str(number)
        cwd.mkdir()
        environment, rng = clean_environment(cwd), random.Random(f"{script} {number}")
        other = cwd / "wandb" / finished.name
        shutil.copytree(finished, other, ignore=shutil.ignore_patterns("*.synced"))
        killed = killing.killed_and_resumed(script, cwd, environment, reference.duration, rng)
        if other.exists():  # a run that ended too early starts over without it
            log = "run-same.wandb"
            assert (other / log).read_bytes() == (finished / log).read_bytes()
            assert not list(other.glob("*.synced"))
            shutil.rmtree(other)
        with serving() as server:
            history = killing.sync(cwd, environment, server)
        changed = [
            (row, expected)
            for row, expected in itertools.zip_longest(history, reference.history)
            if row != expected
        ]
        return killed, killing.differences(reference.out, cwd / "out"), changed

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(kill_and_resume, range(5)))
    assert all(not differences and not changed for _, differences, changed in outcomes), outcomes
    assert all(killed for killed, _, _ in outcomes)


def test_several_threads_give_the_same(tmp_path):
    """The other runs have one thread each."""
    threads, outs = "import torch; torch.set_num_threads(2)", []
    for name in ("whole", "killed"):
        cwd = tmp_path / name
        cwd.mkdir()
        arguments = (clean_environment(cwd), threads, "--wandb", "disabled", "--resume")
        if name == "killed":
            process = killing.start_changed("train_mnist.py", cwd, *arguments)
            wait_for_rows(cwd, 7)
            assert killing.kill(process, 0, everything=True)
        killing.finish(killing.start_changed("train_mnist.py", cwd, *arguments))
        outs.append(cwd / "out")
    assert killing.differences(*outs) == []


def test_killed_online_run_resumes_without_gaps_on_the_server(references, tmp_path):
    reference = references["train_mnist.py"]
    with serving() as server:
        environment = clean_environment(tmp_path, **server.environment())
        process = killing.start("train_mnist.py", tmp_path, environment)
        wait_for_rows(tmp_path, 9)  # in the second epoch; the server has received nothing yet
        killing.kill(process, 0, everything=True)
        killing.finish(killing.start("train_mnist.py", tmp_path, environment, "--resume"))
        assert killing.on_server(server) == reference.history
        assert set(server.runs) == {"same"} and server.runs["same"]["exit"] == 0
    assert killing.differences(reference.out, tmp_path / "out") == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_stop_a_run_promptly_and_it_resumes(script, references, tmp_path):
    environment = clean_environment(tmp_path)
    for rows, number in ((2, signal.SIGTERM), (6, signal.SIGINT)):
        process = killing.start(script, tmp_path, environment, "--resume")
        wait_for_rows(tmp_path, rows)
        process.send_signal(number)
        out = process.communicate(timeout=100)[0].decode()
        assert process.returncode == 128 + number, out
        assert f"{script}: stopped by {number.name} at step " in out and "To go on: python " in out
        assert "Traceback" not in out
    seconds = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["seconds"]
    started = time.perf_counter()
    killing.finish(killing.start(script, tmp_path, environment, "--resume"))
    duration = time.perf_counter() - started
    total = json.loads((tmp_path / "out/metrics.json").read_text())["seconds"]
    assert (
        max(seconds, duration) < total < seconds + duration
    )  # its own time is shorter than `duration`
    assert killing.differences(references[script].out, tmp_path / "out") == []


def numbers(history: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for row in history
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_slurm_step(number, references, tmp_path):
    """SIGUSR1, Slurm's usual warning, and SIGHUP ended a run without a checkpoint. W&B's service survives only the first."""
    reference = references["train_mnist.py"]
    with serving() as server:
        environment = clean_environment(tmp_path, **server.environment())
        process = killing.start(
            "train_mnist.py", tmp_path, environment, "--checkpoint_every", "1000"
        )
        wait_for_rows(tmp_path, 3)
        killing.signal_step(process, number)
        out = process.communicate(timeout=100)[0].decode()
        assert process.returncode == 128 + number, out
        assert f"stopped by {number.name} at step " in out and "To go on: python " in out
        survives = number == signal.SIGUSR1
        reported = "W&B has failed" in out or "W&B does not answer" in out
        assert not (survives and reported), out  # a service that dies may have done all its work
        assert "Traceback" not in out, out
        assert ("preempting" in server.runs["same"]["states"]) == survives
        step = read_checkpoint(tmp_path / "out")["position"]["step"]
        assert f" at step {step}, saved" in out
        killing.finish(killing.start("train_mnist.py", tmp_path, environment, "--resume"))
        history = killing.on_server(server)
    if survives:
        assert history == reference.history
    else:  # pictures are lost with the service
        assert numbers(history) == numbers(reference.history)
    assert killing.differences(reference.out, tmp_path / "out") == []


CLOSED_TERMINAL = """
import os, signal
from harness.script import handling_signals
with handling_signals(60) as requests:
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGHUP):
        os.kill(os.getpid(), number)
        print(requests.first, flush=True)
    os._exit(0)
"""


@pytest.mark.quick
def test_nohup_outlives_the_terminal():
    """SIGHUP is a request to stop unless it is ignored, and stays ignored."""
    printed = {}
    for prefix in ([], ["nohup"]):
        command = [*prefix, sys.executable, "-c", CLOSED_TERMINAL]
        done = subprocess.run(command, cwd=killing.REPO, capture_output=True, text=True)
        printed[len(prefix)] = done.stdout.splitlines()
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # the tests may run under nohup
        assert printed[0] == ["stopped by SIGHUP"] * 3
    assert printed[1] == ["None", "stopped by SIGUSR1", "stopped by SIGUSR1"]


def test_stop_at_the_end_of_an_epoch_repeats_its_validation(tmp_path):
    """Every batch is an epoch here. Neither the journal nor W&B may hold a row without its validation metrics."""
    one_batch = "--batch_size 800 --epochs 6".split()
    outs, histories = [], []
    for name, numbers in (("reference", ()), ("stopped", (signal.SIGTERM, signal.SIGINT))):
        cwd = tmp_path / name
        cwd.mkdir()
        environment = clean_environment(cwd)
        for count, number in enumerate(numbers, 1):
            process = killing.start("train_mnist.py", cwd, environment, *one_batch, "--resume")
            wait_for_rows(cwd, 2 * count)
            process.send_signal(number)
            out = process.communicate(timeout=100)[0].decode()
            assert process.returncode == 128 + number, out
            rows = [
                json.loads(line) for line in (cwd / "out/history.jsonl").read_text().splitlines()
            ]
            assert all("valid/loss" in row for row in rows) and len(rows) < 6
        killing.finish(killing.start("train_mnist.py", cwd, environment, *one_batch, "--resume"))
        outs.append(cwd / "out")
        with serving() as server:
            histories.append(killing.sync(cwd, environment, server))
    assert killing.differences(*outs) == []
    *rows, _ = histories[1]  # the last one is the summary
    assert histories[0] == histories[1] and all("valid/loss" in row for row in rows)


def test_second_ctrl_c_stops_immediately(tmp_path):
    process = killing.start(
        "train_mnist.py", tmp_path, clean_environment(tmp_path), "--epochs", "100"
    )
    wait_for_rows(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode in (-signal.SIGINT, 130)


def test_resuming_a_finished_run_changes_nothing(copied):
    before = {path: path.stat().st_mtime_ns for path in (copied / "out").iterdir()}
    done = resume(copied)
    assert done.status == 0 and "out is finished: see out/metrics.json" in done.out
    assert {path: path.stat().st_mtime_ns for path in (copied / "out").iterdir()} == before


def test_changed_settings_are_refused_but_not_names_and_tags(copied):
    (copied / "out/metrics.json").unlink()
    refused = resume(copied, "--learning_rate", "0.1", "--log_every", "5", "--tags", "new")
    assert refused.status == 2
    last = refused.out.splitlines()[-1]
    assert (
        "--learning_rate was 0.005, is 0.1" in last
        and "--log_every was 4, is 5" in last
        and "tags" not in last
    )
    refused = resume(copied, "--project", "another")
    assert refused.status == 2 and "--project was 'mnist', is 'another'" in refused.out
    assert resume(copied, "--tags", "new", "--notes", "new", "--name", "new").status == 0


def test_another_id_is_refused_without_the_config(copied):
    (copied / "out/config.json").unlink()
    refused = resume(copied, "--id", "other")
    assert refused.status == 2 and "--id was 'same', is 'other'" in refused.out.splitlines()[-1]


def test_changed_data_is_refused(copied, references):
    state = torch.load(copied / "out/checkpoint.pt", weights_only=True)
    (copied / "out/metrics.json").unlink()
    torch.save(state | {"data": state["data"] ^ 1}, copied / "out/checkpoint.pt")
    refused = resume(copied)
    assert refused.status == 2 and "the data are not those" in refused.out.splitlines()[-1]


def test_changed_sentences_are_refused(tmp_path):
    sentences = killing.SENTENCES.read_text()
    for part in ("t.tsv", "v.tsv"):
        (tmp_path / part).write_text(sentences)
    arguments = "--train_file t.tsv --valid_file v.tsv --model scratch --max_steps 2 --wandb disabled --output_dir out"
    assert call("train_cola.py", *arguments.split(), cwd=tmp_path).status == 0
    (tmp_path / "out/metrics.json").unlink()
    (tmp_path / "v.tsv").write_text(sentences.replace("\t1\n", "\t0\n", 1))
    assert (tmp_path / "v.tsv").read_text() != sentences
    refused = call("train_cola.py", *arguments.split(), "--resume", cwd=tmp_path)
    assert refused.status == 2 and "the data are not those" in refused.err.splitlines()[-1]


def test_resume_must_name_a_run(tmp_path):
    done = call("train_mnist.py", "--resume", cwd=tmp_path)
    assert done.status == 2 and done.err.count("\n") == 1 and "--output_dir" in done.err


def test_two_processes_cannot_share_a_directory(tmp_path):
    process = killing.start(
        "train_mnist.py", tmp_path, clean_environment(tmp_path), "--epochs", "100"
    )
    wait_for_rows(tmp_path, 1)
    second = resume(tmp_path, "--epochs", "100")
    killing.kill(process, 0, everything=True)
    assert second.status == 2 and "another process is using it" in second.out.splitlines()[-1]


def test_kill_during_export_loses_nothing(references, tmp_path):
    reference, environment = references["train_mnist.py"], clean_environment(tmp_path)
    process = killing.start("train_mnist.py", tmp_path, environment)
    while not (tmp_path / "out/predictions.csv").exists():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(0.3)  # W&B has every row by then
    killing.kill(process, 0, everything=True)
    assert resume(tmp_path).status == 0
    with serving() as server:
        assert killing.sync(tmp_path, environment, server) == reference.history
    assert killing.differences(reference.out, tmp_path / "out") == []
    assert "is finished" in resume(tmp_path).out


def test_online_run_resumed_offline_has_no_gaps(references, tmp_path):
    with serving() as server:
        process = killing.start(
            "train_mnist.py", tmp_path, clean_environment(tmp_path, **server.environment())
        )
        wait_for_rows(tmp_path, 9)
        killing.kill(process, 0, everything=True)
        assert resume(tmp_path).status == 0
        history = killing.sync(tmp_path, clean_environment(tmp_path), server)
    assert history == references["train_mnist.py"].history


def test_another_run_in_its_place_on_the_server_is_refused(copied):
    """The rows up to that run's last step had been left out without a word."""
    (copied / "out/metrics.json").unlink()
    with serving() as server:
        server.run("same")["config"]["run_token"] = {"value": "of another run"}
        server.history["same"] = {0: {"_step": 5000}}
        refused = resume(copied, "--wandb", "online", **server.environment())
        assert len(server.rows("same")) == 1
    assert refused.status == 2 and "Traceback" not in refused.out
    assert "error: W&B has another run with --id same: go on" in refused.out.splitlines()[-1]


def test_run_of_a_gpu_says_what_to_do_where_there_is_none(copied, references):
    state = torch.load(copied / "out/checkpoint.pt", weights_only=True)
    state["settings"]["device"] = "cuda"
    torch.save(state, copied / "out/checkpoint.pt")
    config = copied / "out/config.json"
    config.write_text(config.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    (copied / "out/metrics.json").unlink()
    refused = resume(copied)
    assert refused.status == 2
    assert refused.out.splitlines()[-1] == (
        "train_mnist.py: error: --device cuda: not available on this machine, or in this torch: use --device cpu"
    )
    moved = resume(copied, "--device", "cpu")
    assert moved.status == 0
    assert "The run was on cuda and continues on cpu: rounding and dropout differ." in moved.out
    assert killing.differences(references["train_mnist.py"].out, copied / "out") == []
    assert json.loads((copied / "out/config.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("damage", ["", "cut", "garbled", "deleted"])
def test_damaged_journal_is_refused(damage, copied):
    (copied / "out/metrics.json").unlink()
    journal = copied / "out/history.jsonl"
    content = journal.read_bytes()
    if damage == "deleted":
        journal.unlink()
    else:
        journal.write_bytes(
            {"": content, "cut": content[: len(content) // 2]}.get(damage, bytes(50) + content[50:])
        )
    done, segments = resume(copied), len(list((copied / "wandb").glob("*run-*")))
    assert done.status == (1 if damage else 0) and "Traceback" not in done.out
    if damage:
        assert "history.jsonl does not go with the checkpoint" in done.out.splitlines()[-1]
        assert segments == 1  # W&B was not started


@pytest.mark.parametrize("config", [None, '{"id": "oth'])
def test_run_id_survives_a_damaged_config(config, copied):
    for name in ("metrics.json", "config.json"):
        (copied / "out" / name).unlink()
    if config:
        (copied / "out/config.json").write_text(config)
    arguments = killing.ARGUMENTS["train_mnist.py"].split()
    assert (
        call("train_mnist.py", *arguments, "--output_dir", "out", "--resume", cwd=copied).status
        == 0
    )
    assert json.loads((copied / "out/config.json").read_text())["id"] == "same"


# ------------------------------------------------------------------------------------------ checkpoints


def test_truncated_checkpoint_is_recovered_or_refused(copied, capsys):
    out, lengths = copied / "out", random.Random(0)
    whole, before = (
        (out / "checkpoint.pt").read_bytes(),
        (out / "checkpoint.previous.pt").read_bytes(),
    )
    expected = torch.load(out / "checkpoint.previous.pt", weights_only=True)["position"]
    for _ in range(20):
        (out / "checkpoint.pt").write_bytes(whole[: lengths.randrange(len(whole))])
        (out / "checkpoint.previous.pt").write_bytes(before)
        assert read_checkpoint(out)["position"] == expected
        assert "checkpoint.pt can't be read" in capsys.readouterr().err
        (out / "checkpoint.pt").write_bytes(whole[: lengths.randrange(len(whole))])
        (out / "checkpoint.previous.pt").write_bytes(before[: lengths.randrange(len(before))])
        with pytest.raises(
            UserError, match=r"checkpoint.pt can't be read.*previous.pt can't be read"
        ):
            read_checkpoint(out)


def test_corrupt_byte_is_detected_or_harmless(copied):
    out, places = copied / "out", random.Random(1)
    whole = (out / "checkpoint.pt").read_bytes()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    (out / "checkpoint.previous.pt").unlink()
    detected = 0
    for _ in range(100):
        garbled = bytearray(whole)
        garbled[places.randrange(len(whole))] ^= 0xFF
        (out / "checkpoint.pt").write_bytes(garbled)
        try:
            assert killing.same(read_checkpoint(out), state)  # harmless
        except UserError:
            detected += 1
    assert detected > 80


@pytest.mark.parametrize("finished", [False, True])
def test_resume_falls_back_to_the_previous_checkpoint(finished, copied, references):
    if not finished:
        (copied / "out/metrics.json").unlink()
    os.truncate(copied / "out/checkpoint.pt", 1000)
    expected = torch.load(copied / "out/checkpoint.previous.pt", weights_only=True)["position"]
    assert read_checkpoint(copied / "out")["position"] == expected
    assert not (copied / "out/checkpoint.previous.pt").exists()  # it has replaced the damaged one
    os.replace(copied / "out/checkpoint.pt", copied / "out/checkpoint.previous.pt")
    (copied / "out/checkpoint.pt").write_bytes(b"")
    done = resume(copied)
    assert (
        done.status == 0 and "Going on from out/checkpoint.previous.pt, which is older." in done.out
    )
    assert killing.differences(references["train_mnist.py"].out, copied / "out") == []


def test_two_damaged_checkpoints_are_an_error_and_change_nothing(copied):
    out = copied / "out"
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        os.truncate(out / name, 1000)
    (out / "metrics.json").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = resume(copied)
    assert done.status == 1 and "give another --output_dir" in done.out.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({PROBE_BYTES}, {PROBE_BYTES}))"
    larger = "--kernels 64 300".split()  # the first checkpoint takes 2.4 MB
    process = killing.start_changed(
        "train_mnist.py", tmp_path, clean_environment(tmp_path), limit, *larger
    )
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 1
    assert out.splitlines()[-1].startswith("-c: error: ") and "Traceback" not in out
    state = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert 0 < state["position"]["batch"] <= 17
    assert not list((tmp_path / "out").glob(".*"))
