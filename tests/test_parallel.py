"""Under torchrun, several processes train like one: same batches and metrics, one W&B run, exact resume."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from harness import distributed
from harness.checkpoints import Checkpoints
from harness.errors import UserError
from harness.progress import Meter
from tasks import encoders
from tests import forking, killing
from tests.conftest import clean_environment, made_once, wandb_records
from tests.wandb_server import serving

SCRIPTS = tuple(killing.ARGUMENTS)


def start(
    script: str,
    cwd: Path,
    *more: str,
    processes: int = 2,
    restarts: int = 0,
    program: Path | None = None,
    **environment: str,
) -> subprocess.Popen:
    """Start the run that `killing` defines in several processes, with one thread each; `program` stands for `script`"""
    launcher = (
        f"-m torch.distributed.run --nproc-per-node {processes} --max-restarts {restarts}".split()
    )
    arguments = [*killing.ARGUMENTS[script].split(), "--output_dir", "out", "--id", "same", *more]
    return forking.Popen(
        [sys.executable, *launcher, program or killing.REPO / script, *arguments],
        cwd=cwd,
        env=clean_environment(cwd, OMP_NUM_THREADS="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def as_script(script: str) -> str:
    """Python code that runs a script of the project as if it had been called itself."""
    code = f"import runpy, sys\nsys.argv[0] = {str(killing.REPO / script)!r}\nsys.path[0] = {str(killing.REPO)!r}\n"
    return code + "runpy.run_path(sys.argv[0], run_name='__main__')\n"


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def wait_for_rows(cwd: Path, count: int) -> None:
    deadline = time.monotonic() + 100
    while not (cwd / "out/history.jsonl").exists() or len(rows(cwd / "out")) < count:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.02)


def workers(torchrun: subprocess.Popen) -> list[int]:
    """The process ids of the training processes that torchrun has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(torchrun.pid), "python"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def uninterrupted(factory: pytest.TempPathFactory, script: str) -> SimpleNamespace:
    """An uninterrupted run with two processes."""

    def make(cwd: Path) -> SimpleNamespace:
        return SimpleNamespace(cwd=cwd, out=cwd / "out", printed=killing.finish(start(script, cwd)))

    return made_once(factory, f"two-{script}", make)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    return {script: uninterrupted(tmp_path_factory, script) for script in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_rank_0_logs_and_prints(script, references):
    reference = references[script]
    assert len(list((reference.cwd / "wandb").glob("*run-*"))) == 1
    history = [
        record["history"]["item"]
        for record in wandb_records(reference.cwd)
        if record["type"] == "history"
    ]
    assert [row["train/loss_step"] for row in history if "train/loss_step" in row] == [
        row["train/loss_step"] for row in rows(reference.out) if "train/loss_step" in row
    ]
    assert reference.printed.count("2 processes train together.") == 1
    assert reference.printed.count("epoch 3: ") == reference.printed.count("Files of this run") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_merged_validation_matches_one_process(script, references, tmp_path):
    """One process evaluates the model that two have trained and gets exactly the same results."""
    shutil.copytree(references[script].cwd, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "out/metrics.json").unlink()
    alone = start(script, tmp_path, "--resume", processes=1)
    assert "begun with 2 process(es) and goes on with 1" in killing.finish(alone)
    assert killing.differences(references[script].out, tmp_path / "out") == []


@pytest.mark.quick
def test_gradients_are_not_summed_twice(monkeypatch):
    """As they would be by a call for each batch, if the optimizer steps every second batch."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda *tensors: None)
    model = torch.nn.Linear(1, 1)
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
        distributed.sum_gradients(model)
        model.zero_grad()
    model(torch.ones(1, 1)).sum().backward()
    distributed.sum_gradients(model)
    model(torch.ones(1, 1)).sum().backward()
    with pytest.raises(ValueError, match="would sum some gradients twice"):
        distributed.sum_gradients(model)


@pytest.mark.quick
def test_gradients_that_a_rank_lacks_are_zero_there(monkeypatch):
    """They must not be taken for those of another weight of the same size; unused ones stay None."""

    def add_other_rank(has, *gradients):
        for tensor, other in zip((has, *gradients), (torch.tensor([1, 1, 0, 0]), 2, 2, 0, 0)):
            tensor += other

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", add_other_rank)
    heads = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    distributed.sum_gradients(heads)
    assert [weight.grad for weight in heads.parameters()] == [2, 2, None, None]


def bert_without_dropout(directory: Path) -> Path:
    words = sorted(
        {
            word
            for line in killing.SENTENCES.read_text().splitlines()
            for word in line.lower().split()
        }
    )
    tokenizer = encoders.bert_tokenizer(encoders.learn_wordpieces(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_agree_with_one_process(script, tmp_path):
    """Equal up to rounding at first; then Adam amplifies the differences, as it does with another number of threads."""
    more = ["--precision", "fp32", "--epochs", "1", "--log_every", "1", "--watch", "off"]
    if script == "train_cola.py":
        more += ["--model", str(bert_without_dropout(tmp_path / "bert")), "--batch_size", "8"]
    histories = []
    for processes in (1, 3):
        (tmp_path / str(processes)).mkdir()
        killing.finish(start(script, tmp_path / str(processes), *more, processes=processes))
        histories.append(
            [row for row in rows(tmp_path / str(processes) / "out") if "train/loss_step" in row]
        )
    assert len(histories[0]) == len(histories[1]) > 10
    for number, (one, three) in enumerate(zip(*histories)):
        assert one["step"] == three["step"]
        within = 1e-3 if number < 6 else 0.2  # whatever a processor rounds
        assert three["train/loss_step"] == pytest.approx(one["train/loss_step"], rel=within)
        one_example = 1 / (8 if script == "train_cola.py" else 48)
        if number < 6:
            assert abs(three["train/acc_step"] - one["train/acc_step"]) < 1.5 * one_example


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_is_restarted(script, victim, references, tmp_path):
    process = start(script, tmp_path, "--resume", restarts=1)
    wait_for_rows(tmp_path, 5)
    os.kill(workers(process)[victim], signal.SIGKILL)
    killing.finish(process)
    assert killing.differences(references[script].out, tmp_path / "out") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_all_processes(number, references, tmp_path):
    """SIGHUP reaches each process twice, from Slurm and through torchrun; the second signal killed it."""
    process = start("train_cola.py", tmp_path, "--checkpoint_every", "1000000")
    wait_for_rows(tmp_path, 5)
    if number == signal.SIGHUP:
        killing.signal_step(process, number)
    else:
        process.send_signal(number)
    printed = process.communicate(timeout=100)[0].decode()
    assert printed.count("stopped by SIG") == 1, printed
    position = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["position"]
    assert position["step"] >= rows(tmp_path / "out")[-1]["step"] and not position["epoch_ends"]
    killing.finish(start("train_cola.py", tmp_path, "--resume"))
    assert killing.differences(references["train_cola.py"].out, tmp_path / "out") == []


def test_slurm_starts_the_processes_and_warns_them(references, tmp_path):
    """As in docs/cluster.md, without torchrun: each process got SIGUSR1 and was gone."""
    started = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for rank in ("0", "1"):
        environment = clean_environment(
            tmp_path,
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            GROUP_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        started.append(killing.start("train_mnist.py", tmp_path, environment))
    wait_for_rows(tmp_path, 5)
    for process in started:
        killing.signal_step(process, signal.SIGUSR1)
    printed = [process.communicate(timeout=100)[0].decode() for process in started]
    assert [process.returncode for process in started] == [128 + signal.SIGUSR1] * 2, printed
    assert "stopped by SIGUSR1 at step" in printed[0] and "W&B has failed" not in printed[0]
    assert "stopped" not in printed[1]
    killing.finish(start("train_mnist.py", tmp_path, "--resume"))
    assert killing.differences(references["train_mnist.py"].out, tmp_path / "out") == []


def test_resume_with_more_processes(references, tmp_path):
    process = start("train_mnist.py", tmp_path, processes=1)
    wait_for_rows(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    printed = killing.finish(start("train_mnist.py", tmp_path, "--resume"))
    assert printed.count("begun with 1 process(es) and goes on with 2") == 1
    expected = references["train_mnist.py"]
    assert [row["step"] for row in rows(tmp_path / "out")] == [
        row["step"] for row in rows(expected.out)
    ]
    for row, other in zip(rows(tmp_path / "out"), rows(expected.out)):
        assert (
            row["train/loss_step"] == pytest.approx(other["train/loss_step"], rel=0.2)
            if "epoch" in row
            else True
        )


def test_resuming_a_finished_run_says_so(references, tmp_path):
    shutil.copytree(references["train_mnist.py"].cwd, tmp_path, symlinks=True, dirs_exist_ok=True)
    assert (
        killing.finish(start("train_mnist.py", tmp_path, "--resume")).count("out is finished: see")
        == 1
    )


def test_divergence_is_reported_once(tmp_path):
    process = start(
        "train_mnist.py", tmp_path, *"--learning_rate 1e30 --precision fp32 --log_every 1".split()
    )
    printed = process.communicate(timeout=200)[0].decode()
    assert process.returncode != 0
    assert printed.count("a lower --learning_rate may help") == 1, printed
    assert 'train_mnist.py", line' not in printed


def test_user_error_is_reported_once(tmp_path):
    process = start("train_mnist.py", tmp_path, "--batch_size", "799", processes=3)
    printed = process.communicate(timeout=200)[0].decode()
    assert process.returncode != 0
    assert (
        printed.count("3 processes can't share a batch of 1: choose another --batch_size") == 1
    ), printed
    assert 'train_mnist.py", line' not in printed  # no traceback of ours; torchrun prints its own
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case, message",
    {
        "no data": "train_cola.py: process 1: error: can't read sentences.tsv",
        "no model": "train_cola.py: process 1: error: --model bert can't be used",
        "other data": "train_cola.py: error: the processes do not have the same data and model",
    }.items(),
)
def test_missing_or_different_files_are_reported(tmp_path, case, message):
    """As on a cluster node whose files are missing or different."""
    for rank in ("0", "1"):
        (tmp_path / rank / "bert").mkdir(parents=True)
        shutil.copy(killing.SENTENCES, tmp_path / rank / "sentences.tsv")
    bert_without_dropout(tmp_path / "0/bert")
    if case != "no model":
        bert_without_dropout(tmp_path / "1/bert")
    lines = killing.SENTENCES.read_text().splitlines(keepends=True)
    if case == "no data":
        (tmp_path / "1/sentences.tsv").unlink()
    if case == "other data":
        (tmp_path / "1/sentences.tsv").write_text("".join([lines[0], *reversed(lines[1:])]))
    arguments = (
        "--train_file sentences.tsv --valid_file sentences.tsv --model bert --wandb disabled"
    )
    there = tmp_path / "there.py"
    there.write_text(f"import os\nos.chdir(os.environ['RANK'])\n{as_script('train_cola.py')}")
    launcher = "-m torch.distributed.run --nproc-per-node 2".split()
    command = [sys.executable, *launcher, there, *arguments.split()]
    done = forking.run(
        command, cwd=tmp_path, env=clean_environment(tmp_path), text=True, timeout=200
    )
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr


def test_stop_from_wandb_is_not_a_failure(tmp_path):
    with serving() as server:
        server.stopped.add("same")
        polls = tmp_path / "polls.py"  # W&B does so every 15 seconds
        polls.write_text(
            "from wandb.sdk.lib import run_stopping\n"
            f"run_stopping.RunStopChecker.__init__.__kwdefaults__['poll_interval'] = 1\n{as_script('train_mnist.py')}"
        )
        more = (
            "--wandb online --epochs 1000 --batch_size 2".split()
        )  # few epochs in that time: each uploads tables
        environment = server.environment() | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}
        process = start("train_mnist.py", tmp_path, *more, program=polls, **environment)
        printed = killing.finish(process, timeout=200)
        assert server.runs["same"]["exit"] == 0, printed
    assert printed.count("stopped by W&B") == 1, printed
    assert torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["position"]["epoch"] < 1000


@pytest.mark.parametrize(
    ("size", "several"), [(None, False), ("", False), ("1", False), ("2", True)]
)
def test_whether_there_are_several_hosts(size, several, monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("GROUP_WORLD_SIZE", size)
    assert distributed.spans_hosts() == several


def test_running_statistics_are_refused(monkeypatch):
    """Each rank would have its own, and the checkpoint those of rank 0."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    progress = SimpleNamespace(session=SimpleNamespace(run=None))
    with pytest.raises(UserError, match="BatchNorm"):
        Checkpoints(progress, [], Meter(), model=model)
