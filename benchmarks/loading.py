"""Compare an epoch with `load_batches` with the same loop over a shuffling DataLoader, both with two workers.

python -m benchmarks.loading
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from benchmarks import pairs
from examples.train_images import Settings, load, make_model
from harness.device import keep_freed_memory, shuffled
from harness.loading import load_batches

WORKERS = 2


def measured(model: torch.nn.Module, make: Callable[[], Iterable[Any]]) -> dict[str, float]:
    """Seconds of an epoch, and those of computing: other processes disturb them less."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    started = time.perf_counter()
    before = sum(os.times()[:4])
    for images, labels in make():
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {"wall time": seconds, "CPU time, workers included": sum(os.times()[:4]) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="paired epochs [5]")
    parser.add_argument(
        "--repeats", type=int, default=10, help="how often an epoch has an image [10]"
    )
    args = parser.parse_args()
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory() as directory:
        settings = Settings(data_dir=directory)
        data = load(settings)
        model = make_model(settings, data, torch.device("cpu"))
        rows = [*range(len(data.train))] * args.repeats
        examples = Subset(data.train, rows)
        session = SimpleNamespace(settings=settings)
        progress = SimpleNamespace(session=session, epoch=1, left=lambda b: b, remaining=iter)

        def ours() -> Iterable[Any]:
            order = shuffled(len(rows), settings.seed, 1).split(settings.batch_size)
            for _, content in load_batches(progress, examples, order, num_workers=WORKERS):
                yield content

        def peer() -> Iterable[Any]:
            return DataLoader(
                examples, batch_size=settings.batch_size, shuffle=True, num_workers=WORKERS
            )

        measured(model, peer)  # warms up
        a, b = pairs.alternate(
            lambda: measured(model, ours), lambda: measured(model, peer), args.pairs
        )
    print(pairs.header("work", ("torch", "torchvision")))
    work = f"an epoch of {len(rows):,} images with {WORKERS} workers"
    for kind in a:
        print(pairs.row(f"{work}, {kind}", a[kind], b[kind]))


if __name__ == "__main__":
    main()
