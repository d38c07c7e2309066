"""User errors end in one clear line and exit status 2, and leave no half-written files."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, call, clean_environment
from wandb.sdk.lib import config_util

import report
import train_mnist
from harness import options
from harness.errors import UserError
from tests import killing

DIGITS = f"{killing.DIGITS} --slice 4 --valid_size 1000"  # what is given later wins
OPTIONS = {
    "--epoch 3": "unknown option --epoch; did you mean --epochs?",
    "--lr 0.1": "unknown option --lr",
    "stray": "unknown option stray",
    "--epochs": "--epochs: expected one argument",
    "--name -x": "--name: expected one argument",
    "--batch_size=--": "--batch_size: ",  # Python 3.13 takes -- as the value
    "--epochs 0": "--epochs: must be at least 1, got '0'",
    "--epochs -3": "--epochs: must be at least 1, got '-3'",
    "--epochs 1.5": "--epochs: must be a whole number, got '1.5'",
    "--epochs many": "--epochs: must be a whole number, got 'many'",
    "--learning_rate nan": "--learning_rate: must be a finite number, got 'nan'",
    "--learning_rate inf": "--learning_rate: must be a finite number, got 'inf'",
    "--learning_rate 0": "--learning_rate: must be above 0, got '0'",
    "--learning_rate -0.1": "--learning_rate: must be above 0, got '-0.1'",
    "--kernels 16": "--kernels: needs 2 values, got 1: ['16']",
    "--kernels 1e19 1": "--kernels: is too large, got '1e19'",
    "--kernels 16 0": "--kernels: must be at least 1, got '0'",
    "--kernels": "--kernels: needs 2 values, got 0",
    "--slice 0": "--slice: must be at least 1, got '0'",
    "--batch_size 0": "--batch_size: must be at least 1, got '0'",
    "--valid_size -1": "--valid_size: must be at least 0, got '-1'",
    "--seed -1": "--seed: must be at least 0, got '-1'",
    "--seed 4294967296": "--seed: must be below 4294967296",
    "--save_code maybe": "--save_code: must be true or false, got 'maybe'",
    "--dataset minst": "--dataset: must be one of auto, mnist, fashion_mnist, kmnist, synthetic; got 'minst'",
    "--monitor valid/accuracy": "--monitor: must be one of valid/loss",
    "--name=": "--name: must not be empty",
    "--device cuda:1": "--device: must be one of auto, cpu, cuda, mps; got 'cuda:1'; did you mean cuda?",
}

AFTER_PARSING = {
    "--dataset mnist": "mnist is not in downloads: train-images-idx3-ubyte, ",
    "--dataset kmnist": "can't be downloaded",
    "DIGITS --valid_size 20000": "--valid_size 20000 leaves no training image of 5000",
    "DIGITS --slice 1000 --batch_size 16": "--batch_size 16 is more than the 4 training examples",
    "DIGITS --valid_size 0 --patience 3": "--patience needs examples to judge by",
    "DIGITS --output_dir /proc/version/x": "--output_dir /proc/version/x: can't write there",
    "--dataset synthetic --wandb online": "--wandb online: no API key is configured",
    "DIGITS --project a/b": "W&B: Invalid project name 'a/b'",
    "DIGITS --id a?b": "W&B: Run ID cannot contain the characters",
    f"DIGITS --output_dir {'x' * 300}": "File name too long",
    f"--dataset mnist --data_dir {'x' * 300}": "xxx",  # too long a name, or from Python 3.14 on no file
    f"DIGITS --tags {'x' * 65}": "W&B can't start: ",
    "DIGITS --device cuda": "--device cuda: not available on this machine, or in this torch: use --device cpu",
}


def assert_one_line(done, message: str) -> None:
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith("train_mnist.py: error: ") and message in line


@pytest.mark.quick
@pytest.mark.parametrize("arguments, message", OPTIONS.items())
def test_bad_option(tmp_path, arguments, message):
    assert_one_line(call("train_mnist.py", *arguments.split(), cwd=tmp_path, real=True), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", AFTER_PARSING.items())
def test_errors_found_after_parsing(tmp_path, arguments, message):
    done = call("train_mnist.py", *arguments.replace("DIGITS", DIGITS).split(), cwd=tmp_path)
    assert_one_line(done, message)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and "wandb" not in path.parts
    ]
    assert not (tmp_path / "runs").exists()


def test_output_directory_of_another_run(small_mnist):
    before = {path: path.read_bytes() for path in small_mnist.files.iterdir()}
    done = call(
        "train_mnist.py", "--dataset", "synthetic", "--output_dir", "out", cwd=small_mnist.cwd
    )
    assert_one_line(done, "--output_dir out already holds another run (config.json)")
    assert {path: path.read_bytes() for path in small_mnist.files.iterdir()} == before


def test_full_disk_at_the_start(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limits to set")
    """A file size limit stands in for a full disk: both make write() fail."""
    limited = subprocess.run(
        [
            sys.executable,
            REPO / "train_mnist.py",
            "--dataset",
            "synthetic",
            "--output_dir",
            "new/out",
        ],
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert limited.returncode == 2 and not (tmp_path / "new").exists()
    assert limited.stderr.splitlines() == [
        "train_mnist.py: error: --output_dir new/out: can't write there (File too large)"
    ]


def test_nonfinite_training_loss_stops_the_run(tmp_path):
    arguments = f"{DIGITS} --schedule constant --log_every 1 --output_dir out"
    done = call("train_mnist.py", *arguments.split(), "--learning_rate", "1e30", cwd=tmp_path)
    assert done.status == 1 and "Traceback" not in done.err
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    step = rows[-1]["step"] + 128
    assert (
        f"the training loss is nan in epoch 1 by step {step}, learning rate 1e+30"
        in done.err.splitlines()[-1]
    )
    assert not (tmp_path / "out/metrics.json").exists()
    assert torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["position"]["batch"] == 0


def test_nonfinite_evaluation_loss_stops_the_run(tmp_path):
    arguments = f"{DIGITS} --schedule constant --max_steps 1 --learning_rate 1e38"
    for valid_size, name in ((0, "test"), (1000, "validation")):
        done = call(
            "train_mnist.py",
            *arguments.split(),
            "--valid_size",
            valid_size,
            "--output_dir",
            name,
            cwd=tmp_path,
        )
        assert done.status == 1 and "Traceback" not in done.err
        assert f"the {name} loss is nan in epoch 1 by step 128" in done.err.splitlines()[-1]
        assert len((tmp_path / name / "history.jsonl").read_text().splitlines()) == 1


def test_full_disk_during_the_run(tmp_path):
    """The file size limit drops after the run has started: one line and status 1."""
    (tmp_path / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('history.jsonl'):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.addaudithook(hook)\n"
    )
    arguments = f"{DIGITS} --wandb disabled --output_dir out".split()
    done = call("train_mnist.py", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    (line,) = done.err.splitlines()
    assert (
        done.status == 1
        and line.startswith("train_mnist.py: error: ")
        and line.endswith("File too large")
    )
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_closed_output_pipe(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = f"{DIGITS} --wandb disabled".split()
    command = [sys.executable, REPO / "train_mnist.py", *arguments]
    environment = clean_environment(tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["train_mnist.py: error: output pipe closed"]


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "bogus"), ("WANDB_TAGS", "x" * 65)])
def test_bad_wandb_environment(tmp_path, name, value):
    done = call("train_mnist.py", "--dataset", "synthetic", cwd=tmp_path, **{name: value})
    assert_one_line(done, "W&B can't start: ")


def test_wandb_disabled_in_its_own_settings(tmp_path):
    command = [sys.executable, "-m", "wandb", "disabled"]
    subprocess.run(
        command, cwd=tmp_path, env=clean_environment(tmp_path), check=True, capture_output=True
    )
    arguments = f"{DIGITS} --max_steps 1".split()
    done = call("train_mnist.py", *arguments, cwd=tmp_path, WANDB_MODE="")
    assert done.status == 0 and done.out.splitlines()[-1].endswith("(W&B is disabled)")


def test_unexpected_error_keeps_its_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.zip = None\n")
    done = call("train_mnist.py", "--dataset", "synthetic", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.status == 1 and "Traceback" in done.err


# ---------------------------------------------------------------------------------------- parsing values


@pytest.mark.quick
def test_values_from_a_sweep_command():
    arguments = [
        "--kernels=[8, 24]",
        "--epochs=32.0",
        "--learning_rate=1e-4",
        "--save_code=True",
        "--deterministic=False",
    ]
    settings = options.parse(
        train_mnist.Settings, [*arguments, "--tags=['a', \"b\"]", "--max_steps=None"]
    )
    assert (settings.kernels, settings.epochs, settings.learning_rate) == ([8, 24], 32, 1e-4)
    assert (settings.save_code, settings.deterministic, settings.tags, settings.max_steps) == (
        True,
        False,
        ["a", "b"],
        None,
    )
    assert isinstance(settings.epochs, int)


def sweep_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    """Leave the values of a sweep's run as W&B's agents do."""
    path = tmp_path / "config-defaults.yaml"
    config_util.save_config_file_from_dict(
        str(path), {name: {"value": value} for name, value in values.items()}
    )
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(path))


@pytest.mark.quick
def test_values_of_a_sweep(tmp_path, monkeypatch):
    values = {"kernels": [8, 24], "epochs": 32.0, "learning_rate": "1e-4", "save_code": True}
    sweep_values(tmp_path, monkeypatch, **values, name=None)
    settings = options.parse(train_mnist.Settings, ["--epochs", "2", "--seed", "7"])
    assert (settings.kernels, settings.epochs, settings.learning_rate) == ([8, 24], 32, 1e-4)
    assert (settings.save_code, settings.seed, settings.batch_size) == (True, 7, 128)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 2.5, "must be a whole number"),
        ("epochs", True, "must be a whole number"),
        ("learning_rate", None, "must be a finite number"),
        ("kernels", "16", "needs 2 values"),
        ("save_code", 2, "must be true or false"),
        ("learning_rat", 0.1, "no such option; did you mean learning_rate?"),
    ],
)
def test_wrong_values_of_a_sweep(name, value, message, tmp_path, monkeypatch):
    sweep_values(tmp_path, monkeypatch, **{name: value})
    with pytest.raises(UserError, match=rf"config\.{name}: {re.escape(message)}"):
        options.parse(train_mnist.Settings, [])


@pytest.mark.quick
def test_a_name_that_is_no_text_in_a_sweep_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text("wandb_version: 1\n5:\n  value: 3\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "sweep.yaml"))
    with pytest.raises(UserError, match=r"config\.5: no such option"):
        options.parse(train_mnist.Settings, [])


@pytest.mark.quick
@pytest.mark.parametrize("content", ["", "[1, 2]", "wandb_version: 1\nepochs: 3", "a: {b"])
def test_a_sweep_file_that_no_agent_wrote_is_one_line(content, tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(content)
    for path in (tmp_path / "sweep.yaml", tmp_path / "missing"):
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(path))
        with pytest.raises(UserError, match=f"WANDB_SWEEP_PARAM_PATH: {path} can't be read"):
            options.parse(train_mnist.Settings, [])


@pytest.mark.quick
def test_tags_add_up_and_keep_their_brackets():
    settings = options.parse(train_mnist.Settings, ["--tags", "a", "--tags", "b", "c"])
    assert settings.tags == ["a", "b", "c"]
    assert options.parse(train_mnist.Settings, ["--tags", "[wip]"]).tags == ["[wip]"]


@pytest.mark.quick
def test_values_that_are_not_text_and_lists_of_floats():
    """`main(["--epochs", 2])` was a traceback; a list of floats had to be of finite numbers, said the refusal of one."""
    assert (
        options.parse(train_mnist.Settings, ["--epochs", 2, "--output_dir", Path("a")]).epochs == 2
    )
    with pytest.raises(UserError, match="nowhere"):
        report.main([Path("nowhere")])
    kind = list[float]
    field = options.option([0.9, 0.99], "betas", length=2)
    Own = dataclasses.make_dataclass("Own", [("betas", kind, field)], kw_only=True, frozen=True)
    Own.__module__ = __name__
    assert options.parse(Own, ["--betas", "0.8", "0.9"]).betas == [0.8, 0.9]
    # What a sweep makes of YAML's off.
    assert options.parse(train_mnist.Settings, ["--watch=False"]).watch == "off"


@pytest.mark.quick
def test_options_on_the_command_line():
    settings = options.parse(
        train_mnist.Settings, ["--kernels", "8", "24", "--save_code", "--tags", "a", "b"]
    )
    assert (settings.kernels, settings.save_code, settings.tags) == ([8, 24], True, ["a", "b"])
    assert options.parse(train_mnist.Settings, []) == train_mnist.Settings()
