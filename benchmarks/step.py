"""Compare a training batch of `train_mnist.py` with the arithmetic that it cannot do without.

python -m benchmarks.step --data_dir DIR
"""

import argparse
import json
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

from benchmarks import pairs
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each [5]")
    args = parser.parse_args()
    keep_freed_memory()  # as a run does
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
