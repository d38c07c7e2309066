"""Batches from a DataLoader that a resumed run continues exactly, random augmentation included."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from harness import distributed
from harness.errors import UserError
from harness.progress import Indices, Progress
from harness.system import STOP_SIGNALS, WINDOWS


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
    sequence = np.random.default_rng((progress.session.settings.seed, progress.epoch, 1))
    seeds = sequence.integers(2**32, size=len(dataset))
    loader = DataLoader(_Seeded(dataset, seeds), batch_sampler=shares, **options)
    return zip(progress.remaining(batches), iterate(loader))


def iterate(loader: DataLoader) -> Iterator[Any]:
    """What a DataLoader yields. Its workers leave requests to stop to the training process.

    Loading changes no random state and uses one thread, with workers or without. Raises the
    `UserError` of a dataset.
    """
    with _no_signals(loader), _like_a_worker():
        init = loader.worker_init_fn
        loader.worker_init_fn = partial(_begin_worker, init)
        loaded = iter(loader)
        loader.worker_init_fn = init
    keep_state = contextlib.nullcontext if loader.num_workers else _like_a_worker
    while True:
        try:
            with keep_state():
                content = next(loaded)
        except StopIteration:
            return
        except UserError as error:
            # Without the traceback of a worker.
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        yield content


class _Seeded(Dataset):
    """Draws the same random numbers for an example in every process."""

    def __init__(self, dataset: Dataset, seeds: np.ndarray):
        self._dataset = dataset
        self._seeds = seeds

    def __getitems__(self, indices: list[int]) -> list[Any]:  # what DataLoader calls for a batch
        examples = []
        for index in indices:
            seed = int(self._seeds[index])
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            examples.append(self._dataset[index])
        return examples


@contextlib.contextmanager
def _no_signals(loader: DataLoader) -> Iterator[None]:
    """Workers started in the block inherit that they get no request to stop."""
    if WINDOWS:
        ignore_ctrl_c = ctypes.windll.kernel32.SetConsoleCtrlHandler
        ignore_ctrl_c(None, True)
        try:
            yield
        finally:
            ignore_ctrl_c(None, False)
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if loader.num_workers:
        resource_tracker.ensure_running()  # it lets some of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """What a worker does first."""
    if WINDOWS:  # where it inherits only that it ignores Ctrl-C
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()
    if init:
        init(worker)


def _end_with_training() -> None:
    """Torch would miss the end of a killed run: the parent of its workers may be a fork server."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _like_a_worker() -> Iterator[None]:
    """Use one thread, since several round sums differently, and put the random state back."""
    threads = torch.get_num_threads()
    python = random.getstate()
    numpy = np.random.get_state()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)


@atexit.register
def _kill_workers() -> None:
    """A traceback may keep a loader; multiprocessing would then wait for its workers forever."""
    if not WINDOWS:  # torch takes the end of a worker for an error
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
