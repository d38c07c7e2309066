"""Reads and checks a W&B sweep file."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import yaml
from annotated_types import Gt
from pydantic import PrivateAttr

from harness.errors import UserError
from offline_sweep.parameters import (
    Beta,
    Constant,
    Mapping,
    Nested,
    Normal,
    Parameter,
    Range,
    WeightedChoice,
    explain,
    optuna_distribution,
    read_parameters,
)

AGENT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # W&B's default
Impute = Literal["best", "worst", "latest"]


class Metric(Mapping):
    """The metric that a sweep optimizes."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None  # a value that ends the search
    impute: Impute | None = None
    impute_while_running: Impute | Literal["false"] = "false"


class EarlyTerminate(Mapping):
    """When runs are stopped early: W&B's `hyperband`."""

    type: Literal["hyperband"]
    min_iter: Annotated[int, Gt(0)] | None = None
    max_iter: int = 0
    s: float | None = None
    eta: Annotated[float, Gt(1)] = 3.0
    strict: bool = True

    def rungs(self) -> list[int]:
        """The numbers of values of the metric after which runs are compared.

        min_iter, min_iter * eta, ..., or the last s of ..., max_iter / eta^2, max_iter / eta.
        """
        rungs = []
        if self.max_iter and self.s is not None:
            rung = self.max_iter / self.eta
            while rung >= 1 and len(rungs) < self.s:
                rungs.insert(0, int(rung))
                rung /= self.eta
        elif self.min_iter:
            rung = self.min_iter
            while len(rungs) < 100 and rung < 1e15:
                rungs.append(int(rung))
                rung *= self.eta
        return rungs


class Controller(Mapping):
    """What runs the sweep: this search does."""

    type: Literal["cloud", "local"]


class Sweep(Nested):
    """The content of a sweep file."""

    method: Literal["grid", "random", "bayes"]
    metric: Metric = Metric(name="")  # trials are ranked by nothing
    early_terminate: EarlyTerminate = EarlyTerminate(type="hyperband")  # no rungs
    command: list = AGENT_COMMAND
    run_cap: Annotated[int, Gt(0)] | None = None
    program: str | None = None
    name: str = ""
    project: str = ""
    entity: str = ""
    description: str = ""
    apiVersion: str = ""
    kind: Literal["sweep"] = "sweep"
    controller: Controller | None = None
    _by_name: dict[str, Parameter] = PrivateAttr()

    @property
    def directory(self) -> Path:
        """The directory for the files of the sweep's runs."""
        # Names that differ have directories that differ. % would be decoded in the storage's URL.
        name = quote(self.name, safe="").replace("%", "~")
        return Path("runs", f"sweep-{name}")

    def constants(self) -> dict[str, Any]:
        """The values that all trials share, by name."""
        items = self._by_name.items()
        return {name: item.value for name, item in items if isinstance(item, Constant)}

    def searched(self) -> dict[str, Parameter]:
        """The parameters that differ between trials, by name; nested ones as outer/inner."""
        items = self._by_name.items()
        return {name: item for name, item in items if not isinstance(item, Constant)}


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_bytes())
        # A trial's arguments and the storage hold what JSON can: a date becomes text.
        content = json.loads(json.dumps(content, default=str))
        sweep = Sweep.model_validate(content)
        if not sweep.metric.name and (sweep.method == "bayes" or "early_terminate" in content):
            raise ValueError("metric: bayes and early_terminate need one")
        rules = content.get("early_terminate", {"min_iter": 1})
        if "min_iter" not in rules and not ("max_iter" in rules and "s" in rules):
            raise ValueError("early_terminate: needs min_iter, or max_iter and s")
        sweep._by_name = read_parameters(sweep.parameters, sweep.method)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(explain(error).split())}") from None
    sweep.name = sweep.name or path.stem
    sweep.command = [str(part) for part in sweep.command or AGENT_COMMAND]
    return sweep


def notes(sweep: Sweep) -> list[str]:
    """What may surprise the user: one line each."""
    lines = []
    for name, parameter in sweep.searched().items():
        kind = parameter.distribution
        if type(parameter) is Range and "log" in kind:
            limits = optuna_distribution(parameter)
            lines.append(
                f"{name}: the min and max of {kind} are exponents of e, so values are from "
                f"{limits.low:.4g} to {limits.high:.4g}; {kind}_values takes the values themselves"
            )
        if sweep.method == "bayes" and isinstance(parameter, (WeightedChoice, Normal, Beta)):
            lines.append(f"{name}: drawn at random, as Optuna can't search {kind}")
    if sweep.method == "bayes" and sweep.metric.impute:
        lines.append("metric.impute: without effect, as Optuna ignores failed trials")
    if "early_terminate" in sweep.model_fields_set and not sweep.early_terminate.rungs():
        lines.append("early_terminate: stops no run, as s or max_iter is too small")
    return lines
