"""Measure the cost of monitoring: W&B on vs. `--wandb disabled`, and our training loop vs. a bare one.

python -m benchmarks.monitoring --data_dir DIR
"""

import argparse
import math
import time
from pathlib import Path

import torch

import train_mnist
from benchmarks import bare, pairs
from harness.device import shuffled

EPOCHS = 5  # several, because train_mnist.py prints their times in tenths of a second


def train_bare(data_dir: str) -> dict[str, float]:
    """Train on the same batches with the same optimizer as train_mnist.py, and nothing else; return seconds."""
    settings = train_mnist.Settings(dataset="mnist", data_dir=data_dir, epochs=EPOCHS, valid_size=0)
    device = torch.device("cpu")
    train_set = train_mnist.load(settings, device).train
    examples = len(train_set.images)
    batches = math.ceil(examples / settings.batch_size)
    step = bare.make_step(settings, train_set, device, EPOCHS * batches)
    # Freeing a large block makes glibc reuse memory from batch to batch, as it does in train_mnist.py.
    torch.empty(31 << 20, dtype=torch.uint8)
    started = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        for indices in shuffled(examples, settings.seed, epoch).split(settings.batch_size):
            step(indices)
    return {"training": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5, help="paired runs [5]")
    parser.add_argument(
        "--bare", action="store_true", help=argparse.SUPPRESS
    )  # one run, in a separate process
    args = parser.parse_args()
    data_dir = str(args.data_dir.resolve())
    if args.bare:
        print(f"training {train_bare(data_dir)['training']:.3f} s")
        return

    def ours(*options: str) -> dict[str, float]:
        arguments = f"--dataset mnist --data_dir {data_dir} --epochs {EPOCHS}"
        return pairs.process(pairs.REPO / "train_mnist.py", *arguments.split(), *options)

    def bare_loop() -> dict[str, float]:
        # harness/script.py sets the same for train_mnist.py.
        return pairs.process(
            "-m", "benchmarks.monitoring", "--data_dir", data_dir, "--bare", GOMP_SPINCOUNT="1000"
        )

    enabled, disabled = pairs.alternate(ours, lambda: ours("--wandb", "disabled"), args.pairs)
    quiet = "--wandb disabled --valid_size 0 --watch off --log_every 1000000".split()
    quiet_loop, plain_loop = pairs.alternate(lambda: ours(*quiet), bare_loop, args.pairs)
    print(pairs.header("train_mnist.py, five epochs", ("torch", "wandb")))
    print(pairs.row("W&B on vs. --wandb disabled", enabled["training"], disabled["training"]))
    print(pairs.row("our loop vs. a bare loop", quiet_loop["training"], plain_loop["training"]))


if __name__ == "__main__":
    main()
