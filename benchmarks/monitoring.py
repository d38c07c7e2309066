"""Measure the cost of monitoring: W&B on vs. `--wandb disabled`, and our training loop vs. a bare one.

python -m benchmarks.monitoring --data_dir DIR
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import train_mnist
from benchmarks import pairs
from harness.device import find_precision

EPOCHS = 5  # several, because train_mnist.py prints their times in tenths of a second


def bare(data_dir: str) -> dict[str, float]:
    """Train on the same batches with the same optimizer as train_mnist.py, and nothing else; return seconds."""
    settings = train_mnist.Settings(dataset="mnist", data_dir=data_dir, epochs=EPOCHS, valid_size=0)
    train_set = train_mnist.load(settings, torch.device("cpu")).train
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = train_mnist.ConvNet(settings.kernels).to(memory_format=torch.channels_last)
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, (0.7, 0.9), fused=True)
    examples = len(train_set.images)
    batches = -(-examples // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, EPOCHS * batches, pct_start=0.1, cycle_momentum=False
    )
    bf16 = find_precision("auto", torch.device("cpu")) == "bf16"
    # Freeing a large block makes glibc reuse memory from batch to batch, as it does in train_mnist.py.
    torch.empty(31 << 20, dtype=torch.uint8)
    started = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        order = torch.from_numpy(
            np.random.default_rng((settings.seed, epoch)).permutation(examples)
        )
        for indices in order.split(settings.batch_size):
            images, labels = train_set.images[indices], train_set.labels[indices]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_function(model(train_mnist.pixels(images)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
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
        print(f"training {bare(data_dir)['training']:.3f} s")
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
