"""Run a W&B sweep file without a server: python sweep_offline.py sweep.yaml --count 20

Each trial is a separate, offline process that runs the command W&B's agent would run. Optuna draws the parameters and
prunes trials. Its storage holds the whole state, so the same command resumes an interrupted search. A program must
accept --output_dir and --resume, and write history.jsonl and metrics.json as train_mnist.py and train_cola.py do.
"""

import contextlib
import csv
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.options import option, parse
from harness.script import run_script

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C during the imports ends the process without a traceback
try:
    import optuna
except ImportError:
    print(
        "sweep_offline.py: error: Optuna is not installed: pip install -r requirements-sweep.txt",
        file=sys.stderr,
    )
    sys.exit(2)

from optuna.trial import FrozenTrial, TrialState

from sweeps import study, trials
from sweeps.file import read_sweep
from sweeps.study import count_trials, ranked_trials
from sweeps.trials import Search, find_files

MAX_INITIAL_FAILURES = 3


@dataclasses.dataclass(kw_only=True)
class Options:
    """The options that follow the sweep file, with a line of help each."""

    count: int | None = option(
        None, "total number of trials [run_cap; for a grid, every cell]", at_least=1
    )
    jobs: int = option(1, "parallel trials; they share the processor", at_least=1)
    storage: str | None = option(
        None, "URL of a shared Optuna storage [a file in runs/sweep-<name>]"
    )
    seed: int | None = option(None, "seed of the search; reproducible with --jobs 1 only")


def run_trials(search: Search) -> None:
    """Run trials until the study has `trial_count`. Raises `UserError` if the first ones fail or none completes."""
    finished: list[FrozenTrial] = []
    state = "started"
    while search.running or state != "done":
        for trial in trials.watch_runs(search):
            finished.append(trial)
            print(outcome(search.sweep.metric, trial), flush=True)
            first = [trial.state for trial in finished[:MAX_INITIAL_FAILURES]]
            if first == [TrialState.FAIL] * MAX_INITIAL_FAILURES and not ranked_trials(
                search.study
            ):
                raise UserError(
                    f"the first {MAX_INITIAL_FAILURES} trials failed; {last_error(search)}", 1
                )
        before, state = state, "started"
        while len(search.running) < search.jobs and state == "started":
            state = trials.next_run(search)
        if state == "wait" != before and not search.running:
            print("Waiting for a run that another process has started.", flush=True)
        time.sleep(0.1)
    known = search.study.get_trials(deepcopy=False)[: search.trial_count]
    if all(trial.state.is_finished() for trial in known) and not ranked_trials(search.study):
        raise UserError(f"no trial completed; {last_error(search)}", 1)


def last_error(search: Search) -> str:
    """The last error of a trial, and where its log is."""
    failed = [
        trial for trial in search.study.get_trials(deepcopy=False) if "error" in trial.user_attrs
    ]
    error = (
        failed and f"{failed[-1].user_attrs['error']} ({find_files(search, failed[-1], '.log')})"
    )
    return f"last error: {error}" if failed else "all were pruned"


def outcome(metric: str, trial: FrozenTrial) -> str:
    """One line about a finished trial."""
    value = "no value" if trial.value is None else f"{metric} {trial.value:.4f}"
    after = (
        f" after {len(trial.intermediate_values)} epochs"
        if trial.state == TrialState.PRUNED
        else ""
    )
    parameters = " ".join(
        f"{name}={rounded(value)}" for name, value in trial.user_attrs["parameters"].items()
    )
    state, value = trial.state.name.lower(), trial.user_attrs.get("error", value)
    return f"trial {trial.number}: {state}{after}, {value} | {parameters}"


def rounded(value: Any) -> str:
    """A parameter's value as text, with four significant digits if it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(search: Search) -> None:
    """Print the best trials and the parameter importances, and write both as CSV."""
    sweep, directory = search.sweep, search.sweep.directory
    started = [
        trial
        for trial in search.study.get_trials(deepcopy=False)
        if "parameters" in trial.user_attrs
    ]
    ranked = ranked_trials(search.study)
    rows = [
        [
            "trial",
            "state",
            sweep.metric,
            *sweep.searched,
            "epochs",
            "seconds",
            "error",
            "output_dir",
        ]
    ]
    for trial in [*ranked, *(trial for trial in started if trial.state != TrialState.COMPLETE)]:
        parameters = [trial.user_attrs["parameters"].get(name) for name in sweep.searched]
        seconds = trial.duration and round(trial.duration.total_seconds(), 1)
        outcome = [
            len(trial.intermediate_values),
            seconds,
            trial.user_attrs.get("error"),
            find_files(search, trial),
        ]
        rows.append([trial.number, trial.state.name.lower(), trial.value, *parameters, *outcome])
    with open(directory / "trials.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    counts = Counter(trial.state for trial in started)
    summary = ", ".join(
        f"{counts[state]} {state.name.lower()}" for state in TrialState if counts[state]
    )
    print(f"{summary}; all trials: {directory}/trials.csv")
    for trial in started:
        if trial.state == TrialState.RUNNING and trial.user_attrs["place"] != search.place:
            print(
                f"trial {trial.number} is unfinished; its files are on {trial.user_attrs['host']}, which resumes it"
            )
    if not ranked:
        return
    table = [["trial", sweep.metric, *sweep.searched]]
    for trial in ranked[:10]:
        values = [trial.user_attrs["parameters"][name] for name in sweep.searched]
        table.append([str(trial.number), f"{trial.value:.4f}", *map(rounded, values)])
    widths = [max(map(len, column)) for column in zip(*table)]
    print(
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in table),
        sep="\n",
    )
    if len(ranked) >= 20 and len({trial.value for trial in ranked}) > 1:  # fewer can't tell
        # Each parameter's share in reaching the better half. Optuna's default is the best tenth: two trials of twenty.
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
        importances = optuna.importance.get_param_importances(search.study, evaluator=evaluator)
        print(
            "importance: " + ", ".join(f"{name} {share:.0%}" for name, share in importances.items())
        )
        with open(directory / "importances.csv", "w", newline="") as file:
            csv.writer(file).writerows([("parameter", "importance"), *importances.items()])
    command = trials.trial_command(sweep, ranked[0].user_attrs["parameters"], "python")
    print(f"to repeat the best run: {shlex.join(command).removeprefix('/usr/bin/env ')}")
    upload = (
        " | to upload all that ran here: wandb sync wandb/offline-run-*"
        if os.path.isdir("wandb")
        else ""
    )
    print(f"its files: {find_files(search, ranked[0])}{upload}")


def main(argv: list[str] | None = None) -> None:
    """Run or resume a search. Raises `UserError` if the arguments, the sweep file or the storage are unusable."""
    file, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if file.startswith("-") and file not in ("-h", "--help"):
        raise UserError("the sweep file comes first: python sweep_offline.py sweep.yaml --count 20")
    options = parse(Options, [file, *rest] if file.startswith("-") else rest)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = read_sweep(Path(file))
    trial_count = count_trials(sweep, options.count)
    trials.check_command(sweep)
    directory = sweep.directory
    ours = any((directory / name).exists() for name in ("place", "study.db"))
    empty = directory.is_dir() and not os.listdir(directory)
    if os.path.lexists(directory) and not (ours or empty):
        raise UserError(f"{directory} holds something else: choose another name for the sweep")
    if not options.storage:
        directory.mkdir(parents=True, exist_ok=True)
    opened = study.open_study(sweep, options.storage or f"sqlite:///{directory}/study.db")
    directory.mkdir(
        parents=True, exist_ok=True
    )  # not earlier: an unusable storage leaves no directory
    place = trials.read_place(directory)  # a run can only be resumed where its files are
    gpus = trials.visible_gpus() if options.jobs > 1 else []  # a single run may use all of them
    search = Search(
        sweep, opened[0], trial_count, options.jobs, options.seed, opened[1], place, gpus
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_trials(search)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            print("Stopping the runs; the same command resumes them.", flush=True)
        study.patience = 0.0
        trials.stop_runs(search.running)
        with contextlib.suppress(UserError, OSError):  # the storage or the directory is gone
            report(search)
        raise
    report(search)


if __name__ == "__main__":
    run_script(main)
