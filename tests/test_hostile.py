"""Hostile conditions: slow disks, damaged state, foreign files. Nothing is lost, or one line says what is."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_mnist
from harness import checkpoints, history
from harness.errors import UserError
from tests import killing
from tests.conftest import REPO, clean_environment

# Runs train_mnist.py with parts of it replaced.
CHANGED = """
import sys, time
import train_mnist
from harness import checkpoints, distributed, script
{change}
script.run_script(train_mnist.main)
"""
SLOW_WRITES = """
save = checkpoints.save_tensors
def slow(path, content):
    save(path, content)
    if content["position"]["batch"]:
        print("writing", flush=True)
        time.sleep(3)
checkpoints.save_tensors = slow
"""
SLOW_BATCHES = """
sum_gradients = distributed.sum_gradients
def slow(model, calls=[]):
    calls.append(sum_gradients(model))
    if len(calls) == 12:
        print("computing", flush=True)
        time.sleep(30)
distributed.sum_gradients = slow
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of train_mnist.py."""
    cwd = tmp_path_factory.mktemp("reference")
    killing.timed("train_mnist.py", cwd, clean_environment(cwd))
    return SimpleNamespace(cwd=cwd, out=cwd / "out")


@pytest.fixture
def unfinished(reference, tmp_path: Path) -> Path:
    """A copy of the output directory of that run, as if it had been killed at its end."""
    shutil.copytree(reference.out, tmp_path / "out")
    (tmp_path / "out/metrics.json").unlink()
    return tmp_path / "out"


def start_changed(cwd: Path, change: str, *more: str) -> subprocess.Popen:
    arguments = [*killing.ARGUMENTS["train_mnist.py"].split(), "--output_dir", "out", "--id", "same", *more]
    return subprocess.Popen(
        [sys.executable, "-c", CHANGED.format(change=change), *arguments],
        cwd=cwd,
        env=clean_environment(cwd, PYTHONPATH=str(REPO)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the run never printed {word!r}")


def resume(cwd: Path, *more: str) -> SimpleNamespace:
    process = killing.start("train_mnist.py", cwd, clean_environment(cwd), "--resume", *more)
    out = process.communicate(timeout=100)[0].decode()
    return SimpleNamespace(status=process.returncode, out=out, last=out.splitlines()[-1])


def settings_of(out: Path) -> train_mnist.Settings:
    used = json.loads((out / "config.json").read_text())
    return train_mnist.Settings(**{name: value for name, value in used.items() if name != "versions"})


# ------------------------------------------------------------------------------------------ requests to stop


def test_a_write_that_has_begun_is_finished(reference, tmp_path):
    """Writes take three seconds, of which the timeout allows one; the one under way ends with all that it holds."""
    process = start_changed(tmp_path, SLOW_WRITES, "--stop_timeout", "1")
    wait_for(process, "writing")
    process.terminate()
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    position = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["position"]
    assert position["batch"] == 7
    assert "stopped by SIGTERM, and --stop_timeout 1 seconds have passed" in out
    assert f"goes on from the checkpoint of step {7 * 48}" in out
    assert resume(tmp_path).status == 0
    assert killing.differences(reference.out, tmp_path / "out") == []


def test_a_batch_that_outlasts_the_timeout_is_repeated(reference, tmp_path):
    process = start_changed(tmp_path, SLOW_BATCHES, "--stop_timeout", "1")
    wait_for(process, "computing")
    asked = time.monotonic()
    process.terminate()
    out = process.communicate(timeout=20)[0]
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - asked < 10, out
    assert f"goes on from the checkpoint of step {7 * 48}" in out
    assert resume(tmp_path).status == 0
    assert killing.differences(reference.out, tmp_path / "out") == []


def test_a_second_signal_stops_at_once(tmp_path):
    process = start_changed(tmp_path, SLOW_BATCHES)
    wait_for(process, "computing")
    process.terminate()
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=3)
    assert process.returncode == -signal.SIGTERM


# ------------------------------------------------------------------------------------------ damaged state


def test_flipped_bits_are_detected(unfinished):
    """2,000 of them, half in the last 4 KB, where an archive keeps its directory."""
    path, places = unfinished / "checkpoint.pt", random.Random(0)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    for number in range(2000):
        place = places.randrange(len(whole) - 4096 if number % 2 else 0, len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            assert killing.same(checkpoints._read(path), state) and place >= len(whole) - checkpoints.SEAL.size
        except ValueError as error:
            assert str(error) == "it is damaged"


def test_a_damaged_checkpoint_without_a_checksum_is_one_line(unfinished, capsys):
    """As an older version wrote it: a method of compression that no archive has, or that fails."""
    whole = (unfinished / "checkpoint.previous.pt").read_bytes()
    torch.save(torch.load(unfinished / "checkpoint.pt", weights_only=True), unfinished / "checkpoint.pt")
    plain = (unfinished / "checkpoint.pt").read_bytes()
    for method in (8, 12, 14, 99):  # deflate, bzip2, lzma, unknown
        garbled = bytearray(plain)
        directory = plain.index(b"PK\x01\x02")
        garbled[8], garbled[directory + 10] = method, method
        (unfinished / "checkpoint.pt").write_bytes(garbled)
        (unfinished / "checkpoint.previous.pt").write_bytes(whole)
        assert checkpoints.load(unfinished, settings_of(unfinished))
        assert "checkpoint.pt can't be read: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it is not a checkpoint of this script"),
        ({"model": {}}, "it has no 'position'"),
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
    assert done.status == 2 and "of another script or version: its options differ (--kernels, --lr)" in done.last


def test_the_other_scripts_run_is_refused(unfinished):
    arguments = f"--train_file {killing.SENTENCES} --valid_file {killing.SENTENCES} --model scratch --output_dir out"
    done = subprocess.run(
        [sys.executable, REPO / "train_cola.py", *arguments.split(), "--resume"],
        cwd=unfinished.parent,
        env=clean_environment(unfinished.parent),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "of another script or version: its options differ (--clip_norm" in done.stderr
    assert "Traceback" not in done.stderr


def test_damage_to_the_journal_is_detected(unfinished):
    """2,000 damages: flipped bits, zeros, lines that are lost or doubled."""
    path, places = unfinished / "history.jsonl", random.Random(0)
    state = torch.load(unfinished / "checkpoint.pt", weights_only=True)["history"]
    whole = path.read_bytes()[: state["journal"]]
    rows = history.rewind(path, state)
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
            assert history.rewind(path, state) == rows
            continue
        with pytest.raises(UserError, match="does not go with the checkpoint"):
            history.rewind(path, state)
