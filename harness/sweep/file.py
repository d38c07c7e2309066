"""Read and check a W&B sweep file; its parameters become Optuna distributions."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from harness.errors import UserError

KEYS = "program name project entity description method metric parameters early_terminate command run_cap".split()
METHODS = ("grid", "random", "bayes")
DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # as W&B's agent
STORABLE = (int, float, str, type(None))  # types of categorical values that Optuna can store
RANGES = "uniform int_uniform log_uniform log_uniform_values inv_log_uniform inv_log_uniform_values".split()
# W&B's distributions that Optuna draws exactly, and their keys.
DISTRIBUTIONS = {
    "constant": {"value"},
    "categorical": {"values"},
    "q_uniform": {"min", "max", "q"},
    **{kind: {"min", "max"} for kind in RANGES},
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # with line separators and lone surrogates
MAX_NUMBER = 1e300  # a range of larger numbers could overflow


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
    command: list[str] | None
    run_cap: int | None
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    searched: dict[str, BaseDistribution] = dataclasses.field(default_factory=dict)
    # Values that Optuna can't store, by the string that replaces them in `searched`.
    lists: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        return _build_sweep(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _build_sweep(path: Path) -> Sweep:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the file is not valid YAML: {' '.join(str(error).split())}") from None
    _check_mapping("the file", content, KEYS)
    for key, value in content.items():
        if key not in ("description", "command"):  # these may have several lines
            _check_characters(key, value)
    program, method, name = content.get("program"), content.get("method"), content.get("name", path.stem)
    _check(isinstance(program, str), "program", "the name of the script to run", program)
    if not os.path.isfile(program):  # Path.is_file raises an error if the name is too long
        raise ValueError(f"program: no such file: {program}")
    _check(method in METHODS, "method", f"one of {', '.join(METHODS)}", method)
    for key in ("name", "project", "entity", "description"):
        _check(isinstance(content.get(key, ""), str), key, "a string", content.get(key))
    _check(0 < len(name) < 100, "name", "1 to 99 characters long", name[:100])
    metric = _check_mapping("metric", content.get("metric"), ("name", "goal"))
    _check(isinstance(metric.get("name"), str), "metric.name", "the name of a logged metric", metric.get("name"))
    goal = metric.get("goal", "minimize")
    _check(goal in ("minimize", "maximize"), "metric.goal", "minimize or maximize", goal)
    command = content.get("command")
    _check(command is None or (isinstance(command, list) and command != []), "command", "a non-empty list", command)
    _check_characters("command", re.sub(r"\s", "", "".join(map(str, command or ()))))
    if content.get("run_cap") is not None:
        _check_whole_number("run_cap", content["run_cap"])
    sweep = Sweep(
        name=name,
        program=program,
        method=method,
        metric=metric["name"],
        direction=goal,
        early_terminate=_check_hyperband(content.get("early_terminate")),
        **{key: content.get(key) for key in ("project", "entity", "command", "run_cap")},
    )
    for name, parameter in _flatten("parameters", content.get("parameters")):
        key = f"parameters.{name.replace('/', '.')}"
        try:
            json.dumps(parameter)
            parsed = _distribution(key, parameter, method)
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"{key}: {error}") from None
        (sweep.searched if isinstance(parsed, BaseDistribution) else sweep.constants)[name] = parsed
        sweep.lists[name] = {str(v): v for v in parameter.get("values", ()) if not isinstance(v, STORABLE)}
    return sweep


def _check(valid: bool, key: str, expected: str, value: Any) -> None:
    """Raise `ValueError`, naming the key and what it must be, if its value is not `valid`."""
    if not valid:
        raise ValueError(f"{key}: must be {expected}, not {value!r}")


def _check_whole_number(key: str, value: Any, lowest: int = 1, highest: int = 10**9) -> None:
    valid = _is_integer(value) and lowest <= value <= highest
    _check(valid, key, f"a whole number from {lowest} to {highest}", value)


def _check_characters(key: str, value: Any) -> None:
    """Raise `ValueError` if a string in `value` has a character that a command or a line of output can't have."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_characters(f"{key}.{name}", [name, inner])
    elif isinstance(value, list):
        for inner in value:
            _check_characters(key, inner)
    elif isinstance(value, str) and CONTROL.search(value):
        raise ValueError(f"{key}: {value!r} has a control character")


def _check_mapping(key: str, value: Any, allowed: Iterable[str]) -> dict[str, Any]:
    _check(isinstance(value, dict), key, f"a mapping with {', '.join(allowed)}", value)
    for unknown in sorted(value.keys() - set(allowed), key=str):
        location = unknown if key == "the file" else f"{key}.{unknown}"
        raise ValueError(f"{location}: unknown key; expected one of {', '.join(sorted(allowed))}")
    return value


def _check_hyperband(early: Any) -> dict[str, Any] | None:
    if early is None:
        return None
    key = "early_terminate"
    _check_mapping(key, early, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    _check(early.get("type") == "hyperband", f"{key}.type", "hyperband", early.get("type"))
    if early.get("strict"):
        raise ValueError(f"{key}.strict: is not supported offline; remove it")
    for name in sorted(early.keys() - {"type", "strict"}):
        _check_whole_number(f"{key}.{name}", early[name], 2 if name == "eta" else 1, 100 if name == "s" else 10**9)
    if "min_iter" not in early and not {"max_iter", "s"} <= early.keys():
        raise ValueError(f"{key}: needs min_iter, or max_iter and s")
    if early.get("min_iter", 1) > early.get("max_iter", math.inf):
        raise ValueError(f"{key}.min_iter: {early['min_iter']} is greater than max_iter, {early['max_iter']}")
    return early


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flatten(key: str, parameters: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each parameter with its name; a parameter with the key `parameters` holds nested ones."""
    _check(isinstance(parameters, dict) and parameters != {}, key, "a mapping of names to parameters", parameters)
    for name, parameter in parameters.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", str(name)):
            raise ValueError(f"{key}.{name}: is not a valid option name")
        _check(isinstance(parameter, dict), f"{key}.{name}", "a mapping with value, values, or min and max", parameter)
        if "parameters" in parameter:
            _check_mapping(f"{key}.{name}", parameter, ["parameters"])
            yield from _flatten(f"{key}.{name}.parameters", parameter["parameters"], f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", parameter


def _distribution(key: str, parameter: dict[str, Any], method: str) -> BaseDistribution | Any:
    """A parameter's distribution, or its value if it is a constant."""
    kind = parameter.get("distribution") or _default_kind(key, parameter)
    _check(isinstance(kind, str), f"{key}.distribution", "a string", kind)
    kind = "categorical_w_probabilities" if "probabilities" in parameter else kind
    if kind not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(f"{key}.distribution: {kind} can't be searched offline; it must be one of {known}")
    _check_mapping(key, parameter, DISTRIBUTIONS[kind] | {"distribution"})
    for required in sorted(DISTRIBUTIONS[kind] - {"q"} - parameter.keys()):
        raise ValueError(f"{key}.{required}: is missing")
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        values = parameter["values"]
        _check(isinstance(values, list) and values != [], f"{key}.values", "a non-empty list", values)
        return CategoricalDistribution([v if isinstance(v, STORABLE) else str(v) for v in values])
    distribution = _range_distribution(key, kind, parameter)
    if method == "grid" and isinstance(distribution, FloatDistribution) and distribution.step is None:
        raise ValueError(f"{key}: a grid can't visit every value of {kind}; give values: [...] or use another method")
    return distribution


def _default_kind(key: str, parameter: dict[str, Any]) -> str:
    """The distribution that W&B assumes if none is named."""
    if "value" in parameter or "values" in parameter:
        return "constant" if "value" in parameter else "categorical"
    low, high = parameter.get("min"), parameter.get("max")
    if low is None or high is None:
        raise ValueError(f"{key}: needs value, values, or min and max")
    if _is_integer(low) != _is_integer(high):
        raise ValueError(f"{key}: write min and max both as whole numbers or both with a decimal point")
    return "int_uniform" if _is_integer(low) else "uniform"


def _range_distribution(key: str, kind: str, parameter: dict[str, Any]) -> BaseDistribution:
    for name in sorted(parameter.keys() - {"distribution"}):
        value = parameter[name]
        hint = " (YAML reads numbers such as 1e-4 as strings: write 0.0001)" if isinstance(value, str) else ""
        _check(_is_integer(value) or isinstance(value, float), f"{key}.{name}", f"a number{hint}", value)
        _check(abs(value) <= MAX_NUMBER, f"{key}.{name}", f"between -{MAX_NUMBER} and {MAX_NUMBER}", value)
    low, high, q = parameter["min"], parameter["max"], parameter.get("q", 1)
    if low >= high:
        raise ValueError(f"{key}.min: {low} is not less than max, {high}")
    if kind == "int_uniform":
        if not (_is_integer(low) and _is_integer(high)):
            raise ValueError(f"{key}.min: int_uniform needs whole numbers, not {low} and {high}")
        return IntDistribution(low, high)
    if kind == "uniform":
        return FloatDistribution(low, high)
    if kind == "q_uniform":
        _check(q > 0, f"{key}.q", "above 0", q)
        if max(abs(low), abs(high)) > 1e15 * q:
            raise ValueError(f"{key}.q: {q} is too small for min and max")
        first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
        if first > last:
            raise ValueError(f"{key}.q: no multiple of {q} lies between {low} and {high}")
        if _is_integer(q):
            return IntDistribution(first * q, last * q, step=q)
        return FloatDistribution(round(first * q, 12), round(last * q, 12), step=q)
    if kind in ("log_uniform", "inv_log_uniform"):  # W&B's bounds are exponents here
        if not -700 < low < high < 700:
            raise ValueError(f"{key}: min and max of {kind} are exponents of e; log_uniform_values takes the values")
        low, high = (math.exp(low), math.exp(high)) if kind == "log_uniform" else (math.exp(-high), math.exp(-low))
    else:
        _check(low > 0, f"{key}.min", f"above 0 for {kind}", low)
    return FloatDistribution(low, high, log=True)
