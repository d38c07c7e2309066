"""The W&B run beside a training run: begun, made unable to hurt training, stopped and ended."""

import contextlib
import functools
import logging
import os
import queue
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb

import wandb_log
from options import SharedSettings, Stopped, UserError, warn_loudly

SECONDS_TO_CONNECT = 8  # W&B waits up to ten more before it, for the API key to be confirmed
SECONDS_TO_UPLOAD = {"none": 20, "best": 1800, "all": 1800}  # at the end of a run, by --log_model
SECONDS_FOR_ARTIFACTS = 5  # to be handed over at the end of a run, after which they are uploaded
SECONDS_TO_STOP = 2  # from a signal on; as long again to close the W&B run


def wandb_mode(choice: str) -> str:
    """The mode for `wandb.init` that `--wandb` asks for.

    "auto" obeys `WANDB_MODE` and W&B's settings files where they say offline or disabled, and else is online
    where credentials are configured and offline where none are; it never prompts. Raises `UserError` where
    "online" was asked for and there are no credentials.
    """
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B would refuse it
    mode = wandb.setup().settings.mode if choice == "auto" else choice
    if mode != "online":
        return mode
    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        problem = "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        problem = f"the API key can't be used: {error}"
    if choice == "online":
        raise UserError(f"--wandb online: {problem}; run `wandb login`, or use --wandb offline")
    print(f"W&B is offline: {problem}.")
    return "offline"


def wandb_settings(settings: SharedSettings, stop: list[Stopped]) -> wandb.Settings:
    """What `wandb.init` is to do otherwise than by default, so that a crash or a dead server costs little."""
    return wandb.Settings(
        x_transaction_log_flush_interval=0.05,  # seconds; by default, a crash loses the last 15
        init_timeout=SECONDS_TO_CONNECT,
        finish_timeout=SECONDS_TO_UPLOAD[settings.log_model],
        finish_timeout_raises=True,
        stop_fn=lambda: stop.append(Stopped("W&B", 0)),
    )


def start(begin: Callable[[str], wandb.Run], settings: SharedSettings) -> tuple[wandb.Run, int]:
    """The W&B run that `begin(mode)` makes, and the last step that W&B has of a resumed run, -1 for none.

    Where the server can't be reached or refuses, the run goes on offline, after at most 25 seconds. No call of the
    run's `log` and `log_artifact` raises or waits for a server, and rows up to that last step are passed over.
    """
    files = wandb_log.log_files(settings.id) if settings.resume and settings.wandb != "disabled" else []
    for file in files:
        if not wandb_log.is_synced(file):
            wandb_log.mend(file)
    try:
        run = begin(settings.wandb)
    except wandb.errors.CommError as error:
        if settings.wandb != "online":
            raise
        problem = str(error).splitlines()[0]
        warn_loudly(
            f"W&B can't be used: {problem}",
            "Where the API key is wrong, wandb login --relogin takes another one.",
            "The run goes on offline; wandb sync uploads it later.",
        )
        wandb.teardown()
        run = begin("offline")
    if run.disabled:
        return run, -1
    logging.raiseExceptions = False  # a full disk under wandb/ would fill the screen
    if run.offline:
        # What an online process logged may not have reached the server: unless it is known to, it is logged again.
        sure = [file for file in files if wandb_log.is_offline(file) or wandb_log.is_synced(file)]
        held = max(wandb_log.history(sure), default=-1)
    else:
        held = run.starting_step - 1 if run.resumed else -1
        _log_artifacts_in_background(run)

    log, log_from_hook, repeating = run.log, run._log, held >= 0

    def log_what_is_new(data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        nonlocal repeating
        repeating = step <= held if step is not None else repeating
        if not repeating and run.id not in _lost:
            with forgiving(run):
                log(data, step, commit)

    def log_histogram(data: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        if not repeating and run.id not in _lost:
            with forgiving(run):
                log_from_hook(data, *arguments, **options)

    run.log, run._log = log_what_is_new, log_histogram  # the hooks of run.watch call the latter
    return run, held


def log_again(run: wandb.Run, rows: list[dict[str, float]], held: int) -> None:
    """Log the rows of the journal that W&B has lost, those after step `held`.

    Where a log file on this machine has the row, its tables and pictures are logged again too.
    """
    if run.disabled or not (rows or held >= 0):
        return
    local = wandb_log.history([file for file in wandb_log.log_files(run.id) if file != Path(run.settings.sync_file)])
    if run.offline and held >= 0:  # or the summary would only know what this process logs
        with forgiving(run):
            for step in sorted(step for step in local if step <= held):
                run.summary.update({key: value for key, value in local[step].values.items() if key[0] != "_"})
    rows = [row for row in rows if row["step"] > held]
    if rows and run.offline and not local:
        print("W&B's own log of this run is not in wandb/: its numbers are logged again.")
    for row in rows:
        values, files = local.get(row["step"], wandb_log.Row(row, Path()))
        for value in values.values():
            if isinstance(value, dict):
                for name in [*value.get("filenames", []), *([value["path"]] if "path" in value else [])]:
                    _copy_into_run(run, files, name)
        own = {key: value for key, value in values.items() if key != "step" and not key.startswith("_")}
        run.log(own, step=row["step"])


def _copy_into_run(run: wandb.Run, files: Path, name: str) -> None:
    with forgiving(run):
        if (files / name).exists():
            copy = Path(run.dir, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / name, copy)
            run.save(copy, base_path=run.dir, policy="now")


@contextlib.contextmanager
def forgiving(run: wandb.Run) -> Iterator[None]:
    """What W&B raises in the block is said, once in a run, and goes no further."""
    try:
        yield
    except Exception as error:
        if _is_from_agent(error):
            raise
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not any(module.startswith("wandb.") for module in modules):
            raise
        if isinstance(error, ConnectionError):
            _lost.add(run.id)
        if run.id not in _complained:
            _complained.add(run.id)
            warn_loudly(
                f"W&B has failed: {error or type(error).__name__}",
                "Training goes on. The journal has every number; the same command with --resume logs them again.",
            )


_complained: set[str] = set()  # ids of runs
_lost: set[str] = set()  # ids of runs whose W&B service is gone


def _log_artifacts_in_background(run: wandb.Run) -> None:
    """Online, W&B asks the server before it logs an artifact, or a table, and waits: not in the way of training."""
    waiting, log_artifact = queue.SimpleQueue(), run.log_artifact

    def work() -> None:
        while call := waiting.get():
            with forgiving(run):
                log_artifact(*call[0], **call[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _workers[run.id] = waiting, thread
    run.log_artifact = lambda *arguments, **options: waiting.put((arguments, options))


_workers: dict[str, tuple[queue.SimpleQueue, threading.Thread]] = {}


@contextlib.contextmanager
def stop_requests() -> Iterator[list[Stopped]]:
    """A list that SIGTERM, SIGINT and W&B's stop button add to; the first entry is to be raised after the batch.

    A signal is raised where the program is, if that takes too long. A second Ctrl-C ends the process.
    """
    asked: list[Stopped] = []
    if threading.current_thread() is not threading.main_thread():  # of wandb.agent; only the main one gets signals
        yield asked
        return

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGTERM and "WANDB_SWEEP_ID" in os.environ:
            asked.append(Stopped("the sweep", 0))  # its agent would take another status for a failure
        else:
            asked.append(Stopped(signal.Signals(number).name, 128 + number))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_STOP)

    def insist(*_: Any) -> None:
        raise asked[0]

    handlers = {signal.SIGTERM: ask, signal.SIGINT: ask, signal.SIGALRM: insist}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield asked
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked and number == signal.SIGTERM else handler)


@contextlib.contextmanager
def finishing(run: wandb.Run) -> Iterator[wandb.Run]:
    """End the W&B run with the block, as failed if it raises, and within seconds if it was stopped.

    `run` itself would do as a context manager, but prints a traceback for any exception, even a `UserError`.
    """
    ending, in_main_thread = False, threading.current_thread() is threading.main_thread()
    try:
        try:
            yield run
        except Exception as error:
            if not _is_from_agent(error):
                raise
            raise Stopped("the sweep", 0) from None
        ending = True
        _finish(run, 0)
    except BaseException as error:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_REAL, 0)
        status = getattr(error, "status", 1)
        if status == 128 + signal.SIGTERM and not ending:
            with forgiving(run):
                run.mark_preempting()
        closing = threading.Thread(target=_finish, args=(run, status), daemon=True)
        closing.start()
        hurried = isinstance(error, Stopped) and status != 0  # W&B gives a run that it stops half a minute
        closing.join(SECONDS_TO_STOP if hurried else None)
        if hurried and (ending or closing.is_alive()):
            print(f"{error} (W&B does not answer; what it lacks is uploaded then)", flush=True)
            os._exit(status)  # all there is has been written, and W&B would wait
        raise


def _is_from_agent(error: Exception) -> bool:
    """Whether `wandb.agent` has raised it in the thread that it runs a function in, to stop that."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return type(error) is Exception and not error.args and not in_main_thread


def for_agents(main: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`main`, which in a thread of `wandb.agent` says that it was stopped and returns nothing, for others to go on."""

    @functools.wraps(main)
    def call(argv: list[str] | None = None) -> dict[str, Any]:
        try:
            return main(argv)
        except Stopped as stopped:
            if threading.current_thread() is threading.main_thread():
                raise
            print(stopped)
            return {}

    return call


def _finish(run: wandb.Run, status: int) -> None:
    if run.id in _workers:
        waiting, thread = _workers.pop(run.id)
        waiting.put(None)
        thread.join(SECONDS_FOR_ARTIFACTS if status == 0 else 0)
        if thread.is_alive():
            _complained.add(run.id)  # what it says from now on is no news
    online = not (run.offline or run.disabled)
    with forgiving(run):
        try:
            run.finish(exit_code=status)
        except TimeoutError:
            warn_loudly("W&B does not answer.", "The same command with --resume uploads what it lacks when it does.")
            return
        if online and run.id not in _complained:
            for file in wandb_log.log_files(run.id):
                wandb_log.mark_synced(file)
    if run.id in _lost:
        with forgiving(run):
            wandb.teardown()  # or it would complain at the exit


def is_complete(run_id: str, mode: str, last_step: int) -> bool:
    """Whether W&B has all of a finished run: on its server or, where the run is offline, in its log files."""
    files = wandb_log.log_files(run_id)
    if mode == "online":
        return all(map(wandb_log.is_synced, files))
    return mode == "disabled" or not files or last_step in wandb_log.history(files)


def where_to_look(run: wandb.Run, output_dir: Path) -> str:
    """The line that ends a run: where its files are, and how to see them in W&B."""
    line = f"Files of this run: {output_dir}"
    if run.disabled:
        return f"{line} (W&B is disabled)"
    directory = os.path.relpath(Path(run.dir).parent)
    upload = f"upload it: wandb sync {directory}" if run.offline else f"on the web: {run.url}"
    return f"{line} | look at it: wandb leet {directory} | {upload}"
