"""A run from its settings to its last line: output directory, resumption, W&B run, ranks."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import wandb
from torch import nn

from harness import distributed, tracking, wandb_service
from harness.device import find_device, find_precision, keep_freed_memory, restoring_globals
from harness.directory import (
    CHECKPOINT,
    CONFIG_FILE,
    JOURNAL_FILE,
    METRICS_FILE,
    PREVIOUS_CHECKPOINT,
    output_directory,
    read_checkpoint,
)
from harness.errors import Stopped, UserError
from harness.files import list_names, read_json, write_json
from harness.options import SharedSettings, given_options
from harness.script import StopRequests, handling_signals, in_ipython, in_main_thread
from harness.system import shell_command

ROOT = Path(__file__).parent.parent
LENGTHS = ("epochs", "max_steps")  # of a run, which may grow when it is resumed
LIBRARIES = ("torch", "torchvision", "transformers", "wandb", "numpy")


@dataclasses.dataclass
class Session:
    """A run, as each of its ranks has it."""

    settings: Any  # as requested or, on resuming, as the run was begun
    stop_requests: StopRequests
    # For W&B, config.json and the checkpoint: the settings, with placeholders such as "auto"
    # replaced by what was found, and "metrics", whether the minimum or maximum of each is best. The
    # script itself replaces the placeholders of its own settings, such as "dataset".
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: torch.device | None = None
    checkpoint: Mapping[str, Any] | None = None  # to resume from; None for a new run
    command: str = ""  # that started this process
    started: float = 0.0  # by `time.perf_counter`, moved back by the time of earlier processes
    run: tracking.Run | None = None  # from `start` on
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)  # of metrics.json
    finished: bool = False  # by an earlier process: there is nothing left to do
    exits: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    def autocast(self) -> torch.autocast:
        """A context for the forward pass, in bf16 if that is the precision of the run."""
        enabled = self.config["precision"] == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def start(self, init: Callable[..., wandb.Run]) -> tracking.Run:
        """Start the W&B run, which ends with the session, and write `config.json`.

        `init` is `wandb.init` with the script's own arguments. Raises `UserError` if W&B can't
        start.
        """
        if distributed.rank() > 0:
            self.run = tracking.Run(init(mode="disabled"))
            return self.run
        journal = self.output_dir / JOURNAL_FILE
        state = self.checkpoint and self.checkpoint["history"]
        if state:
            rows = tracking.rewind(journal, state)
            token = state.get("token")  # none in a run that was begun before runs had one
        else:
            token = read_json(self.output_dir / CONFIG_FILE).get(wandb_service.TOKEN)
        if self.settings.wandb != "online":  # online, it is first compared with the server's
            self.config[wandb_service.TOKEN] = token  # `init` logs it with the first record
        self.run = tracking.start(
            init, self.settings, self.stop_requests, journal, token, resuming=bool(state)
        )
        self.exits.enter_context(tracking.finishing(self.run))
        self.config["id"] = self.run.wandb.id  # W&B's agent may have chosen it
        self.config[wandb_service.TOKEN] = token
        self.config = json.loads(json.dumps(self.config))  # plain values instead of NumPy's
        record = _record_of_process(self.command)
        if state:
            record = _add_to_records(record, self.output_dir)
        write_json(self.output_dir / CONFIG_FILE, self.config | record)
        _log_config(self.run, self.config)
        if state:
            self.run.take_over(rows, state["checksum"])
        return self.run

    def describe(self, name: str, model: nn.Module) -> None:
        """Print the size of the model, and its device, precision and seed."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{name}: {parameters:,} parameters on {self.device.type} "
            f"in {self.config['precision']}, seed {self.settings.seed}"
        )


@contextlib.contextmanager
def open_session(
    requested: SharedSettings, task: str, directions: Mapping[str, str]
) -> Iterator[Session]:
    """Start or resume a run for the `with` block; always close its files and its W&B run.

    `directions`: whether each metric of the script is best at its "min" or "max".
    Raises `UserError` for what the user can fix, and `Stopped` if the run was asked to stop; in a
    thread of `wandb.agent`, which goes on with other runs, that is only printed.
    """
    keep_freed_memory()
    settings = requested
    # How long the other ranks wait for rank 0, which ends the W&B run.
    last_wait = tracking.FINISH_TIMEOUT[requested.log_model] + tracking.ARTIFACT_TIMEOUT
    try:
        with (
            restoring_globals(),
            distributed.joined(requested.peer_timeout, last_wait),
            handling_signals(requested.stop_timeout) as requests,
        ):
            if distributed.rank() == 0:
                opened = _open_on_rank_0(requested, task, directions, requests)
            else:
                opened = _open_on_other_rank(requested, requests)
            with opened as session:
                settings = session.settings
                yield session
    except Stopped as stopped:
        if stopped.ends_launcher:
            distributed.stop_launcher()
        if not in_main_thread():
            print(stopped)
            return
        command = resume_command(settings)
        raise Stopped(f"{stopped.reason}. To go on: {command}", stopped.status) from None


def resume_command(settings: SharedSettings) -> str:
    """The command that resumes a run; its directory has the other settings."""
    output_dir = settings.output_dir
    if output_dir and Path(output_dir, CONFIG_FILE).exists():
        return _command(settings, ["--output_dir", output_dir, "--resume"])
    return _command(settings, given_options(settings))


def _command(settings: SharedSettings, arguments: list[str]) -> str:
    """The command that starts the script with these arguments."""
    module = type(settings).__module__
    script = sys.argv[0]
    if distributed.spans_hosts():
        command = f"{Path(script).name} {shell_command(arguments)}"
        return f"on every host, torchrun with the same options and {command}"
    if module != "__main__":
        return f"{module}.main({arguments})"
    launcher = ["python"]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # set by torchrun
        launcher = ["torchrun", "--nproc-per-node", processes]
    elif in_ipython():
        launcher = ["%run"]
    return shell_command([*launcher, script, *arguments])


@contextlib.contextmanager
def _open_on_rank_0(
    requested: SharedSettings,
    task: str,
    directions: Mapping[str, str],
    requests: StopRequests,
) -> Iterator[Session]:
    started = time.perf_counter()
    _check_leader(requested)
    identity = _identify(requested, task)
    output_dir = Path(identity["output_dir"])
    begun = dataclasses.asdict(requested) | identity
    begun |= {"task_name": task, wandb_service.TOKEN: secrets.token_hex(8)}
    with output_directory(output_dir, requested.resume, begun):
        for path in (output_dir / CONFIG_FILE, Path(requested.config or "")):
            if (read_json(path) or {}).get("task_name", task) != task:
                raise UserError(f"the run in {path.parent} is of another script")
        checkpoint = read_checkpoint(output_dir)
        if checkpoint:
            started -= checkpoint["seconds"]
            identity |= _settings_of(checkpoint["settings"], requested, output_dir)
        settings = dataclasses.replace(requested, **identity)
        metrics = _finished_before(output_dir, settings, checkpoint)
        if metrics is not None:
            distributed.broadcast(None)
            yield Session(settings, requests, metrics=metrics, finished=True)
            return
        if settings.wandb != "disabled":
            _check_copy(output_dir)
        device = find_device(settings.device)
        if device.type == "mps" and settings.deterministic:
            raise UserError("--device mps does not repeat a run exactly: add --deterministic false")
        precision = find_precision(settings.precision, device)
        config = dataclasses.asdict(settings)
        config |= {"device": device.type, "precision": precision}
        config |= {"metrics": dict(directions), "task_name": task}
        distributed.broadcast((settings, config, checkpoint))
        command = _command(requested, given_options(requested))
        session = Session(settings, requests, config, device, checkpoint, command, started)
        with session.exits:
            yield session
            last_line = _where_to_look(session.run, output_dir)
        session.metrics["seconds"] = time.perf_counter() - started
        write_json(output_dir / METRICS_FILE, session.metrics)
    print(last_line)


@contextlib.contextmanager
def _open_on_other_rank(requested: SharedSettings, requests: StopRequests) -> Iterator[Session]:
    """Open with the settings and checkpoint of rank 0; print, log and write nothing."""
    with contextlib.redirect_stdout(io.StringIO()), distributed.deferring_to_rank_0():
        _check_leader(requested)
        received = distributed.broadcast()
        if not received:
            yield Session(requested, requests, finished=True)
            return
        settings, config, checkpoint = received
        device = find_device(config["device"])
        yield Session(settings, requests, config, device, checkpoint)


def _check_leader(requested: SharedSettings) -> None:
    """Raise `UserError`, on all ranks, if only another host than rank 0's has the checkpoint."""
    if not distributed.spans_hosts():
        return
    found = requested.resume and Path(requested.output_dir or "", CHECKPOINT).exists()
    (leader, leader_found), *others = distributed.gather((socket.gethostname(), found))
    hosts = [host for host, host_found in others if host_found]
    if hosts and not leader_found:
        raise UserError(
            f"--resume: the checkpoint of {requested.output_dir} is on {hosts[0]}, and {leader}, "
            "which has process 0, can't read it: "
            f"--output_dir belongs on a shared disk, or --node-rank 0 on {hosts[0]}"
        )


def _identify(requested: SharedSettings, task: str) -> dict[str, Any]:
    """Project, entity, run id, output directory and W&B mode. Raises `UserError`."""
    if requested.resume and not requested.output_dir:
        raise UserError("--resume needs --output_dir")
    run_id = requested.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    identity = {
        "project": requested.project or os.environ.get("WANDB_PROJECT") or task,
        "entity": requested.entity or os.environ.get("WANDB_ENTITY") or None,
        "id": run_id,
        "output_dir": requested.output_dir or f"runs/{task}-{run_id}",
    }
    wandb.Settings(run_id=run_id)  # raises wandb.errors.UsageError for what W&B would refuse
    identity["wandb"] = wandb_service.find_mode(requested.wandb)
    if "WANDB_SWEEP_ID" in os.environ:  # W&B's agent has set them and warns about others
        identity |= {"project": None, "entity": None, "id": None}
    return identity


def _settings_of(
    used: Mapping[str, Any], requested: SharedSettings, output_dir: Path
) -> dict[str, Any]:
    """The settings that a resumed run keeps from its beginning.

    Raises `UserError` if other values were requested for them.
    """
    run = f"--resume: the run in {output_dir}"
    fields = {field.name: field.metadata for field in dataclasses.fields(requested)}
    if used.keys() - fields.keys():
        names = ", ".join(f"--{name}" for name in sorted(used.keys() ^ fields.keys()))
        raise UserError(f"{run} is of another script or version: its options differ ({names})")
    wandb_identity = ("project", "entity", "id")
    differ = []
    taken = {}
    for name in sorted(fields):
        value = getattr(requested, name)
        if name not in used:
            print(f"--{name} is new in the script: the run goes on with {value!r}.")
            continue
        placeholder = None if name in wandb_identity else fields[name]["placeholder"]
        same = value in (used[name], placeholder)
        if name == "device" and not same:
            print(
                f"The run was on {used[name]} and continues on {value}: "
                "rounding and dropout differ."
            )
        elif name in LENGTHS and used[name] and (value or 0) > used[name]:
            print(f"--{name} was {used[name]}, is {value}.")
        elif name in wandb_identity or not fields[name]["may_change"]:
            taken[name] = used[name]
            if not same:
                differ.append(f"--{name} was {used[name]!r}, is {value!r}")
    if differ:
        raise UserError(f"{run} was begun with other settings: {'; '.join(differ)}")
    return taken


def _finished_before(
    output_dir: Path, settings: SharedSettings, checkpoint: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The content of metrics.json if the run is finished and W&B has all of it; else None."""
    metrics = read_json(output_dir / METRICS_FILE)
    if metrics is None:
        return None
    if checkpoint:
        used = checkpoint["settings"]
        if any(getattr(settings, name) != used[name] for name in LENGTHS):
            return None
        if not (output_dir / PREVIOUS_CHECKPOINT).exists():
            return None  # the newest checkpoint was damaged, and the previous one took its place
        last_step = checkpoint["position"]["step"]
        token = checkpoint["history"].get("token")
        if not wandb_service.is_complete(settings.id, token, settings.wandb, last_step):
            print(
                f"{output_dir} is finished, but W&B does not have all of it: the end is repeated."
            )
            return None
    print(f"{output_dir} is finished: see {output_dir / METRICS_FILE}")
    for field in dataclasses.fields(settings):
        describes = field.metadata["may_change"] and field.metadata["tells_apart"]
        if describes and checkpoint and getattr(settings, field.name) != used[field.name]:
            print(f"--{field.name} changes nothing in a finished run.")
    return metrics


def _check_copy(output_dir: Path) -> None:
    """Raise `UserError` if the run's directory is a copy of one that is still there."""
    config = read_json(output_dir / CONFIG_FILE) or {}
    original = Path(str(config.get("output_dir", output_dir)))
    try:
        if original.samefile(output_dir):
            return
    except OSError:  # it is gone, or can't be read
        return
    token = (read_json(original / CONFIG_FILE) or {}).get(wandb_service.TOKEN)
    if token and token == config.get(wandb_service.TOKEN):
        raise UserError(
            f"--resume: {output_dir} is a copy of {original}, and W&B would mix the two: "
            "go on there, or here with --wandb disabled"
        )


def _record_of_process(command: str) -> dict[str, Any]:
    """What config.json holds about a process: how, when and where it was started, and its code."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    code = {}
    for file in sorted(_imported_files()):
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
        with contextlib.suppress(OSError):  # it was removed meanwhile
            content = file.read_bytes().replace(b"\r\n", b"\n")  # Git may convert line ends
            code[Path(name).as_posix()] = f"{zlib.crc32(content):08x}"
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "git_commit": _git_commit(),
        "code": code,
        "versions": versions,
    }


def _add_to_records(record: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The record of the run's first process, with those of its later ones; `record` is the last.

    Prints a line if the versions or the code are not those of the first process.
    """
    before = read_json(output_dir / CONFIG_FILE) or {}  # it may be damaged
    first = {name: before.get(name, record[name]) for name in record}
    changed = []
    for library, new in record["versions"].items() - first["versions"].items():
        changed.append(f"{library} {new} instead of {first['versions'].get(library)}")
    for name, _ in record["code"].items() - first["code"].items():
        if name in first["code"]:
            changed.append(f"a changed {name}")
    if changed:
        print(f"The run goes on with {list_names(changed)}: results may differ.")
    return first | {"resumed": [*before.get("resumed", []), record]}


def _imported_files() -> set[Path]:
    """The script, and the modules beside this package that are imported."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    files = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        beside = file.startswith(f"{ROOT}{os.sep}") and "site-packages" not in file
        if file.endswith(".py") and (beside or file == script):
            files.add(Path(file))
    return files


def _git_commit() -> str | None:
    """The commit of the script, "-modified" if files differ from it; None if git knows none."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=-modified"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@tracking.logs_to_wandb
def _log_config(run: tracking.Run, config: Mapping[str, Any]) -> None:
    """Log the settings that W&B does not have yet, and the code if it is asked for.

    The token goes into the log of each process, even if the server has it.
    """
    known = run.wandb.config
    changed = {name: value for name, value in config.items() if known.get(name) != value}
    changed[wandb_service.TOKEN] = config[wandb_service.TOKEN]
    known.update(changed, allow_val_change=True)
    if config["save_code"]:
        imported = _imported_files()
        run.wandb.log_code(ROOT, include_fn=lambda path: Path(path) in imported)


def _where_to_look(run: tracking.Run, output_dir: Path) -> str:
    """The last line of a run: where its files are, and how to see them in W&B."""
    line = f"Files of this run: {output_dir}"
    if run.wandb.disabled:
        return f"{line} (W&B is disabled)"
    last = str(_short(Path(run.wandb.dir).parent))
    if importlib.util.find_spec("wandb.cli.leet"):  # not in older versions
        since = " (since it was resumed)" if run.earlier_logs else ""
        line += f" | look at it: {shell_command(['wandb', 'leet', last])}{since}"
    if run.online:
        return f"{line} | on the web: {run.wandb.url}"
    command = ["wandb", "sync"]
    if not importlib.util.find_spec("wandb.cli.clean"):
        command.append("--append")  # W&B before 0.29 would overwrite what earlier processes logged
    for log in run.earlier_logs:
        if not wandb_service.synced_marker(log).exists():
            command.append(str(_short(log.parent)))
    return f"{line} | upload it: {shell_command([*command, last])}"


def _short(path: Path) -> Path:
    """Relative to the current directory, unless that is on another drive of Windows."""
    with contextlib.suppress(ValueError):
        return Path(os.path.relpath(path))
    return path
