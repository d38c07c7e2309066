"""A sweep as an Optuna study: its storage and sampler."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from harness.errors import UserError
from offline_sweep.file import EarlyTerminate, Sweep
from offline_sweep.parameters import Choice, Parameter

PATIENCE = 300.0  # seconds that a search waits for a database that does not answer
FAILURES = (DBAPIError, StorageInternalError)
ALREADY_WRITTEN = (IntegrityError, RuntimeError)  # Optuna's, of a finished trial
POSTGRESQL_LIMITS = {
    "connect_timeout": 5,  # seconds
    "tcp_user_timeout": 10_000,  # milliseconds
    "keepalives_idle": 5,
    "keepalives_interval": 2,
}


@dataclasses.dataclass
class RetryingStorage:
    """An Optuna storage that repeats a failed call for up to `patience` seconds.

    Then the call raises `UserError`, and later calls are not repeated.
    """

    storage: BaseStorage
    patience: float

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, getattr(self.storage, name))

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = time.monotonic()
        failures = 0
        while True:
            try:
                return method(*arguments, **options)
            except ALREADY_WRITTEN:
                if failures == 0:
                    raise
                return True  # the failed call did reach the database
            except FAILURES as error:
                failures += 1
                problem = f"the storage does not answer ({_reason(error)})"
            if time.monotonic() - start > self.patience:
                self.patience = 0.0
                raise UserError(f"{problem}; the same command goes on with the search", 1)
            if failures == 2:  # a dropped connection fails only once
                print(
                    f"{problem}: the search waits up to {self.patience:g} seconds, "
                    "and its runs go on.",
                    flush=True,
                )
            time.sleep(0.2)


def value_count(parameter: Parameter) -> int:
    """The number of values of a parameter of a grid."""
    if isinstance(parameter, Choice):
        return len(parameter.values)
    return parameter.max - parameter.min + 1


@dataclasses.dataclass
class GridSampler(RandomSampler):
    """Gives trial n cell n of the grid. Trial numbers are unique, so no cell is repeated."""

    searched: dict[str, Parameter]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, space: BaseDistribution
    ) -> Any:
        """The value of one parameter."""
        cell = trial.number
        for other in sorted(self.searched):
            cell, index = divmod(cell, value_count(self.searched[other]))
            if other == name:
                break
        if isinstance(space, CategoricalDistribution):
            return space.choices[index]
        return space.low + index


@dataclasses.dataclass
class HyperbandPruner(BasePruner):
    """Stops a run that is not in the best 1 / eta of those at its last rung, as W&B does."""

    rules: EarlyTerminate

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop now."""
        values = trial.intermediate_values
        reached = [rung for rung in self.rules.rungs() if rung in values]
        if not reached:
            return False
        rung = reached[-1]
        sign = -1 if study.direction.name == "MAXIMIZE" else 1
        losses = []
        for other in study.get_trials(deepcopy=False):
            if rung in other.intermediate_values:
                losses.append(sign * other.intermediate_values[rung])
        worst_kept = sorted(losses)[int(1 / self.rules.eta * len(losses))]
        considered = [values[rung]] if self.rules.strict else values.values()
        return min(sign * value for value in considered) > worst_kept


def sampler(sweep: Sweep, seed: int | None = None) -> BaseSampler:
    """The sampler for the sweep's method."""
    if sweep.method == "grid":
        return GridSampler(sweep.searched())
    if sweep.method == "random":
        return RandomSampler(seed)
    return TPESampler(seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True)


def open_study(sweep: Sweep, url: str) -> tuple[Study, RetryingStorage]:
    """The sweep's study and its storage. Raises `UserError` if the storage can't be used."""
    patience = 0.0 if url.startswith("sqlite") else PATIENCE  # a damaged file does not recover
    storage = RetryingStorage(_connect(sweep, url), patience)
    rules = sweep.early_terminate
    pruner = HyperbandPruner(rules) if rules else NopPruner()
    study = optuna.load_study(
        study_name=sweep.name, storage=storage, sampler=sampler(sweep), pruner=pruner
    )
    definition = sweep.model_dump(
        include={"program", "project", "entity", "method", "early_terminate", "parameters"}
    )
    definition["metric"] = sweep.metric.name
    definition["goal"] = sweep.metric.goal
    if not study.trials:
        study.set_user_attr("sweep", definition)
    stored = study.user_attrs.get("sweep", {})
    changed = [name for name, value in definition.items() if stored.get(name) != value]
    if changed:
        raise UserError(
            f"the sweep {sweep.name!r} was started with different {' and '.join(changed)}; to "
            "start a new search, change name: in the file; to resume the old one, undo the change"
        )
    return study, storage


def _connect(sweep: Sweep, url: str) -> BaseStorage:
    """The storage at a URL, with the sweep's study. Raises `UserError` if it can't be used."""
    # SQLAlchemy's default driver depends on its version.
    address = re.sub("^postgres(ql)?:", "postgresql+psycopg:", url)
    limits = {}
    if url.startswith("sqlite"):
        limits = {"timeout": 100}  # seconds
    elif "+psycopg" in address:
        limits = POSTGRESQL_LIMITS
    engine_options = {"pool_pre_ping": True, "connect_args": limits}
    shown_url = re.sub(":.*@", ":***@", url).partition("?")[0]  # without the password
    for _ in range(5):  # if two processes create the tables at once, one of them fails
        try:
            database = RDBStorage(address, engine_kwargs=engine_options)
            storage = get_storage(database)  # adds Optuna's cache
            optuna.create_study(
                storage=storage,
                study_name=sweep.name,
                direction=sweep.metric.goal,
                load_if_exists=True,
            )
            return storage
        except ValueError:  # its message may quote a part of the password
            problem = "not a valid URL"
            break
        except ImportError as error:
            problem = f"no driver {error.__cause__.name}; requirements-sweep.txt has psycopg"
            break
        except (*FAILURES, SQLAlchemyError, RuntimeError) as error:
            problem = _reason(error).replace(url, shown_url)
            if re.search("timeout|resolve|translate", problem):  # takes long each time
                break
        time.sleep(1)
    raise UserError(f"--storage {shown_url}: {problem}")


def _reason(error: BaseException) -> str:
    """The first line of the driver's message, without what may be a password in a URL."""
    while error.__cause__:
        error = error.__cause__
    return re.sub(r"\S*@", "***@", str(error).splitlines()[0])


def count_trials(sweep: Sweep, count: int | None) -> int:
    """The total number of trials of the search. Raises `UserError` if nothing limits it."""
    limits = [limit for limit in (count, sweep.run_cap) if limit]
    if sweep.method == "grid":
        limits.append(math.prod(map(value_count, sweep.searched().values())))
    if not limits:
        raise UserError(f"method {sweep.method} never ends by itself; give --count")
    return min(limits)


def ranked_trials(study: Study) -> list[FrozenTrial]:
    """The complete trials, best first."""
    complete = study.get_trials(states=[TrialState.COMPLETE])
    maximize = study.direction.name == "MAXIMIZE"
    return sorted(complete, key=lambda trial: trial.value, reverse=maximize)
