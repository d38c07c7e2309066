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
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UserError
from harness.sweep.file import Sweep

MAX_CELLS = 100_000  # of a grid without --count
FAILURES = (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError)
WRITTEN = (sqlalchemy.exc.IntegrityError, optuna.exceptions.UpdateFinishedTrialError)
POSTGRESQL = {  # libpq's limits in seconds, and in milliseconds
    "connect_timeout": 5,
    **{"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000},
}
patience = 300.0  # seconds that a search waits for a storage that has failed; 0 once the search is to end


class GridSampler(optuna.samplers.RandomSampler):
    """Assigns cell n to trial n. Trial numbers are unique in a storage, so no cell is visited twice."""

    def __init__(self, searched: dict[str, BaseDistribution]):
        super().__init__()
        self.searched = searched

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        cell = trial.number
        for name in sorted(self.searched):
            cell, index = divmod(cell, value_count(self.searched[name]))
            if name == param_name:
                break
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[index]
        return param_distribution.low + index * param_distribution.step


def value_count(distribution: BaseDistribution) -> int:
    """The number of values of a finite distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    return round((distribution.high - distribution.low) / distribution.step) + 1


def sampler(sweep: Sweep, seed: int | None) -> optuna.samplers.BaseSampler:
    """The sampler for the sweep's method."""
    if sweep.method == "grid":
        return GridSampler(sweep.searched)
    if sweep.method == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True)


def pruner(early: dict[str, Any] | None) -> optuna.pruners.BasePruner:
    """The pruner for `early_terminate`. As in W&B, `max_iter` and `s` put the first rung at max_iter / eta^s epochs."""
    if early is None:
        return optuna.pruners.NopPruner()
    eta, longest = early.get("eta", 3), early.get("max_iter")
    shortest = early.get("min_iter") or max(1, longest // eta ** early["s"])
    return optuna.pruners.HyperbandPruner(shortest, longest or "auto", eta)


def open_study(sweep: Sweep, url: str, attempts: int = 5) -> tuple[optuna.Study, Callable[[int], int]]:
    """Open or create the sweep's study; returns it, and the function from trial numbers to Optuna's trial ids.

    Raises `UserError` if the storage is unusable or holds a different sweep.
    """
    shown_url = re.sub(":.*@", ":***@", url).partition("?")[0]  # without the password
    address = re.sub("^postgres(ql)?:", "postgresql+psycopg:", url)  # SQLAlchemy's default depends on its version
    libpq = re.match(r"postgresql\+psycopg2?:", address)
    limits = {"timeout": 100} if address.startswith("sqlite") else POSTGRESQL if libpq else {}
    try:
        storage = optuna.storages.get_storage(
            optuna.storages.RDBStorage(address, engine_kwargs={"pool_pre_ping": True, "connect_args": limits})
        )
        study = optuna.create_study(
            storage=storage, study_name=sweep.name, direction=sweep.direction, load_if_exists=True
        )
    except ValueError:  # its message may quote a part of the password
        raise UserError(f"--storage {shown_url}: not a valid URL") from None
    except ImportError as error:
        driver = getattr(error.__cause__ or error, "name", None)
        problem = f"{driver}, the driver, can't be imported; pip install -r requirements-sweep.txt brings psycopg"
        raise UserError(f"--storage {shown_url}: {problem}") from None
    except (*FAILURES, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        unreachable = libpq and isinstance(_cause(error), sqlalchemy.exc.OperationalError)
        if isinstance(error, FAILURES) and attempts > 1 and not unreachable:  # two processes create the tables
            time.sleep(1)
            return open_study(sweep, url, attempts - 1)
        raise UserError(f"--storage {shown_url}: {_reason(error).replace(url, shown_url)}") from None
    _wait_out_failures(storage)
    fields = dataclasses.asdict(sweep) | {"searched": {k: distribution_to_json(v) for k, v in sweep.searched.items()}}
    definition = {name: value for name, value in fields.items() if name not in ("command", "run_cap", "lists")}
    used = bool(study.get_trials(deepcopy=False))  # read first: another process may be creating the study
    stored = study.user_attrs.get("sweep")
    if stored is None:
        if used:
            raise UserError(f"{shown_url} has a study {sweep.name!r} that sweep_offline.py did not create")
        study.set_user_attr("sweep", definition)
        stored = study.user_attrs["sweep"]
    changed = [name for name, value in json.loads(json.dumps(definition)).items() if stored.get(name) != value]
    if changed:
        raise UserError(
            f"the sweep {sweep.name!r} was started with different {' and '.join(changed)}; "
            "to start a new search, change name: in the file; to resume the old one, undo the change"
        )
    study.pruner = pruner(sweep.early_terminate)
    study_id = storage.get_study_id_from_name(sweep.name)
    return study, functools.partial(storage.get_trial_id_from_study_id_trial_number, study_id)


def _cause(error: Exception) -> Exception:
    """SQLAlchemy's error, behind the one of Optuna's that speaks of invalid data."""
    return error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error


def _reason(error: Exception) -> str:
    """What the driver says in its first line, without the part of a URL that may hold a password."""
    cause = _cause(error)
    return re.sub(r"\S*@", "***@", str(getattr(cause, "orig", None) or cause).splitlines()[0])


def _wait_out_failures(storage: optuna.storages.BaseStorage) -> None:
    """Let the storage's methods repeat what has failed, for `patience` seconds; then they raise `UserError`."""

    def patient(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            global patience
            began, failures = time.monotonic(), 0
            while True:
                try:
                    return method(*arguments, **options)
                except FAILURES + WRITTEN as error:
                    if isinstance(error, WRITTEN):
                        if failures:  # what failed has arrived all the same
                            return True
                        raise
                    failures, reason = failures + 1, _reason(error)
                if time.monotonic() - began > patience:
                    patience = 0.0
                    raise UserError(
                        f"the storage does not answer ({reason}); the same command goes on with the search", 1
                    )
                if failures == 2:  # a dropped connection fails once
                    waits = f"the search waits up to {patience:g} seconds for it, and its runs go on"
                    print(f"The storage does not answer ({reason}): {waits}.", flush=True)
                time.sleep(min(failures, 10) / 10)

        return call

    for name, member in vars(optuna.storages.BaseStorage).items():
        if callable(member) and not name.startswith("_"):
            setattr(storage, name, patient(getattr(storage, name)))


def count_trials(sweep: Sweep, count: int | None) -> int:
    """The total number of trials of the search. Raises `UserError` if nothing limits it."""
    limits = [limit for limit in (count, sweep.run_cap) if limit is not None]
    if sweep.method == "grid":
        cells = math.prod(map(value_count, sweep.searched.values()))
        if not limits and cells > MAX_CELLS:
            raise UserError(f"the grid has {cells:,} cells; give --count")
        limits.append(cells)
    if not limits:
        raise UserError(f"method {sweep.method} never ends by itself; give --count")
    return min(limits)


def suggest(trial: optuna.Trial, name: str, space: BaseDistribution) -> Any:
    """The trial's value of a parameter; the first call draws it."""
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(name, space.choices)
    if isinstance(space, IntDistribution):
        return trial.suggest_int(name, space.low, space.high, step=space.step)
    value = trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
    return round(value, 12) if space.step else value


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials, best first."""
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(complete, key=lambda trial: trial.value, reverse=maximize)
