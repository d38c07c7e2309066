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
from harness.sweep.study import sampler, suggest

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
    gpu: str | None
    pruned: bool = False
    journal_size: int = 0


@dataclasses.dataclass
class Search:
    """A search, and the runs that are at work for it."""

    sweep: Sweep
    study: optuna.Study
    trial_count: int
    jobs: int
    seed: int | None
    location: str  # where the files of this search's runs are
    gpus: list[str]  # to be shared by the runs
    running: dict[int, Run] = dataclasses.field(default_factory=dict)
    attempts: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)


def sweep_directory(sweep: Sweep) -> Path:
    """The directory for the files of a sweep's runs."""
    return Path("runs", f"sweep-{re.sub(r'[^A-Za-z0-9_.-]+', '-', sweep.name)}")


def trial_command(sweep: Sweep, searched: dict[str, Any], interpreter: str) -> list[str]:
    """The command that W&B's agent would run with these values. Raises `UserError` if it has an unknown macro."""
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
    macros = {f"${{{name}}}": words for name, words in macros.items() if name != "args_dict"}
    command = []
    for word in map(str, create_sweep_command(list(sweep.command or DEFAULT_COMMAND))):
        if word.startswith("${") and word not in macros:
            raise UserError(f"command: unknown macro {word}; must be one of {', '.join(macros)}")
        command += macros.get(word, [word])
    return command


def check_command(sweep: Sweep) -> None:
    """Raise `UserError` if the command has an unknown macro, or its program does not exist or can't be executed."""
    words = [*trial_command(sweep, {}, sys.executable), "-"]
    # The word after /usr/bin/env is the program, too, unless it is an option or sets a variable.
    behind_env = words[0] == "/usr/bin/env" and not re.match("-|.*=", words[1])
    program = words[1 if behind_env else 0]
    if shutil.which(program):
        return
    reason = "not found"
    if os.path.isfile(program):
        reason = f"is not on PATH; write ./{program}" if os.access(program, os.X_OK) else "is not executable"
    raise UserError(f"command: {program} {reason}")


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or those of the machine if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def next_run(search: Search) -> Literal["started", "wait", "done"]:
    """Resume a trial that was left unfinished at this location, or start a new one.

    Returns "wait" if only trials of other processes remain, "done" if none do.
    Raises `UserError` if the command can't be started.
    """
    study, others_running = search.study, False
    trials = study.get_trials(deepcopy=False)
    # With one seed for all trials, a resumed search would draw the same parameters again.
    seed = None if search.seed is None else (search.seed * 1_000_003 + len(trials)) % 2**32
    study.sampler = sampler(search.sweep, seed)
    for trial in trials[: search.trial_count]:
        elsewhere = trial.user_attrs.get("place", search.location) != search.location
        if trial.state != TrialState.RUNNING or trial.number in search.running or elsewhere:
            continue
        others_running = True
        age = (datetime.now() - trial.datetime_start).total_seconds()
        if ("run" in trial.user_attrs or age >= CLAIM_TIMEOUT) and start_run(search, trial):
            return "started"
    if len(study.get_trials(deepcopy=False)) >= search.trial_count:
        return "wait" if others_running else "done"
    trial = study.ask()
    # If another process has created the last trial, only a larger --count will run this one.
    return "started" if trial.number < search.trial_count and start_run(search, trial) else "wait"


def start_run(search: Search, trial: optuna.Trial | FrozenTrial) -> bool:
    """Start or resume the run of a trial, unless another process has it or has finished it.

    Raises `UserError` if the command can't be started.
    """
    sweep, study = search.sweep, search.study
    # A W&B run id, also used as the name of the output directory.
    run_id = trial.user_attrs.get("run") or f"{secrets.token_hex(3)}-{trial.number}"
    output_dir = sweep_directory(sweep) / run_id
    lock = os.open(output_dir.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # still running, possibly started by a search that has been killed
        os.close(lock)
        return False
    stored = study.get_trials(deepcopy=False)[trial.number]
    if stored.state != TrialState.RUNNING:  # another process has finished the trial in the meantime
        os.close(lock)
        return False
    if isinstance(trial, FrozenTrial):
        trial = optuna.Trial(study, trial._trial_id)
    trial.set_user_attr("place", search.location)
    trial.set_user_attr("run", run_id)  # claims the trial: from now on the lock tells whether it is running
    searched = {name: suggest(trial, name, distribution) for name, distribution in sweep.searched.items()}
    trial.set_user_attr("parameters", searched)
    command = [*trial_command(sweep, searched, sys.executable), "--output_dir", str(output_dir), "--resume"]
    runs_on = Counter(run.gpu for run in search.running.values())
    gpu = min(search.gpus, key=lambda gpu: runs_on[gpu], default=None)
    with output_dir.with_suffix(".log").open("ab") as log:
        try:
            process = subprocess.Popen(
                command,
                env=run_environment(search, trial.number, run_id, gpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only this process, which stops its runs
                pass_fds=(lock,),  # so that a run that outlives this process keeps the lock
            )
        except OSError as error:  # for example, a script without #!
            raise UserError(f"command: {command[0]}: {error.strerror}") from None
    reported = set(stored.intermediate_values)
    search.running[trial.number] = Run(trial, process, output_dir, lock, reported, time.monotonic(), gpu)
    return True


def run_environment(search: Search, trial_number: int, run_id: str, gpu: str | None) -> dict[str, str]:
    """The environment of a run: W&B offline, a GPU, and a share of the processor's threads."""
    sweep = search.sweep
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // search.jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SWEEP")}
    chosen = {"WANDB_PROJECT": sweep.project, "WANDB_ENTITY": sweep.entity, "CUDA_VISIBLE_DEVICES": gpu}
    environment |= {name: value for name, value in chosen.items() if value}
    return environment | {
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": sweep.name,
        "WANDB_NAME": f"{sweep.name}-{trial_number}",
        "WANDB_RUN_ID": run_id,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", threads),  # used by the tokenizers
    }


def report_progress(sweep: Sweep, run: Run) -> float | None:
    """Report new values of the metric to Optuna and stop the run if it should be pruned; returns the latest value."""
    journal = run.output_dir / "history.jsonl"
    if not journal.exists() or (size := journal.stat().st_size) == run.journal_size:
        return None
    run.journal_size = size
    lines = [line for line in journal.read_text().splitlines(keepends=True) if json.dumps(sweep.metric) in line]
    values = [json.loads(line).get(sweep.metric) for line in lines if line.endswith("\n")]
    for epoch, value in enumerate(values, 1):
        if isinstance(value, (int, float)) and math.isfinite(value) and epoch not in run.reported:
            run.reported.add(epoch)
            run.trial.report(value, epoch)
            if not run.pruned and run.trial.should_prune():
                run.pruned = True
                send_signal(run, signal.SIGTERM)
    return values[-1] if values else None


def send_signal(run: Run, number: signal.Signals) -> None:
    """Send a signal to the run's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)


def record_outcome(search: Search, run: Run) -> FrozenTrial | None:
    """Record the outcome of a run whose process has ended; None if the run is to be resumed."""
    study, metric = search.study, search.sweep.metric
    run.journal_size = -1  # reads the journal even if it has not grown
    last, status = report_progress(search.sweep, run), run.process.returncode
    if status in STOP_STATUSES and not run.pruned:
        search.attempts[run.trial.number, len(run.reported)] += 1
        if search.attempts[run.trial.number, len(run.reported)] < MAX_ATTEMPTS:
            return None
    run.trial.set_user_attr("seconds", round(time.monotonic() - run.started, 1))
    if status in STOP_STATUSES and run.pruned:
        return study.tell(run.trial, state=TrialState.PRUNED)
    value = None
    if status == 0:
        try:
            value = json.loads((run.output_dir / "metrics.json").read_text()).get(metric)
        except (FileNotFoundError, ValueError, AttributeError):
            error = "the run left no readable metrics.json"
        else:
            value = last if value is None else value  # metrics.json holds the best epoch's value, if there is one
            error = f"the run has no metric {metric}" if value is None else f"{metric} is {value!r}"
    elif status < 0:
        error = f"killed by {signal.Signals(-status).name}"
    else:
        log = run.output_dir.with_suffix(".log").read_text(errors="replace")
        messages = [line for line in log.splitlines() if line.strip() and not line.startswith("wandb:")]
        error = messages[-1] if messages else f"exit status {status}"
    if isinstance(value, (int, float)) and math.isfinite(value):
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
