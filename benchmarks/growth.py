"""Measure how time and memory grow with the number of sentences, classes and epochs: python -m benchmarks.growth

Each case runs in a process of its own, on Linux. Memory is the rise of peak resident memory above that of the imports.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import metrics
import viz
from benchmarks import pairs
from tasks import batching, encoders
from tasks.sentences import load_corpus
from tasks.text_files import OwnFiles

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "bdfgklmnpr"]
HEADS = {
    "sentences": ("load", "tokenise", "batches of an epoch", "metrics and charts", "memory"),
    "classes": ("metrics and charts", "memory"),
    "epochs": ("a run", "each epoch", "journal", "W&B's log", "resume"),
}
CASES = {
    "sentences": (10_000, 100_000, 1_000_000),
    "classes": (2, 30, 1000),
    "epochs": (10, 100, 1000),
}


def megabytes(which: str) -> float:
    """This process's resident memory: "VmRSS" now, "VmHWM" at its peak."""
    return int(re.search(which + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


class Timer:
    """Formats the seconds since the last call."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self) -> str:
        before, self.last = self.last, time.perf_counter()
        return f"{self.last - before:.2f} s"


def charts(
    result: metrics.Evaluation, sentences: list[str], sources: list[str], class_names: list[str]
) -> None:
    """What an epoch of train_cola.py draws, but for the attributions."""
    viz.confusion_matrix_chart(result, class_names)
    viz.confusion_matrix_picture(result.confusion.counts, class_names, "valid")
    viz.calibration_picture(result, "valid")
    texts = {"sentence": sentences, "source": sources}
    viz.mistakes_table(result, texts, class_names, step=0)
    viz.roc_chart(result, class_names)
    viz.precision_recall_chart(result, class_names)
    viz.per_source_table(result, sources)
    metrics.matthews_corrcoef_interval(result.confusion)


def sentences(count: int) -> list[str]:
    """`count` training sentences of twelve tokens in a file, and a tenth as many to validate on."""
    rng = random.Random(0)
    for name, lines in (("train", count), ("valid", count // 10)):
        with open(f"{name}.tsv", "w") as file:
            file.write("sentence\tlabel\n")
            file.writelines(
                f"{' '.join(rng.choices(WORDS, k=10))}\t{i % 2}\n" for i in range(lines)
            )
    _, tokenizer = encoders.load_model("scratch", WORDS * 2, ["0", "1"], max_length=128)
    before, timer = megabytes("VmRSS"), Timer()
    corpus = load_corpus("files", ".", OwnFiles(train_file="train.tsv", valid_file="valid.tsv"))
    columns = [timer()]
    parts = []
    for part in (corpus.train, corpus.valid):
        labels = [int(label) for label in part.labels]  # 0 or 1
        device = torch.device("cpu")
        parts.append(batching.tokenise(part.sentences, labels, tokenizer, 128, device))
    assert parts[0].lengths.float().mean() == 12
    columns.append(timer())
    for indices in batching.by_length(parts[0].lengths, 64, seed=(0, 1)):
        batching.inputs_of(parts[0], indices)
    columns.append(timer())
    result = metrics.evaluation(torch.randn(count // 10, 2), parts[1].labels)
    charts(result, corpus.valid.sentences, corpus.valid.sources, corpus.class_names)
    return [*columns, timer(), f"{megabytes('VmHWM') - before:,.0f} MB"]


def classes(count: int) -> list[str]:
    """20,000 validation examples of `count` classes, a third of them wrong."""
    labels = torch.arange(20_000) % count
    logits = torch.nn.functional.one_hot(labels, count) + 0.3 * torch.randn(len(labels), count)
    before, timer = megabytes("VmRSS"), Timer()
    result = metrics.evaluation(logits, labels)
    charts(
        result,
        ["a sentence"] * len(labels),
        ["a source"] * len(labels),
        [f"class {i}" for i in range(count)],
    )
    return [timer(), f"{megabytes('VmHWM') - before:,.0f} MB"]


def epochs(count: int) -> list[str]:
    """A run of `count` epochs, stopped in its last tenth and resumed; 25 batches and a row per epoch."""
    options = f"--dataset synthetic --slice 40 --valid_size 4000 --batch_size 16 --epochs {count} --output_dir out"
    command = [
        sys.executable,
        pairs.REPO / "train_mnist.py",
        *options.split(),
        "--log_every",
        "25",
        "--resume",
    ]
    timer, journal = Timer(), Path("out/history.jsonl")
    process = subprocess.Popen(
        command, env=pairs.OFFLINE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") >= 0.9 * count
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    before = timer.last
    columns = [
        timer(),
        f"{1000 * (timer.last - before) / count:.0f} ms",
        f"{journal.stat().st_size / 1e6:.1f} MB",
    ]
    log = sum(file.stat().st_size for file in Path("wandb").glob("offline-run-*/*.wandb"))
    columns.append(f"{log / 1e6:.1f} MB")
    size, process = (
        journal.stat().st_size,
        subprocess.Popen(command, env=pairs.OFFLINE, stdout=subprocess.DEVNULL),
    )
    timer()
    while journal.stat().st_size <= size:
        time.sleep(0.01)
    columns.append(timer())
    process.kill()
    process.wait()
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case",
        nargs=2,
        metavar=("TABLE", "SIZE"),
        help="measure one case here, and print its row",
    )
    args = parser.parse_args()
    if args.case:
        torch.manual_seed(0)
        table, size = args.case[0], int(args.case[1])
        columns = {"sentences": sentences, "classes": classes, "epochs": epochs}[table](size)
        print(f"| {size:,} | {' | '.join(columns)} |")
        return
    for table, sizes in CASES.items():
        print(pairs.header(table, ("torch", "transformers", "wandb"), HEADS[table]), flush=True)
        for size in sizes:
            with tempfile.TemporaryDirectory() as cwd:
                command = [sys.executable, "-m", "benchmarks.growth", "--case", table, str(size)]
                subprocess.run(command, cwd=cwd, env=pairs.OFFLINE, check=True)
        print()


if __name__ == "__main__":
    main()
