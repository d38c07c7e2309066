"""Requests to stop: SIGTERM, Ctrl-C and W&B's stop button end a run after the current batch, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from harness.errors import Stopped

STOP_TIMEOUT = 2  # seconds from a signal to the end of training; as long again to close the W&B run


@contextlib.contextmanager
def stop_requests() -> Iterator[list[Stopped]]:
    """A list of the requests to stop so far. Training checks it after each batch and raises the first one.

    If that takes longer than `STOP_TIMEOUT`, it is raised wherever the program is. A second Ctrl-C kills the process.
    """
    requests: list[Stopped] = []
    if not in_main_thread():  # of wandb.agent; only the main thread receives signals
        yield requests
        return

    def on_signal(number: int, _: Any) -> None:
        if number == signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ:
            requests.append(Stopped("the sweep", 0))  # its agent takes any other status for a failure
        else:
            requests.append(Stopped(signal.Signals(number).name, 128 + number))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, STOP_TIMEOUT)

    def on_timeout(*_: Any) -> None:
        raise requests[0]

    handlers = {signal.SIGTERM: on_signal, signal.SIGINT: on_signal, signal.SIGALRM: on_timeout}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        cancel_timeout()
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if requests and number == signal.SIGTERM else handler)


def cancel_timeout() -> None:
    """Let the program finish what it is doing, however long that takes."""
    if in_main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
