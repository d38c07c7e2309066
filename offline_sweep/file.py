"""Reads and checks a W&B sweep file. Its parameters become Optuna distributions."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner

from harness.errors import UserError

KEYS = (
    "program",
    "name",
    "project",
    "entity",
    "description",
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "command",
    "run_cap",
)
BOUNDS = ("min", "max")
# The W&B distributions that Optuna can draw from exactly, and their keys. Only q may be missing.
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "q_uniform": (*BOUNDS, "q"),
    "uniform": BOUNDS,
    "int_uniform": BOUNDS,
    "log_uniform": BOUNDS,
    "log_uniform_values": BOUNDS,
    "inv_log_uniform": BOUNDS,
    "inv_log_uniform_values": BOUNDS,
}
AGENT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # W&B's default
STORABLE = (int, float, str, type(None))  # types of categorical values that Optuna can store


@dataclasses.dataclass
class Sweep:
    """The content of a sweep file. Parameters are stored by name, nested ones as outer/inner."""

    name: str
    program: str
    project: str | None
    entity: str | None
    method: str
    metric: str
    direction: str  # "minimize" or "maximize"
    early_terminate: dict[str, Any] | None
    command: list[str]
    run_cap: int | None
    constants: dict[str, Any]
    searched: dict[str, BaseDistribution]
    lists: dict[str, Any]  # values that Optuna can't store, by the text that it stores instead

    @property
    def directory(self) -> Path:
        """The directory for the files of the sweep's runs."""
        # Names that differ have directories that differ. % would be decoded in the storage's URL.
        name = quote(self.name, safe="").replace("%", "~")
        return Path("runs", f"sweep-{name}")


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_bytes())
        # A trial's arguments and the storage hold what JSON can: a date becomes text.
        return _build_sweep(json.loads(json.dumps(content, default=str)), path.stem)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _build_sweep(content: Any, default_name: str) -> Sweep:
    _check_keys("the file", content, KEYS)
    program = content.get("program")
    _check(os.path.isfile(str(program)), "program", "an existing script", program)
    method = content.get("method")
    _check(method in ("grid", "random", "bayes"), "method", "grid, random or bayes", method)
    metric = content.get("metric")
    _check_keys("metric", metric, ("name", "goal"))
    metric_name = metric.get("name")
    _check(isinstance(metric_name, str), "metric.name", "the name of a logged metric", metric_name)
    goal = metric.get("goal", "minimize")
    _check(goal in ("minimize", "maximize"), "metric.goal", "minimize or maximize", goal)
    run_cap = content.get("run_cap")
    valid = run_cap is None or (type(run_cap) is int and run_cap > 0)
    _check(valid, "run_cap", "a whole number above 0", run_cap)
    early_terminate = content.get("early_terminate")
    pruner(early_terminate)  # raises `ValueError` if it is invalid
    command = content.get("command") or AGENT_COMMAND
    _check(isinstance(command, list), "command", "a list", command)

    sweep = Sweep(
        name=str(content.get("name") or default_name),
        program=program,
        project=content.get("project"),
        entity=content.get("entity"),
        method=method,
        metric=metric_name,
        direction=goal,
        early_terminate=early_terminate,
        command=[str(part) for part in command],
        run_cap=run_cap,
        constants={},
        searched={},
        lists={},
    )
    _add_parameters(sweep, "parameters", content.get("parameters"))
    return sweep


def _check(valid: object, key: str, expected: str, value: Any) -> None:
    """Raise `ValueError`, naming the key and what it must be, if its value is not `valid`."""
    if not valid:
        raise ValueError(f"{key}: must be {expected}, not {value!r}")


def _check_keys(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` if `value` is not a mapping, or has a key that is not `allowed`."""
    names = ", ".join(allowed)
    _check(isinstance(value, dict), key, f"a mapping with {names}", value)
    for name in value:
        _check(name in allowed, f"a key of {key}", f"one of {names}", name)


def pruner(early_terminate: Any) -> BasePruner:
    """The pruner for a sweep file's `early_terminate`. Raises `ValueError` if it is invalid.

    W&B calls it Hyperband, but gives every run the same rungs: asynchronous successive halving. A
    run goes on after min_iter, min_iter * eta, min_iter * eta^2, ... values of the metric if it is
    in the best 1 / eta of the runs that got there.
    """
    if early_terminate is None:
        return NopPruner()
    key = "early_terminate"
    _check_keys(key, early_terminate, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    kind = early_terminate.get("type")
    _check(kind == "hyperband", f"{key}.type", "hyperband", kind)
    try:
        eta = int(early_terminate.get("eta", 3))
        if "min_iter" in early_terminate:
            min_iter = int(early_terminate["min_iter"])
        else:  # the last rung is at max_iter / eta
            min_iter = int(early_terminate["max_iter"] / float(eta) ** early_terminate["s"])
            min_iter = max(min_iter, 1)
        return SuccessiveHalvingPruner(min_iter, eta)
    except (ArithmeticError, KeyError, TypeError, ValueError):
        expected = "given min_iter, or max_iter and s, and perhaps eta, at least 2"
        raise ValueError(f"{key}: must be {expected}, not {early_terminate}") from None


def _add_parameters(sweep: Sweep, key: str, parameters: Any, prefix: str = "") -> None:
    """Check parameters and add them to the sweep. The key `parameters` marks nested ones."""
    valid = isinstance(parameters, dict) and parameters
    _check(valid, key, "a mapping of names to parameters", parameters)
    for name, parameter in parameters.items():
        inner_key = f"{key}.{name}"
        _check("/" not in name, inner_key, "a name without /", name)
        valid = isinstance(parameter, dict)
        _check(valid, inner_key, "a mapping with value, values, or min and max", parameter)
        full_name = f"{prefix}{name}"
        if "parameters" in parameter:
            _check_keys(inner_key, parameter, ("parameters",))
            nested = parameter["parameters"]
            _add_parameters(sweep, f"{inner_key}.parameters", nested, f"{full_name}/")
        elif distribution := _distribution(inner_key, parameter, sweep.method):
            sweep.searched[full_name] = distribution
            for value in parameter.get("values", ()):
                if not isinstance(value, STORABLE):
                    sweep.lists[str(value)] = value
        else:
            sweep.constants[full_name] = parameter["value"]


def _distribution(key: str, parameter: dict[str, Any], method: str) -> BaseDistribution | None:
    """A parameter's distribution; None if it is a constant."""
    kind = parameter.get("distribution", _default_kind(parameter))
    expected = f"one of {', '.join(DISTRIBUTIONS)}"
    _check(kind in list(DISTRIBUTIONS), f"{key}.distribution", expected, kind)
    for name in DISTRIBUTIONS[kind]:
        if name not in parameter and name != "q":
            raise ValueError(f"{key}: needs value, values, or min and max")
    _check_keys(key, parameter, ("distribution", *DISTRIBUTIONS[kind]))
    if kind == "constant":
        return None
    if kind == "categorical":
        values = parameter["values"]
        _check(isinstance(values, list) and values, f"{key}.values", "a non-empty list", values)
        return CategoricalDistribution(
            [value if isinstance(value, STORABLE) else str(value) for value in values]
        )

    for name in ("min", "max", "q"):
        number = parameter.get(name, 1)
        expected = "a number below 1e15 (YAML reads 1e-4 as text: write 0.0001)"
        valid = type(number) in (int, float) and abs(number) < 1e15
        _check(valid, f"{key}.{name}", expected, number)
    try:
        distribution = _range(kind, parameter["min"], parameter["max"], parameter.get("q", 1))
    except (ArithmeticError, ValueError) as error:  # Optuna checks that low <= high
        raise ValueError(f"{key}: {error}") from None
    if method == "grid" and distribution.step is None:
        raise ValueError(
            f"{key}: a grid can't visit every value of {kind}; "
            "give values: [...] or use another method"
        )
    return distribution


def _default_kind(parameter: dict[str, Any]) -> str:
    """The distribution of a parameter that names none, as W&B infers it."""
    if "value" in parameter:
        return "constant"
    if "values" in parameter:
        return "categorical"
    is_int = type(parameter.get("min")) is int and type(parameter.get("max")) is int
    return "int_uniform" if is_int else "uniform"


def _range(kind: str, low: float, high: float, q: float) -> FloatDistribution | IntDistribution:
    if kind in ("int_uniform", "q_uniform"):  # the bounds become multiples of q
        first = math.ceil(low / q - 1e-9)
        last = math.floor(high / q + 1e-9)
        distribution = IntDistribution if type(q) is int else FloatDistribution
        return distribution(round(first * q, 12), round(last * q, 12), step=q)
    if kind == "log_uniform":  # W&B's bounds are exponents here
        low, high = math.exp(low), math.exp(high)
    elif kind == "inv_log_uniform":
        low, high = math.exp(-high), math.exp(-low)
    return FloatDistribution(low, high, log=kind != "uniform")
