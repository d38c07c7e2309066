"""Hostile conditions: slow disks, damaged state, foreign files. Nothing is lost, or one line says what is."""

import json
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import train_mnist
from harness import files, script, tracking
from harness.directory import read_checkpoint
from harness.errors import UserError
from tasks import encoders
from tests import forking, killing
from tests.conftest import REPO, call, clean_environment, finished_run, wandb_records

QUICK = f"{killing.DIGITS} --slice 20 --valid_size 1000 --max_steps 2 --batch_size 16 --output_dir out".split()
SLOW_WRITES = """
flush = files.flush
def slow(path, calls=[]):
    flush(path)
    if "checkpoint.pt" in path.name:
        calls.append(path)
        if len(calls) > 1:
            print("writing", flush=True)
            time.sleep(3)
files.flush = slow
"""
SLOW_BATCHES = """
sum_gradients = distributed.sum_gradients
def slow(model, calls=[]):
    calls.append(sum_gradients(model))
    if len(calls) == 6:
        print("computing", flush=True)
        time.sleep(30)
distributed.sum_gradients = slow
"""


@pytest.fixture
def reference(references) -> SimpleNamespace:
    return references["train_mnist.py"]


@pytest.fixture
def unfinished(reference, tmp_path: Path) -> Path:
    """A copy of the output directory of that run, as if it had been killed at its end."""
    shutil.copytree(reference.out, tmp_path / "out")
    (tmp_path / "out/metrics.json").unlink()
    return tmp_path / "out"


def start_changed(
    cwd: Path, change: str, *more: str, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    return killing.start_changed(
        "train_mnist.py", cwd, clean_environment(cwd, **(environment or {})), change, *more
    )


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.decode().strip() == word:
            return
    raise AssertionError(f"the run never printed {word!r}")


def resume(cwd: Path, *more: str) -> SimpleNamespace:
    process = killing.start("train_mnist.py", cwd, clean_environment(cwd), "--resume", *more)
    out = process.communicate(timeout=100)[0].decode()
    return SimpleNamespace(status=process.returncode, out=out, last=out.splitlines()[-1])


# ------------------------------------------------------------------------------------------ requests to stop


def test_a_write_that_has_begun_is_finished(reference, tmp_path):
    """Writes take three seconds, of which the timeout allows one; the one under way ends with all that it holds."""
    process = start_changed(tmp_path, SLOW_WRITES, "--stop_timeout", "1")
    wait_for(process, "writing")
    process.terminate()
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, out
    position = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["position"]
    assert position["batch"] == 4
    assert "stopped by SIGTERM, and --stop_timeout 1 seconds have passed" in out
    assert f"goes on from the checkpoint of step {4 * 48}" in out
    assert resume(tmp_path).status == 0
    assert killing.differences(reference.out, tmp_path / "out") == []


def test_a_batch_that_outlasts_the_timeout_is_repeated(reference, tmp_path):
    process = start_changed(tmp_path, SLOW_BATCHES, "--stop_timeout", "1")
    wait_for(process, "computing")
    process.terminate()
    out = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, out
    assert f"goes on from the checkpoint of step {4 * 48}" in out
    assert resume(tmp_path).status == 0
    assert killing.differences(reference.out, tmp_path / "out") == []


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    """A second SIGTERM did, too: that of torchrun or of a sweep which Slurm had signaled with all its processes."""
    process = start_changed(tmp_path, SLOW_BATCHES)
    wait_for(process, "computing")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT


# ------------------------------------------------------------------------------------------ damaged state


def test_flipped_bits_are_detected_or_harmless(unfinished):
    """2,000 of them, half in the last 4 KB, where an archive keeps its directory."""
    path, places = unfinished / "checkpoint.pt", random.Random(0)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    detected = 0
    for number in range(2000):
        place = places.randrange(len(whole) - 4096 if number % 2 else 0, len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            content = files.read_tensors(path)
        except Exception:
            detected += 1
        else:
            assert killing.same(content, state)
    assert detected > 1500


@pytest.mark.quick
def test_what_could_not_be_read_again_does_not_replace_a_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.write_tensors(path, {"best": 1.0})
    with pytest.raises(pickle.UnpicklingError):
        files.write_tensors(path, {"best": np.float64(0.5)}, previous=tmp_path / "previous.pt")
    assert files.read_tensors(path) == {"best": 1.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.quick
def test_two_nodes_may_write_the_same_file(tmp_path):
    """As process 1 of two containers that share --data_dir. One found the other's temporary file gone."""
    path = tmp_path / "train-images"
    with files.replacing(path) as first, files.replacing(path) as second:
        first.write_bytes(b"images")
        second.write_bytes(b"imag")  # the rest is still to come
        assert first.read_bytes() == b"images"
    assert path.read_bytes() == b"images" and list(tmp_path.iterdir()) == [path]


def test_a_damaged_archive_is_one_line(unfinished, capsys):
    """A method of compression that no archive has, or that fails."""
    whole = (unfinished / "checkpoint.previous.pt").read_bytes()
    torch.save(
        torch.load(unfinished / "checkpoint.pt", weights_only=True), unfinished / "checkpoint.pt"
    )
    plain = (unfinished / "checkpoint.pt").read_bytes()
    for method in (8, 12, 14, 99):  # deflate, bzip2, lzma, unknown
        garbled = bytearray(plain)
        directory = plain.index(b"PK\x01\x02")
        garbled[8], garbled[directory + 10] = method, method
        (unfinished / "checkpoint.pt").write_bytes(garbled)
        (unfinished / "checkpoint.previous.pt").write_bytes(whole)
        assert read_checkpoint(unfinished)
        assert "checkpoint.pt can't be read: " in capsys.readouterr().err


def test_a_state_that_cannot_be_loaded_is_refused_before_training(tmp_path):
    change = """
import numpy as np
from harness import progress
progress.Best.state_dict = lambda best: {"epoch": 0, "value": np.float64(1), "weights": {}}
"""
    out = start_changed(tmp_path, change).communicate(timeout=100)[0].decode()
    assert "error: the state of training can't be loaded again from a checkpoint" in out
    assert "multiarray.scalar was not an allowed global" in out  # torch names it last
    assert "Traceback" not in out and not (tmp_path / "out/checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it is not a checkpoint of this script"),
        ({"model": {}}, "it has no data, history, position and 3 more"),
        (torch.zeros(3), "it is not a checkpoint of this script"),
    ],
)
def test_another_torch_file_is_refused(content, message, unfinished):
    torch.save(content, unfinished / "checkpoint.pt")
    (unfinished / "checkpoint.previous.pt").unlink()
    done = resume(unfinished.parent)
    assert done.status == 1 and message in done.last and "Traceback" not in done.out


def test_another_model_or_version_is_refused(unfinished):
    state = torch.load(unfinished / "checkpoint.pt", weights_only=True)
    del state["model"]["fc.bias"]
    torch.save(state, unfinished / "checkpoint.pt")
    done = resume(unfinished.parent)
    assert done.status == 2 and "its checkpoint is not of this model or version" in done.last
    del state["settings"]["kernels"]
    torch.save(state | {"settings": state["settings"] | {"lr": 1}}, unfinished / "checkpoint.pt")
    done = resume(unfinished.parent)
    assert (
        done.status == 2
        and "of another script or version: its options differ (--kernels, --lr)" in done.last
    )


def test_a_new_option_takes_its_default_and_says_so(unfinished, reference):
    state = torch.load(unfinished / "checkpoint.pt", weights_only=True)
    del state["settings"]["patience"]
    torch.save(state, unfinished / "checkpoint.pt")
    done = resume(unfinished.parent)
    assert done.status == 0
    assert "--patience is new in the script: the run goes on with 0." in done.out.splitlines()


def test_the_other_scripts_run_is_refused(unfinished):
    arguments = f"--train_file {killing.SENTENCES} --valid_file {killing.SENTENCES} --model scratch --output_dir out"
    done = call("train_cola.py", *arguments.split(), "--resume", cwd=unfinished.parent)
    assert done.status == 2
    assert "out/config.json does not fit this script: dataset: must be one of" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"task_name": "tabular"}, "the run in out is of another script"),
        ({"epochs": -2}, "out/config.json does not fit this script: epochs: must be at"),
    ],
)
def test_a_run_without_checkpoint_is_not_begun_with_other_options(
    entry, problem, tmp_path, monkeypatch, capsys
):
    """It trained with the defaults of all options, or another script with the options of this one."""
    monkeypatch.chdir(tmp_path)
    config = {
        "id": "a",
        "output_dir": "out",
        "resume": False,
        "epochs": 1,
        "run_token": "b",
    } | entry
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    arguments = "--output_dir out --resume --dataset synthetic --wandb disabled".split()
    assert script.status_of(lambda: train_mnist.main(arguments)) == 2
    assert problem in capsys.readouterr().err
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_damage_to_the_journal_is_detected(unfinished):
    """2,000 damages: flipped bits, zeros, lines that are lost or doubled."""
    path, places = unfinished / "history.jsonl", random.Random(0)
    state = torch.load(unfinished / "checkpoint.pt", weights_only=True)["history"]
    whole = path.read_bytes()[: state["journal"]]
    rows = tracking.rewind(path, state)
    for number in range(2000):
        damaged, place = bytearray(whole), places.randrange(len(whole))
        lines = whole.splitlines(keepends=True)
        line = places.randrange(len(lines))
        if number % 4 == 0:
            damaged[place] ^= 1 << places.randrange(8)
        elif number % 4 == 1:
            damaged[place : place + 50] = bytes(len(damaged[place : place + 50]))
        elif number % 4 == 2:
            damaged = b"".join(lines[:line] + lines[line + 1 :])
        else:
            damaged = b"".join(lines[: line + 1] + lines[line:])
        path.write_bytes(damaged)
        if damaged.startswith(whole):  # what is behind the checkpoint's part does not count
            assert tracking.rewind(path, state) == rows
            continue
        with pytest.raises(UserError, match="does not go with the checkpoint"):
            tracking.rewind(path, state)


# ------------------------------------------------------------------------------------------ the user's files

FOREIGN = (
    "thesis.txt",
    ".keep.tmp/thesis.txt",
    "model.pt",
    "predictions.csv",
    "mistakes.png",
    "model",
    "model/my_weights.bin",
    "config.json",
    "metrics.json",
)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("more", ["", "--resume"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_files_of_the_user_is_refused(name, more, tmp_path, monkeypatch, capsys):
    """In this process; the script's last line is the same."""
    (tmp_path / "exp" / name).parent.mkdir(parents=True)
    (tmp_path / "exp" / name).write_text('{"lr": 1}')
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_mnist.py"])
    arguments = f"--dataset synthetic --wandb disabled --output_dir exp {more}".split()
    assert script.status_of(lambda: train_mnist.main(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_mnist.py: error: --output_dir exp holds files that no run wrote")
    assert name.split("/")[0] in line and contents(tmp_path) == before


def test_only_temporary_files_of_runs_are_cleared_away(unfinished):
    (unfinished / ".keep.tmp").mkdir()
    (unfinished / ".keep.tmp/thesis.txt").write_text("mine")
    (unfinished / "slurm.out").write_text("mine")
    (unfinished / ".thesis.unfinished").write_text("mine")
    (unfinished / ".model.pt.4711.unfinished").write_text("")
    (unfinished / ".link.1.unfinished").symlink_to(unfinished / ".keep.tmp")
    (unfinished / ".model.4711.unfinished/model").mkdir(parents=True)
    assert resume(unfinished.parent).status == 0
    for name in (".keep.tmp/thesis.txt", "slurm.out", ".thesis.unfinished"):
        assert (unfinished / name).read_text() == "mine"
    assert [file.name for file in unfinished.glob("*.unfinished")] == [".thesis.unfinished"]


def test_a_refused_directory_stays_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("checkpoint.pt", "notes", ".book.unfinished"):
        (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path / "out")
    for more, status in ([], 2), (["--resume"], 1):
        done = call("train_mnist.py", *QUICK, *more, cwd=tmp_path)
        assert done.status == status and len(done.err.splitlines()) == 1
        assert contents(tmp_path / "out") == before


def test_a_new_run_with_the_id_of_another_logs_all_its_rows(tmp_path):
    """The second one is a sweep's: with --resume, it had ended in a traceback."""
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "same"}
    for name, environment in (("one", {}), ("two", agent)):
        done = call(
            "train_mnist.py",
            *QUICK,
            "--log_every",
            1,
            "--id",
            "same",
            "--resume",
            "--output_dir",
            name,
            cwd=tmp_path,
            **environment,
        )
        assert done.status == 0, done.err
    logged = [
        record["history"]["item"]["_step"]
        for record in wandb_records(tmp_path)
        if record["type"] == "history"
    ]
    assert logged == [16, 32]


def test_saved_code_gives_nothing_else_away(tmp_path):
    """W&B's own save_code had added diff.patch, with what has changed in any file that git tracks."""
    secrets = tmp_path / "secrets.yaml"
    for content, commands in (("key: 1", ("init", "add .", "commit -m x")), ("key: 2", ())):
        secrets.write_text(content)
        for command in commands:
            user = "-c user.name=a -c user.email=a@b.c".split()
            git = ["git", *user, *command.split()]
            subprocess.run(git, cwd=tmp_path, check=True, capture_output=True)
    done = call("train_mnist.py", *QUICK, "--save_code", cwd=tmp_path)
    assert done.status == 0, done.err
    (artifact,) = (
        record["artifact"]
        for record in wandb_records(tmp_path)
        if record.get("artifact", {}).get("type") == "code"
    )
    logged = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert {"train_mnist.py", "harness/session.py"} <= logged and "sweep.yaml" not in logged
    saved = {file.name for file in (tmp_path / "wandb/latest-run/files").rglob("*")}
    assert "model.onnx" in saved and not saved & {"diff.patch", "code", "secrets.yaml"}


def test_a_directory_in_place_of_a_file_is_one_line(unfinished):
    (unfinished / "model.onnx").unlink()
    (unfinished / "model.onnx").mkdir()
    done = resume(unfinished.parent)
    assert (
        done.status == 2
        and "model.onnx: Is a directory" in done.last
        and "Traceback" not in done.out
    )


def test_a_signal_at_the_very_end_stops_what_called_the_run(tmp_path):
    program = """
import os, signal, sys, train_mnist
from harness import session
write_json = session.write_json
def signalled(path, content):
    write_json(path, content)
    if path.name == "metrics.json":
        os.kill(os.getpid(), signal.SIGTERM)
session.write_json = signalled
for name in "ab":
    train_mnist.main([*sys.argv[1:], "--output_dir", name])
"""
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO), WANDB_MODE="disabled")
    done = forking.run([sys.executable, "-c", program, *QUICK], cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGTERM
    assert (tmp_path / "a/metrics.json").exists() and not (tmp_path / "b").exists()


def test_a_model_directory_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/my_weights.bin").write_text("mine")
    with (
        pytest.raises(
            UserError, match=r"model was not written by this run: move my_weights.bin away"
        ),
        files.replacing_directory(tmp_path / "model") as directory,
    ):
        (directory / "config.json").write_text("{}")
    assert contents(tmp_path) == {tmp_path / "model/my_weights.bin": b"mine"}


def test_a_home_directory_and_brackets_in_names(tmp_path):
    """As from a YAML file, where no shell expands a tilde; W&B would take brackets for a pattern."""
    arguments = f"{killing.DIGITS} --slice 20 --valid_size 1000 --max_steps 2 --batch_size 16 --output_dir=~/[a]"
    done = call("train_mnist.py", *arguments.split(), cwd=tmp_path)  # which is HOME
    assert done.status == 0, done.err
    saved = next((tmp_path / "wandb").glob("offline-run-*")) / "files"
    for name in ("model.pt", "model.onnx"):
        assert (saved / name).read_bytes() == (tmp_path / "[a]" / name).read_bytes()


# ------------------------------------------------------------------------------------------ odd numbers and models


def test_one_cycle_works_for_every_number_of_batches():
    for batches in range(1, 200):
        settings = train_mnist.Settings()
        model = train_mnist.ConvNet(settings.kernels)
        optimizer, schedule = train_mnist.make_optimizer(model, settings, batches)
        # Before, a run of one batch trained at 2e-8: the last rate of a cycle.
        assert schedule.get_last_lr()[0] > 0.03 * settings.learning_rate
        for _ in range(batches):
            assert 0 <= schedule.get_last_lr()[0] <= settings.learning_rate
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_stored_in_half_precision_is_trained_in_float32(dtype, tmp_path):
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    pieces = encoders.learn_wordpieces(killing.SENTENCES.read_text().splitlines())[:200]
    tokenizer = encoders.bert_tokenizer(pieces)
    transformers.BertForSequenceClassification(config).to(dtype).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == str(
        dtype
    ).removeprefix("torch.")
    data = f"--train_file {killing.SENTENCES} --valid_file {killing.SENTENCES} --epochs 2 --wandb disabled"
    run = finished_run("train_cola.py", tmp_path, *data.split(), "--model", "half")
    weights = safetensors.torch.load_file(run.files / "model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert json.loads((run.files / "model/config.json").read_text())["dtype"] == "float32"


# ------------------------------------------------------------------------------------------ W&B


CLEANED = """
import glob, shutil, tempfile
flush = files.flush
def cleaning(path):
    flush(path)
    for directory in glob.glob(tempfile.gettempdir() + "/*wandb*/"):
        if "checkpoint" in path.name:
            shutil.rmtree(directory)
files.flush = cleaning
"""


@pytest.mark.parametrize("name", ["WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"])
def test_caches_that_cannot_be_written(name, reference, tmp_path):
    environment = clean_environment(tmp_path) | {name: "/proc/nowhere"}
    out = killing.finish(
        killing.start("train_mnist.py", tmp_path, environment, "--log_model", "best")
    )
    assert "W&B can't write to /proc/nowhere" in out and "Traceback" not in out and "!!" not in out
    # The service's own log: it came after the line that says why a run has failed.
    assert " INFO " not in out
    assert killing.differences(reference.out, tmp_path / "out") == []
    artifacts = [
        record["artifact"] for record in wandb_records(tmp_path) if record["type"] == "artifact"
    ]
    assert {"dataset", "model", "run_table"} <= {artifact["type"] for artifact in artifacts}
    # Where `wandb sync` will look for their files; it skips what is gone, and reports success. They were in /tmp.
    staged = [
        Path(entry["local_path"])
        for artifact in artifacts
        for entry in artifact["manifest"]["contents"]
        if "local_path" in entry
    ]
    assert staged and all(file.is_relative_to(tmp_path) and file.is_file() for file in staged)


def test_temporary_files_of_wandb_that_vanish(reference, tmp_path):
    """Cleaned from /tmp at each checkpoint: one warning, the same weights, and every number in W&B."""
    (tmp_path / "tmp").mkdir()
    process = start_changed(tmp_path, CLEANED, environment={"TMPDIR": str(tmp_path / "tmp")})
    out = process.communicate(timeout=100)[0].decode()
    assert (
        process.returncode == 0
        and out.count("!!  W&B has failed: ") == 1
        and "Traceback" not in out
    ), out
    assert re.search(r"\((train_mnist|viz)\.py:\d+\)", out), out
    assert killing.differences(reference.out, tmp_path / "out") == []
    logged = [
        record["history"]["item"]
        for record in wandb_records(tmp_path)
        if record["type"] == "history"
    ]
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    assert [row["_step"] for row in logged] == [row["step"] for row in rows]
    assert all(
        row.items() <= (entry | {"step": entry["_step"]}).items()
        for row, entry in zip(rows, logged)
    )


# ------------------------------------------------------------------------------------------ environment

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ODD_ENVIRONMENT = {
    "rank": (TORCHRUN | {"RANK": "x"}, "RANK=x, WORLD_SIZE=2, "),
    "rank out of range": (
        TORCHRUN | {"RANK": "5"},
        "RANK=5, WORLD_SIZE=2, MASTER_ADDR=localhost, MASTER_PORT=29500: impossible",
    ),
    "world size": (
        TORCHRUN | {"WORLD_SIZE": "two"},
        "WORLD_SIZE=two, ",
    ),
    "port": (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT=x: "),
    "port too high": (
        TORCHRUN | {"MASTER_PORT": "70000"},
        "MASTER_PORT=70000: ",
    ),
    "address of long words": (TORCHRUN | {"MASTER_ADDR": "a" * 100}, "label too long"),
    "no directory for W&B": ({"WANDB_DIR": "/proc"}, "W&B can't start: [Errno 2]"),
    "name of no text": ({"WANDB_NAME": "a\udcff"}, "W&B can't start: 'utf-8' codec can't encode"),
    "address": (
        TORCHRUN | {"MASTER_ADDR": "no.such.host.invalid"},
        "MASTER_ADDR=no.such.host.invalid, MASTER_PORT=29500: [Errno ",
    ),
    "service": (
        {"WANDB_SERVICE": "garbage"},
        "W&B can't start: Failed to parse WANDB_SERVICE='garbage'",
    ),
    "mode": (
        {"WANDB_MODE": "bogus"},
        "W&B can't start: 1 validation error for Settings mode Input should be",
    ),
}


@pytest.mark.parametrize("case", ODD_ENVIRONMENT)
def test_odd_environment_variables_are_one_line(case, tmp_path):
    environment, message = ODD_ENVIRONMENT[case]
    done = call("train_mnist.py", *QUICK, cwd=tmp_path, **environment)
    (line,) = done.err.splitlines()
    assert done.status == 2 and message in line
    assert not (tmp_path / "out").exists()


def test_a_process_that_waits_alone_says_what_to_type(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment = TORCHRUN | {"MASTER_PORT": str(free.getsockname()[1])}
    done = call("train_mnist.py", "--peer_timeout", "1.5", cwd=tmp_path, **environment)
    assert done.status == 1 and not list(tmp_path.iterdir())
    command = shlex.split(done.err.splitlines()[-1].partition("To go on: ")[2])
    assert command == ["python", str(REPO / "train_mnist.py"), "--peer_timeout=1.5"]


def test_names_need_not_be_ascii(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = call(
        "train_mnist.py", *QUICK, "--name", "é", "--output_dir", "ü", cwd=tmp_path, **environment
    )
    assert done.status == 0 and "Traceback" not in done.err
    assert json.loads((tmp_path / "ü/config.json").read_text())["name"] == "é"


@pytest.mark.parametrize("option", ["--name", "--output_dir", "--tags"])
def test_bytes_that_are_not_utf8_are_one_line(option, tmp_path):
    done = call("train_mnist.py", *QUICK, option, "a\udcffb", cwd=tmp_path)
    (line,) = done.err.splitlines()
    assert done.status == 2 and f"{option}: must be UTF-8 text, got 'a\\udcffb'" in line


def test_help_without_docstrings(tmp_path):
    done = call("train_mnist.py", "--help", cwd=tmp_path, PYTHONOPTIMIZE="2")
    assert done.status == 0 and "--learning_rate" in done.out


def test_closed_streams(tmp_path):
    command = f'exec "{sys.executable}" "{REPO}/train_mnist.py" {" ".join(QUICK)} >&- 2>&-'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=clean_environment(tmp_path))
    assert done.returncode == 0 and (tmp_path / "out/metrics.json").exists()


def test_out_of_memory_is_one_line(tmp_path):
    done = call("train_mnist.py", *QUICK, "--kernels", "3000000", "3000000", cwd=tmp_path)
    assert done.status == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1] == (
        "train_mnist.py: error: out of memory: a smaller --micro_batch_size, or a smaller model, needs less"
    )


def test_an_id_with_wildcards_finds_its_own_files(tmp_path):
    for more in ([], ["--resume"]):
        done = call("train_mnist.py", *QUICK, "--id", "**", *more, cwd=tmp_path)
        assert done.status == 0 and "Traceback" not in done.err
    assert "out is finished" in done.out


@pytest.mark.parametrize(
    "write",
    [
        'safetensors.torch.save_file({"w": torch.zeros(9999)}, "w")',
        'files.write_tensors(Path("w"), torch.zeros(9999))',
    ],
)
def test_a_full_disk_hidden_by_a_library_is_one_line(write, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    program = (
        "import resource, safetensors.torch, torch\nfrom pathlib import Path\nfrom harness import files, script\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nscript.run_script(lambda: {write})"
    )
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO))
    done = forking.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)
    assert (done.returncode, done.stderr) == (1, "-c: error: writing: File too large\n")


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_a_wandb_service_that_does_not_start_is_one_line(mode, tmp_path):
    """W&B itself waits forever."""
    program = (
        "import sys, train_mnist\nfrom harness import script, wandb_service\nwandb_service.SERVICE_TIMEOUT = 2\n"
        "script.run_script(lambda: train_mnist.main(sys.argv[1:]))"
    )
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO), WANDB__SERVICE_WAIT="0")
    command = [sys.executable, "-c", program, *QUICK, "--wandb", mode]
    done = forking.run(command, cwd=tmp_path, env=environment, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "-c: error: W&B's service did not start within 2 seconds"
    )
    assert not (tmp_path / "out").exists()


def test_ctrl_c_during_the_exit_shows_no_traceback(tmp_path):
    program = (
        "import atexit, os, signal\nfrom harness import script\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\nscript.run_script(lambda: None)"
    )
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO))
    done = forking.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_an_exit_that_hangs_is_cut_short(tmp_path):
    program = (
        "import atexit, time\nfrom harness import script\nscript.EXIT_TIMEOUT = 1\n"
        "atexit.register(time.sleep, 1000)\nscript.run_script(lambda: print('done'))"
    )
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO))
    done = forking.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_threads_end_before_the_program(tmp_path):
    program = (
        "import threading, time\nfrom concurrent.futures import ThreadPoolExecutor\nfrom harness import script\n"
        "def work(name): time.sleep(0.5); open(name, 'w').close()\n"
        "def main(): threading.Thread(target=work, args='a').start(); ThreadPoolExecutor(1).submit(work, 'b')\n"
        "script.run_script(main)"
    )
    command = [sys.executable, "-c", program]
    assert (
        forking.run(
            command, cwd=tmp_path, env=clean_environment(tmp_path, PYTHONPATH=str(REPO))
        ).returncode
        == 0
    )
    assert {"a", "b"} <= {file.name for file in tmp_path.iterdir()}


def test_freed_memory_is_kept_for_the_next_batch(tmp_path):
    """Four tensors of 2,048 pages each, 50 times: only the first ones touch new pages."""
    program = (
        "import resource, torch\nfrom harness.device import keep_freed_memory\nkeep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nbefore = faults()\n"
        "for _ in range(50): [torch.ones(1 << 21) for _ in range(4)]\nprint(faults() - before)"
    )
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO))
    done = forking.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)
    assert int(done.stdout) < 20 * 2048, done.stderr


def test_all_logs_of_a_run_are_found(tmp_path):
    """W&B appends -1 to the name of a directory if the run was started twice within a second."""
    directories = [
        "offline-run-20260101_000000-same",
        "run-20260101_000000-same-1",
        "run-20260101_000001-same",
    ]
    for directory in [*directories, "run-20260101_000000-same-1-other"]:
        name = "same-1-other" if directory.endswith("other") else "same"
        (tmp_path / "wandb" / directory).mkdir(parents=True)
        (tmp_path / "wandb" / directory / f"run-{name}.wandb").touch()
    program = "from harness import wandb_service\nfor log in wandb_service.log_files('same', None): print(log.parent.name)"
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO))
    done = forking.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True)
    assert done.stdout.splitlines() == directories, done.stderr


# What W&B 0.22 does not have: its settings were passed whether W&B had them or not.
OLDER = """import wandb
for name in (wandb_service.FLUSH_SETTING, "finish_timeout", "finish_timeout_raises", "stop_fn"):
    wandb.Settings.model_fields.pop(name, None)"""
INTERNALS = {
    OLDER: ": a crash may lose the last seconds of W&B's log, and its stop button stops a run as Ctrl-C does.",
    'tracking.LOG_METHOD = "_gone"': "the histograms of run.watch may be logged with another step",
    "wandb_service.Record = None": "its log files can't be read, so that a resumed run may log rows twice",
}


@pytest.mark.parametrize("change", INTERNALS)
def test_what_wandb_does_not_document_may_change(change, reference, tmp_path):
    """Each in turn is taken away: training is the same, and one line says what is lost."""
    change_it = f"from harness import tracking, wandb_service; {change}"
    out = start_changed(tmp_path, change_it).communicate(timeout=100)[0].decode()
    if "Record" in change:  # is read when a run is resumed
        (tmp_path / "out/metrics.json").unlink()
        out = start_changed(tmp_path, change_it, "--resume").communicate(timeout=100)[0].decode()
    assert "Traceback" not in out and out.count(INTERNALS[change]) == 1, out
    assert killing.differences(reference.out, tmp_path / "out") == []
