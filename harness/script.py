"""The process of a script: how it starts, is asked to stop, and exits."""

import atexit
import builtins
import contextlib
import errno
import gc
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.errors import DISK_ERRORS, Stopped, UserError, disk_error
from harness.options import SharedSettings, parse
from harness.system import ALARM, STOP_SIGNALS, interrupt_after

GRACE = 2  # seconds from a signal to the exit if there is nothing to save
EXIT_TIMEOUT = 30  # seconds
PATH_ERRORS = (errno.EACCES, errno.EPERM)
ALLOCATION_ERRORS = re.compile(
    "out of memory|can't allocate memory|storage size calculation|ALLOC_FAILED", re.IGNORECASE
)


def check_options(settings_class: type[SharedSettings]) -> None:
    """Answer `--help` and mistakes in the options, and prepare the process for the slow imports."""
    if in_ipython():
        return
    _open_streams()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C ends the process
    # Let idle OpenMP threads sleep: spinning slows training down tenfold on a busy machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")  # W&B's telemetry would delay the exit
    if _is_rank_0():
        status = status_of(lambda: parse(settings_class))
        if status:
            sys.exit(status)
    gc.disable()  # imports create many objects and no garbage


def _open_streams() -> None:
    """Let standard output and error take any character, and discard it if they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or io.StringIO()
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def run_script(main: Callable[[], Any]) -> None:
    """Call `main` and exit; errors that the user can fix end in one line and their exit status.

    IPython, in which %run has started the script, lives on.
    """
    if in_ipython():
        status_of(main)
        return
    _open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(50_000)  # collect rarely: the ONNX exporter is still to be imported
    gc.enable()
    status = status_of(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C ends the process
    if sys.modules["__main__"].__spec__ or sys.flags.interactive:
        sys.exit(status)  # `python -m cProfile train_mnist.py` and the like still have to report
    # Threads and W&B's functions may wait forever.
    limit = threading.Timer(EXIT_TIMEOUT, os._exit, [status])
    limit.daemon = True
    limit.start()
    if status == 0:
        wait_for_threads = getattr(threading, "_shutdown", None)  # undocumented: what Python does
        if wait_for_threads:
            wait_for_threads()
    run_exit_functions = getattr(atexit, "_run_exitfuncs", None)  # undocumented as well
    if run_exit_functions is None:
        sys.exit(status)
    run_exit_functions()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)  # skips tearing down every module, which takes nearly a second


def status_of(action: Callable[[], Any]) -> int:
    """The exit status of `action`, after printing one line if the user can fix its error."""
    try:
        action()
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
        return 0
    except Stopped as stopped:
        message = str(stopped)
        status = stopped.status
        if not _is_rank_0() and os.environ.get("LOCAL_RANK") != "0":
            return status  # rank 0 reports it, and on other hosts the first process
    except KeyboardInterrupt:
        message = "interrupted"
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # closing it would fail
        message = "error: output pipe closed"
        status = 1
    except Exception as error:
        problem, status = _explained(error)
        if problem is None:
            raise
        message = f"error: {problem}"
    if not _is_rank_0():
        message = f"process {os.environ['RANK']}: {message}"
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # keeps this line last if both streams go to one file
    line = re.sub(r"\s*\n\s*", " ", message.strip())[:1900]
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return status


def _is_rank_0() -> bool:
    """Whether this is torchrun's process of rank 0, or the only process."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


def _explained(error: Exception) -> tuple[str | None, int]:
    """What the user can fix, and the exit status; None for any other error."""
    if isinstance(error, UserError):
        return str(error), error.status
    failure = disk_error(error)
    if failure and (failure.filename or failure.errno in DISK_ERRORS + PATH_ERRORS):
        path = failure.filename2 or failure.filename or "writing"
        return f"{path}: {failure.strerror}", 1 if failure.errno in DISK_ERRORS else 2
    if isinstance(error, MemoryError) or ALLOCATION_ERRORS.search(str(error)):
        return "out of memory: a smaller --micro_batch_size, or a smaller model, needs less", 1
    if "not have a deterministic implementation" in str(error):
        problem = str(error).partition(",")[0]
        return f"{problem}: --deterministic false allows it", 1
    if type(error).__module__.startswith("wandb.errors"):
        return f"W&B: {error}", 2
    return None, 1


class StopRequests:
    """Requests to stop, from a signal or from W&B, which training obeys after the current batch.

    If saving takes longer than `timeout` seconds after a signal, the request is raised wherever the
    program is, but never in the middle of a write. A second Ctrl-C kills the process; other signals
    are ignored by then, because torchrun, Slurm and a sweep may each send one.
    """

    def __init__(self, timeout: float):
        self.first: Stopped | None = None
        self.signal: int | None = None
        self.saved_step: int | None = None  # of the latest checkpoint
        self._timeout = timeout
        self._training = False
        self._writing = False
        self._late = False

    def add(self, reason: str, status: int) -> None:
        """Request to stop with this exit status."""
        self.first = self.first or Stopped(reason, status)

    def on_signal(self, number: int, _: Any) -> None:
        self.signal = number
        if number == signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ:
            self.add("the sweep", 0)  # its agent takes any other status for a failure
        else:
            self.add(signal.Signals(number).name, 128 + number)
        for repeated in STOP_SIGNALS:
            signal.signal(repeated, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler if in_ipython() else signal.SIG_DFL)
        interrupt_after(self._timeout if self._training else GRACE)

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
        """Finish writing the checkpoint of this step, however long it takes."""
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
        late = f"--stop_timeout {self._timeout:g} seconds have passed"
        if self.saved_step is None:
            outcome = "the run starts over"
        else:
            outcome = f"the run goes on from the checkpoint of step {self.saved_step}"
        raise Stopped(f"{self.first.reason}, and {late}: {outcome}", self.first.status)


@contextlib.contextmanager
def handling_signals(timeout: float) -> Iterator[StopRequests]:
    """Turn signals into requests to stop; in other threads, such as wandb.agent's, none arrive."""
    requests = StopRequests(timeout)
    previous = {}
    if in_main_thread():
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, requests.on_signal)
        previous[ALARM] = signal.signal(ALARM, requests.on_timeout)
    try:
        yield requests
    except BaseException:
        if requests.first and previous and not in_ipython():
            for number in STOP_SIGNALS[1:]:
                previous[number] = signal.SIG_IGN  # the exit is under way
        raise
    finally:
        cancel_timeout()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests.signal:  # the run has finished all the same; its caller has still to stop
        signal.raise_signal(requests.signal)


def cancel_timeout() -> None:
    """Let the program finish what it is doing, however long that takes."""
    if in_main_thread():
        interrupt_after(0)


def in_ipython() -> bool:
    """Whether this is a notebook or an IPython shell, which must outlive the run."""
    return hasattr(builtins, "__IPYTHON__")


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
