"""A sweep as an Optuna study: its storage, sampler and pruner."""

import dataclasses
import json
import math
import time
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from harness.errors import UserError
from harness.sweep.file import Sweep

MAX_CELLS = 100_000  # of a grid without --count


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


def pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """The pruner for `early_terminate`. As in W&B, `max_iter` and `s` put the first rung at max_iter / eta^s epochs."""
    early = sweep.early_terminate
    if early is None:
        return optuna.pruners.NopPruner()
    eta, longest = early.get("eta", 3), early.get("max_iter")
    shortest = early.get("min_iter") or max(1, longest // eta ** early["s"])
    return optuna.pruners.HyperbandPruner(shortest, longest or "auto", eta)


def open_storage(url: str, attempts: int = 5) -> optuna.storages.RDBStorage:
    """Open a storage; retries, since one of two processes that create its tables at the same time fails."""
    options = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except sqlalchemy.exc.DBAPIError:
        if attempts == 1:
            raise
        time.sleep(1)
        return open_storage(url, attempts - 1)


def open_study(sweep: Sweep, storage: str) -> optuna.Study:
    """Open or create the sweep's study. Raises `UserError` if the storage is unusable or holds a different sweep."""
    definition = dataclasses.asdict(sweep) | {
        "searched": {name: distribution_to_json(distribution) for name, distribution in sweep.searched.items()}
    }
    del definition["command"]  # it may be mended or changed; the search stays the same
    definition = json.loads(json.dumps(definition))
    try:
        study = optuna.create_study(
            storage=open_storage(storage), study_name=sweep.name, direction=sweep.direction, load_if_exists=True
        )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(f"--storage {storage}: {str(error).splitlines()[0]}") from None
    if "sweep" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{storage} has a study {sweep.name!r} that sweep_offline.py did not create")
        study.set_user_attr("sweep", definition)
    stored = study.user_attrs["sweep"]
    changed = [key for key, value in definition.items() if key != "run_cap" and stored.get(key) != value]
    if changed:
        raise UserError(
            f"the sweep {sweep.name!r} was started with different {' and '.join(changed)}; "
            "to start a new search, change name: in the file; to resume the old one, undo the change"
        )
    study.pruner = pruner(sweep)
    return study


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
    if isinstance(space, FloatDistribution):
        value = trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)
        return round(value, 12) if space.step else value
    return trial.suggest_int(name, space.low, space.high, step=space.step)


def ranked_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials, best first."""
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(complete, key=lambda trial: sign * trial.value)
