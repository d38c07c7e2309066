"""W&B can't hurt training: its errors are reported once in a run, and then swallowed."""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import wandb

from harness import distributed
from harness.errors import disk_error, warn_loudly
from harness.signals import in_main_thread

reported_runs: set[str] = set()  # ids of runs in which an error was reported; later ones are its consequences
lost_runs: set[str] = set()  # ids of runs whose W&B service is gone


@contextlib.contextmanager
def tolerate_wandb_errors(run: wandb.Run) -> Iterator[None]:
    """Report an error of W&B in the block once per run, then swallow it and all that follow. Also a decorator."""
    try:
        yield
    except Exception as error:
        if is_from_agent(error):
            raise
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not any(module.startswith("wandb.") for module in modules) and not disk_error(error):
            raise
        if isinstance(error, ConnectionError):
            lost_runs.add(run.id)
        if run.id not in reported_runs:
            reported_runs.add(run.id)
            warn_loudly(
                f"W&B has failed: {error or type(error).__name__}",
                "Training continues. The journal has every number; the same command with --resume logs them again.",
            )


def logs_to_wandb(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator for functions that log to W&B, with the run as first argument.

    They are called on rank 0 only, and do not raise W&B's errors.
    """

    @functools.wraps(function)
    def on_rank_0(run: wandb.Run, *arguments: Any, **options: Any) -> None:
        if distributed.rank() == 0:
            with tolerate_wandb_errors(run):
                function(run, *arguments, **options)

    return on_rank_0


def is_from_agent(error: Exception) -> bool:
    """Whether `wandb.agent` raised this, a bare `Exception`, in its thread to stop the run there."""
    return type(error) is Exception and not error.args and not in_main_thread()
