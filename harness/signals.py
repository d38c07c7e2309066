"""Requests to stop: SIGTERM, Ctrl-C and W&B's stop button end training after the current batch, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from harness.errors import Stopped

GRACE = 2  # seconds from a signal to the exit if there is nothing to save


class StopRequests:
    """The first request to stop, which training raises after the batch, and what it may still finish.

    If that takes longer than `timeout` seconds after a signal, the request is raised wherever the program is, but never
    in the middle of a write. A second signal kills the process.
    """

    def __init__(self, timeout: float):
        self.first: Stopped | None = None
        self.saved_step: int | None = None  # of the latest checkpoint
        self.signal: int | None = None
        self._timeout, self._training, self._writing, self._late = timeout, False, False, False

    def add(self, reason: str, status: int) -> None:
        """Request to stop with this exit status."""
        self.first = self.first or Stopped(reason, status)

    def on_signal(self, number: int, _: Any) -> None:
        self.signal = number
        if number == signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ:
            self.add("the sweep", 0)  # its agent takes any other status for a failure
        else:
            self.add(signal.Signals(number).name, 128 + number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self._timeout if self._training else GRACE)

    def on_timeout(self, *_: Any) -> None:
        self._late = True
        if self.first and not self._writing:
            self._raise_late()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While there is progress to save: allow the whole timeout."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Finish the write of the checkpoint of this step, however long it takes."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False
        self.saved_step = step
        if self._late:
            self._raise_late()

    def _raise_late(self) -> None:
        if not self._training:
            raise self.first
        saved = (
            "starts over"
            if self.saved_step is None
            else f"goes on from the checkpoint of step {self.saved_step}"
        )
        late = f"{self.first.reason}, and --stop_timeout {self._timeout:g} seconds have passed: the run {saved}"
        raise Stopped(late, self.first.status)


@contextlib.contextmanager
def handling_signals(timeout: float) -> Iterator[StopRequests]:
    """Turn signals into requests to stop, in the main thread; others, such as wandb.agent's, receive none."""
    requests, previous = StopRequests(timeout), {}
    if in_main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, requests.on_signal)
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, requests.on_timeout)
    try:
        yield requests
    except BaseException:
        if requests.first and previous:
            previous[signal.SIGTERM] = signal.SIG_IGN  # the exit is under way
        raise
    finally:
        cancel_timeout()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests.signal:  # it came too late for this run, but what called it is to stop
        signal.raise_signal(requests.signal)


def cancel_timeout() -> None:
    """Let the program finish what it is doing, however long that takes."""
    if in_main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
