"""What a user does on Windows: runs, stops, resumes, a sweep, a report. Prints what came of it as JSON.

Runs in an empty directory, on Windows itself with PYTHONPATH, and elsewhere by `windows.py`.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import wandb
from torch.utils.data import DataLoader, Dataset

import report
import sweep_offline
import train_cola
import train_mnist
from harness import files, loading, system, tracking
from harness.errors import Stopped, UserError
from offline_sweep import trials

MNIST = (
    "--dataset synthetic --slice 60 --epochs 2 --log_every 1 --watch off --wandb disabled".split()
)
COLA = "--dataset synthetic --model scratch --max_steps 3 --batch_size 8 --watch off --wandb disabled".split()
SWEEP = """
name: Mixed Case
program: trial.py
method: grid
metric: {name: score, goal: maximize}
early_terminate: {type: hyperband, min_iter: 1, eta: 2}
parameters:
  note: {value: two words}
  x: {values: [3, 2, 1]}
"""
TRIAL = """
import json, pathlib, signal, sys, time
stop = signal.SIGBREAK if sys.platform == "win32" else signal.SIGUSR2
signal.signal(stop, lambda *_: sys.exit(1))
options = dict(word[2:].split("=") for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir(exist_ok=True)
for epoch in range(3):
    with open(out / "history.jsonl", "a") as file:
        print(json.dumps({"step": epoch, "score": float(options["x"])}), file=file)
    if epoch == 1:
        time.sleep(1)
(out / "metrics.json").write_text(json.dumps({"score": float(options["x"])}))
"""
# A trial that Ctrl-Break does not stop, and that takes a minute unless its x is good.
DEAF = """
import json, os, pathlib, re, signal, sys, time
signal.signal(signal.SIGBREAK if sys.platform == "win32" else signal.SIGUSR2, signal.SIG_IGN)
x = int(re.search("x:\\s+value: (.)", pathlib.Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).read_text())[1])
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir()
(out / "history.jsonl").write_text("".join(json.dumps({"step": i, "score": x}) + "\\n" for i in range(2)))
time.sleep(60 if x == 1 else 0)
(out / "metrics.json").write_text(json.dumps({"score": x}))
"""
DEAF_SWEEP = """
name: NAME
program: deaf.py
command: ['${interpreter}', '${program}']
method: grid
metric: {name: score, goal: maximize}
early_terminate: {type: hyperband, min_iter: 1, eta: 2}
parameters: {x: {values: VALUES}}
"""
results = {}
log = tracking.Run.log


def do(name: str, action: Callable, *arguments: str) -> None:
    """Keep what an action prints, and its last words if it is stopped or refused."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            action(list(arguments))
            end = ""
        except (UserError, Stopped, SystemExit, wandb.errors.UsageError) as error:
            end = str(error)
    results[name] = [out.getvalue(), end]


def at_step_3(action: Callable) -> None:
    """Do something when a run logs its third row."""
    calls = []

    def logging(*arguments, **options):
        log(*arguments, **options)
        calls.append(None)
        if len(calls) == 3:
            tracking.Run.log = log
            action()

    tracking.Run.log = logging


def looked_at() -> None:
    do("in use", train_mnist.main, *MNIST, "--output_dir", "plain", "--resume")
    do("report under way", report.main, "plain", "--output", "early.html")


def read_weights(directory: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{directory}/checkpoint.pt", weights_only=True)["model"]


def busy() -> None:
    signal.raise_signal(signal.SIGBREAK)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)


class IgnoresBreak(Dataset):
    """Whether the process that loads an example ignores Ctrl-Break, and what it was told when it began."""

    begun = False

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[bool, bool]:
        return signal.getsignal(signal.SIGBREAK) == signal.SIG_IGN, IgnoresBreak.begun


def begin_worker(number: int) -> None:
    IgnoresBreak.begun = True


def deaf_trials() -> None:
    """Ctrl-Break while a trial ignores it, and the end of a trial that no console can reach."""
    watch, signal_group = trials.Search.watch, system.signal_group
    Path("deaf.py").write_bytes(DEAF.encode())

    def stopping(search: trials.Search) -> list:
        if any((process.output_dir / "history.jsonl").exists() for process in search.running):
            signal.raise_signal(signal.SIGBREAK)
        return watch(search)

    def no_console(pid: int, number: int) -> None:
        if number == system.STOP:
            raise OSError("The handle is invalid")
        signal_group(pid, number)

    trials.Search.watch, trials.STOP_TIMEOUT = stopping, 0.5
    Path("deaf.yaml").write_text(DEAF_SWEEP.replace("NAME", "a.").replace("VALUES", "[1]"))
    do("deaf", sweep_offline.main, "deaf.yaml")
    trials.Search.watch = watch
    (lock_file,) = Path("runs").glob("sweep-a*/*.lock")
    deadline = time.monotonic() + 30
    while "deaf trial ended" not in results and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            os.close(system.lock(lock_file))
            results["deaf trial ended"] = True
        time.sleep(0.05)

    system.signal_group = no_console
    Path("deaf.yaml").write_text(DEAF_SWEEP.replace("NAME", "a").replace("VALUES", "[3, 2, 1]"))
    do("no console", sweep_offline.main, "deaf.yaml")
    system.signal_group = signal_group


def main() -> None:
    at_step_3(looked_at)
    do("plain", train_mnist.main, *MNIST, "--output_dir", "plain")
    offline = [*MNIST[:-1], "offline", "--output_dir", "stopped"]
    at_step_3(lambda: signal.raise_signal(signal.SIGBREAK))
    do("stopped", train_mnist.main, *offline)
    Path("stopped/.lock").touch()  # as a process that was killed leaves it
    do("resumed", train_mnist.main, *offline, "--resume")
    weights = read_weights("stopped")
    results["same weights"] = all(
        torch.equal(weight, weights[name]) for name, weight in read_weights("plain").items()
    )

    at_step_3(busy)
    do("late", train_mnist.main, *MNIST, "--output_dir", "late", "--stop_timeout", "0.2")
    do("colon", train_mnist.main, *MNIST, "--id", "a:b")
    do("unknown", train_mnist.main, *MNIST, "--data_dir", "nowhere", "--dataset", "mnist")
    do("cola", train_cola.main, *COLA, "--output_dir", "cola")
    results["loaded"] = [
        batch.tolist() for batch in loading.iterate(DataLoader(range(4), num_workers=1))
    ]
    loader = DataLoader(IgnoresBreak(), num_workers=1, worker_init_fn=begin_worker)
    ((ignored, begun),) = loading.iterate(loader)
    results["worker"] = {"ignores Ctrl-Break": ignored.item(), "begun": begun.item()}

    Path("trial.py").write_bytes(TRIAL.encode())
    Path("sweep.yaml").write_bytes(SWEEP.encode())
    do("sweep", sweep_offline.main, "sweep.yaml")
    deaf_trials()
    do("report", report.main, "plain", "stopped")

    with open("lock", "w") as lock_file:
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], **system.group_options(lock_file)
        )
    try:
        system.lock(Path("lock"))
        results["kept lock"] = False
    except BlockingIOError:
        results["kept lock"] = True
    process.kill()
    process.wait()
    os.close(system.lock(Path("lock")))

    files.write_json(Path("read.json"), {"version": 1})
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; file = open('read.json'); print(flush=True); time.sleep(0.5)",
        ],
        stdout=subprocess.PIPE,
    )
    reader.stdout.readline()
    files.write_json(Path("read.json"), {"version": 2})
    results["replaced"] = json.loads(Path("read.json").read_bytes())["version"]
    results["left"] = [
        str(path) for name in (".lock", "*.unfinished") for path in Path().rglob(name)
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
