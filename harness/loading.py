"""Batches from a DataLoader that a resumed run continues exactly, random augmentation included."""

import contextlib
import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from harness import distributed
from harness.progress import Indices, Progress


def load_batches(
    progress: Progress, dataset: Dataset, batches: Sequence[Indices], **options: Any
) -> Iterator[tuple[Indices, Any]]:
    """Like `progress.remaining`, with this rank's share of each batch as a DataLoader makes it.

    `options` are those of `DataLoader`, such as `num_workers` and `collate_fn`. What `dataset`, a
    map-style one, draws from the generators of Python, NumPy and torch for an example follows from
    seed, epoch and index, whatever the number of workers and of ranks.
    """
    shares = [
        torch.as_tensor(distributed.share_of(batch)).tolist() for batch in progress.left(batches)
    ]
    seeds = (progress.session.settings.seed, progress.epoch)
    loader = DataLoader(
        _Seeded(dataset, seeds),
        batch_sampler=shares,
        generator=torch.Generator(),  # or it would draw from the global one
        **options,
    )
    with _no_signals():
        loaded = iter(loader)
    for indices in progress.remaining(batches):
        with _random_state_kept():  # without workers, it is this process that draws
            content = next(loaded)
        yield indices, content


class _Seeded(Dataset):
    """Draws the same random numbers for an example in every process."""

    def __init__(self, dataset: Dataset, seeds: tuple[int, int]):
        self._dataset = dataset
        self._seeds = seeds

    def __getitems__(self, indices: list[int]) -> list[Any]:  # what DataLoader calls for a batch
        examples = []
        for index in indices:
            sequence = np.random.SeedSequence((*self._seeds, index))
            seed = int(sequence.generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            examples.append(self._dataset[index])
        return examples


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Workers started in the block leave Ctrl-C and SIGTERM to the training process."""
    numbers = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    python = random.getstate()
    numpy = np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
