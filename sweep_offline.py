"""Run a W&B sweep file without a server: python sweep_offline.py sweep.yaml --count 20

Each trial is a separate, offline process that runs the command W&B's agent would run. Optuna draws
the parameters and prunes trials. Its storage holds the whole state, so the same command resumes an
interrupted search. A program must accept --output_dir and --resume, and write history.jsonl and
metrics.json as train_mnist.py and train_cola.py do.
"""

import contextlib
import csv
import dataclasses
import signal
import sys
import time
from pathlib import Path

from harness.errors import UserError
from harness.files import replacing
from harness.options import command_line, option, parse
from harness.script import in_main_thread, run_script
from harness.system import STOP_SIGNALS, WINDOWS, shell_command

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
from offline_sweep.file import notes, read_sweep
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


def run_trials(search: Search) -> None:
    """Run trials until the study has `trial_count`.

    Raises `UserError` if the first ones fail or none completes.
    """
    states = []
    waiting = False
    while True:
        for trial in search.watch():
            print(outcome(search.sweep.metric.name, trial), flush=True)
            states.append(trial.state)
            all_failed = states == [TrialState.FAIL] * MAX_INITIAL_FAILURES
            if all_failed and not ranked_trials(search.study):
                raise UserError(
                    f"the first {MAX_INITIAL_FAILURES} trials failed; {last_error(search)}", 1
                )
        if target_is_reached(search) and search.trial_count:
            print("metric.target is reached: no more trials.", flush=True)
            search.trial_count = 0
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


def target_is_reached(search: Search) -> bool:
    """Whether a trial has the value at which the search should end."""
    metric = search.sweep.metric
    ranked = ranked_trials(search.study) if metric.target is not None else []
    if not ranked:
        return False
    best = ranked[0].value
    return best >= metric.target if metric.goal == "maximize" else best <= metric.target


def last_error(search: Search) -> str:
    """The last error of a trial, and the path of its log."""
    failed = [trial for trial in search.trials() if "error" in trial.user_attrs]
    if not failed:
        return "all were pruned"
    error = failed[-1].user_attrs["error"]
    return f"last error: {error} ({search.output_dir(failed[-1])}.log)"


def outcome(metric: str, trial: FrozenTrial) -> str:
    """One line about a finished trial."""
    state = trial.state.name.lower()
    if trial.state == TrialState.PRUNED:
        state += f" after {len(trial.intermediate_values)} epochs"
    if "error" in trial.user_attrs:
        state += f", {trial.user_attrs['error']}"
    elif metric:
        state += f", {metric} {trial.value:.4f}"
    parameters = []
    for name, value in trial.user_attrs["parameters"].items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        parameters.append(f"{name}={text}")
    return f"trial {trial.number}: {state} | {' '.join(parameters)}"


def report(search: Search) -> None:
    """Print the best trials, and write all of them to trials.csv."""
    sweep = search.sweep
    started = [trial for trial in search.trials() if "parameters" in trial.user_attrs]
    ranked = ranked_trials(search.study)
    others = [trial for trial in started if trial.state != TrialState.COMPLETE]
    write_trials(search, [*ranked, *others])
    states = [trial.state for trial in started]
    counts = [
        f"{states.count(state)} {state.name.lower()}" for state in TrialState if state in states
    ]
    print(f"{', '.join(counts)}; all trials: {sweep.directory}/trials.csv")
    if not ranked or not sweep.metric.name:
        return
    print("the best:")
    for trial in ranked[:10]:
        print(outcome(sweep.metric.name, trial))
    best = ranked[0]
    arguments = trials.trial_arguments(sweep, best.user_attrs["parameters"])
    json_file = f"{search.output_dir(best)}.json"
    command = trials.trial_command(sweep, arguments, json_file, is_shown=True)
    shown = shell_command(command)
    if not any("{args" in part for part in sweep.command):  # the program reads wandb.config
        setting = f"WANDB_SWEEP_PARAM_PATH={search.output_dir(best)}.yaml"
        shown = f'set "{setting}" && {shown}' if WINDOWS else f"{setting} {shown}"
    print(f"to repeat the best run: {shown}")


def write_trials(search: Search, rows: list[FrozenTrial]) -> None:
    """Write trials.csv, with a row for each trial."""
    names = search.sweep.searched()
    metric = search.sweep.metric.name
    first = ["trial", "state", metric or "unranked"]
    last = ["epochs_done", "error", "output_dir"]
    # A parameter may have the name of another column.
    columns = [f"parameters.{name}" if name in first + last else name for name in names]
    with (
        replacing(search.sweep.directory / "trials.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(first + columns + last)
        for trial in rows:
            attributes = trial.user_attrs
            table.writerow(
                [
                    trial.number,
                    trial.state.name.lower(),
                    trial.value if metric else None,
                    *[attributes["parameters"][name] for name in names],
                    len(trial.intermediate_values),
                    attributes.get("error"),
                    search.output_dir(trial),
                ]
            )


def main(argv: list[str] | None = None) -> None:
    """Run or resume a search.

    Raises `UserError` if the arguments, the sweep file or the storage are unusable.
    """
    if argv is None:
        argv = command_line(__name__)
    file, *rest = argv or ["--help"]
    if file in ("-h", "--help"):
        parse(Options, [file])  # prints the help and exits
    sweep = read_sweep(Path(file))
    trials.check_command(sweep)
    options = parse(Options, rest)
    for note in notes(sweep):
        print(note)
    trial_count = count_trials(sweep, options.count)
    sweep.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as restored:  # what a notebook would keep
        restored.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study, storage = open_study(
            sweep, options.storage or f"sqlite:///{sweep.directory}/study.db"
        )
        search = Search(
            sweep=sweep,
            study=study,
            trial_count=trial_count,
            jobs=options.jobs,
            # A single run may use all GPUs.
            gpus=trials.visible_gpus() if options.jobs > 1 else [],
        )
        if in_main_thread():
            for number in STOP_SIGNALS[1:]:
                previous = signal.signal(number, lambda number, _: sys.exit(128 + number))
                restored.callback(signal.signal, number, previous)
        try:
            run_trials(search)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C or SIGTERM
                print("Stopping the runs; the same command resumes them.", flush=True)
            storage.patience = 0.0
            search.stop()
            with contextlib.suppress(UserError, OSError):  # the storage or the directory is gone
                report(search)
            raise
        report(search)


if __name__ == "__main__":
    run_script(main)
