"""A sweep as an Optuna study: its storage, sampler and pruner."""

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UserError
from sweeps.file import Sweep

FAILURES = (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError)
WRITTEN = (sqlalchemy.exc.IntegrityError, optuna.exceptions.UpdateFinishedTrialError)
POSTGRESQL = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
}  # libpq's limits, in seconds and in milliseconds
POSTGRESQL |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
patience = (
    300.0  # seconds that a search waits for a storage that has failed; 0 once the search is to end
)


def value_count(distribution: BaseDistribution) -> int:
    """The number of values of a finite distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    return round((distribution.high - distribution.low) / distribution.step) + 1


def sampler(sweep: Sweep, seed: int | None) -> optuna.samplers.BaseSampler:
    """The sampler for the sweep's method."""
    if sweep.method == "bayes":
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True
        )
    independent = optuna.samplers.RandomSampler(seed)

    def grid_value(_: optuna.Study, trial: FrozenTrial, name: str, space: BaseDistribution) -> Any:
        """A value of cell n for trial n: trial numbers are unique in a storage, so no cell is visited twice."""
        cell, index = trial.number, 0
        for other in sorted(sweep.searched):
            cell, index = divmod(cell, value_count(sweep.searched[other]))
            if other == name:
                break
        return (
            space.choices[index]
            if isinstance(space, CategoricalDistribution)
            else space.low + index * space.step
        )

    if sweep.method == "grid":
        independent.sample_independent = grid_value
    return independent


def pruner(early: dict[str, Any] | None) -> optuna.pruners.BasePruner:
    """The pruner for `early_terminate`. As in W&B, `max_iter` and `s` put the first rung at max_iter / eta^s epochs."""
    if early is None:
        return optuna.pruners.NopPruner()
    eta, longest = early.get("eta", 3), early.get("max_iter")
    shortest = early.get("min_iter") or max(1, longest // eta ** early["s"])
    return optuna.pruners.HyperbandPruner(shortest, longest or "auto", eta)


def open_study(
    sweep: Sweep, url: str, attempts: int = 5
) -> tuple[optuna.Study, Callable[[int], int]]:
    """The sweep's study and, by trial number, Optuna's trial ids. Raises `UserError` if its storage can't be used."""
    global patience
    shown_url = re.sub(":.*@", ":***@", url).partition("?")[0]  # without the password
    address = re.sub(
        "^postgres(ql)?:", "postgresql+psycopg:", url
    )  # SQLAlchemy's default depends on its version
    limits = (
        {"timeout": 100}
        if url.startswith("sqlite")
        else POSTGRESQL
        if "+psycopg" in address
        else {}
    )
    engine, name = {"pool_pre_ping": True, "connect_args": limits}, sweep.name
    try:
        store = optuna.storages.get_storage(
            optuna.storages.RDBStorage(address, engine_kwargs=engine)
        )
        study = optuna.create_study(
            storage=store, study_name=name, direction=sweep.direction, load_if_exists=True
        )
    except ValueError:  # its message may quote a part of the password
        raise UserError(f"--storage {shown_url}: not a valid URL") from None
    except ImportError as error:
        driver = getattr(error.__cause__ or error, "name", None)
        raise UserError(
            f"--storage {shown_url}: no driver {driver}; requirements-sweep.txt has psycopg"
        ) from None
    except (*FAILURES, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        reason = _reason(error).replace(url, shown_url)
        unreachable = re.search(
            "timeout|resolve|translate", reason
        )  # which takes seconds to find out
        if (
            isinstance(error, FAILURES) and attempts > 1 and not unreachable
        ):  # of two that create the tables, one fails
            time.sleep(1)
            return open_study(sweep, url, attempts - 1)
        raise UserError(f"--storage {shown_url}: {reason}") from None
    if url.startswith("sqlite"):  # a file does not go away: what fails stays damaged
        patience = 0.0
    for method in filter(re.compile("[a-z]").match, vars(optuna.storages.BaseStorage)):
        setattr(store, method, _patient(getattr(store, method)))
    fields = dataclasses.asdict(sweep) | {
        "searched": {k: distribution_to_json(v) for k, v in sweep.searched.items()}
    }
    definition = {
        name: value for name, value in fields.items() if name not in ("command", "run_cap", "lists")
    }
    used = bool(
        study.get_trials(deepcopy=False)
    )  # read first: another process may be creating the study
    if "sweep" not in study.user_attrs:
        if used:
            raise UserError(
                f"{shown_url} has a study {sweep.name!r} that sweep_offline.py did not create"
            )
        study.set_user_attr("sweep", definition)
    stored = study.user_attrs["sweep"]
    changed = [
        name
        for name, value in json.loads(json.dumps(definition)).items()
        if stored.get(name) != value
    ]
    if changed:
        advice = "to start a new search, change name: in the file; to resume the old one, undo the change"
        raise UserError(
            f"the sweep {sweep.name!r} was started with different {' and '.join(changed)}; {advice}"
        )
    study.pruner = pruner(sweep.early_terminate)
    return study, functools.partial(
        store.get_trial_id_from_study_id_trial_number, store.get_study_id_from_name(name)
    )


def _reason(error: BaseException) -> str:
    """What the driver says in its first line, without the part of a URL that may hold a password."""
    while error.__cause__:
        error = error.__cause__
    return re.sub(r"\S*@", "***@", str(error).splitlines()[0])


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    """A storage's method, repeated while it fails, for `patience` seconds; then it raises `UserError`."""

    def call(*arguments: Any, **options: Any) -> Any:
        global patience
        began, failures = time.monotonic(), 0
        while True:
            try:
                return method(*arguments, **options)
            except WRITTEN:
                if failures:  # what failed has arrived all the same
                    return True
                raise
            except FAILURES as error:
                failures, reason = failures + 1, f"the storage does not answer ({_reason(error)})"
            if time.monotonic() - began > patience:
                patience = 0.0
                raise UserError(f"{reason}; the same command goes on with the search", 1)
            if failures == 2:  # a dropped connection fails once
                print(
                    f"{reason}: the search waits up to {patience:g} seconds, and its runs go on.",
                    flush=True,
                )
            time.sleep(0.2)

    return call


def count_trials(sweep: Sweep, count: int | None) -> int:
    """The total number of trials of the search. Raises `UserError` if nothing limits it."""
    limits = [limit for limit in (count, sweep.run_cap) if limit is not None]
    if sweep.method == "grid":
        limits.append(math.prod(map(value_count, sweep.searched.values())))
    if not limits:
        raise UserError(f"method {sweep.method} never ends by itself; give --count")
    return min(limits)


def suggest(trial: optuna.Trial, name: str, space: BaseDistribution) -> Any:
    """The trial's value of a parameter; the first call draws it."""
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    draw = trial.suggest_int if isinstance(space, IntDistribution) else trial.suggest_float
    value = draw(name, space.low, space.high, step=space.step, log=space.log)
    return round(value, 12) if space.step else value


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials, best first."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(
        complete, key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE"
    )
