"""The W&B run: started online or offline, kept from hurting training, and finished."""

import contextlib
import functools
import logging
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wandb

from harness import distributed, wandb_internals
from harness.errors import Stopped, UserError, disk_error, place_of, warn_loudly
from harness.options import SharedSettings
from harness.signals import StopRequests, cancel_timeout, in_main_thread

SERVICE_TIMEOUT = 35  # seconds; W&B waits 30 for its service to start
INIT_TIMEOUT = 8  # seconds; W&B waits up to ten more before that to confirm the API key
FINISH_TIMEOUT = {"none": 20, "best": 1800, "all": 1800}  # seconds, by --log_model
KILL_AFTER = 10  # seconds after that until the service is killed
CLOSE_TIMEOUT = 2  # seconds to close the run after a signal
CACHE_BYTES = 1 << 20  # a cache that can't take this much counts as full
ARTIFACT_TIMEOUT = (
    5  # seconds to hand over artifacts at the end of a run; uploading them comes after that
)
NO_ANSWER = ("W&B does not answer.", "The same command with --resume logs the rest once it does.")

reported_runs: set[str] = (
    set()
)  # ids of runs in which an error was reported; later ones are its consequences
lost_runs: set[str] = set()  # ids of runs whose W&B service is gone
_workers: dict[
    str, tuple[queue.SimpleQueue, threading.Thread]
] = {}  # by run id: what logs artifacts


@contextlib.contextmanager
def tolerate_wandb_errors(run: wandb.Run) -> Iterator[None]:
    """Report an error of W&B in the block once per run, then swallow it and all that follow. Also a decorator."""
    try:
        yield
    except Exception as error:
        if _is_from_agent(error):
            raise
        if not _is_raised_by_wandb(error) and not disk_error(error):
            raise
        if isinstance(error, ConnectionError):
            lost_runs.add(run.id)
        if run.id not in reported_runs:
            reported_runs.add(run.id)
            warn_loudly(
                f"W&B has failed: {str(error) or type(error).__name__} ({place_of(error)})",
                "Training continues. The journal has every number; the same command with --resume logs them again.",
            )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Whatever W&B raises before a run has started becomes a `UserError`, unless it says itself what is wrong."""
    try:
        yield
    except Exception as error:
        if not _is_raised_by_wandb(error) or type(error).__module__.startswith(
            ("harness", "wandb.errors", "pydantic")
        ):
            raise
        with contextlib.suppress(Exception):
            wandb.teardown()  # or it complains at exit
        problem = f"W&B can't start: {str(error) or type(error).__name__}"
        raise UserError(
            f"{problem}; see its environment variables and settings, or use --wandb disabled"
        ) from None


def _is_raised_by_wandb(error: Exception) -> bool:
    modules = (
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return any(module.startswith("wandb.") for module in modules)


def logs_to_wandb(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator for functions that log to W&B, the run first: called on rank 0 only, they do not raise W&B's errors."""

    @functools.wraps(function)
    def on_rank_0(run: wandb.Run, *arguments: Any, **options: Any) -> None:
        if distributed.rank() == 0:
            with tolerate_wandb_errors(run):
                function(run, *arguments, **options)

    return on_rank_0


def _is_from_agent(error: Exception) -> bool:
    """Whether `wandb.agent` raised this, a bare `Exception`, in its thread to stop the run there."""
    return type(error) is Exception and not error.args and not in_main_thread()


@_starting()
def wandb_mode(choice: str) -> str:
    """The mode for `wandb.init` that `--wandb` stands for. Never prompts.

    "auto" is what `WANDB_MODE` or W&B's settings files say; by default online if credentials are configured, else
    offline. Raises `UserError` if `choice` is "online" and there are no credentials.
    """
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B rejects an empty one
    mode = choice
    if choice == "auto":
        _start_service()
        mode = wandb.setup().settings.mode
    if mode != "online":
        return mode
    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        problem = "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        problem = f"the API key is invalid: {error}"
    if choice == "online":
        raise UserError(f"--wandb online: {problem}; run `wandb login`, or use --wandb offline")
    print(f"W&B is offline: {problem}.")
    return "offline"


def _start_service() -> None:
    """Start W&B's service. Raises `UserError` if it does not start: W&B itself may then wait forever."""
    errors: list[Exception] = []

    def start() -> None:
        try:
            wandb.setup()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(SERVICE_TIMEOUT)
    if thread.is_alive():
        problem = f"W&B's service did not start within {SERVICE_TIMEOUT} seconds"
        raise UserError(
            f"{problem}: is there room in the temporary directory? --wandb disabled does without it",
            1,
        )
    if errors:
        raise errors[0]


def init_options(
    settings: SharedSettings, mode: str, requests: StopRequests, resuming: bool
) -> dict[str, Any]:
    """Arguments for `wandb.init` beside project, name, tags and config; W&B's stop button adds to `requests`."""
    return {
        **{
            name: getattr(settings, name) for name in ("entity", "id", "job_type", "group", "notes")
        },
        "mode": mode,
        "save_code": settings.save_code or None,
        "resume": "allow" if resuming and mode == "online" else None,
        "settings": wandb.Settings(
            **wandb_internals.settings(),
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT[settings.log_model if mode == "online" else "none"],
            finish_timeout_raises=True,
            stop_fn=lambda: requests.add("W&B", 0),
        ),
    }


@_starting()
def start(
    init: Callable[[str], wandb.Run], settings: SharedSettings, resuming: bool
) -> tuple[wandb.Run, int]:
    """The W&B run that `init(mode)` starts, and the last step that W&B already has of it, -1 if none.

    If the server can't be reached or refuses, the run is offline, after at most 25 seconds. Artifacts are logged in
    the background, so that training doesn't wait for a server.
    """
    _find_caches()
    if settings.wandb != "disabled":
        _start_service()
    try:
        logs = (
            wandb_internals.log_files(settings.id)
            if settings.resume and settings.wandb != "disabled"
            else []
        )
        for log in logs:
            if not wandb_internals.synced_marker(log).exists():
                wandb_internals.repair(log)
        run = init(settings.wandb)
    except wandb.errors.CommError as error:
        if settings.wandb != "online":
            raise
        warn_loudly(
            f"W&B can't be used: {str(error).splitlines()[0]}",
            "If the API key is wrong, set another one: wandb login --relogin.",
            "The run continues offline; wandb sync uploads it later.",
        )
        wandb.teardown()
        run = init("offline")
    if run.disabled:
        return run, -1
    wandb_internals.allow_histograms(run)
    for name in ("watch", "save", "alert", "log_artifact"):
        setattr(run, name, tolerate_wandb_errors(run)(getattr(run, name)))
    logging.raiseExceptions = False  # a full disk under wandb/ would flood the terminal
    if not run.offline:
        _log_artifacts_in_background(run)
        return run, run.starting_step - 1 if run.resumed else -1
    if (
        not resuming
    ):  # a run has a checkpoint before it has rows: any that are there are of another run
        return run, -1
    # Rows of an online process may not have reached the server: they are logged again unless it confirmed them.
    offline = [log for log in logs if log.parent.name.startswith("offline-")]
    confirmed = [log for log in logs if wandb_internals.synced_marker(log).exists()]
    return run, max(wandb_internals.history(offline + confirmed), default=-1)


def _find_caches() -> None:
    """If W&B can't write its caches, as in a container with another user's home, let it use a temporary directory."""
    caches = {
        "WANDB_CACHE_DIR": wandb.env.get_cache_dir(),
        "WANDB_DATA_DIR": wandb.env.get_data_dir(),
    }
    for name, directory in caches.items():
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(bytes(CACHE_BYTES))
        except OSError as error:
            os.environ[name] = tempfile.mkdtemp(prefix="wandb-")
            print(
                f"W&B can't write to {directory} ({error.strerror}): {name} is now {os.environ[name]}."
            )


def _log_artifacts_in_background(run: wandb.Run) -> None:
    """Replace `run.log_artifact`: online, W&B waits for the server before it logs an artifact or a table."""
    waiting, log_artifact = queue.SimpleQueue(), run.log_artifact

    def work() -> None:
        while call := waiting.get():
            log_artifact(*call[0], **call[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _workers[run.id] = waiting, thread
    run.log_artifact = lambda *arguments, **options: waiting.put((arguments, options))


@contextlib.contextmanager
def finishing(run: wandb.Run, command: str) -> Iterator[None]:
    """Finish the run with the block, within seconds if it was stopped; `command` is what resumes it."""
    closing = False
    try:
        try:
            yield
        except Exception as error:
            if not _is_from_agent(error):
                raise
            raise Stopped("the sweep", 0) from None
        closing = True
        _finish(run, 0)
    except BaseException as error:
        cancel_timeout()
        status = getattr(error, "status", 1)
        if status == 128 + signal.SIGTERM and not closing:
            with tolerate_wandb_errors(run):
                run.mark_preempting()
        finish = threading.Thread(target=_finish, args=(run, status), daemon=True)
        finish.start()
        hurry = isinstance(error, Stopped) and status != 0  # a run stopped by W&B has half a minute
        finish.join(CLOSE_TIMEOUT if hurry else None)
        if hurry and (closing or finish.is_alive()):
            print(f"{error}; W&B does not answer. To go on: {command}", flush=True)
            os._exit(status)  # every file is written, and W&B would go on waiting
        raise


def _finish(run: wandb.Run, status: int) -> None:
    if run.id in _workers:
        waiting, thread = _workers.pop(run.id)
        waiting.put(None)
        thread.join(ARTIFACT_TIMEOUT if status == 0 else 0)
        if thread.is_alive():
            reported_runs.add(run.id)  # W&B's later errors are consequences of this one
    online = not (run.offline or run.disabled)
    killer = threading.Timer(run.settings.finish_timeout + KILL_AFTER, _give_up, [run.id])
    killer.daemon = True
    killer.start()
    with tolerate_wandb_errors(run):
        try:
            run.finish(exit_code=status)
        except TimeoutError:
            warn_loudly(*NO_ANSWER)
            return
        finally:
            killer.cancel()
        if online and run.id not in reported_runs:
            for log in wandb_internals.log_files(run.id):
                wandb_internals.synced_marker(log).touch()
    if run.id in lost_runs:
        with tolerate_wandb_errors(run):
            wandb.teardown()  # or it complains at exit


def _give_up(run_id: str) -> None:
    """End W&B's service, which may wait for an upload forever."""
    reported_runs.add(run_id)
    lost_runs.add(run_id)
    try:
        warn_loudly(*NO_ANSWER)
    finally:
        wandb_internals.kill_service()


def is_complete(run_id: str, mode: str, last_step: int) -> bool:
    """Whether W&B has all of a finished run: on its server, or in its log files if the run is offline."""
    logs = wandb_internals.log_files(run_id)
    if mode == "online":
        return all(wandb_internals.synced_marker(log).exists() for log in logs)
    return mode == "disabled" or not logs or last_step in wandb_internals.history(logs)
