"""On a GPU: the same bits twice and after a kill, the CPU's results up to rounding, and one line for what can't be.

Each run is a new process, because a forked one can't use CUDA. Tests start theirs side by side: a start takes seconds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import train_cola
import train_mnist
from tasks import batching
from tasks.digits import load_digits, split_digits
from tasks.sentences import load_corpus
from tasks.text_files import OwnFiles
from tests import forking, killing
from tests.conftest import clean_environment, made_once, wandb_records

GPU = os.environ["GPUS_OF_TESTS"].split(",")[0].strip()  # one, as two processes on it are tested
SCRIPTS = tuple(killing.ARGUMENTS)
RUNS = [(script, precision) for script in SCRIPTS for precision in ("fp32", "bf16")]
EXAMPLES = [(script, "fp32") for script in killing.EXAMPLES]


def missing() -> str:
    """Why there is no GPU to test on, or "".

    torch would have to initialize CUDA to be certain, and this process is to stay without it: the driver's tool knows.
    If torch can't use what that finds, the tests fail.
    """
    if GPU in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not shutil.which("nvidia-smi"):
        return "there is no nvidia-smi, so no NVIDIA driver"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return "" if "GPU 0: " in listed.stdout else "nvidia-smi lists no GPU"


REASON = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=f"no GPU: {REASON}")]


def environment(cwd: Path, gpu: str = GPU) -> dict[str, str]:
    """That of a fresh machine with one GPU, or with none if `gpu` is empty."""
    return clean_environment(cwd, CUDA_VISIBLE_DEVICES=gpu, PYTHONUNBUFFERED="1")


def start(script: str, cwd: Path, *more: str, gpu: str = GPU) -> subprocess.Popen:
    """Start the run that `killing` defines, in `cwd`, which is created."""
    cwd.mkdir(exist_ok=True)
    return killing.start(script, cwd, environment(cwd, gpu), *more)


def ended(process: subprocess.Popen) -> SimpleNamespace:
    out = process.communicate(timeout=200)[0].decode()
    return SimpleNamespace(status=process.returncode, out=out, last=out.splitlines()[-1])


def kill_in_second_epoch(process: subprocess.Popen, cwd: Path) -> None:
    """SIGKILL the run and W&B's service after seven rows, in the second of three epochs (in train_lm.py, the first)."""
    journal = cwd / "out/history.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 7:
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # finding the service takes as long as several batches
    assert killing.kill(process, 0, everything=True)


def make_runs(script: str, precision: str, directory: Path) -> SimpleNamespace:
    """Two runs of one command, one that was killed and resumed, and a copy of that before it was resumed."""
    options = ("--device", "cuda", "--precision", precision, "--watch_every", "10")
    names = ("first", "second", "killed")
    started = {name: start(script, directory / name, *options) for name in names}
    kill_in_second_epoch(started["killed"], directory / "killed")
    shutil.copytree(directory / "killed", directory / "copy", symlinks=True)
    resumed = start(script, directory / "killed", *options[2:], "--resume")
    printed = killing.finish(started["first"])
    killing.finish(started["second"])
    return SimpleNamespace(
        directory=directory,
        printed=printed,
        resumed=killing.finish(resumed),
        options=options,
        sentences=str(killing.SHORT),  # of this process
    )


@pytest.fixture
def runs(tmp_path_factory):
    """The runs of a script in a precision, made by the first test that needs them."""

    def get(script: str, precision: str) -> SimpleNamespace:
        make = partial(make_runs, script, precision)
        return made_once(tmp_path_factory, f"gpu-{script}-{precision}", make)

    return get


@pytest.mark.parametrize("script, precision", RUNS + EXAMPLES)
def test_same_bits_twice_and_after_a_kill(script, precision, runs):
    made = runs(script, precision)
    assert f"parameters on cuda in {precision}, seed 42" in made.printed
    assert re.search("Resuming out at epoch [123], batch ", made.resumed)
    assert "on cuda in " in made.resumed and "continues on" not in made.resumed
    first = made.directory / "first/out"
    assert killing.differences(first, made.directory / "second/out") == []
    assert killing.differences(first, made.directory / "killed/out") == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_watched_batches(script, runs):
    """W&B has histograms of every weight and gradient, and each counts all the finite values."""
    made = runs(script, "bf16")
    records = wandb_records(made.directory / "first")
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    state = torch.load(made.directory / "first/out/checkpoint.pt", "cpu", weights_only=True)[
        "model"
    ]
    watched = [row for row in rows if any(key.startswith("gradients/") for key in row)]
    assert len(watched) >= 3
    for row in watched:
        for name, weight in state.items():
            for kind in ("gradients", "parameters"):
                histogram = row.get(f"{kind}/{name}")
                if histogram is not None:  # a tied weight has one
                    assert sum(histogram["values"]) == weight.numel(), (kind, name)
        seen = {key.split("/", 1)[1] for key in row if key.startswith("gradients/")}
        assert len(seen) > 0.8 * len(state)


def probabilities(out: Path, columns: int) -> np.ndarray:
    """Those in predictions.csv, which a GPU has computed."""
    usecols = range(2, 2 + columns)
    return np.genfromtxt(out / "predictions.csv", delimiter=",", skip_header=1, usecols=usecols)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mnist_evaluation_and_export_equal_those_of_a_cpu(precision, runs):
    out = runs("train_mnist.py", precision).directory / "first/out"
    digits = split_digits(load_digits("mnist", killing.FILES.name), 1000, 5)
    model = train_mnist.ConvNet([16, 32])
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    metrics = json.loads((out / "metrics.json").read_text())
    for name, part in (("valid", digits.valid), ("test", digits.test)):
        result = train_mnist.evaluate(model, part)
        assert metrics[f"{name}/loss"] == pytest.approx(result.metrics["loss"], rel=1e-4, abs=1e-6)
        assert metrics[f"{name}/acc"] == pytest.approx(
            result.metrics["acc"], abs=1.5 / len(part.labels)
        )
        if name == "valid":
            on_gpu = probabilities(out, 10)
            assert np.allclose(on_gpu, result.probabilities.numpy(), atol=1e-4)
    exported = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    images = train_mnist.pixels(digits.valid.images).numpy()
    (logits,) = exported.run(None, {"images": images})
    assert np.allclose(torch.tensor(logits).softmax(1).numpy(), on_gpu, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cola_evaluation_equals_that_of_a_cpu(precision, runs):
    out = runs("train_cola.py", precision).directory / "first/out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model")
    valid = load_corpus(
        "files", ".", OwnFiles(train_file=str(killing.SHORT), valid_file=str(killing.SHORT))
    ).valid
    part = batching.tokenise(valid.sentences, valid.labels, tokenizer, 128, torch.device("cpu"))
    result = train_cola.evaluate(SimpleNamespace(model=model, positive=1), part)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["valid/loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert np.allclose(probabilities(out, 2), result.probabilities.numpy(), atol=1e-4)


def test_run_of_a_cpu_stays_there_unless_it_is_moved(tmp_path):
    names = ("whole", "stays", "moves")
    started = {name: start("train_mnist.py", tmp_path / name, "--device", "cpu") for name in names}
    for name in ("stays", "moves"):
        kill_in_second_epoch(started[name], tmp_path / name)
    stays = start("train_mnist.py", tmp_path / "stays", "--resume")
    moves = start("train_mnist.py", tmp_path / "moves", "--resume", "--device", "cuda")
    killing.finish(started["whole"])
    printed = killing.finish(stays)
    assert "parameters on cpu in " in printed and "continues on" not in printed
    assert killing.differences(tmp_path / "whole/out", tmp_path / "stays/out") == []
    printed = killing.finish(moves)
    assert "The run was on cpu and continues on cuda: rounding and dropout differ." in printed
    assert "parameters on cuda in " in printed
    assert json.loads((tmp_path / "moves/out/config.json").read_text())["device"] == "cuda"


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_of_a_gpu_where_there_is_none(script, runs, tmp_path):
    made = runs(script, "bf16")
    for name in ("refused", "moved"):
        shutil.copytree(made.directory / "copy", tmp_path / name, symlinks=True)
    more = [*made.options[2:], "--resume"]
    if script == "train_cola.py":
        more += ["--train_file", made.sentences, "--valid_file", made.sentences]
    refused = start(script, tmp_path / "refused", *more, gpu="")
    moved = start(script, tmp_path / "moved", *more, "--device", "cpu", gpu="")
    done = ended(refused)
    problem = "--device cuda: not available on this machine, or in this torch: use --device cpu"
    assert done.status == 2 and done.last == f"{script}: error: {problem}"
    assert "Traceback" not in done.out
    printed = killing.finish(moved)
    assert "The run was on cuda and continues on cpu: rounding and dropout differ." in printed
    assert "parameters on cpu in bf16" in printed


def test_out_of_memory_is_one_line(tmp_path):
    limit = "import torch; torch.cuda.set_per_process_memory_fraction(0.0005)"
    options = "--device cuda --kernels 256 256 --batch_size 800".split()
    process = killing.start_changed(
        "train_mnist.py", tmp_path, environment(tmp_path), limit, *options
    )
    done = ended(process)
    assert done.status == 1 and "Traceback" not in done.out
    assert done.last.endswith(
        "error: out of memory: a smaller --micro_batch_size, or a smaller model, needs less"
    )


def torchrun(processes: int, cwd: Path, *command: str | Path) -> subprocess.Popen:
    cwd.mkdir(exist_ok=True)
    launcher = [*"-m torch.distributed.run --standalone --nproc-per-node".split(), str(processes)]
    return forking.Popen(
        [sys.executable, *launcher, *map(str, command)],
        cwd=cwd,
        env={**environment(cwd), "PYTHONPATH": str(killing.REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


# A group of one process communicates through NCCL too, but harness/distributed.py returns before it would.
NCCL = """
import torch
import torch.distributed as dist
from harness import distributed
from harness.device import find_device

dist.init_process_group("cpu:gloo,cuda:nccl")
distributed.world_size = lambda: 2
device = find_device("cuda")
one, two = torch.arange(3.0, device=device), torch.full((2, 2), 0.5, device=device)
distributed.sum_over_ranks(one, two)
print(device, dist.get_backend_config(), one.tolist(), two.tolist(), distributed.broadcast("text"))
dist.destroy_process_group()
"""


def test_torchrun(runs, tmp_path):
    """One process gives the bits of a run without torchrun; NCCL sums; two can't share a GPU."""
    arguments = [
        *killing.ARGUMENTS["train_mnist.py"].split(),
        "--output_dir",
        "out",
        "--id",
        "same",
    ]
    made = runs("train_mnist.py", "bf16")
    script = killing.REPO / "train_mnist.py"
    one = torchrun(1, tmp_path / "one", script, *arguments, *made.options)
    two = torchrun(2, tmp_path / "two", script, *arguments, *made.options)
    program = tmp_path / "program.py"
    program.write_text(NCCL)
    sums = ended(torchrun(1, tmp_path / "nccl", program))
    assert sums.status == 0, sums.out
    assert "cuda:0 " in sums.out and "nccl" in sums.out
    assert "[0.0, 1.0, 2.0] [[0.5, 0.5], [0.5, 0.5]] text" in sums.out
    killing.finish(one)
    assert killing.differences(made.directory / "first/out", tmp_path / "one/out") == []
    done = ended(two)
    problem = "2 processes on a machine with 1 GPUs: start 1, or use --device cpu"
    assert done.status == 1 and f"train_mnist.py: error: {problem}" in done.out
