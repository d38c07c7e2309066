"""Errors that end a run in one line instead of a traceback, and the warning that nobody misses."""

import sys


class UserError(Exception):
    """A mistake the user can fix. The program prints one line and exits with `status`, without a traceback."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """The run was asked to stop, by a signal or by W&B, and can be resumed; `status` is its exit status."""

    def __init__(self, reason: str, status: int, resume: str = "goes on where it was"):
        super().__init__(f"stopped by {reason}; the same command with --resume {resume}")
        self.reason, self.status = reason, status


def warn_loudly(*lines: str) -> None:
    """Print a framed warning to stderr."""
    frame = "!" * 100
    print("", frame, *(f"!!  {line}" for line in lines), frame, "", sep="\n", file=sys.stderr, flush=True)
