"""Errors that end a run in one line instead of a traceback, and the warning that nobody misses."""

import errno
import os
import re
import sys
import sysconfig
import textwrap
import traceback
from pathlib import Path

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
)
# Where code is not the user's: Python's own, this package, and what has no file.
LIBRARIES = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<")


class UserError(Exception):
    """A mistake the user can fix: one line and exit status `status`, without a traceback."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
        self.of_this_rank = False  # whether rank 0 may not have met it

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"error: {self}"]


class Stopped(BaseException):
    """The run was asked to stop, by a signal or by W&B, and can be resumed.

    `status` is its exit status. `ends_launcher`: torchrun has to be told not to restart the run.
    """

    def __init__(self, reason: str, status: int, ends_launcher: bool = False):
        super().__init__(f"stopped by {reason}")
        self.reason = reason
        self.status = status
        self.ends_launcher = ends_launcher

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [str(self)]


def disk_error(error: Exception) -> OSError | None:
    """The `OSError` that an exception is, or that torch or safetensors raise as their own."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(match[1])
        return OSError(number, os.strerror(number))
    return error if isinstance(error, OSError) else None


def script_line(error: Exception | None = None) -> str:
    """The line of the user's code that led here, or to `error`, as "train_mnist.py:120"."""
    frames = list(traceback.walk_stack(None))
    if error:
        frames = list(traceback.walk_tb(error.__traceback__))[::-1] + frames
    for frame, line in frames:  # the innermost first
        file = frame.f_code.co_filename
        if not file.startswith(LIBRARIES) and "-packages" not in file:
            return f"{Path(file).name}:{line}"
    return "in the background"


def warn_loudly(*lines: str) -> None:
    """Print a framed warning to stderr, in lines of at most 120 characters."""
    frame = "!" * 100
    wrapper = textwrap.TextWrapper(116, break_long_words=False, break_on_hyphens=False)
    wrapped = [f"!!  {part}" for line in lines for part in wrapper.wrap(line)]
    print("", frame, *wrapped, frame, "", sep="\n", file=sys.stderr, flush=True)
