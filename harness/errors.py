"""Errors that end a run in one line instead of a traceback, and the warning that nobody misses."""

import os
import re
import sys
import textwrap
import traceback
from pathlib import Path


class UserError(Exception):
    """A mistake the user can fix. The program prints one line and exits with `status`, without a traceback."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """The run was asked to stop, by a signal or by W&B, and can be resumed; `status` is its exit status.

    `ends_launcher`: torchrun does not know of it, and is not to restart the run.
    """

    def __init__(self, reason: str, status: int, ends_launcher: bool = False):
        super().__init__(f"stopped by {reason}")
        self.reason, self.status, self.ends_launcher = reason, status, ends_launcher


def disk_error(error: Exception) -> OSError | None:
    """The `OSError` that an exception is, or that torch or safetensors hide behind one of their own."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    return error if isinstance(error, OSError) else None


def place_of(error: Exception) -> str:
    """File and line of the innermost call, outside of harness/ and installed libraries, that led to an exception."""
    harness = Path(__file__).parent
    for frame, line in [
        *[*traceback.walk_tb(error.__traceback__)][::-1],
        *traceback.walk_stack(None),
    ]:
        file = Path(frame.f_code.co_filename)
        installed = "site-packages" in file.parts or not file.is_relative_to(harness.parent)
        if not installed and not file.is_relative_to(harness):
            return f"{file.name}:{line}"
    return "in the background"


def warn_loudly(*lines: str) -> None:
    """Print a framed warning to stderr, in lines of at most 120 characters."""
    whole_words = {"break_long_words": False, "break_on_hyphens": False}
    wrapped = [f"!!  {part}" for line in lines for part in textwrap.wrap(line, 116, **whole_words)]
    frame = "!" * 100
    print("", frame, *wrapped, frame, "", sep="\n", file=sys.stderr, flush=True)
