"""Run a W&B sweep file without a server: python sweep_offline.py sweep.yaml --count 20

Each trial is a separate, offline process that runs the command W&B's agent would run. Optuna draws the parameters and
prunes trials. Its storage holds the whole state, so the same command resumes an interrupted search. A program must
accept --output_dir and --resume, and write history.jsonl and metrics.json as train_mnist.py and train_cola.py do.
"""

import argparse
import contextlib
import csv
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import UserError
from harness.script import run_script

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback
try:
    import optuna
except ImportError:
    print("sweep_offline.py: error: Optuna is not installed: pip install -r requirements-sweep.txt", file=sys.stderr)
    sys.exit(2)

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from harness.sweep import trials
from harness.sweep.file import Sweep, read_sweep
from harness.sweep.study import count_trials, open_study, ranked_trials
from harness.sweep.trials import Search, sweep_directory

POLL_INTERVAL = 0.3  # seconds
MAX_INITIAL_FAILURES = 3


def run_trials(search: Search) -> None:
    """Run trials until the study has `trial_count`. Raises `UserError` if the first ones or all of them fail."""
    study, running = search.study, search.running
    finished: list[FrozenTrial] = []
    done = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)[: search.trial_count])
    waiting_announced = False
    with tqdm(total=search.trial_count, initial=done, unit="trial", disable=None, file=sys.stdout) as bar:
        try:
            while True:
                for number, run in list(running.items()):
                    if run.process.poll() is None:
                        trials.report_progress(search.sweep, run)
                        continue
                    outcome = trials.record_outcome(search, run)
                    del running[number]
                    os.close(run.lock)
                    if outcome:
                        finished.append(outcome)
                        show_outcome(search.sweep, study, outcome, bar)
                if len(finished) >= MAX_INITIAL_FAILURES:
                    first = finished[:MAX_INITIAL_FAILURES]
                    check_failures(search, first, f"the first {len(first)} trials failed")
                state = "started"
                while len(running) < search.jobs and state == "started":
                    state = trials.next_run(search)
                if running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        next(iter(running.values())).process.wait(POLL_INTERVAL)
                    continue
                if state == "done":
                    break
                if not waiting_announced:
                    waiting_announced = True
                    bar.write("Waiting for a run that another process has started.")
                time.sleep(POLL_INTERVAL)
        finally:
            trials.stop_runs(running)
    check_failures(search, study.get_trials(deepcopy=False)[: search.trial_count], "no trial completed")


def check_failures(search: Search, checked: list[FrozenTrial], message: str) -> None:
    """Raise `UserError` with the last error if all of these trials failed and the study has no complete trial."""
    if all(trial.state == TrialState.FAIL for trial in checked) and not ranked_trials(search.study):
        last = checked[-1].user_attrs
        raise UserError(
            f"{message}; last error: {last['error']} ({sweep_directory(search.sweep) / last['run']}.log)", 1
        )


def show_outcome(sweep: Sweep, study: optuna.Study, trial: FrozenTrial, bar: tqdm) -> None:
    """Print one line about a finished trial, and show the best value so far beside the progress bar."""
    value = "no value" if trial.value is None else f"{sweep.metric} {trial.value:.4f}"
    outcome = trial.user_attrs.get("error") or value
    after = f" after {len(trial.intermediate_values)} epochs" if trial.state == TrialState.PRUNED else ""
    parameters = " ".join(f"{name}={rounded(value)}" for name, value in trial.user_attrs["parameters"].items())
    bar.write(f"trial {trial.number}: {trial.state.name.lower()}{after}, {outcome} | {parameters}")
    if ranked := ranked_trials(study):
        bar.set_postfix_str(f"best {sweep.metric} {ranked[0].value:.4f}, trial {ranked[0].number}")
    bar.update()


def rounded(value: Any) -> str:
    """A parameter's value as text, with four significant digits if it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(sweep: Sweep, study: optuna.Study, location: str) -> None:
    """Print the best trials and the parameter importances, and write both as CSV."""
    started = [trial for trial in study.get_trials(deepcopy=False) if "parameters" in trial.user_attrs]
    ranked = ranked_trials(study)
    directory = sweep_directory(sweep)
    with (directory / "trials.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "state", sweep.metric, *sweep.searched, "epochs", "seconds", "error", "output_dir"])
        for trial in [*ranked, *(trial for trial in started if trial.state != TrialState.COMPLETE)]:
            attrs = trial.user_attrs
            parameters = [attrs["parameters"].get(name) for name in sweep.searched]
            outcome = [len(trial.intermediate_values), attrs.get("seconds"), attrs.get("error")]
            row = [trial.number, trial.state.name.lower(), trial.value, *parameters, *outcome, directory / attrs["run"]]
            rows.writerow(row)
    counts = Counter(trial.state for trial in started)
    summary = ", ".join(f"{counts[state]} {state.name.lower()}" for state in TrialState if counts[state])
    print(f"{summary}; all trials: {directory}/trials.csv")
    for trial in started:
        owner = trial.user_attrs["place"]
        if trial.state == TrialState.RUNNING and owner != location:
            print(f"trial {trial.number} belongs to {owner}; run the same command there to resume it")
    if not ranked:
        return
    lines = [["trial", sweep.metric, *sweep.searched]]
    for trial in ranked[:10]:
        parameters = (rounded(trial.user_attrs["parameters"][name]) for name in sweep.searched)
        lines.append([str(trial.number), f"{trial.value:.4f}", *parameters])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(*("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines), sep="\n")
    if len({trial.value for trial in ranked}) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
        print("importance: " + ", ".join(f"{name} {share:.0%}" for name, share in importances.items()))
        with (directory / "importances.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("parameter", "importance"), *importances.items()])
    command = trials.trial_command(sweep, ranked[0].user_attrs["parameters"], "python")
    print(f"to repeat the best run: {shlex.join(command[1:] if command[0] == '/usr/bin/env' else command)}")
    files = directory / ranked[0].user_attrs["run"]
    print(f"its files: {files} | to upload all runs to W&B: wandb sync wandb/offline-run-*")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command-line arguments. Raises `UserError` if one is invalid."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("sweep_file", type=Path, help="a W&B sweep file")
    parser.add_argument("--count", type=positive, help="total number of trials [run_cap; for a grid, every cell]")
    parser.add_argument("--jobs", type=positive, default=1, help="parallel trials; they share the processor [1]")
    parser.add_argument("--storage", help="URL of a shared Optuna storage [a file in runs/sweep-<name>]")
    parser.add_argument("--seed", type=int, help="seed of the search; reproducible with --jobs 1 only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run or resume a search. Raises `UserError` if the arguments, the sweep file or the storage are unusable."""
    try:
        run_search(parse_arguments(argv))
    except UserError as error:  # may quote a path or a value with line breaks
        message = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(error))
        raise UserError(message, error.status) from None


def run_search(arguments: argparse.Namespace) -> None:
    """Run or resume a search with checked arguments."""
    sweep = read_sweep(arguments.sweep_file)
    trial_count = count_trials(sweep, arguments.count)
    trials.check_command(sweep)
    directory = sweep_directory(sweep)
    created = [path for path in (directory, directory.parent) if not path.exists()]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        study = open_study(sweep, arguments.storage or f"sqlite:///{directory}/study.db")
    except FileExistsError:
        raise UserError(f"{directory} is a file, not a directory") from None
    except UserError:
        with contextlib.suppress(OSError):  # keeps a directory with files
            for path in created:
                path.rmdir()
        raise
    # A run can only be resumed where its files are. The default storage lies beside them, so it has one location.
    location = f"{socket.gethostname()}:{Path.cwd()}" if arguments.storage else "this directory"
    gpus = trials.visible_gpus() if arguments.jobs > 1 else []  # a single run may use all of them
    search = Search(sweep, study, trial_count, arguments.jobs, arguments.seed, location, gpus)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_trials(search)
    except (KeyboardInterrupt, SystemExit):
        print("The runs were stopped; the same command resumes them.")
        raise
    finally:
        report(sweep, study, location)


if __name__ == "__main__":
    run_script(main)
