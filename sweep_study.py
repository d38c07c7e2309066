"""A sweep as a study of Optuna's: its storage, and what draws parameters and ends runs early."""

import dataclasses
import json
import math
import time
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from options import UserError
from sweep_file import Sweep


class GridSampler(optuna.samplers.BaseSampler):
    """Trial n takes cell n. No two trials of a storage have the same number, and so no cell is visited twice."""

    def __init__(self, searched: dict[str, BaseDistribution]):
        self.axes = {name: grid_values(searched[name]) for name in sorted(searched)}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        cell = trial.number
        for name, values in self.axes.items():
            cell, place = divmod(cell, len(values))
            if name == param_name:
                return values[place]
        raise KeyError(param_name)


def grid_values(distribution: BaseDistribution) -> list[Any]:
    """The values of a distribution that has finitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + i * distribution.step for i in range(steps + 1)]


def sampler(sweep: Sweep, seed: int | None) -> optuna.samplers.BaseSampler:
    """What draws parameters by the sweep's method."""
    if sweep.method == "grid":
        return GridSampler(sweep.searched)
    if sweep.method == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True)


def pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """What ends runs early. `max_iter` and `s` give the first comparison as in W&B: max_iter / eta^s epochs."""
    early = sweep.early_terminate
    if early is None:
        return optuna.pruners.NopPruner()
    eta, longest = early.get("eta", 3), early.get("max_iter")
    shortest = early.get("min_iter") or max(1, longest // eta ** early["s"])
    return optuna.pruners.HyperbandPruner(shortest, longest or "auto", eta)


def open_storage(url: str, tries: int = 5) -> optuna.storages.RDBStorage:
    """Where two processes make the tables at the same moment, one fails, and finds them a second later."""
    options = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except sqlalchemy.exc.DBAPIError:
        if tries == 1:
            raise
        time.sleep(1)
        return open_storage(url, tries - 1)


def open_study(sweep: Sweep, storage: str) -> optuna.Study:
    """The study of this sweep in the storage, made where there is none. Raises `UserError`."""
    definition = dataclasses.asdict(sweep) | {
        "searched": {name: distribution_to_json(distribution) for name, distribution in sweep.searched.items()}
    }
    definition = json.loads(json.dumps(definition))
    try:
        database = open_storage(storage)
        study = optuna.create_study(
            storage=database, study_name=sweep.name, direction=sweep.direction, load_if_exists=True
        )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(f"--storage {storage}: {str(error).splitlines()[0]}") from None
    if "sweep" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise UserError(f"{storage} has a study {sweep.name!r} that is not of sweep_offline.py")
        study.set_user_attr("sweep", definition)
    before = study.user_attrs.get("sweep", {})
    differ = [key for key, value in definition.items() if before.get(key) != value]
    if differ and differ != ["run_cap"]:
        raise UserError(
            f"the sweep {sweep.name!r} was begun with another {' and '.join(differ)}; to begin a new search, give the "
            "file another name:, to go on with the old one, put it back"
        )
    study.pruner = pruner(sweep)
    return study


def trials_wanted(sweep: Sweep, count: int | None) -> int:
    """How many trials the search has in all. Raises `UserError` where nobody has said."""
    limits = [limit for limit in (count, sweep.run_cap) if limit is not None]
    if sweep.method == "grid":
        limits.append(math.prod(len(grid_values(distribution)) for distribution in sweep.searched.values()))
    if not limits:
        raise UserError(f"how many trials? method {sweep.method} has no end: give --count")
    return min(limits)


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value of a parameter, drawn at the first call."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, FloatDistribution):
        value = trial.suggest_float(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
        return round(value, 12) if distribution.step else value
    return trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials."""
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(complete, key=lambda trial: sign * trial.value)
