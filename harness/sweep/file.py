"""Read and check a W&B sweep file; its parameters become Optuna distributions."""

import dataclasses
import json
import math
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
# W&B's distributions that Optuna draws exactly, and their keys.
DISTRIBUTIONS = {
    "constant": {"value"},
    "categorical": {"values"},
    "uniform": {"min", "max"},
    "int_uniform": {"min", "max"},
    "q_uniform": {"min", "max", "q"},
    "log_uniform": {"min", "max"},
    "log_uniform_values": {"min", "max"},
    "inv_log_uniform": {"min", "max"},
    "inv_log_uniform_values": {"min", "max"},
}
SERVER_ONLY_DISTRIBUTIONS = (
    "categorical_w_probabilities normal log_normal beta q_normal q_log_normal q_beta q_log_uniform "
    "q_log_uniform_values".split()
)
MACROS = (
    "env interpreter program args args_no_hyphens args_no_boolean_flags args_no_equals args_json args_append_hydra "
    "args_override_hydra"
).split()


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
    constants: dict[str, Any]
    searched: dict[str, BaseDistribution]
    lists: dict[str, dict[str, Any]]  # values that Optuna can't store, by the string that replaces them in `searched`


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, naming the key and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} can't be read: nested too deeply") from None
    try:
        return _build_sweep(content, path)
    except RecursionError:
        raise UserError(f"{path}: parameters: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _build_sweep(content: Any, path: Path) -> Sweep:
    _check_mapping("the file", content, KEYS)
    program, method, name = content.get("program"), content.get("method"), content.get("name", path.stem)
    if not isinstance(program, str):
        raise ValueError("program: must name the script to run")
    if not Path(program).is_file():
        raise ValueError(f"program: no such file: {program}")
    if method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {method!r}")
    for key in ("name", "project", "entity", "description"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{key}: must be a string, not {content[key]!r}")
    if not 0 < len(name) < 100 or not name.isprintable():
        raise ValueError(f"name: must have 1 to 99 printable characters, not {name[:100]!r}")
    if "metric" not in content:
        raise ValueError("metric: is missing; give its name, and goal: minimize or maximize")
    metric = _check_mapping("metric", content["metric"], ("name", "goal"))
    if not isinstance(metric.get("name"), str):
        raise ValueError("metric: needs the name of a logged metric")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal: must be minimize or maximize, not {goal!r}")
    _check_command(content.get("command"))
    run_cap = content.get("run_cap")
    if run_cap is not None and not (_is_integer(run_cap) and run_cap > 0):
        raise ValueError(f"run_cap: must be a whole number above 0, not {run_cap!r}")
    sweep = Sweep(
        name=name,
        program=program,
        project=content.get("project"),
        entity=content.get("entity"),
        method=method,
        metric=metric["name"],
        direction=goal,
        early_terminate=_check_hyperband(content.get("early_terminate")),
        command=content.get("command"),
        run_cap=run_cap,
        constants={},
        searched={},
        lists={},
    )
    for parameter_name, parameter in _flatten("parameters", content.get("parameters")):
        _add_parameter(sweep, parameter_name, parameter)
    return sweep


def _check_mapping(key: str, value: Any, allowed: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be a mapping, not {value!r}")
    for unknown in sorted(value.keys() - set(allowed), key=str):
        location = unknown if key == "the file" else f"{key}.{unknown}"
        raise ValueError(f"{location}: unknown key; expected one of {', '.join(sorted(allowed))}")
    return value


def _check_command(command: Any) -> None:
    if command is not None and not (isinstance(command, list) and command):
        raise ValueError("command: must be a non-empty list")
    for word in map(str, command or ()):
        if word.startswith("${") and not re.fullmatch(r"\$\{(\w+|envvar:[A-Z0-9_]+)\}", word):
            raise ValueError(f"command: {word} is not a valid macro")
        if re.fullmatch(r"\$\{\w+\}", word) and word[2:-1] not in MACROS:
            raise ValueError(f"command: unknown macro {word}; must be one of {', '.join(MACROS)}")


def _check_hyperband(early: Any) -> dict[str, Any] | None:
    if early is None:
        return None
    key = "early_terminate"
    _check_mapping(key, early, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    if early.get("type") != "hyperband":
        raise ValueError(f"{key}.type: must be hyperband, not {early.get('type')!r}")
    if early.get("strict"):
        raise ValueError(f"{key}.strict: is not supported offline; remove it")
    for name in ("min_iter", "max_iter", "s", "eta"):
        if name in early and not (_is_integer(early[name]) and early[name] >= (2 if name == "eta" else 1)):
            raise ValueError(f"{key}.{name}: must be a whole number above {name == 'eta':d}, not {early[name]!r}")
    if "min_iter" not in early and not {"max_iter", "s"} <= early.keys():
        raise ValueError(f"{key}: needs min_iter, or max_iter and s")
    if early.get("min_iter", 1) > early.get("max_iter", math.inf):
        raise ValueError(f"{key}.min_iter: {early['min_iter']} is greater than max_iter, {early['max_iter']}")
    return early


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flatten(key: str, parameters: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each parameter with its name; a parameter with the key `parameters` holds nested ones."""
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{key}: must be a mapping of names to parameters, not {parameters!r}")
    for name, parameter in parameters.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", str(name)):
            raise ValueError(f"{key}.{name}: is not a valid option name")
        if not isinstance(parameter, dict):
            raise ValueError(f"{key}.{name}: must be a mapping with value, values, or min and max, not {parameter!r}")
        if "parameters" in parameter:
            _check_mapping(f"{key}.{name}", parameter, ["parameters"])
            yield from _flatten(f"{key}.{name}.parameters", parameter["parameters"], f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", parameter


def _add_parameter(sweep: Sweep, name: str, parameter: dict[str, Any]) -> None:
    key = f"parameters.{name.replace('/', '.')}"
    try:
        json.dumps(parameter)
        parsed = _distribution(key, parameter, sweep.method)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{key}: {error}") from None
    (sweep.searched if isinstance(parsed, BaseDistribution) else sweep.constants)[name] = parsed
    sweep.lists[name] = {str(v): v for v in parameter.get("values", ()) if not isinstance(v, STORABLE)}


def _distribution(key: str, parameter: dict[str, Any], method: str) -> BaseDistribution | Any:
    """A parameter's distribution, or its value if it is a constant."""
    kind = parameter.get("distribution") or _default_kind(key, parameter)
    if not isinstance(kind, str):
        raise ValueError(f"{key}.distribution: must be a string, not {kind!r}")
    if kind in SERVER_ONLY_DISTRIBUTIONS or "probabilities" in parameter:
        kind = kind if kind in SERVER_ONLY_DISTRIBUTIONS else "categorical_w_probabilities"
        raise ValueError(f"{key}.distribution: {kind} can't be searched offline, only with W&B's server")
    if kind not in DISTRIBUTIONS:
        raise ValueError(f"{key}.distribution: must be one of {', '.join(DISTRIBUTIONS)}, not {kind!r}")
    _check_mapping(key, parameter, DISTRIBUTIONS[kind] | {"distribution"})
    for required in DISTRIBUTIONS[kind] - {"q"}:
        if required not in parameter:
            raise ValueError(f"{key}.{required}: is missing")
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        values = parameter["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}.values: must be a non-empty list, not {values!r}")
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
    if _is_integer(low) and _is_integer(high):
        return "int_uniform"
    if _is_integer(low) or _is_integer(high):
        raise ValueError(f"{key}: write min and max both as whole numbers or both with a decimal point")
    return "uniform"


def _range_distribution(key: str, kind: str, parameter: dict[str, Any]) -> BaseDistribution:
    for name, value in parameter.items():
        if name != "distribution" and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            hint = "; YAML reads numbers such as 1e-4 as strings: write 0.0001" if isinstance(value, str) else ""
            raise ValueError(f"{key}.{name}: must be a number, not {value!r}{hint}")
        if name != "distribution" and not math.isfinite(value):
            raise ValueError(f"{key}.{name}: must be finite, not {value!r}")
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
        return _q_uniform(key, low, high, q)
    if kind in ("log_uniform", "inv_log_uniform"):  # W&B's bounds are exponents here
        if not -700 < low < high < 700:
            raise ValueError(f"{key}: min and max of {kind} are exponents of e; log_uniform_values takes the values")
        low, high = (math.exp(low), math.exp(high)) if kind == "log_uniform" else (math.exp(-high), math.exp(-low))
    elif low <= 0:
        raise ValueError(f"{key}.min: must be above 0 for {kind}, not {low}")
    return FloatDistribution(low, high, log=True)


def _q_uniform(key: str, low: float, high: float, q: float) -> BaseDistribution:
    """The multiples of q between the bounds."""
    if q <= 0:
        raise ValueError(f"{key}.q: must be above 0, not {q}")
    first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)
    if first > last:
        raise ValueError(f"{key}.q: no multiple of {q} lies between {low} and {high}")
    if _is_integer(q):
        return IntDistribution(first * q, last * q, step=q)
    return FloatDistribution(round(first * q, 12), round(last * q, 12), step=q)
