"""Run a W&B sweep file without a server: python sweep_offline.py sweep.yaml --count 20

Each trial is a separate, offline process that runs the command W&B's agent would run. Optuna draws
the parameters and prunes trials. Its storage holds the whole state, so the same command resumes an
interrupted search. A program must accept --output_dir and --resume, and write history.jsonl and
metrics.json as train_mnist.py and train_cola.py do.
"""

import contextlib
import csv
import dataclasses
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.options import option, parse
from harness.script import run_script

if __name__ == "__main__":
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    import optuna
except ImportError:
    print(
        "sweep_offline.py: error: Optuna is not installed: pip install -r requirements-sweep.txt",
        file=sys.stderr,
    )
    sys.exit(2)

from optuna.trial import FrozenTrial, TrialState

from offline_sweep import trials
from offline_sweep.file import read_sweep
from offline_sweep.study import count_trials, open_study, ranked_trials
from offline_sweep.trials import Search

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
    """Run trials until the study has `trial_count`.

    Raises `UserError` if the first ones fail or none completes.
    """
    states: list[TrialState] = []
    waiting = False
    while True:
        for trial in search.watch():
            print(outcome(search.sweep.metric, trial), flush=True)
            states.append(trial.state)
            all_failed = states == [TrialState.FAIL] * MAX_INITIAL_FAILURES
            if all_failed and not ranked_trials(search.study):
                raise UserError(
                    f"the first {MAX_INITIAL_FAILURES} trials failed; {last_error(search)}", 1
                )
        while len(search.running) < search.jobs:
            if not search.start_next():
                break
        if search.running:
            waiting = False
        elif not search.unfinished():
            break
        elif not waiting:
            waiting = True
            print("Waiting for a run that another process has started.", flush=True)
        time.sleep(0.1)
    known = search.trials()[: search.trial_count]
    if all(trial.state.is_finished() for trial in known) and not ranked_trials(search.study):
        raise UserError(f"no trial completed; {last_error(search)}", 1)


def last_error(search: Search) -> str:
    """The last error of a trial, and the path of its log."""
    failed = [trial for trial in search.trials() if "error" in trial.user_attrs]
    if not failed:
        return "all were pruned"
    error = failed[-1].user_attrs["error"]
    return f"last error: {error} ({search.find_files(failed[-1], '.log')})"


def outcome(metric: str, trial: FrozenTrial) -> str:
    """One line about a finished trial."""
    state = trial.state.name.lower()
    if trial.state == TrialState.PRUNED:
        state += f" after {len(trial.intermediate_values)} epochs"
    result = trial.user_attrs.get("error") or f"{metric} {trial.value:.4f}"
    values = trial.user_attrs["parameters"].items()
    parameters = " ".join(f"{name}={rounded(value)}" for name, value in values)
    return f"trial {trial.number}: {state}, {result} | {parameters}"


def rounded(value: Any) -> str:
    """A parameter's value as text, with four significant digits if it is a float."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(search: Search) -> None:
    """Print the best trials and the parameter importances, and write both as CSV."""
    started = [trial for trial in search.trials() if "parameters" in trial.user_attrs]
    ranked = ranked_trials(search.study)
    others = [trial for trial in started if trial.state != TrialState.COMPLETE]
    write_trials(search, [*ranked, *others])
    states = [trial.state for trial in started]
    counts = [
        f"{states.count(state)} {state.name.lower()}" for state in TrialState if state in states
    ]
    print(f"{', '.join(counts)}; all trials: {search.sweep.directory}/trials.csv")
    for trial in started:
        if trial.state == TrialState.RUNNING and trial.user_attrs["place"] != search.directory_id:
            print(
                f"trial {trial.number} is unfinished; "
                f"its files are on {trial.user_attrs['host']}, which resumes it"
            )
    if not ranked:
        return
    print_best(search, ranked[:10])
    # Fewer trials can't tell, nor can trials of one value.
    if len(ranked) >= 20 and ranked[0].value != ranked[-1].value:
        report_importances(search)
    best = ranked[0]
    command = trials.trial_command(search.sweep, best.user_attrs["parameters"], "python")
    print(f"to repeat the best run: {shlex.join(command).removeprefix('/usr/bin/env ')}")
    files = f"its files: {search.find_files(best)}"
    if os.path.isdir("wandb"):
        files += " | to upload all that ran here: wandb sync wandb/offline-run-*"
    print(files)


def write_trials(search: Search, rows: list[FrozenTrial]) -> None:
    """Write trials.csv, with a row for each trial."""
    names = search.sweep.searched
    results = ("epochs", "seconds", "error", "output_dir")
    with (search.sweep.directory / "trials.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", "state", search.sweep.metric, *names, *results])
        for trial in rows:
            attributes = trial.user_attrs
            seconds = trial.duration and round(trial.duration.total_seconds(), 1)
            table.writerow(
                [
                    trial.number,
                    trial.state.name.lower(),
                    trial.value,
                    *[attributes["parameters"][name] for name in names],
                    len(trial.intermediate_values),
                    seconds,
                    attributes.get("error"),
                    search.find_files(trial),
                ]
            )


def print_best(search: Search, best: list[FrozenTrial]) -> None:
    """Print a table of trials with their parameters."""
    names = search.sweep.searched
    table = [["trial", search.sweep.metric, *names]]
    for trial in best:
        values = [rounded(trial.user_attrs["parameters"][name]) for name in names]
        table.append([str(trial.number), f"{trial.value:.4f}", *values])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def report_importances(search: Search) -> None:
    """Print each parameter's share in reaching the better half, and write them as CSV."""
    # Optuna's default is the best tenth: two trials of twenty.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    importances = optuna.importance.get_param_importances(search.study, evaluator=evaluator)
    shares = [f"{name} {share:.0%}" for name, share in importances.items()]
    print(f"importance: {', '.join(shares)}")
    with (search.sweep.directory / "importances.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("parameter", "importance"), *importances.items()])


def main(argv: list[str] | None = None) -> None:
    """Run or resume a search.

    Raises `UserError` if the arguments, the sweep file or the storage are unusable.
    """
    file, *rest = argv or sys.argv[1:] or ["--help"]
    if file in ("-h", "--help"):
        parse(Options, [file])  # prints the help and exits
    if file.startswith("-"):
        raise UserError("the sweep file comes first: python sweep_offline.py sweep.yaml --count 20")
    options = parse(Options, rest)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep = read_sweep(Path(file))
    trial_count = count_trials(sweep, options.count)
    trials.check_command(sweep)

    directory = sweep.directory
    if os.path.lexists(directory):
        is_empty = directory.is_dir() and not os.listdir(directory)
        is_search = (directory / "place").exists() or (directory / "study.db").exists()
        if not (is_empty or is_search):
            raise UserError(f"{directory} holds something else: choose another name for the sweep")
    url = options.storage
    if not url:
        directory.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{directory}/study.db"
    study, storage = open_study(sweep, url)
    # Not earlier: an unusable storage leaves no directory.
    directory.mkdir(parents=True, exist_ok=True)
    search = Search(
        sweep=sweep,
        study=study,
        storage=storage,
        trial_count=trial_count,
        jobs=options.jobs,
        seed=options.seed,
        directory_id=trials.read_directory_id(directory),
        gpus=trials.visible_gpus() if options.jobs > 1 else [],  # a single run may use all of them
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_trials(search)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            print("Stopping the runs; the same command resumes them.", flush=True)
        storage.patience = 0.0
        search.stop()
        with contextlib.suppress(UserError, OSError):  # the storage or the directory is gone
            report(search)
        raise
    report(search)


if __name__ == "__main__":
    run_script(main)
