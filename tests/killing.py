"""Kill a run at random moments, resume it, and compare its results with those of an uninterrupted run."""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tasks.digits import synthetic_digits
from tests import forking
from tests.conftest import clean_environment, write_mnist
from tests.wandb_server import WandbServer, serving

REPO = Path(__file__).parent.parent
SENTENCES = REPO / "tests/sentences.tsv"  # from the built-in grammar
FILES = (
    tempfile.TemporaryDirectory()
)  # the digits of each run, which take a second to make and no time to read
write_mnist(Path(FILES.name), synthetic_digits(train=5000, test=1000))
SHORT = Path(FILES.name, "short.tsv")  # the first 100 sentences
SHORT.write_text("".join(SENTENCES.read_text().splitlines(keepends=True)[:101]))
DIGITS = f"--dataset mnist --data_dir {FILES.name}"
# Long enough to cross epochs, checkpoints and logged rows: 17 and 15 batches in an epoch, of which the last is shorter.
ARGUMENTS = {
    "train_mnist.py": f"{DIGITS} --slice 5 --valid_size 1000 --epochs 3 --batch_size 48 "
    "--log_every 4 --checkpoint_every 4",
    "train_cola.py": f"--train_file {SHORT} --valid_file {SHORT} --model scratch --epochs 3 --batch_size 7 "
    "--log_every 4 --checkpoint_every 5",
}
EXAMPLES = {
    "examples/train_images.py": f"--data_dir {FILES.name} --epochs 3 --batch_size 24 --log_every 4 --checkpoint_every 4",
    "examples/train_lm.py": "--precision fp32 --epochs 3 --context 16 --layers 1 --heads 1 --batch_size 64 --log_every 4 --checkpoint_every 5",
    "examples/train_tabular.py": "--precision fp32 --epochs 4 --batch_size 48 --checkpoint_every 7",
}
TIMINGS = ("seconds", "train/examples_per_second")


def start(script: str, cwd: Path, environment: dict[str, str], *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        REPO / script,
        *(EXAMPLES | ARGUMENTS)[script].split(),
        "--output_dir",
        "out",
        "--id",
        "same",
        *more,
    ]
    return forking.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_changed(
    script: str, cwd: Path, environment: dict[str, str], change: str, *more: str
) -> subprocess.Popen:
    """The same run after executing `change`, Python code that may replace parts of `files` or `distributed`."""
    name = Path(script).stem
    program = f"import sys\nsys.path.insert(0, {str((REPO / script).parent)!r})\n"
    program += f"import {name}, time\nfrom harness import distributed, files, script\n{change}\n"
    program += f"script.run_script(lambda: {name}.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        program,
        *(EXAMPLES | ARGUMENTS)[script].split(),
        "--output_dir",
        "out",
        "--id",
        "same",
        *more,
    ]
    return forking.Popen(
        command,
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 200) -> str:
    """Wait for the process, check that it succeeds, and return its output."""
    out = process.communicate(timeout=timeout)[0].decode()
    assert process.returncode == 0, out
    return out


def kill(process: subprocess.Popen, seconds: float, everything: bool) -> bool:
    """SIGKILL the process after `seconds`, W&B's service too if `everything`; return whether it was still running."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return False
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    for child in (
        children if everything else []
    ):  # the service is not in the process group: it has its own session
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.communicate()
    return True


def signal_step(process: subprocess.Popen, number: int) -> None:
    """Send a signal to every process of a Slurm step, as Slurm does: the process, and all that descend from it."""
    pids = [str(process.pid)]
    for pid in pids:  # it grows
        listing = subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True)
        pids += listing.stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)


def outcome(out: Path) -> dict[str, Any]:
    """Everything a run left that must be reproducible, by file, without timings."""
    state = torch.load(out / "checkpoint.pt", "cpu", weights_only=True)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return {
        "checkpoint.pt": {
            key: state[key]
            for key in ("model", "average", "optimizer", "schedule", "position", "best")
            if key in state
        },
        "history.jsonl": [
            {key: value for key, value in row.items() if key not in TIMINGS} for row in rows
        ],
        "metrics.json": {
            k: v
            for k, v in json.loads((out / "metrics.json").read_text()).items()
            if k not in TIMINGS
        },
        "predictions.csv": (out / "predictions.csv").read_bytes(),
        "names": sorted(path.name for path in out.iterdir()),
        "model": {
            path.relative_to(out): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.suffix in (".safetensors", ".onnx", ".png", ".txt")
            or path.parent.name == "model"
        },
    }


def same(a: Any, b: Any) -> bool:
    """Exact equality of nested dictionaries and lists, including tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def curve(rows: list[dict]) -> list[dict]:
    """The rows of a W&B history without timings, watch histograms or media file names."""
    kept = []
    for row in rows:
        kept.append({})
        for key, value in row.items():
            if isinstance(value, dict) and "sha256" in value:
                value = (value["_type"], value["sha256"])
            if key not in (*TIMINGS, "_runtime", "_timestamp") and not key.startswith(
                ("gradients/", "parameters/")
            ):
                kept[-1][key] = value
    return kept


def sync_command(cwd: Path) -> list[str | Path]:
    """How to upload all logs in `cwd/wandb` without a question; before W&B 0.29 as docs/resume.md says."""
    wandb = Path(sys.executable).with_name("wandb")
    if importlib.util.find_spec("wandb.cli.clean"):
        return [wandb, "sync", "--yes", cwd / "wandb"]
    return [wandb, "sync", "--append", *sorted((cwd / "wandb").glob("offline-run-*"))]


def sync(cwd: Path, environment: dict[str, str], server: WandbServer, *options: str) -> list[dict]:
    """`wandb sync` everything in `cwd/wandb`; return what the server then has."""
    command = [*sync_command(cwd), *options]
    done = forking.run(command, cwd=cwd, env={**environment, **server.environment()}, text=True)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr
    return on_server(server)


def on_server(server: WandbServer) -> list[dict]:
    """The run's history on the server, with its summary as the last row."""
    summary = {
        key: value
        for key, value in server.runs["same"]["summary"].items()
        if key not in ("_wandb", "_step")
    }
    return curve([*server.rows("same"), summary])


def differences(reference: Path, other: Path) -> list[str]:
    a, b = outcome(reference), outcome(other)
    return [name for name in a if not same(a[name], b[name])]


def killed_and_resumed(
    script: str, cwd: Path, environment: dict[str, str], duration: float, rng: random.Random
) -> list[str]:
    """Run with `--resume` until finished, killed one to three times at random moments; return when.

    One kill in five hits a checkpoint write. A run that ends before its first kill starts over.
    """
    killed, times = [], rng.choice([1, 1, 1, 2, 3])
    starts = 0
    while len(killed) < times:
        starts += 1
        assert starts < 30, "the run fails again and again"
        process = start(script, cwd, environment, "--resume")
        if rng.random() < 0.2:
            writes = rng.randint(1, 12)
            if wait_for_writes(process, cwd / "out", writes):
                kill(process, 0, everything=rng.random() < 0.5)
                killed.append(f"in write {writes}")
        elif kill(
            process, seconds := rng.uniform(0.1, 0.9 * duration), everything=rng.random() < 0.5
        ):
            killed.append(f"after {seconds:.2f} s")
        if process.returncode == 0 and killed:
            break
        if process.returncode == 0:
            duration *= 0.7  # the machine was busier when it was measured
            shutil.rmtree(cwd / "out")
            shutil.rmtree(cwd / "wandb")
    finish(start(script, cwd, environment, "--resume"))
    return killed


SLOW_WRITES = """
flush = files.flush
def slow(path):
    flush(path)
    time.sleep(0.7 if "checkpoint.pt" in path.name else 0)
files.flush = slow
"""
HOSTILE = (
    "SIGKILL",
    "SIGTERM",
    "slow disk",
    "damaged checkpoint",
    "unwritable caches",
    "service killed",
)


def hostile(
    script: str, cwd: Path, environment: dict[str, str], duration: float, rng: random.Random
) -> list[str]:
    """Run with `--resume` under one to three hostile conditions, then to the end; return them.

    Raises `AssertionError` if a run ends in a traceback, or in a status that is none of its own.
    """
    conditions = [rng.choice(HOSTILE) for _ in range(rng.randint(1, 3))]
    for condition in conditions:
        caches = {"WANDB_CACHE_DIR": "/proc/nowhere", "WANDB_DATA_DIR": "/proc/nowhere"}
        more = {**environment, **(caches if condition == "unwritable caches" else {})}
        if condition == "slow disk":
            process = start_changed(
                script, cwd, more, SLOW_WRITES, "--resume", "--stop_timeout", "0.3"
            )
        else:
            process = start(script, cwd, more, "--resume")
        time.sleep(rng.uniform(0.3, 0.9) * duration)
        if condition == "service killed":
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid), "wandb-core"])
            time.sleep(0.2 * duration)
        if process.poll() is None:
            process.send_signal(
                signal.SIGTERM if condition in ("SIGTERM", "slow disk") else signal.SIGKILL
            )
        out = process.communicate(timeout=200)[0].decode()
        allowed = [0, 143, -signal.SIGKILL, -signal.SIGTERM]
        if condition == "service killed" and "error: W&B can't start: " in out:
            allowed.append(2)  # it was killed before the run had begun
        assert process.returncode in allowed and "Traceback" not in out, out
        path = cwd / "out/checkpoint.pt"
        if condition == "damaged checkpoint" and path.exists():
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
    process = start(script, cwd, environment, "--resume")
    out = process.communicate(timeout=200)[0].decode()
    if (
        process.returncode
    ):  # refused, as both checkpoints are damaged, or the first one is before there is another
        assert "Traceback" not in out and "checkpoint.pt can't be read: " in out, out
        shutil.rmtree(cwd / "out")
        finish(start(script, cwd, environment, "--resume"))
        conditions.append("refused")
    return conditions


def wait_for_writes(process: subprocess.Popen, out: Path, writes: int) -> bool:
    """Wait until that many checkpoint writes have started; False if the process ends first."""
    seen = set()
    while process.poll() is None:
        with contextlib.suppress(OSError):
            seen |= {
                (entry.name, entry.inode())
                for entry in os.scandir(out)
                if entry.name.startswith(".checkpoint.pt.")
            }
        if len(seen) >= writes:
            return True
        time.sleep(0.001)
    process.communicate()
    return False


def reference(script: str, cwd: Path) -> SimpleNamespace:
    """An uninterrupted run, the seconds it took, and its history on the server."""
    duration = timed(script, cwd, clean_environment(cwd))
    with serving() as server:
        history = sync(cwd, clean_environment(cwd), server)
    return SimpleNamespace(cwd=cwd, out=cwd / "out", duration=duration, history=history)


def timed(script: str, cwd: Path, environment: dict[str, str]) -> float:
    """Run without interruption; return the seconds it took."""
    started = time.perf_counter()
    finish(start(script, cwd, environment))
    return time.perf_counter() - started
