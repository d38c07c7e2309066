"""The processes of a sweep's trials: starts, resumes, watches, prunes and records them."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from harness import system
from harness.errors import UserError
from harness.files import read_json, write_json
from offline_sweep.file import Sweep
from offline_sweep.parameters import Constant, suggest

STOP_TIMEOUT = 30  # seconds; a run takes at most its --stop_timeout, and a little to close W&B


def trial_arguments(sweep: Sweep, searched: dict[str, Any]) -> dict[str, Any]:
    """All parameters of a trial, nested ones as mappings, given its values of those searched."""
    arguments = {}
    for name, parameter in sweep.parameters.items():
        *outer_names, inner_name = name.split("/")
        mapping = arguments
        for outer_name in outer_names:
            mapping = mapping.setdefault(outer_name, {})
        is_constant = isinstance(parameter, Constant)
        mapping[inner_name] = parameter.value if is_constant else searched[name]
    return arguments


def trial_command(
    sweep: Sweep, arguments: dict[str, Any], json_file: str, is_shown: bool = False
) -> list[str]:
    """The command that W&B's agent would run, or the one to show to the user.

    That one has `python` and `${envvar:X}`. Raises `UserError` if there is an unknown macro.
    """
    content = {name: {"value": value} for name, value in arguments.items()}
    macros = create_sweep_command_args({"args": content})
    del macros["args_dict"]
    macros["args_json_file"] = [json_file]
    macros["env"] = [] if system.WINDOWS or is_shown else ["/usr/bin/env"]
    macros["interpreter"] = ["python" if is_shown else sys.executable]
    macros["program"] = [str(sweep.program)]
    command = []
    for part in sweep.command if is_shown else create_sweep_command(sweep.command.copy()):
        name = part[2:-1]
        if part == f"${{{name}}}" and not (is_shown and name.startswith("envvar:")):
            if name not in macros:
                names = ", ".join(macros)
                raise UserError(f"command: unknown macro {part}; must be one of {names}")
            command += macros[name]
        else:
            command.append(part)
    return command


def check_command(sweep: Sweep) -> None:
    """Raise `UserError` if the sweep's command can't be started."""
    command = trial_command(sweep, {}, "")
    words = [word for word in command if word != "/usr/bin/env" and "=" not in word]
    program = str(sweep.program)
    is_found = os.path.isfile(program) or shutil.which(program)
    if "${program}" in sweep.command and not is_found:
        raise UserError(f"program: must be an existing script, not {sweep.program!r}")
    if not words or not shutil.which(words[0]):
        raise UserError(f"command: can't be started: {system.shell_command(sweep.command)}")


def visible_gpus() -> list[str]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or those of the machine if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return re.findall(r"[^,\s]+", visible)
    command = ["nvidia-smi", "-L"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return []
    return re.findall(r"^GPU (\d+):", listing, re.MULTILINE)


def is_finite(value: Any) -> bool:
    """Whether a float can hold `value`, which may be a huge integer, as a finite number."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


@dataclasses.dataclass
class TrialProcess:
    """The process that runs a trial."""

    trial: optuna.Trial
    popen: subprocess.Popen
    output_dir: Path
    lock: TextIO
    gpu: str | None
    reported: int  # epochs
    journal_size: int = 0  # when it was last read
    last_value: Any = None
    pruned: bool = False

    def send_signal(self, number: int) -> None:
        """Send a signal to the process group."""
        try:
            system.signal_group(self.popen.pid, number)
        except OSError:  # it has ended; or, on Windows, no console passes on Ctrl-Break
            self.popen.kill()

    def report_progress(self, metric: str) -> None:
        """Report new values of the metric to Optuna, and stop the run if it should be pruned."""
        journal = self.output_dir / "history.jsonl"
        size = journal.stat().st_size if journal.is_file() else 0
        if size == self.journal_size:
            return
        self.journal_size = size
        text = journal.read_text("utf-8", "replace")
        key = json.dumps(metric)
        values = []
        for line in text.split("\n")[:-1]:  # the last line may be incomplete
            if key in line:
                # Another program's journal may hold anything.
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    values.append(json.loads(line)[metric])
        if values:
            self.last_value = values[-1]
        for value in values[self.reported :]:
            self.reported += 1
            if is_finite(value):
                self.trial.report(value, self.reported)
                if not self.pruned and self.trial.should_prune():
                    self.pruned = True
                    self.send_signal(system.STOP)

    def read_result(self, metric: str) -> float | str:
        """The final value of the metric, or what is wrong with the run if it failed."""
        status = self.popen.returncode
        if status < 0:
            return f"killed by {signal.strsignal(-status)}"
        if status > 0:
            log = self.output_dir.with_suffix(".log")
            lines = log.read_text("utf-8", "replace").splitlines()
            messages = [line for line in lines if line.strip() and not line.startswith("wandb:")]
            return messages[-1] if messages else f"exit status {status}"
        metrics = read_json(self.output_dir / "metrics.json")
        if metrics is None:
            return "the run left no readable metrics.json"
        if not metric:
            return 0.0  # trials are ranked by nothing
        value = metrics.get(metric, self.last_value)  # that of the best epoch, if there is one
        if value is None:
            return f"the run has no metric {metric}"
        return value if is_finite(value) else f"{metric} is {value!r}"


@dataclasses.dataclass
class Search:
    """A search and its running processes."""

    sweep: Sweep
    study: optuna.Study
    trial_count: int
    jobs: int
    gpus: list[str]  # shared by the processes
    running: list[TrialProcess] = dataclasses.field(default_factory=list)

    def trials(self) -> list[FrozenTrial]:
        """All trials in the storage, by number."""
        return self.study.get_trials(deepcopy=False)

    def unfinished(self) -> list[FrozenTrial]:
        """The trials that have started in this directory and have not ended."""
        return [
            trial
            for trial in self.trials()[: self.trial_count]
            if trial.state == TrialState.RUNNING and self.lock_file(trial).exists()
        ]

    def start_next(self) -> bool:
        """Resume an unfinished trial or start a new one; False if there is nothing to start."""
        for trial in self.unfinished():
            if self._start(trial):
                return True
        if len(self.trials()) >= self.trial_count:
            return False
        # Unlike study.ask(), this creates the trial with its lock, so that no search elsewhere
        # takes it. The next call starts it.
        attributes = {"lock": secrets.token_hex(6)}
        trial = optuna.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        self.lock_file(trial).touch()
        self.study.add_trial(trial)
        return True

    def _start(self, known: FrozenTrial) -> bool:
        """Start or resume a trial; False if a process runs it already, or if it has ended.

        Raises `UserError` if the command can't be started.
        """
        sweep = self.sweep
        number = known.number
        try:
            lock = os.fdopen(system.lock(self.lock_file(known)))
        except BlockingIOError:  # the process may be left from a search that was killed
            return False
        known = self.trials()[number]
        if known.state != TrialState.RUNNING:
            return False
        trial = optuna.Trial(self.study, known._trial_id)
        searched = known.user_attrs.get("parameters")
        if searched is None:
            parameters = sweep.searched().items()
            searched = {name: suggest(trial, name, parameter) for name, parameter in parameters}
            trial.set_user_attr("parameters", searched)

        output_dir = self.output_dir(known)
        trial.set_user_attr("run", output_dir.name)
        arguments = trial_arguments(sweep, searched)
        json_file = output_dir.with_suffix(".json")
        write_json(json_file, arguments)
        command = trial_command(sweep, arguments, str(json_file))
        command += ["--output_dir", str(output_dir), "--resume"]
        # As W&B's agent does, for programs that read their parameters from wandb.config.
        content = {"wandb_version": 1}
        for name, value in arguments.items():
            content[name] = {"value": value}
        output_dir.with_suffix(".yaml").write_bytes(yaml.safe_dump(content, encoding="utf-8"))
        gpus_in_use = [process.gpu for process in self.running]
        gpu = min(self.gpus, key=gpus_in_use.count, default=None)
        with output_dir.with_suffix(".log").open("ab") as log:
            try:
                popen = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(number, output_dir, gpu),
                    # Ctrl-C reaches only the search, which stops its runs. One that outlives the
                    # search keeps the lock.
                    **system.group_options(lock),
                )
            except (OSError, ValueError) as error:  # a script without #!, a NUL in an argument
                raise UserError(f"command: {error.args[-1]}") from None
        reported = max(known.intermediate_values, default=0)
        self.running.append(TrialProcess(trial, popen, output_dir, lock, gpu, reported))
        return True

    def _environment(self, number: int, output_dir: Path, gpu: str | None) -> dict[str, str]:
        """The environment of a run: W&B offline, a GPU, and a share of the processor's threads."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))} | os.environ
        values = {
            "PYTHONIOENCODING": "utf-8",  # of the log
            "WANDB_MODE": "offline",
            "WANDB_NAME": f"{self.sweep.name}-{number}",
            "WANDB_RUN_ID": output_dir.name,
            "WANDB_RUN_GROUP": self.sweep.name,
            "WANDB_SWEEP_PARAM_PATH": str(output_dir.with_suffix(".yaml").resolve()),
            "WANDB_PROJECT": self.sweep.project,
            "WANDB_ENTITY": self.sweep.entity,
            "CUDA_VISIBLE_DEVICES": gpu,
        }
        return environment | {name: value for name, value in values.items() if value}

    def watch(self) -> list[FrozenTrial]:
        """Report the progress of the processes; returns the trials that have ended."""
        ended = []
        for process in list(self.running):
            exited = process.popen.poll() is not None  # before the last values are read
            process.report_progress(self.sweep.metric.name)
            if exited:
                self.running.remove(process)
                with process.lock:
                    ended.append(self._record_outcome(process))
        return ended

    def _record_outcome(self, process: TrialProcess) -> FrozenTrial:
        trial = process.trial
        result = process.read_result(self.sweep.metric.name)
        if isinstance(result, str):
            if process.pruned:
                return self.study.tell(trial, state=TrialState.PRUNED)
            trial.set_user_attr("error", result)
            return self.study.tell(trial, state=TrialState.FAIL)
        return self.study.tell(trial, result)

    def output_dir(self, trial: FrozenTrial) -> Path:
        """The directory of a trial's run, on the machine that has run it."""
        # A storage that fails may create two trials with the same lock.
        return self.sweep.directory / f"{trial.user_attrs['lock']}-{trial.number}"

    def lock_file(self, trial: FrozenTrial) -> Path:
        """Locked by a trial's run; it exists in the directory in which the trial has started."""
        return self.sweep.directory / f"{trial.user_attrs['lock']}.lock"

    def stop(self) -> None:
        """Ask the runs to write a checkpoint and stop; kill those that do not stop in time."""
        try:
            for process in self.running:
                process.send_signal(system.STOP)
            for process in self.running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(STOP_TIMEOUT)
        finally:  # also after a second Ctrl-C
            for process in self.running:
                process.send_signal(system.KILL)
