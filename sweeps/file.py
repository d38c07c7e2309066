"""Read and check a W&B sweep file; its parameters become Optuna distributions."""

import dataclasses
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
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

KEYS = "program name project entity description method metric parameters early_terminate command run_cap".split()
RANGES = "q_uniform uniform int_uniform log_uniform log_uniform_values inv_log_uniform inv_log_uniform_values".split()
# W&B's distributions that Optuna draws exactly, and the keys that they need.
DISTRIBUTIONS = {
    "constant": ["value"],
    "categorical": ["values"],
    **{kind: ["min", "max"] for kind in RANGES},
}
MOST = 10**9  # trials or epochs
STORABLE = (int, float, str, type(None))  # types of categorical values that Optuna can store
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # with line separators and lone surrogates


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
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    searched: dict[str, BaseDistribution] = dataclasses.field(default_factory=dict)
    lists: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # by the text that Optuna stores instead of them

    @property
    def directory(self) -> Path:
        """The directory for the files of the sweep's runs."""
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name)
        return Path(
            "runs",
            f"sweep-{name}{f'-{zlib.crc32(self.name.encode()):x}' if name != self.name else ''}",
        )


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        return _build_sweep({"name": path.stem}, yaml.safe_load(path.read_text()))
    except (OSError, RecursionError, yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _build_sweep(defaults: dict[str, Any], content: Any) -> Sweep:
    _check_keys("the file", content, KEYS)
    content = dict.fromkeys(KEYS) | defaults | content
    command = content["command"] or [
        "${env}",
        "${interpreter}",
        "${program}",
        "${args}",
    ]  # as W&B's agent
    _check(isinstance(command, list), "command", "a list", command)
    _check_values("command", [re.sub(r"\s", " ", str(word)) for word in command])
    for key in KEYS:
        if key not in ("command", "description"):  # these may have several lines
            _check_values(key, content[key])
    for key in ("program", "name", "project", "entity"):
        _check(isinstance(content[key] or "", str), key, "text", content[key])
    _check(
        os.path.isfile(content["program"] or ""),
        "program",
        "an existing script",
        content["program"],
    )
    _check(0 < len(content["name"] or "") < 100, "name", "1 to 99 characters long", content["name"])
    _check(
        content["method"] in ("grid", "random", "bayes"),
        "method",
        "grid, random or bayes",
        content["method"],
    )
    _check_keys("metric", content["metric"], ["name", "goal"])
    metric, goal = content["metric"].get("name"), content["metric"].get("goal", "minimize")
    _check(isinstance(metric, str), "metric.name", "the name of a logged metric", metric)
    _check(goal in ("minimize", "maximize"), "metric.goal", "minimize or maximize", goal)
    cap = content["run_cap"]
    _check(
        cap is None or (type(cap) is int and 0 < cap <= MOST),
        "run_cap",
        f"a whole number from 1 to {MOST}",
        cap,
    )
    if (early := content["early_terminate"]) is not None:
        key = "early_terminate"
        _check_keys(key, early, ["type", "min_iter", "max_iter", "s", "eta"])
        _check(early.get("type") == "hyperband", f"{key}.type", "hyperband", early.get("type"))
        for name in early.keys() - {"type"}:
            lowest, highest = 2 if name == "eta" else 1, 100 if name == "s" else MOST
            valid = type(early[name]) is int and lowest <= early[name] <= highest
            _check(
                valid, f"{key}.{name}", f"a whole number from {lowest} to {highest}", early[name]
            )
        enough = "min_iter" in early or {"max_iter", "s"} <= early.keys()
        _check(enough, key, "given min_iter, or max_iter and s", early)
        _check(
            early.get("min_iter", 1) <= early.get("max_iter", math.inf),
            key,
            "given min_iter below max_iter",
            early,
        )
    kept = ("name", "program", "project", "entity", "method", "run_cap", "early_terminate")
    sweep = Sweep(
        **{key: content[key] for key in kept},
        metric=metric,
        direction=goal,
        command=list(map(str, command)),
    )
    for name, parameter in _flatten("parameters", content["parameters"]):
        parsed = _distribution(f"parameters.{name.replace('/', '.')}", parameter, sweep.method)
        (sweep.searched if isinstance(parsed, BaseDistribution) else sweep.constants)[name] = parsed
        sweep.lists |= {
            str(value): value
            for value in parameter.get("values", ())
            if not isinstance(value, STORABLE)
        }
    return sweep


def _check(valid: object, key: str, expected: str, value: Any) -> None:
    """Raise `ValueError`, naming the key and what it must be, if its value is not `valid`."""
    if not valid:
        raise ValueError(f"{key}: must be {expected}, not {value!r}")


def _check_keys(key: str, value: Any, allowed: Iterable[str]) -> None:
    _check(isinstance(value, dict), key, f"a mapping with {', '.join(allowed)}", value)
    for name in (name for name in value if name not in allowed):
        location = name if key == "the file" else f"{key}.{name}"
        raise ValueError(f"{location}: unknown key; expected one of {', '.join(allowed)}")


def _check_values(key: str, value: Any) -> None:
    """Raise `ValueError` if `value` holds what a command, JSON or a line of output can't express."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_values(f"{key}.{name}", [name, inner])
    elif isinstance(value, list):
        for inner in value:
            _check_values(key, inner)
    elif (
        not isinstance(value, STORABLE)
        or value != value
        or (type(value) is int and abs(value) >= 2**53)
    ):
        raise ValueError(
            f"{key}: {str(value)[:99]} is neither text nor a number that a float holds"
        )  # such as a date
    elif isinstance(value, str) and CONTROL.search(value):
        raise ValueError(f"{key}: {value!r} has a control character")


def _flatten(key: str, parameters: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each parameter with its name; a parameter with the key `parameters` holds nested ones."""
    _check(
        isinstance(parameters, dict) and parameters != {},
        key,
        "a mapping of names to parameters",
        parameters,
    )
    for name, parameter in parameters.items():
        _check(
            re.fullmatch(r"[A-Za-z_][\w.-]*", str(name)),
            f"{key}.{name}",
            "a valid option name",
            name,
        )
        _check(
            isinstance(parameter, dict),
            f"{key}.{name}",
            "a mapping with value, values, or min and max",
            parameter,
        )
        if "parameters" in parameter:
            _check_keys(f"{key}.{name}", parameter, ["parameters"])
            yield from _flatten(
                f"{key}.{name}.parameters", parameter["parameters"], f"{prefix}{name}/"
            )
        else:
            yield f"{prefix}{name}", parameter


def _distribution(key: str, parameter: dict[str, Any], method: str) -> BaseDistribution | Any:
    """A parameter's distribution, or its value if it is a constant."""
    whole = type(parameter.get("min")) is int or type(parameter.get("max")) is int
    kinds = {
        "value": "constant",
        "values": "categorical",
        "min": "int_uniform" if whole else "uniform",
    }
    implied = next(
        (kind for name, kind in kinds.items() if name in parameter), "uniform"
    )  # as for W&B
    kind = parameter.get("distribution", implied)
    _check(
        kind in list(DISTRIBUTIONS),
        f"{key}.distribution",
        f"one of {', '.join(DISTRIBUTIONS)}",
        kind,
    )
    if not set(DISTRIBUTIONS[kind]) <= parameter.keys():
        raise ValueError(f"{key}: needs value, values, or min and max")
    _check_keys(
        key,
        parameter,
        ["distribution", *DISTRIBUTIONS[kind], *(["q"] if kind == "q_uniform" else [])],
    )
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        values = parameter["values"]
        _check(
            isinstance(values, list) and values != [], f"{key}.values", "a non-empty list", values
        )
        return CategoricalDistribution(
            [value if isinstance(value, STORABLE) else str(value) for value in values]
        )
    for name in parameter.keys() - {"distribution"}:
        number = type(parameter[name]) is int or isinstance(parameter[name], float)
        _check(
            number,
            f"{key}.{name}",
            "a number (YAML reads 1e-4 as text: write 0.0001)",
            parameter[name],
        )
    try:
        distribution = _range(kind, parameter["min"], parameter["max"], parameter.get("q", 1))
    except ArithmeticError:
        raise ValueError(f"{key}: min, max or q is too large or too small") from None
    except ValueError as error:  # also from Optuna, which checks that low <= high
        raise ValueError(f"{key}: {error}") from None
    if method == "grid" and distribution.step is None:
        raise ValueError(
            f"{key}: a grid can't visit every value of {kind}; give values: [...] or use another method"
        )
    return distribution


def _range(kind: str, low: float, high: float, q: float) -> FloatDistribution | IntDistribution:
    if not (float(high) - float(low)) / q < 1e15:
        raise OverflowError
    if kind == "int_uniform":
        if not (type(low) is int and type(high) is int):
            raise ValueError("write min and max both as whole numbers or both with a decimal point")
        return IntDistribution(low, high)
    if kind == "q_uniform":
        first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
        if first > last:
            raise ValueError(f"no multiple of {q} lies between {low} and {high}")
        kind_of = IntDistribution if type(q) is int else FloatDistribution
        return kind_of(round(first * q, 12), round(last * q, 12), step=q)
    if kind in ("log_uniform", "inv_log_uniform"):  # W&B's bounds are exponents here
        low, high = (
            (math.exp(low), math.exp(high))
            if kind == "log_uniform"
            else (math.exp(-high), math.exp(-low))
        )
    return FloatDistribution(low, high, log=kind != "uniform")
