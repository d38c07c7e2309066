"""Reads and checks a W&B sweep file."""

import json
import zlib
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import yaml
from annotated_types import Gt, Lt
from wandb.sdk.launch.sweeps.utils import DEFAULT_SWEEP_COMMAND

from harness.errors import UserError
from harness.system import WINDOWS
from offline_sweep.parameters import (
    Beta,
    Constant,
    Nested,
    Normal,
    Parameter,
    Range,
    Section,
    WeightedChoice,
    explain,
    read_parameters,
)

Impute = Literal["best", "worst", "latest"]


class Metric(Section):
    """The metric that a sweep optimizes."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = None  # a value that ends the search
    impute: Impute | None = None
    impute_while_running: Impute | Literal["false"] = "false"


class EarlyTerminate(Section):
    """When runs are stopped early: W&B's `hyperband`."""

    type: Literal["hyperband"]
    min_iter: Annotated[int, Gt(0)] | None = None
    max_iter: int | None = None
    s: float | None = None
    eta: Annotated[float, Gt(1), Lt(1000)] = 3.0
    strict: bool = True

    def rungs(self) -> list[int]:
        """The numbers of values of the metric after which runs are compared.

        min_iter, min_iter * eta, ..., or the last s of ..., max_iter / eta^2, max_iter / eta.
        """
        if None in (self.max_iter, self.s):
            return [int(self.min_iter * self.eta**index) for index in range(100)]
        return [int(self.max_iter / self.eta**step) for step in range(int(min(self.s, 99)), 0, -1)]


class Sweep(Nested):
    """The content of a sweep file; once it is read, with parameters by their full names."""

    method: Literal["grid", "random", "bayes"]
    metric: Metric = Metric(name="")  # trials are ranked by nothing
    early_terminate: EarlyTerminate | None = None
    command: list = DEFAULT_SWEEP_COMMAND
    run_cap: Annotated[int, Gt(0)] | None = None
    program: str | None = None
    name: str = ""
    project: str = ""
    entity: str = ""
    description: str = ""
    apiVersion: str = ""
    kind: Literal["sweep"] = "sweep"
    controller: dict[Literal["type"], Literal["cloud", "local"]] | None = None

    @property
    def directory(self) -> Path:
        """The directory for the files of the sweep's runs."""
        # Names that differ have directories that differ. % would be decoded in the storage's URL.
        name = quote(self.name, safe="").replace("%", "~")
        if WINDOWS and name != name.lower().rstrip("."):  # there, "A", "a" and "a." are the same
            name += f"~{zlib.crc32(name.encode()):x}"
        return Path("runs", f"sweep-{name}")

    def searched(self) -> dict[str, Parameter]:
        """The parameters that differ between trials."""
        items = self.parameters.items()
        return {name: item for name, item in items if not isinstance(item, Constant)}


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_bytes())
        # A trial's arguments and the storage hold what JSON can: a date becomes text.
        content = json.loads(json.dumps(content, default=str))
        sweep = Sweep.model_validate(content)
        rules = sweep.early_terminate
        if not sweep.metric.name and (rules or sweep.method == "bayes"):
            raise ValueError("metric: bayes and early_terminate need one")
        if rules and rules.min_iter is None and None in (rules.max_iter, rules.s):
            raise ValueError("early_terminate: needs min_iter, or max_iter and s")
        sweep.parameters = read_parameters(sweep.parameters, sweep.method)
        if taken := {"output_dir", "resume"} & sweep.parameters.keys():
            raise ValueError(f"parameters: {min(taken)} is set by the search itself")
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(explain(error).split())}") from None
    sweep.name = sweep.name or path.stem
    sweep.command = [str(part) for part in sweep.command or DEFAULT_SWEEP_COMMAND]
    return sweep


def notes(sweep: Sweep) -> list[str]:
    """What may surprise the user, in one line each."""
    lines = []
    metric = sweep.metric
    if metric.name and "goal" not in metric.model_fields_set:
        lines.append(f"metric: no goal, so {metric.name} is minimized, as W&B does")
    for name, parameter in sweep.searched().items():
        kind = parameter.distribution
        if type(parameter) is Range and "log" in kind:
            lines.append(
                f"{name}: min and max of {kind} are exponents of e; {kind}_values takes values"
            )
        if sweep.method == "bayes" and isinstance(parameter, (WeightedChoice, Normal, Beta)):
            lines.append(f"{name}: only drawn at random, as Optuna can't search {kind}")
    if sweep.method == "bayes" and metric.impute:
        lines.append("metric.impute: without effect, as Optuna ignores failed trials")
    return lines
