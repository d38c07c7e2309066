"""What `train_mnist.py` computes in a batch, without anything around it, and the script's own loop in this process."""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import train_mnist
from harness.device import find_precision, seed_everything, shuffled
from tasks.digits import ImageSet

Step = Callable[
    [Tensor], Tensor
]  # trains on a batch of indices and returns the loss, on the device


def make_step(
    settings: train_mnist.Settings, train_set: ImageSet, device: torch.device, batches: int
) -> Step:
    """The same model, precision and optimizer, `batches` in all."""
    seed_everything(settings.seed, settings.deterministic)
    model = train_mnist.ConvNet(settings.kernels)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer, schedule = train_mnist.make_optimizer(model, settings, batches)
    bf16 = find_precision(settings.precision, device) == "bf16"

    def step(indices: Tensor) -> Tensor:
        images, labels = train_set.images[indices], train_set.labels[indices]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(train_mnist.pixels(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss

    return step


def make_graph(
    settings: train_mnist.Settings, train_set: ImageSet, device: torch.device, batches: int
) -> Step:
    """The same as one CUDA graph, for batches of one size and a constant learning rate."""
    seed_everything(settings.seed, settings.deterministic)
    model = train_mnist.ConvNet(settings.kernels)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer, _ = train_mnist.make_optimizer(model, settings, batches)
    for group in optimizer.param_groups:
        group["capturable"] = True
    bf16 = find_precision(settings.precision, device) == "bf16"
    static = torch.arange(settings.batch_size, device=device)

    def step() -> Tensor:
        images, labels = train_set.images[static], train_set.labels[static]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = F.cross_entropy(model(train_mnist.pixels(images)), labels)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their memory before the capture
        for _ in range(3):
            step()
            optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay(indices: Tensor) -> Tensor:
        static.copy_(indices)
        graph.replay()
        return loss

    return replay


def batches_of(
    settings: train_mnist.Settings, examples: int, device: torch.device
) -> Iterator[Tensor]:
    """The whole batches of all epochs, in the order of train_mnist.py."""
    for epoch in range(1, settings.epochs + 1):
        order = shuffled(examples, settings.seed, epoch).to(device)
        for indices in order.split(settings.batch_size):
            if len(indices) == settings.batch_size:
                yield indices


def rate(step: Step, batches: Iterator[Tensor], batch_size: int, every: int = 10) -> float:
    """Examples per second: the median over groups of `every` batches, each of which waits for its last loss.

    The first quarter warms up.
    """
    seconds = []
    started = time.perf_counter()
    for number, indices in enumerate(batches, 1):
        loss = step(indices)
        if number % every == 0:
            loss.item()
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
    return batch_size * every / statistics.median(seconds[len(seconds) // 4 :])


@contextlib.contextmanager
def in_new_directory() -> Iterator[None]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as cwd:
        os.chdir(cwd)
        try:
            yield
        finally:
            os.chdir(before)


def our_rate(options: list[str], script: types.ModuleType = train_mnist) -> float:
    """Examples per second of a script: the median of its rows after the first quarter."""
    with (
        in_new_directory(),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(script, "conclude", lambda *_: {}),  # what follows training
    ):
        script.main([*options, "--output_dir", "out"])
        lines = Path("out/history.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    rates = [row["train/examples_per_second"] for row in rows if "train/examples_per_second" in row]
    return statistics.median(rates[len(rates) // 4 :])
