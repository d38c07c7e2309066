"""Run the trials of a sweep: start, resume, watch, prune and record their processes."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import optuna
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UserError
from sweeps.file import Sweep
from sweeps.study import sampler, suggest

STOP_TIMEOUT = 30  # seconds; a run takes at most its --stop_timeout, and a little to close W&B
MAX_ATTEMPTS = 3  # per epoch, for a run that something else keeps stopping
STOP_STATUSES = (
    130,
    143,
    -signal.SIGINT,
    -signal.SIGTERM,
)  # exit statuses after which a run can be resumed


@dataclasses.dataclass
class Run:
    """A trial and the process that runs it."""

    trial: optuna.Trial
    process: subprocess.Popen
    output_dir: Path
    lock: TextIO
    reported: set[int]  # epochs
    gpu: str | None
    pruned: bool = False


@dataclasses.dataclass
class Search:
    """A search, and the runs that are at work for it."""

    sweep: Sweep
    study: optuna.Study
    trial_count: int
    jobs: int
    seed: int | None
    trial_id: Callable[[int], int]  # by trial number
    place: str  # stands for the directory that has the files of this search's runs
    gpus: list[str]  # to be shared by the runs
    running: dict[int, Run] = dataclasses.field(default_factory=dict)  # by trial number
    attempts: Counter[tuple[int, int]] = dataclasses.field(
        default_factory=Counter
    )  # by trial number and epoch


def trial_command(sweep: Sweep, searched: dict[str, Any], interpreter: str) -> list[str]:
    """The command that W&B's agent would run with these values. Raises `UserError` if it has an unknown macro."""
    arguments: dict[str, Any] = {}
    for name, value in {**sweep.constants, **searched}.items():
        *outer, inner = name.split("/")
        mapping = functools.reduce(
            lambda mapping, part: mapping.setdefault(part, {}), outer, arguments
        )
        mapping[inner] = sweep.lists.get(value, value) if name in searched else value
    pairs = [f"{name}={value}" for name, value in arguments.items()]
    switches = [
        name if value is True else f"{name}={value}"
        for name, value in arguments.items()
        if value is not False
    ]
    macros = {
        "${env}": ["/usr/bin/env"],
        "${interpreter}": [interpreter],
        "${program}": [sweep.program],
    }
    macros |= {"${args}": [f"--{pair}" for pair in pairs], "${args_no_hyphens}": pairs}
    macros |= {
        "${args_no_boolean_flags}": [f"--{word}" for word in switches],
        "${args_json}": [json.dumps(arguments)],
    }
    command = []
    for word in sweep.command:
        word = re.sub(
            r"\$\{envvar:([A-Z0-9_]*)\}", lambda match: os.environ.get(match[1], match[1]), word
        )
        if word.startswith("${") and word not in macros:
            raise UserError(f"command: unknown macro {word}; must be one of {', '.join(macros)}")
        command += macros.get(word, [word])
    return command


def check_command(sweep: Sweep) -> None:
    """Raise `UserError` if the command has an unknown macro, or its program can't be executed."""
    words = [*trial_command(sweep, {}, sys.executable), "-"]
    # The word after /usr/bin/env is the program, unless it is an option or sets a variable.
    if words[0] == "/usr/bin/env" and not re.match("-|.*=", words[1]):
        words = words[1:]
    if not shutil.which(words[0]):
        raise UserError(
            f"command: {words[0]} not found on PATH, or not executable; a path needs a /, as in ./run.sh"
        )


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or those of the machine if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30
        ).stdout
        return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)
    return []


def next_run(search: Search) -> Literal["started", "wait", "done"]:
    """Resume a trial that was left unfinished here, or start a new one; "wait" if only other processes have some."""
    study, count = search.study, search.trial_count
    known = study.get_trials(deepcopy=False)
    # With one seed for all trials, a resumed search would draw the same parameters again.
    seed = None if search.seed is None else (search.seed * 1_000_003 + len(known)) % 2**32
    study.sampler = sampler(search.sweep, seed)
    here = [trial for trial in known[:count] if trial.user_attrs.get("place") == search.place]
    unfinished = [trial for trial in here if trial.state == TrialState.RUNNING]
    if any(start_run(search, trial) for trial in unfinished):
        return "started"
    if len(known) >= count:
        return "wait" if unfinished else "done"
    # Unlike study.ask(), this gives the trial a place from the start, so that no other search takes it.
    study.add_trial(
        optuna.create_trial(state=TrialState.RUNNING, user_attrs={"place": search.place})
    )
    return "started"


def start_run(search: Search, known: FrozenTrial) -> bool:
    """Start or resume a trial's run, unless it is at work. Raises `UserError` if the command can't be started."""
    sweep = search.sweep
    lock = (sweep.directory / f"trial-{known.number}.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # running, possibly since a search that was killed
        return False
    if search.study.get_trials(deepcopy=False)[known.number].state != TrialState.RUNNING:
        return False
    trial = optuna.Trial(search.study, search.trial_id(known.number))
    run_id = (
        trial.user_attrs.get("run") or f"{secrets.token_hex(3)}-{trial.number}"
    )  # W&B's, and the directory's name
    output_dir = sweep.directory / run_id
    trial.set_user_attr("run", run_id)
    trial.set_user_attr("host", f"{socket.gethostname()}:{Path.cwd()}")
    searched = {
        name: suggest(trial, name, distribution) for name, distribution in sweep.searched.items()
    }
    trial.set_user_attr("parameters", searched)
    gpu = min(search.gpus, key=[run.gpu for run in search.running.values()].count, default=None)
    command = [
        *trial_command(sweep, searched, sys.executable),
        "--output_dir",
        str(output_dir),
        "--resume",
    ]
    with output_dir.with_suffix(".log").open("ab") as log:
        try:
            # Ctrl-C reaches only this process, which stops its runs; a run that outlives it keeps the lock.
            how = {
                "start_new_session": True,
                "pass_fds": (lock.fileno(),),
                "stdin": subprocess.DEVNULL,
            }
            how |= {
                "stdout": log,
                "stderr": subprocess.STDOUT,
                "env": run_environment(search, trial, run_id, gpu),
            }
            process = subprocess.Popen(command, **how)
        except OSError as error:  # for example, a script without #!
            raise UserError(f"command: {command[0]}: {error.strerror}") from None
    search.running[trial.number] = Run(
        trial, process, output_dir, lock, set(known.intermediate_values), gpu
    )
    return True


def read_place(directory: Path) -> str:
    """The random name by which a storage knows a directory, whatever its host is called; the first call chooses it."""
    with (directory / "place").open("a+", errors="replace") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (place := file.read().strip()):
            file.write(place := secrets.token_hex(8))
        if not re.fullmatch("[0-9a-f]{16}", place):
            raise UserError(
                f"{file.name} is damaged: restore it, or choose another name for the sweep", 1
            )
        return place


def find_files(search: Search, trial: FrozenTrial, suffix: str = "") -> str | None:
    """The directory of a trial's run, or its file with a suffix, as host:path if elsewhere; None if it is gone."""
    path = f"{search.sweep.directory / trial.user_attrs['run']}{suffix}"
    if trial.user_attrs["place"] != search.place:
        return f"{trial.user_attrs.get('host', 'elsewhere')}/{path}"
    return path if os.path.exists(path) else None


def run_environment(
    search: Search, trial: optuna.Trial, run_id: str, gpu: str | None
) -> dict[str, str]:
    """The environment of a run: W&B offline, a GPU, and a share of the processor's threads."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = str(max(1, cores // search.jobs))
    inherited, sweep = (
        {k: v for k, v in os.environ.items() if not k.startswith("WANDB_SWEEP")},
        search.sweep,
    )
    chosen = {
        "WANDB_PROJECT": sweep.project,
        "WANDB_ENTITY": sweep.entity,
        "WANDB_RUN_GROUP": sweep.name,
    }
    chosen |= {
        "WANDB_MODE": "offline",
        "WANDB_NAME": f"{sweep.name}-{trial.number}",
        "WANDB_RUN_ID": run_id,
    }
    chosen["CUDA_VISIBLE_DEVICES"] = gpu
    defaults = {
        "OMP_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
    }  # the tokenizers use the latter
    return defaults | inherited | {name: value for name, value in chosen.items() if value}


def watch_runs(search: Search) -> Iterator[FrozenTrial]:
    """Report the runs' progress and yield the trials that have finished since the last call."""
    for number, run in list(search.running.items()):
        ended = run.process.poll() is not None
        last = report_progress(search.sweep.metric, run)
        if ended:
            with search.running.pop(number).lock:
                if trial := record_outcome(search, run, last):
                    yield trial


def report_progress(metric: str, run: Run) -> float | None:
    """Report new values of the metric to Optuna and stop the run if it should be pruned; returns the latest value."""
    journal = run.output_dir / "history.jsonl"
    lines = (
        journal.read_text(errors="replace").split("\n")[:-1] if journal.is_file() else []
    )  # the last may be cut
    values = []
    for line in (line for line in lines if json.dumps(metric) in line):
        with contextlib.suppress(
            ValueError, KeyError, TypeError, RecursionError
        ):  # another program's journal
            values.append(json.loads(line)[metric])
    for epoch, value in enumerate(values, 1):
        if is_finite(value) and epoch not in run.reported:
            run.reported.add(epoch)
            run.trial.report(value, epoch)
            if not run.pruned and run.trial.should_prune():
                run.pruned = True
                send_signal(run, signal.SIGTERM)
    return values[-1] if values else None


def is_finite(value: Any) -> bool:  # also of integers that no float can hold
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def send_signal(run: Run, number: signal.Signals) -> None:
    """Send a signal to the run's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)


def record_outcome(search: Search, run: Run, last: float | None) -> FrozenTrial | None:
    """Record the outcome of a run whose process has ended; None if the run is to be resumed."""
    if run.process.returncode in STOP_STATUSES:
        if run.pruned:
            return search.study.tell(run.trial, state=TrialState.PRUNED)
        search.attempts[run.trial.number, len(run.reported)] += 1
        if search.attempts[run.trial.number, len(run.reported)] < MAX_ATTEMPTS:
            return None
    value, error = read_result(search.sweep.metric, run, last)
    if error is None:
        return search.study.tell(run.trial, value)
    run.trial.set_user_attr("error", error)
    return search.study.tell(run.trial, state=TrialState.FAIL)


def read_result(metric: str, run: Run, last: float | None) -> tuple[float | None, str | None]:
    """The final value of a run's metric, and what is wrong with the run if it failed."""
    status = run.process.returncode
    if status < 0:
        return None, f"killed by {signal.strsignal(-status) or f'signal {-status}'}"
    if status > 0:
        log = run.output_dir.with_suffix(".log")
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        messages = [line for line in lines if line.strip() and not line.startswith("wandb:")]
        return None, messages[-1] if messages else f"exit status {status}"
    try:  # metrics.json holds the best epoch's value, if there is one
        value = json.loads((run.output_dir / "metrics.json").read_text()).get(metric, last)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None, "the run left no readable metrics.json"
    if is_finite(value):
        return value, None
    return None, f"the run has no metric {metric}" if value is None else f"{metric} is {value!r}"


def stop_runs(running: dict[int, Run]) -> None:
    """Ask the runs to write a checkpoint and stop; kill those that do not stop in time."""
    try:
        for run in running.values():
            send_signal(run, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        for run in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0, deadline - time.monotonic()))
    finally:  # also after a second Ctrl-C
        for run in running.values():
            send_signal(run, signal.SIGKILL)
