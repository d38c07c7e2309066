"""How a script starts and exits: options checked before the slow imports, errors as one line, exit statuses."""

import atexit
import contextlib
import errno
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import Stopped, UserError, disk_error
from harness.options import SharedSettings, parse

EXIT_TIMEOUT = 30  # seconds
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)
PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
)
ALLOCATION_ERRORS = re.compile(
    "out of memory|can't allocate memory|storage size calculation", re.IGNORECASE
)


def check_options(settings_class: type[SharedSettings]) -> None:
    """Answer `--help` and mistakes in the options, and prepare the process for the slow imports."""
    _open_streams()
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until training starts, Ctrl-C just ends the process
    # Let idle OpenMP threads sleep instead of spinning: on a busy machine spinning slows training down tenfold.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault(
        "OTEL_SDK_DISABLED", "true"
    )  # W&B's telemetry would wait for a server at exit
    if _is_rank_0() and (status := status_of(lambda: parse(settings_class))):
        sys.exit(status)
    gc.disable()  # imports create many objects and no garbage


def _open_streams() -> None:
    """Let standard output and error take any character, whatever the locale, and lead nowhere if they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def run_script(main: Callable[[], Any]) -> None:
    """Call `main` and exit; errors that the user can fix end in one line on stderr and their exit status."""
    _open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(50_000)  # collect rarely: the ONNX exporter is still to be imported
    gc.enable()
    status = status_of(main)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C just ends the process
    if sys.modules["__main__"].__spec__ or sys.flags.interactive:
        sys.exit(status)  # `python -m cProfile train_mnist.py` and the like still have to report
    limit = threading.Timer(
        EXIT_TIMEOUT, os._exit, [status]
    )  # threads and W&B's functions may wait forever
    limit.daemon = True
    limit.start()
    if status == 0:
        getattr(
            threading, "_shutdown", lambda: None
        )()  # undocumented: waits for threads, as Python does
    getattr(
        atexit, "_run_exitfuncs", lambda: sys.exit(status)
    )()  # undocumented: without it, the slow way
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)  # skips tearing down every module, which takes nearly a second


def status_of(action: Callable[[], Any]) -> int:
    """The exit status of `action`, after printing one line if it raised an error that the user can fix."""
    try:
        action()
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
        return 0
    except Stopped as stopped:
        message, status = str(stopped), stopped.status
        if not _is_rank_0() and os.environ.get("LOCAL_RANK") != "0":
            return status  # rank 0 reports it, and on other hosts the first process
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or closing it would fail again
        message, status = "error: output pipe closed", 1
    except Exception as error:
        problem, status = _explained(error)
        if problem is None:
            raise
        message = f"error: {problem}"
    if not _is_rank_0():
        message = f"process {os.environ['RANK']}: {message}"
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # keeps this line last if both streams go to one file
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    line = line if len(line) < 2000 else f"{line[:1000]} … {line[-500:]}"
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
    if failure and failure.errno in DISK_ERRORS + PATH_ERRORS:
        place = failure.filename2 or failure.filename or "writing"
        return f"{place}: {failure.strerror}", 1 if failure.errno in DISK_ERRORS else 2
    if isinstance(error, MemoryError) or ALLOCATION_ERRORS.search(str(error)):
        return "out of memory: a smaller --batch_size, or a smaller model, needs less", 1
    wandb, pydantic = (
        sys.modules.get("wandb"),
        sys.modules.get("pydantic_core"),
    )  # importing them takes long
    if wandb and (isinstance(error, wandb.errors.Error) or re.search("WANDB_[A-Z]+=", str(error))):
        return f"W&B: {error}", 2
    if pydantic and isinstance(error, pydantic.ValidationError):  # of W&B's settings
        problem = error.errors()[0]
        setting = ".".join(map(str, problem["loc"]))
        variable = f"WANDB_{setting.upper()}"
        return f"W&B: {variable if variable in os.environ else setting}: {problem['msg']}", 2
    return None, 1
