"""The tracked run: its rows go to a journal and to W&B, whose failures never reach training."""

import contextlib
import functools
import json
import logging
import math
import operator
import os
import queue
import shutil
import signal
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import wandb
from torch import Tensor, nn
from tqdm import tqdm

from harness import distributed, wandb_service
from harness.errors import DISK_ERRORS, Stopped, UserError, disk_error, script_line, warn_loudly
from harness.files import replacing
from harness.options import SharedSettings
from harness.script import StopRequests, cancel_timeout, in_main_thread

INIT_TIMEOUT = 8  # seconds; W&B waits up to ten more before that to confirm the API key
# Seconds until a service that has not finished the run is killed, by --log_model.
FINISH_TIMEOUT = {"none": 30, "best": 1800, "all": 1800}
CLOSE_TIMEOUT = 2  # the same after a signal
ARTIFACT_TIMEOUT = 5  # seconds to hand over artifacts at the end; uploading them comes after that
LOG_METHOD = "_log"  # undocumented: what the hooks of `watch` call
HOOK_KEYS = ("gradients/", "parameters/")


def logs_to_wandb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: call a function that takes a `Run` without letting W&B's errors reach training.

    It is called on rank 0 only. The first error of W&B is reported; the user's own are raised.
    """

    @functools.wraps(function)
    def isolated(run: "Run", *arguments: Any, **options: Any) -> Any:
        if distributed.rank() > 0:
            return None
        try:
            return function(run, *arguments, **options)
        except Exception as error:
            disk_fails = getattr(disk_error(error), "errno", None) in DISK_ERRORS
            ours = isinstance(error, (LogError, JournalError)) or _is_from_agent(error)
            if ours or not (disk_fails or wandb_service.raised_by_wandb(error)):
                raise
            run.report(error)
            return None

    return isolated


class LogError(ValueError):
    """`Run.log` was called in a way that would lose data; names the calling line."""

    def __init__(self, problem: str):
        super().__init__(f"run.log in {script_line()}: {problem}")


class JournalError(OSError):
    """The journal can't be written: unlike an error of W&B, this ends the run."""


def _is_from_agent(error: BaseException) -> bool:
    """Whether `wandb.agent` raised this, a bare `Exception`, in its thread to stop the run."""
    return type(error) is Exception and not error.args and not in_main_thread()


class Run:
    """Holds a `wandb.Run` and collects a row per step, the number of training examples seen.

    A row is written, to the journal and then to W&B, when a later one begins or on `commit`. So a
    process that dies leaves no half of a row, and both hold the same rows. Whatever W&B raises is
    reported once, and training goes on. On ranks other than 0 nothing is written.
    """

    def __init__(
        self,
        run: wandb.Run,
        journal: Path | None = None,
        token: str | None = None,
        logs: Sequence[Path] = (),
        wandb_step: int = -1,
        finish_timeout: int = FINISH_TIMEOUT["none"],
    ):
        """`token` and `logs`: of this run, and W&B's log files of its earlier processes.

        `wandb_step` is the last step that W&B already has of this run, -1 if none.
        """
        self.wandb = run  # for what this class does not offer
        self._token = token
        self.earlier_logs = logs
        self.step = 0  # of the current row
        self.failed = False  # whether a failure of W&B was reported
        self.lost = False  # whether W&B's service is gone
        self._row: dict[str, Any] = {}
        self._ended = False  # whether the row was written
        self._restoring = False  # from `take_over` to `load_state_dict`: nothing is written
        self._rows: list[dict[str, float]] = []  # of the journal
        self._journal = journal
        self._checksum = 0
        self._wandb_step = wandb_step
        self._finish_timeout = finish_timeout
        self._watched: list[nn.Module] = []
        self._artifacts = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        if not run.disabled:
            self._intercept_hooks()
        if self.online:
            # W&B waits for the server before it logs an artifact.
            self._worker = threading.Thread(target=self._log_artifacts, daemon=True)
            self._worker.start()

    @property
    def online(self) -> bool:
        return not (self.wandb.offline or self.wandb.disabled)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The numbers of all rows so far, each with its step; the current one is the last."""
        return [*self._rows, {"step": self.step, **_numbers(self._row)}]

    def log(self, values: Mapping[str, Any], step: int | None = None, commit: bool = False) -> None:
        """Add numbers, media or charts to the row of `step`, by default the current one.

        A larger step begins that row; `commit` ends the current one. Raises `LogError` for a step
        that falls, a row that has ended, a key that the row has with another value, and a key that
        W&B or the journal keeps for itself.
        """
        values = _plain_values(values)
        if step is not None and step != self.step:
            step = operator.index(step)
            if step < self.step:
                raise LogError(f"step {step} comes after step {self.step}")
            self.commit()
            self.step = step
            self._ended = False
        if self._ended and values:
            raise LogError(f"the row of step {self.step} has ended")
        for name, value in values.items():
            if name in self._row and not _same(value, self._row[name]):
                raise LogError(f"the row of step {self.step} has another value of {name!r}")
        self._row.update(values)
        if commit:
            self.commit()

    def commit(self) -> None:
        """End the current row: write it to the journal, then to W&B.

        Raises `JournalError` if the journal can't be written.
        """
        row = self._row
        self._row = {}
        self._ended = True
        if self._restoring:
            return
        numbers = _numbers(row)
        if numbers and self._journal:
            entry = {"step": self.step, **numbers}
            line = (json.dumps(entry) + "\n").encode()
            try:
                with self._journal.open("ab") as journal:
                    journal.write(line)
            except OSError as error:
                raise JournalError(error.errno, error.strerror, str(self._journal)) from None
            self._rows.append(entry)
            self._checksum = zlib.crc32(line, self._checksum)
        self._send(row, self.step)

    def _send(self, row: Mapping[str, Any], step: int) -> None:
        if not row or self.lost or self.wandb.disabled or step <= self._wandb_step:
            return
        stored = self._hand_over(row, step)
        if not stored and not self.lost:  # if the media can't be stored, at least the numbers
            self._hand_over(_numbers(row), step)

    @logs_to_wandb
    def _hand_over(self, row: Mapping[str, Any], step: int) -> bool:
        self._log_to_wandb({}, step=step)  # W&B names media files after the row that is open
        self._log_to_wandb(row, step=step, commit=True)
        return True

    def _intercept_hooks(self) -> None:
        """Have the hooks of `watch` and W&B's own `log` add to the current row."""
        self._log_to_wandb = getattr(self.wandb, LOG_METHOD, self.wandb.log)
        if self._log_to_wandb == self.wandb.log:
            loss = "the histograms of run.watch may be logged with another step"
            wandb_service.report_change(loss)
            return

        def log(
            data: Mapping[str, Any], step: int | None = None, commit: bool | None = None
        ) -> None:
            if all(name.startswith(HOOK_KEYS) for name in data):
                if not self._ended:  # a hook may run several times in a step
                    self._row.update(data)
            else:
                self.log(data, step, bool(commit))

        setattr(self.wandb, LOG_METHOD, log)

    def state_dict(self) -> dict[str, Any]:
        """Flush the journal; returns its length, its CRC-32, and the current row without media.

        Raises `ValueError` if a resumed run was not restored.
        """
        if self._restoring:
            raise ValueError("call checkpoints.restore_or_begin() before training")
        with self._journal.open("ab") as journal:
            os.fsync(journal.fileno())
            length = journal.tell()
        row = {name: value for name, value in self._row.items() if _is_plain(value)}
        return {
            "journal": length,
            "checksum": self._checksum,
            "step": self.step,
            "row": json.loads(json.dumps(row)),  # no subclasses, which could not be loaded
            "written": self._ended,
            "token": self._token,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the row that `state_dict` found."""
        self.step = state["step"]
        self._row = dict(state["row"])
        self._ended = state["written"]
        self._restoring = False

    def take_over(self, rows: list[dict[str, float]], checksum: int) -> None:
        """Continue after these rows of the journal, and log those that W&B has lost.

        Their media are logged too if an earlier W&B log on this machine has them. What is logged
        before `load_state_dict` was logged by an earlier process.
        """
        self._rows = rows
        self._checksum = checksum
        self._restoring = True
        logged = wandb_service.logged_rows(self.earlier_logs)
        if self.wandb.offline:
            for step in sorted(logged):  # an offline summary starts empty
                if step <= self._wandb_step:
                    self.update_summary(logged[step][0])
        for row in rows:
            values = dict(row)
            step = values.pop("step")
            if step in logged and step > self._wandb_step:
                values, directory = logged[step]
                self._save_media(values, directory)
            self._send(values, step)

    def _save_media(self, values: Mapping[str, Any], directory: Path) -> None:
        """Save the files of a row that an earlier process logged."""
        for value in values.values():
            if not isinstance(value, dict):
                continue
            for name in [*value.get("filenames", ()), value.get("path", "")]:
                if (directory / name).is_file():
                    self.save(directory / name, name)

    @logs_to_wandb
    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of W&B, isolated from training; None if it fails."""
        return function(*arguments, **options)

    @logs_to_wandb
    def add_tag(self, tag: str) -> None:
        """Add a tag to those of the run."""
        self.wandb.tags = tuple(dict.fromkeys((*(self.wandb.tags or ()), tag)))

    @logs_to_wandb
    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Set values in the summary of the W&B run."""
        self.wandb.summary.update(values)

    def watch(self, model: nn.Module, log: str) -> None:
        """`wandb.Run.watch` for the current batch: histograms of a model.

        `log` is "gradients", "parameters" or "all".
        """
        index = len(self._watched)  # W&B adds it to the names of a second model
        self._watched.append(model)
        self.call(self.wandb.watch, model, log=log, log_freq=1, idx=index)

    def unwatch(self) -> None:
        """End `watch`; `Checkpoints.end_batch` calls it, so that no evaluation is watched."""
        if self._watched:
            self.call(self.wandb.unwatch, self._watched)
            self._watched = []

    @logs_to_wandb
    def save(self, path: Path, name: str | None = None) -> None:
        """Save a copy of a file to the W&B run; `wandb.Run.save` alone would link to the file.

        `name`: its path in the run, by default its own name.
        """
        if not self.wandb.disabled:
            copy = Path(self.wandb.dir, name or path.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            self.wandb.save(copy, base_path=self.wandb.dir, policy="now", glob=False)

    def alert(self, title: str, text: str) -> None:
        """Print a warning, and send it by `wandb.Run.alert` if the run is online."""
        tqdm.write(f"WARNING: at step {self.step:,}, {text}")
        if self.online:
            self.call(self.wandb.alert, title, text, level=wandb.AlertLevel.WARN)

    def log_artifact(self, artifact: wandb.Artifact, **options: Any) -> None:
        """`wandb.Run.log_artifact`, online in the background: W&B waits for the server."""
        if self._worker:
            self._artifacts.put((artifact, options))
        else:
            self.call(self.wandb.log_artifact, artifact, **options)

    @logs_to_wandb
    def log_model(
        self, save: Callable[[Path], None], metadata: Mapping[str, Any], is_best: bool
    ) -> None:
        """Log what `save` writes to a directory as the artifact model-<run id>.

        It has the alias "best" if it is the best model.
        """
        name = f"model-{self.wandb.id}"
        artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
        with tempfile.TemporaryDirectory() as directory:
            save(Path(directory))
            artifact.add_dir(directory)
        self.log_artifact(artifact, aliases=["latest", "best"] if is_best else None)

    def log_weights(
        self, weights: Mapping[str, Tensor], metadata: Mapping[str, Any], is_best: bool
    ) -> None:
        """Log a state dict, as `log_model` does, in the file model.pt."""
        on_cpu = {name: weight.cpu() for name, weight in weights.items()}
        self.log_model(
            lambda directory: torch.save(on_cpu, directory / "model.pt"), metadata, is_best
        )

    def _log_artifacts(self) -> None:
        while work := self._artifacts.get():
            artifact, options = work
            self.call(self.wandb.log_artifact, artifact, **options)

    def report(self, error: Exception) -> None:
        """Report the first failure of W&B; later ones are assumed to follow from it."""
        if isinstance(error, ConnectionError):
            self.lost = True
        if self.failed:
            return
        self.failed = True
        reason = str(error) or type(error).__name__
        warn_loudly(
            f"W&B has failed: {reason} ({script_line(error)})",
            "Training continues. The journal has every number; "
            "the same command with --resume logs them again.",
        )

    def finish(self, status: int, timeout: float | None = None) -> None:
        """Hand over what is left and end the W&B run; give up after `timeout` seconds."""
        if self._worker:
            self._artifacts.put(None)
            self._worker.join(ARTIFACT_TIMEOUT if status == 0 else 0)
            if self._worker.is_alive():
                self.failed = True  # later errors are expected, and not reported
        killer = threading.Timer(timeout or self._finish_timeout, self.give_up)
        killer.daemon = True
        killer.start()
        try:
            self._finish(status)
        finally:
            killer.cancel()
        if self.lost:
            wandb_service.close()

    @logs_to_wandb
    def _finish(self, status: int) -> None:
        self.wandb.finish(exit_code=status)
        if self.online and not self.failed:
            for log in (*self.earlier_logs, Path(self.wandb.settings.sync_file)):
                wandb_service.synced_marker(log).touch()

    def give_up(self) -> None:
        """End W&B's service, which may wait for an upload forever."""
        self.failed = True
        self.lost = True
        try:
            warn_loudly(
                "W&B does not answer.",
                "The same command with --resume logs the rest once it does.",
            )
        finally:
            wandb_service.kill()


def _plain_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values as they are now, nested ones as outer.inner, as in W&B. Raises `LogError`."""
    plain = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name or name == "step" or name.startswith("_"):
            raise LogError(f"{name!r} can't be the name of a metric")
        if isinstance(value, Mapping):
            inner = _plain_values(value, f"{prefix}{name}.")
        else:
            inner = {f"{prefix}{name}": _plain(value, name)}
        if twice := plain.keys() & inner.keys():
            raise LogError(f"{twice.pop()!r} is logged twice")
        plain |= inner
    return plain


def _plain(value: Any, name: str) -> Any:
    """A number of a tensor or an array as Python's own; a copy of a longer one."""
    if hasattr(value, "shape") and hasattr(value, "item"):
        if math.prod(value.shape) != 1:
            return value.detach().clone() if isinstance(value, Tensor) else value.copy()
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if value is None or isinstance(value, (int, float, str)):
        return value
    if not any(kind.__module__.startswith("wandb.") for kind in type(value).__mro__):
        raise LogError(
            f"{name!r} is of type {type(value).__name__}: use wandb.Image, wandb.Html or the like"
        )
    return value


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def _same(a: Any, b: Any) -> bool:
    """Whether two values of a row are the same; NaN is the same as NaN."""
    if _is_plain(a) and _is_plain(b):
        return a == b or (a != a and b != b)
    return a is b


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def rewind(journal: Path, state: Mapping[str, Any]) -> list[dict[str, float]]:
    """Cut the journal to its length in a run's `state_dict` and return its rows.

    Raises `UserError` if they are damaged.
    """
    content = b""
    if journal.is_file():
        content = journal.read_bytes()[: state["journal"]]
    if len(content) != state["journal"] or zlib.crc32(content) != state["checksum"]:
        raise UserError(
            f"{journal} does not go with the checkpoint: "
            "rows are missing or damaged; choose another --output_dir",
            status=1,
        )
    with replacing(journal) as temporary:
        temporary.write_bytes(content)
    return [json.loads(line) for line in content.splitlines()]


@wandb_service.starting()
def start(
    init: Callable[..., wandb.Run],
    settings: SharedSettings,
    requests: StopRequests,
    journal: Path,
    token: str | None,
    resuming: bool,
) -> Run:
    """The tracked run of the W&B run that `init` starts; W&B's stop button adds to `requests`.

    If the server can't be reached or refuses, the run is offline, after at most 25 seconds.
    Raises `UserError` if the server has another run in place of a resumed one.
    """
    wandb_service.find_caches()
    logs = []
    if settings.wandb != "disabled":
        wandb_service.start()
        if settings.resume and settings.id:
            logs = wandb_service.log_files(settings.id, token)
    for log in logs:
        if not wandb_service.synced_marker(log).exists():
            wandb_service.repair_log(log)
    options = _init_options(settings, requests)
    resume = "allow" if resuming and settings.wandb == "online" else None
    try:
        run = init(**options, mode=settings.wandb, resume=resume)
    except wandb.errors.CommError as error:
        if settings.wandb != "online":
            raise
        warn_loudly(
            f"W&B can't be used: {str(error).splitlines()[0]}",
            "If the API key is wrong, set another one: wandb login --relogin.",
            "The run continues offline; wandb sync uploads it later.",
        )
        wandb.teardown()
        run = init(**options, mode="offline")
    logging.raiseExceptions = False  # a full disk under wandb/ would flood the terminal
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # W&B's; warns at Python 3.14's exit
    wandb_step = -1
    if run.resumed:
        if run.config.get(wandb_service.TOKEN, token) != token:
            run.finish()
            raise UserError(
                f"W&B has another run with --id {settings.id}: "
                "go on with --wandb offline, and upload with `wandb sync --id` and a new id"
            )
        wandb_step = run.starting_step - 1
    elif resuming and run.offline:
        # Rows of an online process may not have reached the server, unless it confirmed them.
        kept = [
            log
            for log in logs
            if log.parent.name.startswith("offline-") or wandb_service.synced_marker(log).exists()
        ]
        wandb_step = max(wandb_service.logged_rows(kept), default=-1)
    timeout = FINISH_TIMEOUT["none" if run.offline else settings.log_model]
    return Run(run, journal, token, logs, wandb_step, timeout)


def _init_options(settings: SharedSettings, requests: StopRequests) -> dict[str, Any]:
    """Arguments for `wandb.init` beside those of the script."""
    return {
        "entity": settings.entity,
        "id": settings.id,
        "name": settings.name,
        "tags": settings.tags or None,
        "job_type": settings.job_type,
        "group": settings.group,
        "notes": settings.notes,
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            **wandb_service.known_settings(
                {
                    wandb_service.FLUSH_SETTING: 0.05,  # seconds; by default 15
                    "stop_fn": lambda: requests.add("W&B", 0),
                }
            ),
        ),
    }


@contextlib.contextmanager
def finishing(run: Run) -> Iterator[None]:
    """Finish the run with the block, within seconds if it was stopped."""
    closing = False
    try:
        yield
        run.commit()
        closing = True
        run.finish(0)
    except BaseException as error:
        if _is_from_agent(error):
            error = Stopped("the sweep", 0)
        cancel_timeout()
        status = getattr(error, "status", 1)
        hurry = isinstance(error, Stopped) and status != 0  # stopped by W&B, it has half a minute
        if hurry and closing:
            run.give_up()  # W&B was interrupted, and would go on waiting
        elif status > 128 + signal.SIGINT:  # SIGTERM, or Slurm's SIGUSR1
            run.call(run.wandb.mark_preempting)
        run.finish(status, CLOSE_TIMEOUT if hurry else None)
        raise error
