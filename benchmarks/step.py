"""Compare a training batch of `train_mnist.py` with the arithmetic that it cannot do without.

python -m benchmarks.step --data_dir DIR
python -m benchmarks.step --host    # what a batch costs besides arithmetic: operators, and time with a tiny model
"""

import argparse
import collections
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_cola
import train_mnist
from benchmarks import bare, pairs
from harness import options
from harness.device import keep_freed_memory
from tasks import encoders
from tasks.sentences import load_corpus

BATCH, SIDE = 128, 2048
FORWARD = (
    2 * BATCH * (28 * 28 * 16 * 25 + 14 * 14 * 32 * 16 * 25 + 10 * 7 * 7 * 32)
)  # FLOP; backward: twice as many


def milliseconds(action: Callable[[], object], repeats: int = 200) -> float:
    """Median time of an action in ms."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[repeats // 10 :])


def matrix_product() -> float:
    """ms for a product of two bf16 matrices."""
    matrix = torch.randn(SIDE, SIDE).bfloat16()
    return milliseconds(lambda: matrix @ matrix, 50)


def convolutions() -> float:
    """ms for both convolutions with pooling and ReLU, forward and backward, as the model computes them."""
    first, second = nn.Conv2d(1, 16, 5, padding=2), nn.Conv2d(16, 32, 5, padding=2)
    for layer in (first, second):
        layer.to(torch.bfloat16, memory_format=torch.channels_last)
    images = torch.rand(BATCH, 1, 28, 28).bfloat16()

    def block() -> None:
        x = F.max_pool2d(first(images), 2).relu()
        x = F.max_pool2d(second(x), 2).relu()
        x.backward(torch.ones_like(x))

    return milliseconds(block)


def training_batch(data_dir: Path) -> float:
    """ms for a batch of the script's loop: the median of its rows of 10 batches."""
    options = f"--dataset mnist --data_dir {data_dir} --valid_size 0 --max_steps 600 --watch off --output_dir out"
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, pairs.REPO / "train_mnist.py", *options.split()]
        subprocess.run(command, cwd=cwd, env=pairs.OFFLINE, check=True, capture_output=True)
        rows = map(json.loads, Path(cwd, "out/history.jsonl").read_text().splitlines())
        rates = [
            row["train/examples_per_second"] for row in rows if "train/examples_per_second" in row
        ]
    return 1000 * BATCH / statistics.median(rates)


class Operators(TorchDispatchMode):
    """Counts what torch dispatches, by name: on a GPU, nearly each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function).removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


TINY = (
    "--dataset synthetic --valid_size 0 --watch off --batch_size 1 --kernels 1 1 --epochs 1".split()
)
COLA = "--dataset synthetic --model scratch --watch off --batch_size 8 --epochs 1".split()
SHORT, LONG = 50, 100  # batches
Counts = collections.Counter[str]


def difference(count: Callable[[int], Counts]) -> Counts:
    """The operators of a batch: those of a longer run less those of a shorter one."""
    counts = count(LONG)
    counts.subtract(count(SHORT))
    return collections.Counter({name: n / (LONG - SHORT) for name, n in counts.items()})


def our_operators(script: types.ModuleType, arguments: list[str], batches: int) -> Counts:
    """Those of the script's `train` with `batches` batches."""
    train, operators = script.train, Operators()

    def counted(*given: object) -> object:
        with operators:
            return train(*given)

    options = [*arguments, "--wandb", "disabled", "--max_steps", str(batches)]
    with mock.patch.object(script, "train", counted):
        bare.our_rate(options, script)
    return operators.counts


def operators_of(step: Callable[[], object]) -> Counts:
    """Those of the second of two equal batches of a bare loop: the first one makes the optimizer's state."""
    step()
    with Operators() as operators:
        step()
    return operators.counts


def bare_mnist(precision: str) -> Counts:
    settings = options.parse(train_mnist.Settings, [*TINY, "--precision", precision])
    device = torch.device("cpu")
    digits = train_mnist.load(settings, device).train
    step = bare.make_step(settings, digits, device, len(digits.labels))
    first = torch.tensor([0])
    return operators_of(lambda: step(first))


def bare_cola(precision: str) -> Counts:
    """BERT-tiny's batch of sentences of one length."""
    corpus = load_corpus("synthetic", "")
    model, _ = encoders.load_model("scratch", corpus.train.sentences, corpus.class_names, 128)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(5, 100, (8, 10))
    mask = torch.ones_like(tokens)
    labels = torch.zeros(8, dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens, attention_mask=mask).logits
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()

    return operators_of(step)


def host_work(repeats: int) -> None:
    """Print a batch's operators beside those of a bare loop, and host time with one image and one channel."""
    os.environ["WANDB_SILENT"] = "true"
    print(pairs.header("a batch", ("torch", "transformers"), ("ours", "bare", "ratio")))
    for script, arguments, bare_one in (
        (train_mnist, TINY, bare_mnist),
        (train_cola, COLA, bare_cola),
    ):
        for precision in ("fp32", "bf16"):
            given = [*arguments, "--precision", precision]
            ours = difference(functools.partial(our_operators, script, given))
            plain = bare_one(precision)
            a, b = ours.total(), plain.total()
            work = f"`{script.__name__}.py`, operators dispatched in {precision}"
            print(f"| {work} | {a:.1f} | {b:.1f} | {b / a:.2f} |", flush=True)
            more = {name: ours[name] - plain[name] for name in ours | plain}
            listed = sorted(more.items(), key=lambda item: -abs(item[1]))
            names = ", ".join(f"{name} {n:+.1f}" for name, n in listed if abs(n) > 0.05)
            print(f"more than the bare loop: {names}", file=sys.stderr)
    settings = options.parse(train_mnist.Settings, TINY)
    device = torch.device("cpu")
    digits = train_mnist.load(settings, device).train
    rates: dict[str, list[float]] = {"offline": [], "disabled": [], "bare": []}
    for _ in range(repeats):
        for mode in ("offline", "disabled"):
            rates[mode].append(bare.our_rate([*TINY, "--wandb", mode, "--max_steps", "1000"]))
        step = bare.make_step(settings, digits, device, len(digits.labels))
        batches = itertools.islice(bare.batches_of(settings, len(digits.labels), device), 1000)
        rates["bare"].append(bare.rate(step, batches, 1))
    plain = statistics.median(rates["bare"])
    for mode in ("offline", "disabled"):
        rate = statistics.median(rates[mode])
        times = f"{1e6 / rate:.0f} µs | {1e6 / plain:.0f} µs | {rate / plain:.2f}"
        print(f"| `train_mnist.py` with one image, one channel, `--wandb {mode}` | {times} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--data_dir", type=Path)
    task.add_argument("--host", action="store_true", help="measure what arithmetic leaves over")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each [5]")
    args = parser.parse_args()
    keep_freed_memory()  # as a run does
    if args.host:
        torch.set_num_threads(1)
        host_work(args.repeats)
        return
    rounds = []
    for _ in range(args.repeats):
        rounds.append((matrix_product(), convolutions(), training_batch(args.data_dir.resolve())))
        print("{:.2f} {:.2f} {:.2f}".format(*rounds[-1]), file=sys.stderr, flush=True)
    product, block, batch = map(statistics.median, zip(*rounds))
    print(pairs.header("work", ("torch",), ("time", "GFLOP/s")))
    print(
        f"| product of two {SIDE}² matrices in bf16 | {product:.1f} ms | {2 * SIDE**3 / product / 1e6:.0f} |"
    )
    print(f"| both convolutions with pooling and ReLU, forward and backward | {block:.2f} ms | |")
    print(
        f"| a batch of {BATCH} of train_mnist.py | {batch:.2f} ms | {3 * FORWARD / batch / 1e6:.0f} |"
    )


if __name__ == "__main__":
    main()
