"""A W&B sweep file: read, checked, and its parameters as Optuna's distributions."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from options import UserError

KEYS = "program name project entity description method metric parameters early_terminate command run_cap".split()
METHODS = ("grid", "random", "bayes")
PLAIN = (int, float, str, type(None))  # the kinds of values that Optuna stores
COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # W&B's default
# W&B's kinds of parameters that Optuna draws exactly, and the keys that they have.
KINDS = {
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
OTHER_KINDS = (
    "categorical_w_probabilities normal log_normal beta q_normal q_log_normal q_beta q_log_uniform "
    "q_log_uniform_values".split()
)
MACROS = (
    "env interpreter program args args_no_hyphens args_no_boolean_flags args_no_equals args_json args_append_hydra "
    "args_override_hydra"
).split()


@dataclasses.dataclass
class Sweep:
    """What a sweep file asks for; parameters by name, nested ones as outer/inner."""

    name: str
    program: str
    project: str | None
    entity: str | None
    method: str
    metric: str
    direction: str  # as Optuna has it
    early_terminate: dict[str, Any] | None
    command: list[str] | None
    run_cap: int | None
    constants: dict[str, Any]
    searched: dict[str, BaseDistribution]
    lists: dict[str, dict[str, Any]]  # values that are no plain ones, by the text that stands for them in `searched`


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises `UserError`, which names the key and what is wrong with it."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is not YAML that can be read: it is nested too deeply") from None
    try:
        return _check(content, path)
    except RecursionError:
        raise UserError(f"{path}: parameters: are nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _check(content: Any, path: Path) -> Sweep:
    _mapping("the file", content, KEYS)
    program, method, name = content.get("program"), content.get("method"), content.get("name", path.stem)
    if not isinstance(program, str):
        raise ValueError("program: which script is to be run?")
    if not Path(program).is_file():
        raise ValueError(f"program: there is no {program} here")
    if method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {method!r}")
    for key in ("name", "project", "entity", "description"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{key}: must be a string, not {content[key]!r}")
    if not 0 < len(name) < 100 or not name.isprintable():
        raise ValueError(f"name: {name[:100]!r} must have 1 to 99 letters")
    if "metric" not in content:
        raise ValueError("metric: which figure is to be searched by? Its name, and goal: minimize or maximize")
    metric = _mapping("metric", content["metric"], ("name", "goal"))
    if not isinstance(metric.get("name"), str):
        raise ValueError("metric: needs the name of a figure")
    goal = metric.get("goal", "minimize")
    if goal not in ("minimize", "maximize"):
        raise ValueError(f"metric.goal: must be minimize or maximize, not {goal!r}")
    command = content.get("command")
    if command is not None and not (isinstance(command, list) and command):
        raise ValueError("command: must be a list of words")
    for word in command or ():
        if str(word).startswith("${") and not re.fullmatch(r"\$\{(\w+|envvar:[A-Z0-9_]+)\}", str(word)):
            raise ValueError(f"command: {word} is neither a word nor a macro")
        if re.fullmatch(r"\$\{\w+\}", str(word)) and str(word)[2:-1] not in MACROS:
            raise ValueError(f"command: {word} is none of the macros that can be used offline, {', '.join(MACROS)}")
    run_cap = content.get("run_cap")
    if run_cap is not None and not (_is_whole(run_cap) and run_cap > 0):
        raise ValueError(f"run_cap: must be a whole number above 0, not {run_cap!r}")
    constants, searched, lists = {}, {}, {}
    for name_of, parameter in _flat("parameters", content.get("parameters")):
        key = f"parameters.{name_of.replace('/', '.')}"
        try:
            json.dumps(parameter)
            found = _distribution(key, parameter, method)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{key}: {error}") from None
        (searched if isinstance(found, BaseDistribution) else constants)[name_of] = found
        lists[name_of] = {str(v): v for v in parameter.get("values", ()) if not isinstance(v, PLAIN)}
    return Sweep(
        name, program, content.get("project"), content.get("entity"), method, metric["name"], goal,
        _hyperband(content.get("early_terminate")), command, run_cap, constants, searched, lists,
    )  # fmt: skip


def _mapping(key: str, value: Any, allowed: Iterable[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be a mapping, not {value!r}")
    for unknown in sorted(value.keys() - set(allowed), key=str):
        where = unknown if key == "the file" else f"{key}.{unknown}"
        raise ValueError(f"{where}: is no key here; there are {', '.join(sorted(allowed))}")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flat(key: str, parameters: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each parameter with its name; `parameters` in a parameter are nested ones."""
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{key}: must be a mapping of names to parameters, not {parameters!r}")
    for name, parameter in parameters.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", str(name)):
            raise ValueError(f"{key}.{name}: is no name for an option")
        if not isinstance(parameter, dict):
            raise ValueError(f"{key}.{name}: must be a mapping, with value, values, or min and max; not {parameter!r}")
        if "parameters" in parameter:
            _mapping(f"{key}.{name}", parameter, ["parameters"])
            yield from _flat(f"{key}.{name}.parameters", parameter["parameters"], f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", parameter


def _distribution(key: str, parameter: dict[str, Any], method: str) -> BaseDistribution | Any:
    """A parameter's distribution, or its value if it is a constant."""
    kind = parameter.get("distribution") or _kind(key, parameter)
    if not isinstance(kind, str):
        raise ValueError(f"{key}.distribution: must be a word, not {kind!r}")
    if kind in OTHER_KINDS or "probabilities" in parameter:
        kind = kind if kind in OTHER_KINDS else "categorical_w_probabilities"
        raise ValueError(f"{key}.distribution: {kind} can't be searched offline; W&B's own server can")
    if kind not in KINDS:
        raise ValueError(f"{key}.distribution: {kind!r} is none of {', '.join(KINDS)}")
    _mapping(key, parameter, KINDS[kind] | {"distribution"})
    for needed in KINDS[kind] - {"q"}:
        if needed not in parameter:
            raise ValueError(f"{key}.{needed}: is missing")
    if kind == "constant":
        return parameter["value"]
    if kind == "categorical":
        values = parameter["values"]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}.values: must be a list that is not empty, not {values!r}")
        return CategoricalDistribution([v if isinstance(v, PLAIN) else str(v) for v in values])
    found = _range(key, kind, parameter)
    if method == "grid" and isinstance(found, FloatDistribution) and found.step is None:
        raise ValueError(f"{key}: a grid can't visit every value of {kind}; give values: [...], or another method")
    return found


def _kind(key: str, parameter: dict[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in parameter or "values" in parameter:
        return "constant" if "value" in parameter else "categorical"
    low, high = parameter.get("min"), parameter.get("max")
    if low is None or high is None:
        raise ValueError(f"{key}: needs value, values, or min and max")
    if _is_whole(low) and _is_whole(high):
        return "int_uniform"
    if _is_whole(low) or _is_whole(high):
        raise ValueError(f"{key}: write min and max both as whole numbers or both with a decimal point")
    return "uniform"


def _range(key: str, kind: str, parameter: dict[str, Any]) -> BaseDistribution:
    for name, value in parameter.items():
        if name != "distribution" and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            hint = "; YAML reads numbers such as 1e-4 as words: write 0.0001" if isinstance(value, str) else ""
            raise ValueError(f"{key}.{name}: must be a number, not {value!r}{hint}")
        if name != "distribution" and not math.isfinite(value):
            raise ValueError(f"{key}.{name}: must be finite, not {value!r}")
    low, high, q = parameter["min"], parameter["max"], parameter.get("q", 1)
    if low >= high:
        raise ValueError(f"{key}.min: {low} is not less than max, {high}")
    if kind == "int_uniform":
        if not (_is_whole(low) and _is_whole(high)):
            raise ValueError(f"{key}.min: int_uniform needs whole numbers, not {low} and {high}")
        return IntDistribution(low, high)
    if kind == "uniform":
        return FloatDistribution(low, high)
    if kind == "q_uniform":
        if q <= 0:
            raise ValueError(f"{key}.q: must be above 0, not {q}")
        first, last = math.ceil(low / q - 1e-9), math.floor(high / q + 1e-9)  # values are multiples of q
        if first > last:
            raise ValueError(f"{key}.q: there is no multiple of {q} from {low} to {high}")
        return (
            IntDistribution(first * q, last * q, step=q)
            if _is_whole(q)
            else FloatDistribution(round(first * q, 12), round(last * q, 12), step=q)
        )
    if kind in ("log_uniform", "inv_log_uniform"):  # the bounds are exponents, as in W&B
        if not -700 < low < high < 700:
            raise ValueError(f"{key}: min and max of {kind} are exponents of e; log_uniform_values takes the values")
        low, high = (math.exp(low), math.exp(high)) if kind == "log_uniform" else (math.exp(-high), math.exp(-low))
    elif low <= 0:
        raise ValueError(f"{key}.min: must be above 0 for {kind}, not {low}")
    return FloatDistribution(low, high, log=True)


def _hyperband(early: Any) -> dict[str, Any] | None:
    if early is None:
        return None
    key = "early_terminate"
    _mapping(key, early, ("type", "min_iter", "max_iter", "s", "eta", "strict"))
    if early.get("type") != "hyperband":
        raise ValueError(f"{key}.type: must be hyperband, not {early.get('type')!r}")
    if early.get("strict"):
        raise ValueError(f"{key}.strict: can't be done offline; leave it out")
    for name in ("min_iter", "max_iter", "s", "eta"):
        if name in early and not (_is_whole(early[name]) and early[name] >= (2 if name == "eta" else 1)):
            raise ValueError(f"{key}.{name}: must be a whole number above {name == 'eta':d}, not {early[name]!r}")
    if "min_iter" not in early and not {"max_iter", "s"} <= early.keys():
        raise ValueError(f"{key}: needs min_iter, or max_iter and s")
    if early.get("min_iter", 1) > early.get("max_iter", math.inf):
        raise ValueError(f"{key}.min_iter: {early['min_iter']} is more than max_iter, {early['max_iter']}")
    return early
