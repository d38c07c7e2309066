"""Compare a training batch of `train_mnist.py` with the arithmetic that it cannot do without.

python -m benchmarks.step --data_dir DIR
python -m benchmarks.step --host    # what a batch costs besides arithmetic: operators, and time with a tiny model
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_mnist
from benchmarks import bare, pairs
from harness import options
from harness.device import keep_freed_memory

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
SHORT, LONG = 100, 200  # batches


def our_operators(batches: int) -> collections.Counter[str]:
    """Those of the script's `train` with `batches` batches, an epoch's end included."""
    train, operators = train_mnist.train, Operators()

    def counted(*arguments: object) -> object:
        with operators:
            return train(*arguments)

    train_mnist.train = counted
    try:
        bare.our_rate([*TINY, "--wandb", "disabled", "--max_steps", str(batches)])
    finally:
        train_mnist.train = train
    return operators.counts


def host_work(repeats: int) -> None:
    """Print a batch's operators beside those of a bare loop, and host time with one image and one channel."""
    os.environ["WANDB_SILENT"] = "true"
    settings = options.parse(train_mnist.Settings, TINY)
    digits = train_mnist.load(settings, torch.device("cpu")).train

    def batches() -> list[torch.Tensor]:
        return list(bare.batches_of(settings, len(digits.labels), torch.device("cpu")))[:1000]

    ours = our_operators(LONG)
    ours.subtract(our_operators(SHORT))  # without what happens once
    step = bare.make_step(settings, digits, torch.device("cpu"), len(digits.labels))
    with Operators() as operators:
        for indices in batches()[: LONG - SHORT]:
            step(indices)
    count = LONG - SHORT
    more = {name: (ours[name] - operators.counts[name]) / count for name in ours | operators.counts}
    rates: dict[str, list[float]] = {"offline": [], "disabled": [], "bare": []}
    for _ in range(repeats):
        for mode in ("offline", "disabled"):
            rates[mode].append(bare.our_rate([*TINY, "--wandb", mode, "--max_steps", "1000"]))
        step = bare.make_step(settings, digits, torch.device("cpu"), len(digits.labels))
        rates["bare"].append(bare.rate(step, batches(), 1))
    plain = statistics.median(rates["bare"])
    print(pairs.header("a batch of one image, one channel", ("torch",), ("ours", "bare", "ratio")))
    a, b = ours.total() / count, operators.counts.total() / count
    print(f"| operators dispatched | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    for mode in ("offline", "disabled"):
        rate = statistics.median(rates[mode])
        times = f"{1e6 / rate:.0f} µs | {1e6 / plain:.0f} µs | {rate / plain:.2f}"
        print(f"| host time, `--wandb {mode}` | {times} |")
    listed = sorted(more.items(), key=lambda item: -abs(item[1]))
    print(
        "\nMore than the bare loop:",
        ", ".join(f"{n} {x:+.2f}" for n, x in listed if abs(x) > 0.005),
    )


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
