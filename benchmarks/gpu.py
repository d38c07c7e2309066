"""Measure both scripts on a GPU beside peers: python -m benchmarks.gpu --data_dir DIR, under four minutes.

DIR contains MNIST/raw and cola_public_1.1.zip, as the scripts store them; without them all train on the built-in data.
`--model` is a directory or the name of a Hugging Face model; "scratch" is BERT-tiny's architecture with random weights.
`--smoke` goes through all parts with little work, also without a GPU. The ratio is ours over the other's speed.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import train_mnist
from benchmarks import bare, pairs
from benchmarks.mnist import FAST, TUTORIAL
from harness.device import find_device, keep_freed_memory
from tasks import encoders
from tasks.sentences import load_corpus

LIBRARIES = ("torch", "transformers", "wandb", "lightning", "accelerate")
ROUNDS = 3


class Data:
    """Where the data are, and the options that name them."""

    def __init__(self, directory: Path, smoke: bool):
        self.directory = str(directory.resolve())
        self.smoke = smoke
        has_mnist = (directory / "MNIST/raw/train-images-idx3-ubyte").exists()
        self.mnist = [
            "--data_dir",
            self.directory,
            "--dataset",
            "mnist" if has_mnist else "synthetic",
        ]
        self.corpus = "cola" if (directory / "cola_public_1.1.zip").exists() else "synthetic"
        self.cola = ["--data_dir", self.directory, "--dataset", self.corpus]


def row(work: str, ours: str, other: str = "", ratio: float | None = None) -> None:
    shown = "" if ratio is None else f"{ratio:.2f}"
    print(f"| {work} | {ours} | {other} | {shown} |", flush=True)


def train(script: str, *options: str) -> dict[str, float]:
    """Run a script; returns seconds and rates: "process", "training", "first epoch", "last rate", "batches".

    "last rate" is the median of the last epoch's rows, "batches" the seconds of all batches by the rates of the rows.
    """
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, pairs.REPO / script, *options, "--output_dir", "out"]
        started = time.perf_counter()
        done = subprocess.run(
            [*map(str, command)], cwd=cwd, env=pairs.OFFLINE, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        lines = Path(cwd, "out/history.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/examples_per_second" in row]
    epochs = pairs.epoch_seconds(done.stdout)
    rates = [row["train/examples_per_second"] for row in rows]
    steps = [0, *(row["step"] for row in rows)]
    last = [rate for row, rate in zip(rows, rates) if row["epoch"] == rows[-1]["epoch"]]
    return {
        **pairs.reported(done.stdout),
        "process": seconds,
        "first epoch": epochs[0],
        "last rate": statistics.median(last),
        "batches": sum((b - a) / rate for a, b, rate in zip(steps, steps[1:], rates)),
    }


def training_rate(data: Data, _: str) -> None:
    """A batch in the same process, in turn: ours, the bare loop with and without determinism, and as one CUDA graph."""
    os.environ["WANDB_SILENT"] = "true"
    device = find_device("auto")
    for batch_size in (128, 1024):
        epochs = 1 if data.smoke else {128: 2, 1024: 8}[batch_size]
        few = ["--slice", "5"] if data.smoke else []
        options = f"--batch_size {batch_size} --epochs {epochs} --valid_size 0".split()
        options = [*options, *data.mnist, *few]
        settings = train_mnist.options.parse(train_mnist.Settings, options)
        loose = train_mnist.options.parse(
            train_mnist.Settings, [*options, "--deterministic", "false"]
        )
        digits = train_mnist.load(settings, device).train
        count = len(digits.labels)
        total = epochs * (count // batch_size + 1)
        makers = {
            "a bare eager loop, deterministic": (bare.make_step, settings),
            "a bare eager loop": (bare.make_step, loose),
        }
        if device.type == "cuda":
            makers["one CUDA graph, for reference"] = (bare.make_graph, settings)
        ours: list[float] = []
        others: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(1 if data.smoke else ROUNDS):
            ours.append(bare.our_rate([*options, "--wandb", "offline"]))
            for name, (make, its) in makers.items():
                step = make(its, digits, device, total)
                batches = bare.batches_of(its, count, device)
                others[name].append(bare.rate(step, batches, batch_size))
        mean = statistics.median(ours)
        shown = f"{mean:,.0f} images/s, {1000 * batch_size / mean:.2f} ms"
        for name, rates in others.items():
            rate = statistics.median(rates)
            other = f"{rate:,.0f} images/s, {1000 * batch_size / rate:.2f} ms: {name}"
            row(f"MNIST, batches of {batch_size}: training rate", shown, other, mean / rate)


def target(data: Data, _: str) -> None:
    few = "--slice 40 --max_steps 10".split() if data.smoke else []
    done = train("train_mnist.py", *data.mnist, *FAST, *few)
    shown = f"{done['training']:.2f} s of training, {done['process']:.1f} s the process"
    row(f"MNIST to 99%: {done['accuracy']:.2%} reached", shown)


def tutorial(data: Data, _: str) -> None:
    ours = train("train_mnist.py", *data.mnist, *TUTORIAL)
    peer = pairs.process("-m", "benchmarks.peers.mnist_tutorial", data.directory)
    a, b = ours["training"], peer["training"]
    row("the W&B tutorial's job: training", f"{a:.2f} s", f"{b:.2f} s: the tutorial", b / a)
    a, b = ours["process"], peer["whole process"]
    row("the same, whole process", f"{a:.1f} s", f"{b:.1f} s: the tutorial", b / a)


def cola(data: Data, model: str) -> None:
    """Epochs of training and validation, with all that ours logs and draws."""
    epochs = 1 if data.smoke else 3
    with contextlib.ExitStack() as stack:
        if model == "scratch":  # the same for all
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            corpus = load_corpus(data.corpus, data.directory)
            torch.manual_seed(0)
            for part in encoders.load_model(model, corpus.train.sentences, corpus.class_names, 128):
                part.save_pretrained(directory)
            model = directory
        # The peers train in float32; bf16, the scripts' choice on a GPU, adds a third to the launches.
        ours = {}
        for precision in ("auto", "fp32"):
            options = ["--model", model, "--epochs", str(epochs), "--precision", precision]
            done = train("train_cola.py", *data.cola, *options)
            seconds = done["training"] / epochs
            shown = f"{seconds:.2f} s, {done['batches'] / epochs:.2f} s of it batches"
            ours[precision] = seconds, f"{shown} (--precision {precision})"
        peers = {
            "Lightning with its tutorial's settings": ["cola_lightning"],
            "Trainer, batches of similar length, nothing logged": [
                "cola_trainer",
                "group_by_length",
            ],
        }
        for name, (module, *more) in peers.items():
            command = [f"benchmarks.peers.{module}", data.directory, model, epochs, *more]
            with reporting(name):
                b = pairs.process("-m", *command)["training"] / epochs
                for a, shown in ours.values():
                    row("CoLA: an epoch of BERT-tiny", shown, f"{b:.2f} s: {name}", b / a)


@contextlib.contextmanager
def reporting(name: str) -> Iterator[None]:
    """Print an error in a line; what comes after goes on."""
    started = time.perf_counter()
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        row(f"FAILED: {name}", type(error).__name__, lines[-1][:200].replace("|", "/"))
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


PARTS: dict[str, Callable[[Data, str], None]] = {
    "rate": training_rate,
    "target": target,
    "cola": cola,
    "tutorial": tutorial,
}


def header(device: torch.device) -> str:
    versions = []
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            version(library)
            versions.append(library)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"no GPU ({device.type})"
    today = datetime.date.today().isoformat()
    columns = ("ours", "compared with", "ratio")
    return f"{card}, {today}; {pairs.header('work', tuple(versions), columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--model", default="scratch", help="for CoLA [scratch]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="little work, to try the benchmark")
    args = parser.parse_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    data = Data(args.data_dir, args.smoke)
    keep_freed_memory()  # as a run does
    print(header(find_device("auto")), flush=True)
    for name in args.parts:
        with reporting(name):
            PARTS[name](data, model)


if __name__ == "__main__":
    main()
