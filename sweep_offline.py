"""Search hyperparameters as a W&B sweep file says, without a server: python sweep_offline.py sweep.yaml --count 20

Each trial is the command that W&B's agent would run, a process of its own, offline. The search is Optuna's, and its
storage holds all there is to know: the same command goes on where it was. A program to be searched must take
--output_dir and --resume, and write history.jsonl and metrics.json as train_mnist.py and train_cola.py do.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from options import UserError, run_script

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until all is imported, Ctrl-C just ends the process
try:
    import optuna
except ImportError:
    print("sweep_offline.py: error: Optuna is not installed: pip install -r requirements-sweep.txt", file=sys.stderr)
    sys.exit(2)

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from sweep_file import COMMAND, Sweep, read_sweep
from sweep_study import best_first, open_study, sampler, suggest, trials_wanted

SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_STOP = 15  # a run needs less than five
SECONDS_TO_BEGIN = 60  # after which a trial that nobody has taken on is anybody's
FAILURES_AT_THE_START = 3
RESTARTS = 3  # of a run that others end before its next epoch
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit statuses after which a run can be resumed


@dataclasses.dataclass
class Run:
    """A trial whose process is at work."""

    trial: optuna.Trial
    process: subprocess.Popen
    output_dir: Path
    lock: int
    reported: set[int]  # epochs
    started: float
    pruned: bool = False
    journal_size: int = 0


# ---------------------------------------------------------------------------------------------- its runs


def command(sweep: Sweep, searched: dict[str, Any], interpreter: str) -> list[str]:
    """The command that W&B's agent would run with these parameters."""
    arguments: dict[str, Any] = {}
    for name, value in {**sweep.constants, **searched}.items():
        value = sweep.lists.get(name, {}).get(value, value) if isinstance(value, str) else value
        *outer, inner = name.split("/")
        place = arguments
        for part in outer:
            place = place.setdefault(part, {})
        place[inner] = value
    words = create_sweep_command_args({"args": {name: {"value": value} for name, value in arguments.items()}})
    words |= {"env": ["/usr/bin/env"], "interpreter": [interpreter], "program": [sweep.program]}
    made = []
    for word in map(str, create_sweep_command(list(sweep.command or COMMAND))):
        made += words[word[2:-1]] if word.startswith("${") else [word]
    return made


def directory(sweep: Sweep) -> Path:
    """Where the files of a sweep's runs are."""
    return Path("runs", f"sweep-{re.sub(r'[^A-Za-z0-9_.-]+', '-', sweep.name)}")


def locked(path: Path) -> int | None:
    """A descriptor that holds the lock on a file; None where another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def start(sweep: Sweep, study: optuna.Study, trial: optuna.Trial, name: str, lock: int, here: str, jobs: int) -> Run:
    """Start the run of a trial, or go on with it. Raises `UserError` where there is no such command."""
    trial.set_user_attr("place", here)
    trial.set_user_attr("run", name)  # from now on, the lock says whether it is at work
    output_dir = directory(sweep) / name
    searched = {name: suggest(trial, name, distribution) for name, distribution in sweep.searched.items()}
    trial.set_user_attr("parameters", searched)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SWEEP")}
    of_wandb = {"project": sweep.project, "entity": sweep.entity}
    environment |= {f"WANDB_{name.upper()}": value for name, value in of_wandb.items() if value}
    environment |= {
        "WANDB_MODE": "offline",
        "WANDB_RUN_GROUP": sweep.name,
        "WANDB_NAME": f"{sweep.name}-{trial.number}",
        "WANDB_RUN_ID": name,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        "RAYON_NUM_THREADS": os.environ.get("RAYON_NUM_THREADS", threads),  # of the tokenizers
    }
    words = [*command(sweep, searched, sys.executable), "--output_dir", str(output_dir), "--resume"]
    if not shutil.which(words[0]):
        raise UserError(f"command: there is no {words[0]} here")
    reported = set(study.trials[trial.number].intermediate_values)
    with output_dir.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process to pass on
            pass_fds=(lock,),  # held by a run that outlives this process, too
        )
    return Run(trial, process, output_dir, lock, reported, time.monotonic())


def next_run(
    sweep: Sweep, study: optuna.Study, wanted: int, jobs: int, here: str, running: dict[int, Run]
) -> Run | str:
    """A run that was left behind `here`, or a new one; "wait" where others are at work, "end" where all is done."""
    waiting = False
    for left in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        place, name = left.user_attrs.get("place", here), left.user_attrs.get("run")
        if left.number in running or left.number >= wanted or place != here:
            continue
        waiting = True
        age = (datetime.now() - left.datetime_start).total_seconds()
        if name is None and age < SECONDS_TO_BEGIN:
            continue
        name = name or run_name(left.number)
        lock = locked(directory(sweep) / f"{name}.lock")
        if lock is None:
            continue  # its run is at work, of this search, of another process, or of one that was killed
        if study.get_trials(deepcopy=False)[left.number].state == TrialState.RUNNING:
            return start(sweep, study, optuna.Trial(study, left._trial_id), name, lock, here, jobs)
        os.close(lock)  # it has ended meanwhile
    if len(study.get_trials(deepcopy=False)) >= wanted:
        return "wait" if waiting else "end"
    trial = study.ask()
    if trial.number >= wanted:  # another process was faster: this one is left for a greater --count
        return "wait"
    name = run_name(trial.number)
    lock = locked(directory(sweep) / f"{name}.lock")
    return start(sweep, study, trial, name, lock, here, jobs)


def run_name(number: int) -> str:
    """A W&B id for a trial's run, also the name of its output directory."""
    return f"{secrets.token_hex(3)}-{number}"


def watch(sweep: Sweep, run: Run) -> float | None:
    """Report what the journal has of the metric, and stop a run that is to be pruned; returns the latest value."""
    journal = run.output_dir / "history.jsonl"
    if not journal.exists() or (size := journal.stat().st_size) == run.journal_size:
        return None
    run.journal_size = size
    lines = [line for line in journal.read_text().splitlines(keepends=True) if json.dumps(sweep.metric) in line]
    values = [json.loads(line).get(sweep.metric) for line in lines if line.endswith("\n")]
    for epoch, value in enumerate(values, 1):
        if is_number(value) and epoch not in run.reported:
            run.reported.add(epoch)
            run.trial.report(value, epoch)
            if not run.pruned and run.trial.should_prune():
                run.pruned = True
                send(run, signal.SIGTERM)
    return values[-1] if values else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def send(run: Run, number: signal.Signals) -> None:
    """A signal to the run's process and to those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, number)


def conclude(sweep: Sweep, study: optuna.Study, run: Run, restarts: Counter[tuple[int, int]]) -> FrozenTrial | None:
    """Record what has become of a run that has ended; None where it is to be resumed."""
    run.journal_size = -1
    last, status = watch(sweep, run), run.process.returncode
    if status in STOPPED and not run.pruned:
        restarts[run.trial.number, len(run.reported)] += 1
        if restarts[run.trial.number, len(run.reported)] < RESTARTS:
            return None
    run.trial.set_user_attr("seconds", round(time.monotonic() - run.started, 1))
    if status in STOPPED and run.pruned:
        return study.tell(run.trial, state=TrialState.PRUNED)
    value = None
    if status == 0:
        try:
            value = json.loads((run.output_dir / "metrics.json").read_text()).get(sweep.metric)
        except (FileNotFoundError, ValueError, AttributeError):
            error = "the run has left no metrics.json that can be read"
        else:
            value = last if value is None else value  # of the best model where there is one, else of the last epoch
            error = f"the run has no figure {sweep.metric}" if value is None else f"{sweep.metric} is {value!r}"
    elif status < 0:
        error = f"ended by {signal.Signals(-status).name}"
    else:
        log = run.output_dir.with_suffix(".log").read_text(errors="replace")
        said = [line for line in log.splitlines() if line.strip() and not line.startswith("wandb:")]
        error = said[-1] if said else f"exit status {status}"
    if is_number(value):
        return study.tell(run.trial, value)
    run.trial.set_user_attr("error", error)
    return study.tell(run.trial, state=TrialState.FAIL)


def stop(running: dict[int, Run]) -> None:
    """End the runs with a checkpoint, to be resumed."""
    try:
        for run in running.values():
            send(run, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS_TO_STOP
        for run in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0, deadline - time.monotonic()))
    finally:  # also on a second Ctrl-C
        for run in running.values():
            send(run, signal.SIGKILL)


def search(sweep: Sweep, study: optuna.Study, wanted: int, jobs: int, here: str, seed: int | None) -> None:
    """Run trials until there are as many as wanted. Raises `UserError` where the first ones all fail."""
    running: dict[int, Run] = {}
    ended: list[FrozenTrial] = []
    restarts: Counter[tuple[int, int]] = Counter()
    done, told = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)[:wanted]), False
    with tqdm(total=wanted, initial=done, unit="trial", disable=None, file=sys.stdout) as bar:
        try:
            while True:
                for number, run in list(running.items()):
                    if run.process.poll() is None:
                        watch(sweep, run)
                        continue
                    outcome = conclude(sweep, study, run, restarts)
                    del running[number]
                    os.close(run.lock)
                    if outcome:
                        ended.append(outcome)
                        say(sweep, study, outcome, bar)
                first = ended[:FAILURES_AT_THE_START]
                failed = [trial.user_attrs for trial in first if trial.state == TrialState.FAIL]
                if len(failed) == FAILURES_AT_THE_START and not best_first(study):
                    log = directory(sweep) / f"{failed[-1]['run']}.log"
                    raise UserError(
                        f"the first {len(failed)} trials failed, the last: {failed[-1]['error']} ({log})", 1
                    )
                while len(running) < jobs:
                    trials = len(study.get_trials(deepcopy=False))
                    # Every trial its own seed, or a search that is resumed would draw the same again.
                    study.sampler = sampler(sweep, None if seed is None else (seed * 1_000_003 + trials) % 2**32)
                    begun = next_run(sweep, study, wanted, jobs, here, running)
                    if isinstance(begun, str):
                        break
                    running[begun.trial.number] = begun
                if not running and begun == "end":
                    return
                if not running and not told:
                    told = True
                    bar.write("Waiting for a run that another process has begun.")
                if not running:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                for run in list(running.values())[:1]:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        run.process.wait(SECONDS_BETWEEN_LOOKS)
        finally:
            stop(running)


# ---------------------------------------------------------------------------------------------- what is shown


def say(sweep: Sweep, study: optuna.Study, trial: FrozenTrial, bar: tqdm) -> None:
    """A line on a trial that has ended, and the best so far beside the bar."""
    value = "no value" if trial.value is None else f"{sweep.metric} {trial.value:.4f}"
    outcome = trial.user_attrs.get("error") or value
    after = f" after {len(trial.intermediate_values)} epochs" if trial.state == TrialState.PRUNED else ""
    parameters = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                          for name, value in trial.user_attrs["parameters"].items())  # fmt: skip
    bar.write(f"trial {trial.number}: {trial.state.name.lower()}{after}, {outcome} | {parameters}")
    if best := best_first(study):
        bar.set_postfix_str(f"best {sweep.metric} {best[0].value:.4f}, trial {best[0].number}")
    bar.update()


def report(sweep: Sweep, study: optuna.Study, here: str) -> None:
    """Print the best runs and what mattered, and write both as CSV."""
    trials, best = [t for t in study.get_trials(deepcopy=False) if "parameters" in t.user_attrs], best_first(study)
    names = list(sweep.searched)
    table = directory(sweep) / "trials.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", sweep.metric, *names, "epochs", "seconds", "error", "output_dir"])
        for trial in [*best, *(trial for trial in trials if trial.state != TrialState.COMPLETE)]:
            attrs = trial.user_attrs
            rows.writerow([
                trial.number, trial.state.name.lower(), trial.value,
                *(attrs["parameters"].get(name) for name in names), len(trial.intermediate_values),
                attrs.get("seconds"), attrs.get("error"), directory(sweep) / attrs["run"],
            ])  # fmt: skip
    counts = {state.name.lower(): sum(trial.state == state for trial in trials) for state in TrialState}
    print(f"{', '.join(f'{count} {name}' for name, count in counts.items() if count)}; all trials: {table}")
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.user_attrs["place"] != here:
            print(f"trial {trial.number} is with {trial.user_attrs['place']}: the same command there goes on with it")
    if not best:
        return
    lines = [["trial", sweep.metric, *names]]
    for trial in best[:10]:
        values = [trial.user_attrs["parameters"][name] for name in names]
        shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        lines.append([str(trial.number), f"{trial.value:.4f}", *shown])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(*("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines), sep="\n")
    if len(best) > 1 and len({trial.value for trial in best}) > 1:
        importances = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
        print("what mattered: " + ", ".join(f"{name} {share:.0%}" for name, share in importances.items()))
        with (directory(sweep) / "importances.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("parameter", "importance"), *importances.items()])
    again = command(sweep, best[0].user_attrs["parameters"], "python")
    print(f"the best run again: {shlex.join(again[1:] if again[0] == '/usr/bin/env' else again)}")
    files = directory(sweep) / best[0].user_attrs["run"]
    print(f"its files: {files} | all of them to W&B: wandb sync wandb/offline-run-*")


# ---------------------------------------------------------------------------------------------- from start to end


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("sweep_file", type=Path, help="a W&B sweep file")
    parser.add_argument("--count", type=positive, help="trials in all [all of a grid; run_cap of the file]")
    parser.add_argument("--jobs", type=positive, default=1, help="trials at a time, which share the processor [1]")
    parser.add_argument("--storage", help="URL of an Optuna storage, to share [a file in runs/sweep-<name>]")
    parser.add_argument("--seed", type=int, help="of the search, for trials one at a time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    asked = arguments(argv)
    sweep = read_sweep(asked.sweep_file)
    wanted = trials_wanted(sweep, asked.count)
    try:
        directory(sweep).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{directory(sweep)} is a file, and no directory") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study(sweep, asked.storage or f"sqlite:///{directory(sweep)}/study.db")
    # A run can be gone on with where its files are; a storage of its own is nowhere else.
    here = f"{socket.gethostname()}:{Path.cwd()}" if asked.storage else "this directory"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        search(sweep, study, wanted, asked.jobs, here, asked.seed)
    except (KeyboardInterrupt, SystemExit):
        print("The runs were stopped; the same command goes on where they were.")
        raise
    finally:
        report(sweep, study, here)


if __name__ == "__main__":
    run_script(main)
