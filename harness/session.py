"""A run from its output directory to the end of its W&B run, on rank 0 and on the others."""

import contextlib
import dataclasses
import os
import platform
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import wandb

from harness import checkpoints, distributed, wandb_run
from harness.device import find_device, find_precision, keep_freed_memory
from harness.directory import (
    CHECKPOINT,
    CONFIG,
    JOURNAL,
    METRICS,
    newest_unfinished,
    output_directory,
)
from harness.errors import Stopped, UserError
from harness.files import read_json, write_json
from harness.history import History, rewind
from harness.options import SharedSettings, from_config
from harness.signals import StopRequests, handling_signals, in_main_thread

LIBRARIES = ("torch", "torchvision", "transformers", "wandb", "numpy")
Load = Callable[[Any], Any]  # (settings) -> data; fills in the settings that depend on the data
Init = Callable[..., wandb.Run]  # (settings, **options of wandb.init) -> run


@dataclasses.dataclass
class Session:
    """What a script needs of its run, on each rank."""

    settings: Any  # as used: placeholders resolved, a sweep's values included
    data: Any = None  # what `load` returned
    run: wandb.Run | None = None  # None if the run was finished before
    history: History | None = None  # replaces `run.log`
    checkpoint: Mapping[str, Any] | None = None  # to resume from; None for a new run
    stop_requests: StopRequests | None = None
    started: float = 0.0  # on the clock of `time.perf_counter`, earlier by what the run took before it was resumed
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)  # content of metrics.json

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.run is None

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def device(self) -> torch.device:
        return find_device(self.settings.device)


@contextlib.contextmanager
def open_session(settings: SharedSettings, task: str, load: Load, init: Init) -> Iterator[Session]:
    """Begin a run, or resume it, and end it with the block; files are written and W&B is told, however it ends.

    Raises `UserError` for what the user can fix, and `Stopped` if the run was asked to stop; in a thread of
    `wandb.agent`, which goes on with other runs, that is only printed.
    """
    keep_freed_memory()
    try:
        last_wait = (
            wandb_run.FINISH_TIMEOUT[settings.log_model]
            + wandb_run.KILL_AFTER
            + wandb_run.ARTIFACT_TIMEOUT
        )
        with (
            distributed.joined(settings.peer_timeout, last_wait),
            handling_signals(settings.stop_timeout) as requests,
        ):
            if distributed.rank() == 0:
                _identify(settings, task)
                opened = _open_on_rank_0(settings, load, init, requests)
            else:
                opened = _open(settings, load, requests)
            with opened as session:
                yield session
    except Stopped as stopped:
        if stopped.ends_launcher:
            distributed.stop_launcher()
        if in_main_thread():
            raise Stopped(
                f"{stopped.reason}. To go on: {resume_command(settings)}", stopped.status
            ) from None
        print(stopped)


def resume_command(settings: SharedSettings) -> str:
    """What to type to resume this run."""
    if distributed.spans_hosts():
        more = (
            " with --resume and its --output_dir"
            if settings.output_dir and not settings.resume
            else ""
        )
        return f"the same command on every host{more}"
    processes = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    launcher = ["torchrun", "--nproc-per-node", processes] if processes else ["python"]
    named = any(word.partition("=")[0] == "--output_dir" for word in sys.argv)
    more = [] if named or not settings.output_dir else ["--output_dir", settings.output_dir]
    more += ["--resume"] if settings.output_dir and not settings.resume else []
    return shlex.join([*launcher, *sys.argv, *more])


@contextlib.contextmanager
def _open_on_rank_0(
    settings: SharedSettings, load: Load, init: Init, requests: StopRequests
) -> Iterator[Session]:
    started = time.perf_counter()
    _check_leader(settings)
    with output_directory(settings) as output_dir:
        checkpoint = checkpoints.load(output_dir, settings)
        started -= checkpoint["seconds"] if checkpoint else 0
        if metrics := _finished_before(output_dir, settings, checkpoint):
            distributed.broadcast(None)
            yield Session(settings, metrics=metrics)
            return
        rows = rewind(output_dir / JOURNAL, checkpoint["history"]) if checkpoint else []
        requested, data, resuming = dataclasses.replace(settings), None, bool(checkpoint)
        if "WANDB_SWEEP_ID" not in os.environ:
            find_device(
                settings.device
            )  # before W&B starts, so that a mistake leaves nothing behind
            data = load(settings)

        def init_run(mode: str) -> wandb.Run:
            return init(requested, **wandb_run.init_options(requested, mode, requests, resuming))

        run, wandb_step = wandb_run.start(init_run, requested, resuming)
        with wandb_run.finishing(run, resume_command(settings)):
            # A sweep may have set values: from here on, W&B's config decides.
            configured = settings if checkpoint else from_config(requested, run.config)
            if data is None or configured not in (requested, settings):
                settings = configured
                data = load(settings)
            device = find_device(settings.device)
            settings.device, settings.precision = (
                device.type,
                find_precision(settings.precision, device),
            )
            settings.id = run.id
            _record(run, settings, output_dir)
            history = History(run, output_dir / JOURNAL, wandb_step)
            history.take_over(rows)
            distributed.broadcast((settings, checkpoint))
            session = Session(settings, data, run, history, checkpoint, requests, started)
            yield session
            history.commit()
            last_line = _where_to_look(run, output_dir)
        session.metrics["seconds"] = time.perf_counter() - started
        write_json(output_dir / METRICS, session.metrics)
    print(last_line)


@contextlib.contextmanager
def _open(requested: SharedSettings, load: Load, requests: StopRequests) -> Iterator[Session]:
    """On the other ranks: the settings and the checkpoint of rank 0; nothing is printed, logged or written."""
    with distributed.deferring_to_rank_0():
        _check_leader(requested)
    begun = distributed.broadcast()
    if not begun:  # it was finished before
        yield Session(None)
        return
    settings, checkpoint = begun
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        data, run = load(settings), wandb.init(mode="disabled")
        with distributed.deferring_to_rank_0():
            yield Session(settings, data, run, History(run, None), checkpoint, requests)


def _check_leader(settings: SharedSettings) -> None:
    """Raise `UserError`, on all ranks, if a run is to be resumed whose checkpoint is on another host than rank 0's."""
    found = bool(settings.output_dir) and Path(settings.output_dir, CHECKPOINT).exists()
    leader, *others = distributed.gather((socket.gethostname(), found and settings.resume))
    hosts = [host for host, found in others if found and not leader[1]]
    if hosts:
        problem = f"is on {hosts[0]}, and {leader[0]}, which has process 0, can't read it"
        advice = f"--output_dir belongs where all hosts share it, or --node-rank 0 on {hosts[0]}"
        raise UserError(f"--resume: the checkpoint of {settings.output_dir} {problem}: {advice}")


def _identify(settings: SharedSettings, task: str) -> None:
    """Resolve project, entity, run id, output directory and W&B mode. Raises `UserError`."""
    if settings.resume and not settings.output_dir:
        newest = newest_unfinished(task)
        raise UserError(
            "--resume needs --output_dir"
            + (f"; the newest unfinished run is {newest}" if newest else "")
        )
    config = read_json(Path(settings.output_dir, CONFIG)) or {} if settings.resume else {}
    before = {name: value for name, value in config.items() if isinstance(value, str)}
    for name, variable in (
        ("project", "WANDB_PROJECT"),
        ("entity", "WANDB_ENTITY"),
        ("id", "WANDB_RUN_ID"),
    ):
        used, wanted = before.get(name), getattr(settings, name) or os.environ.get(variable)
        if used and wanted and used != wanted:
            raise UserError(
                f"--resume: the run in {settings.output_dir} has --{name} {used}, not {wanted}"
            )
        setattr(settings, name, used or wanted)
    settings.project = settings.project or task
    settings.id = settings.id or secrets.token_hex(4)
    settings.output_dir = settings.output_dir or f"runs/{task}-{settings.id}"
    if "/" in settings.id:
        raise UserError(f"--id: must not contain a slash, got {settings.id!r}")
    for name, value in ("id", settings.id), ("output_dir", settings.output_dir):
        if value.splitlines() != [value]:  # they stand in the last line of a run
            raise UserError(f"--{name}: must be one line, got {value!r}")
    settings.wandb = wandb_run.wandb_mode(settings.wandb)
    if "WANDB_SWEEP_ID" in os.environ:
        settings.project = settings.entity = settings.id = (
            None  # W&B's agent has set them and warns about others
        )


def _finished_before(
    output_dir: Path, settings: SharedSettings, checkpoint: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The content of metrics.json if the run is finished and W&B has all of it; else None."""
    metrics = read_json(output_dir / METRICS)
    if metrics is None:
        return None
    if checkpoint and not wandb_run.is_complete(
        settings.id, settings.wandb, checkpoint["position"]["step"]
    ):
        print(f"{output_dir} is finished, but W&B does not have all of it: the end is repeated.")
        return None
    print(f"{output_dir} is finished: see {output_dir / METRICS}")
    return metrics


def _record(run: wandb.Run, settings: SharedSettings, output_dir: Path) -> None:
    """Write the settings as used to W&B and, with versions, to `config.json`; the data set becomes a tag."""
    used = dataclasses.asdict(settings)
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    write_json(output_dir / CONFIG, used | {"versions": versions})
    with wandb_run.tolerate_wandb_errors(run):
        run.config.update(
            {k: v for k, v in used.items() if run.config.get(k) != v}, allow_val_change=True
        )
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), settings.dataset)))
        if settings.save_code:
            root = Path(__file__).parent.parent
            packages = {root, Path(sys.argv[0]).resolve().parent}
            packages |= {
                init.parent for depth in ("*", "*/*") for init in root.glob(f"{depth}/__init__.py")
            }
            run.log_code(
                root,
                include_fn=lambda p: Path(p).parent in packages and p.endswith((".py", ".yaml")),
            )


def _where_to_look(run: wandb.Run, output_dir: Path) -> str:
    """The last line of a run: where its files are, and how to see them in W&B."""
    line = f"Files of this run: {output_dir}"
    if run.disabled:
        return f"{line} (W&B is disabled)"
    directory = os.path.relpath(Path(run.dir).parent)
    upload = f"upload it: wandb sync {directory}" if run.offline else f"on the web: {run.url}"
    return f"{line} | look at it: wandb leet {directory} | {upload}"
