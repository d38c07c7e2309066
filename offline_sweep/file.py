"""Reads and checks a W&B sweep file. Its parameters become Optuna distributions."""

import dataclasses
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

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
MAX_COUNT = 10**9  # trials or epochs
STORABLE = (int, float, str, type(None))  # types of categorical values that Optuna can store
# Line separators and lone surrogates included.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
OPTION_NAME = re.compile(r"[A-Za-z_][\w.-]*")


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
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name)
        if name != self.name:  # tell "a b" from "a-b"
            name += f"-{zlib.crc32(self.name.encode()):x}"
        return Path("runs", f"sweep-{name}")


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        return _build_sweep(yaml.safe_load(path.read_text()), path.stem)
    except (OSError, RecursionError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _build_sweep(content: Any, default_name: str) -> Sweep:
    _check_keys("the file", content, KEYS)
    content.setdefault("name", default_name)
    for key, value in content.items():
        if key not in ("command", "description"):  # these may have several lines
            _check_values(key, value)

    texts = {key: content.get(key) for key in ("name", "program", "project", "entity")}
    for key, value in texts.items():
        _check(value is None or isinstance(value, str), key, "text", value)
    program = texts["program"]
    _check(program and os.path.isfile(program), "program", "an existing script", program)
    name = texts["name"]
    _check(name and len(name) < 100, "name", "1 to 99 characters long", name)

    method = content.get("method")
    _check(method in ("grid", "random", "bayes"), "method", "grid, random or bayes", method)
    metric = content.get("metric")
    _check_keys("metric", metric, ("name", "goal"))
    metric_name = metric.get("name")
    _check(isinstance(metric_name, str), "metric.name", "the name of a logged metric", metric_name)
    goal = metric.get("goal", "minimize")
    _check(goal in ("minimize", "maximize"), "metric.goal", "minimize or maximize", goal)

    run_cap = content.get("run_cap")
    if run_cap is not None:
        _check_count("run_cap", run_cap)
    early_terminate = content.get("early_terminate")
    if early_terminate is not None:
        _check_early_terminate(early_terminate)
    command = content.get("command") or AGENT_COMMAND
    _check(isinstance(command, list), "command", "a list", command)
    command = [str(part) for part in command]
    _check_values("command", " ".join(command).split())  # line breaks are allowed

    sweep = Sweep(
        **texts,
        method=method,
        metric=metric_name,
        direction=goal,
        early_terminate=early_terminate,
        command=command,
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
        if name not in allowed:
            location = name if key == "the file" else f"{key}.{name}"
            raise ValueError(f"{location}: unknown key; expected one of {names}")


def _check_count(key: str, value: Any, low: int = 1, high: int = MAX_COUNT) -> None:
    valid = type(value) is int and low <= value <= high
    _check(valid, key, f"a whole number from {low} to {high}", value)


def _check_values(key: str, value: Any) -> None:
    """Raise `ValueError` if a command, JSON or a line of output can't express `value`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(f"{key}.{name}", [name, inner])
    elif isinstance(value, list):
        for inner in value:
            _check_values(key, inner)
    elif isinstance(value, str):
        if CONTROL_CHARACTERS.search(value):
            raise ValueError(f"{key}: {value!r} has a control character")
    else:
        is_nan = isinstance(value, float) and math.isnan(value)
        too_large = isinstance(value, int) and abs(value) >= 2**53
        if is_nan or too_large or not isinstance(value, STORABLE):  # such as a date
            text = str(value)[:99]
            raise ValueError(f"{key}: {text} is neither text nor a number that a float holds")


def _check_early_terminate(value: Any) -> None:
    key = "early_terminate"
    _check_keys(key, value, ("type", "min_iter", "max_iter", "s", "eta"))
    _check(value.get("type") == "hyperband", f"{key}.type", "hyperband", value.get("type"))
    max_iter = value.get("max_iter", MAX_COUNT)
    _check_count(f"{key}.max_iter", max_iter)
    _check_count(f"{key}.min_iter", value.get("min_iter", 1), high=max_iter)
    _check_count(f"{key}.s", value.get("s", 1), high=100)
    _check_count(f"{key}.eta", value.get("eta", 2), low=2)
    sufficient = "min_iter" in value or ("max_iter" in value and "s" in value)
    _check(sufficient, key, "given min_iter, or max_iter and s", value)


def _add_parameters(sweep: Sweep, key: str, parameters: Any, prefix: str = "") -> None:
    """Check parameters and add them to the sweep. The key `parameters` marks nested ones."""
    valid = isinstance(parameters, dict) and parameters
    _check(valid, key, "a mapping of names to parameters", parameters)
    for name, parameter in parameters.items():
        inner_key = f"{key}.{name}"
        _check(OPTION_NAME.fullmatch(str(name)), inner_key, "a valid option name", name)
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
        expected = "a number (YAML reads 1e-4 as text: write 0.0001)"
        _check(type(number) in (int, float), f"{key}.{name}", expected, number)
    try:
        distribution = _range(kind, parameter["min"], parameter["max"], parameter.get("q", 1))
    except ArithmeticError:
        raise ValueError(f"{key}: min, max or q is too large or too small") from None
    except ValueError as error:  # also from Optuna, which checks that low <= high
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
    if type(parameter.get("min")) is int or type(parameter.get("max")) is int:
        return "int_uniform"
    return "uniform"


def _range(kind: str, low: float, high: float, q: float) -> FloatDistribution | IntDistribution:
    if not (high - low) / q < 1e15:
        raise OverflowError
    if kind == "int_uniform":
        if not (type(low) is int and type(high) is int):
            raise ValueError("write min and max both as whole numbers or both with a decimal point")
        return IntDistribution(low, high)
    if kind == "q_uniform":  # its bounds become multiples of q
        first = math.ceil(low / q - 1e-9)
        last = math.floor(high / q + 1e-9)
        if first > last:
            raise ValueError(f"no multiple of {q} lies between {low} and {high}")
        distribution = IntDistribution if type(q) is int else FloatDistribution
        return distribution(round(first * q, 12), round(last * q, 12), step=q)
    if kind == "log_uniform":  # W&B's bounds are exponents here
        low, high = math.exp(low), math.exp(high)
    elif kind == "inv_log_uniform":
        low, high = math.exp(-high), math.exp(-low)
    return FloatDistribution(low, high, log=kind != "uniform")
