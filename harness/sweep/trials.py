"""Run the trials of a sweep: start, resume, watch, prune and record their processes."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from harness.errors import UserError
from harness.sweep.file import DEFAULT_COMMAND, Sweep
from harness.sweep.study import suggest

STOP_TIMEOUT = 30  # seconds; a run takes at most its --stop_timeout, and a little to close W&B
CLAIM_TIMEOUT = 60  # seconds; a trial that nobody has claimed by then may be taken over
MAX_ATTEMPTS = 3  # per epoch, for a run that something else keeps stopping
STOP_STATUSES = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit statuses after which a run can be resumed


@dataclasses.dataclass
class Run:
    """A trial and the process that runs it."""

    trial: optuna.Trial
    process: subprocess.Popen
    output_dir: Path
    lock: int  # file descriptor
    reported: set[int]  # epochs
    started: float
    pruned: bool = False
    journal_size: int = 0


def sweep_directory(sweep: Sweep) -> Path:
    """The directory for the files of a sweep's runs."""
    return Path("runs", f"sweep-{re.sub(r'[^A-Za-z0-9_.-]+', '-', sweep.name)}")


def trial_command(sweep: Sweep, searched: dict[str, Any], interpreter: str) -> list[str]:
    """The command that W&B's agent would run with these values of the searched parameters."""
    arguments: dict[str, Any] = {}
    for name, value in {**sweep.constants, **searched}.items():
        value = sweep.lists.get(name, {}).get(value, value) if isinstance(value, str) else value
        *outer, inner = name.split("/")
        mapping = arguments
        for part in outer:
            mapping = mapping.setdefault(part, {})
        mapping[inner] = value
    macros = create_sweep_command_args({"args": {name: {"value": value} for name, value in arguments.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": [interpreter], "program": [sweep.program]}
    command = []
    for word in map(str, create_sweep_command(list(sweep.command or DEFAULT_COMMAND))):
        command += macros[word[2:-1]] if word.startswith("${") else [word]
    return command


def try_lock(path: Path) -> int | None:
    """Lock a file and return the descriptor that holds the lock, or None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def start_run(
    sweep: Sweep, study: optuna.Study, trial: optuna.Trial, run_id: str, lock: int, location: str, jobs: int
) -> Run:
    """Start or resume the run of a trial. Raises `UserError` if the command does not exist."""
    trial.set_user_attr("place", location)
    trial.set_user_attr("run", run_id)  # claims the trial: from now on the lock tells whether it is running
    searched = {name: suggest(trial, name, distribution) for name, distribution in sweep.searched.items()}
    trial.set_user_attr("parameters", searched)
    output_dir = sweep_directory(sweep) / run_id
    command = [*trial_command(sweep, searched, sys.executable), "--output_dir", str(output_dir), "--resume"]
    if not shutil.which(command[0]):
        raise UserError(f"command: {command[0]} not found")
    reported = set(study.trials[trial.number].intermediate_values)
    with output_dir.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=run_environment(sweep, trial.number, run_id, jobs),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches only this process, which stops its runs
            pass_fds=(lock,),  # so that a run that outlives this process keeps the lock
        )
    return Run(trial, process, output_dir, lock, reported, time.monotonic())


def run_environment(sweep: Sweep, trial_number: int, run_id: str, jobs: int) -> dict[str, str]:
    """The environment of a run: W&B offline, and a share of the processor's threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SWEEP")}
    account = {"WANDB_PROJECT": sweep.project, "WANDB_ENTITY": sweep.entity}
    environment |= {name: value for name, value in account.items() if value}
    return environment | {
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": sweep.name,
        "WANDB_NAME": f"{sweep.name}-{trial_number}",
        "WANDB_RUN_ID": run_id,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", threads),  # used by the tokenizers
    }


def next_run(
    sweep: Sweep, study: optuna.Study, trial_count: int, jobs: int, location: str, running: dict[int, Run]
) -> Run | Literal["wait", "done"]:
    """Resume a trial that was left unfinished at `location`, or start a new one.

    Returns "wait" if only trials of other processes remain, "done" if none do.
    Raises `UserError` if the command does not exist.
    """
    others_running = False
    for unfinished in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        owner, run_id = unfinished.user_attrs.get("place", location), unfinished.user_attrs.get("run")
        if unfinished.number in running or unfinished.number >= trial_count or owner != location:
            continue
        others_running = True
        age = (datetime.now() - unfinished.datetime_start).total_seconds()
        if run_id is None and age < CLAIM_TIMEOUT:
            continue
        run_id = run_id or new_run_id(unfinished.number)
        lock = try_lock(sweep_directory(sweep) / f"{run_id}.lock")
        if lock is None:
            continue  # still running, possibly started by a search that has been killed
        if study.get_trials(deepcopy=False)[unfinished.number].state == TrialState.RUNNING:
            trial = optuna.Trial(study, unfinished._trial_id)
            return start_run(sweep, study, trial, run_id, lock, location, jobs)
        os.close(lock)  # another process has finished the trial in the meantime
    if len(study.get_trials(deepcopy=False)) >= trial_count:
        return "wait" if others_running else "done"
    trial = study.ask()
    if trial.number >= trial_count:  # another process created the last one; a larger --count will run this one
        return "wait"
    run_id = new_run_id(trial.number)
    lock = try_lock(sweep_directory(sweep) / f"{run_id}.lock")
    return start_run(sweep, study, trial, run_id, lock, location, jobs)


def new_run_id(trial_number: int) -> str:
    """A W&B run id for a trial, also used as the name of its output directory."""
    return f"{secrets.token_hex(3)}-{trial_number}"


def report_progress(sweep: Sweep, run: Run) -> float | None:
    """Report new values of the metric to Optuna and stop the run if it should be pruned; returns the latest value."""
    journal = run.output_dir / "history.jsonl"
    if not journal.exists() or (size := journal.stat().st_size) == run.journal_size:
        return None
    run.journal_size = size
    lines = [line for line in journal.read_text().splitlines(keepends=True) if json.dumps(sweep.metric) in line]
    values = [json.loads(line).get(sweep.metric) for line in lines if line.endswith("\n")]
    for epoch, value in enumerate(values, 1):
        if is_finite_number(value) and epoch not in run.reported:
            run.reported.add(epoch)
            run.trial.report(value, epoch)
            if not run.pruned and run.trial.should_prune():
                run.pruned = True
                send_signal(run, signal.SIGTERM)
    return values[-1] if values else None


def is_finite_number(value: Any) -> bool:
    """Whether a value read from JSON is a number other than NaN and infinity."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def send_signal(run: Run, number: signal.Signals) -> None:
    """Send a signal to the run's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)


def record_outcome(
    sweep: Sweep, study: optuna.Study, run: Run, attempts: Counter[tuple[int, int]]
) -> FrozenTrial | None:
    """Record the outcome of a run whose process has ended; None if the run is to be resumed."""
    run.journal_size = -1  # reads the journal even if it has not grown
    last, status = report_progress(sweep, run), run.process.returncode
    if status in STOP_STATUSES and not run.pruned:
        attempts[run.trial.number, len(run.reported)] += 1
        if attempts[run.trial.number, len(run.reported)] < MAX_ATTEMPTS:
            return None
    run.trial.set_user_attr("seconds", round(time.monotonic() - run.started, 1))
    if status in STOP_STATUSES and run.pruned:
        return study.tell(run.trial, state=TrialState.PRUNED)
    value = None
    if status == 0:
        try:
            value = json.loads((run.output_dir / "metrics.json").read_text()).get(sweep.metric)
        except (FileNotFoundError, ValueError, AttributeError):
            error = "the run left no readable metrics.json"
        else:
            value = last if value is None else value  # metrics.json holds the best epoch's value, if there is one
            error = f"the run has no metric {sweep.metric}" if value is None else f"{sweep.metric} is {value!r}"
    elif status < 0:
        error = f"killed by {signal.Signals(-status).name}"
    else:
        log = run.output_dir.with_suffix(".log").read_text(errors="replace")
        messages = [line for line in log.splitlines() if line.strip() and not line.startswith("wandb:")]
        error = messages[-1] if messages else f"exit status {status}"
    if is_finite_number(value):
        return study.tell(run.trial, value)
    run.trial.set_user_attr("error", error)
    return study.tell(run.trial, state=TrialState.FAIL)


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
