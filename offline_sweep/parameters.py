"""The parameters of a sweep: what a file may say about one, and how a trial gets its value."""

import json
import math
import random
import re
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial
from pydantic import BaseModel, ConfigDict, ValidationError

PARAMETER_NAME = re.compile("[A-Za-z_][A-Za-z0-9_.-]*")
Positive = Annotated[float, Gt(0)]


class Section(BaseModel):
    """A part of a sweep file."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Nested(Section):
    """A mapping of parameters."""

    parameters: Annotated[dict, MinLen(1)]


class Parameter(Section):
    """A parameter. Subclasses have the keys of W&B's distributions."""

    distribution: str
    q: Positive = 1.0  # a value of q_uniform and the like is rounded to a multiple


class Constant(Parameter):
    """A value that no trial changes."""

    value: Any


class Choice(Parameter):
    """One of several values."""

    values: Annotated[list, MinLen(1)]


class WeightedChoice(Choice):
    """One of several values that are not equally likely."""

    probabilities: list[Annotated[float, Ge(0)]]


class Range(Parameter):
    """A number between two others, or between their logarithms."""

    min: float
    max: float


class IntRange(Range):
    """A whole number between two others."""

    min: int
    max: int


class PositiveRange(Range):
    """A number whose logarithm is drawn."""

    min: Positive


class Normal(Parameter):
    """A number with a normal distribution, or whose logarithm has one."""

    mu: float = 0.0
    sigma: Positive = 1.0


class Beta(Parameter):
    """A number with a beta distribution."""

    a: Positive = 1.0
    b: Positive = 1.0


DISTRIBUTIONS = {
    "constant": Constant,
    "categorical": Choice,
    "categorical_w_probabilities": WeightedChoice,
    "int_uniform": IntRange,
    "uniform": Range,
    "q_uniform": Range,
    "log_uniform": Range,
    "q_log_uniform": Range,
    "log_uniform_values": PositiveRange,
    "q_log_uniform_values": PositiveRange,
    "inv_log_uniform": Range,
    "inv_log_uniform_values": PositiveRange,
    "normal": Normal,
    "q_normal": Normal,
    "log_normal": Normal,
    "q_log_normal": Normal,
    "beta": Beta,
    "q_beta": Beta,
}
IN_A_GRID = ("constant", "categorical", "int_uniform", "q_uniform")


def read_parameters(content: Any, method: str) -> dict[str, Parameter]:
    """The parameters of a sweep file by name, nested ones as outer/inner.

    Raises `ValueError`, naming the key and what is wrong with it.
    """
    parameters = {}
    for name, parameter in content.items():
        try:
            if not (PARAMETER_NAME.fullmatch(name) and isinstance(parameter, dict)):
                raise ValueError("must be a name without spaces and /, with a mapping")
            if "parameters" in parameter:
                nested = Nested(**parameter).parameters
                for inner_name, inner in read_parameters(nested, method).items():
                    parameters[f"{name}/{inner_name}"] = inner
            else:
                parameters[name] = _read_parameter(parameter, method)
        except (OverflowError, ValueError) as error:
            raise ValueError(f"parameters.{name}: {explain(error)}") from None
    return parameters


def explain(error: Exception) -> str:
    """The first of the keys that are wrong, and what is wrong with it."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    is_number = first["type"] == "float_type"
    hint = " (YAML reads 1e-4 as text: write 0.0001)" if is_number else ""
    return f"{key}: {first['msg']}, got {first['input']!r}{hint}"


def _read_parameter(content: dict[str, Any], method: str) -> Parameter:
    kind = content.get("distribution", _default_distribution(content))
    if kind not in list(DISTRIBUTIONS):
        raise ValueError(f"distribution: must be one of {', '.join(DISTRIBUTIONS)}, got {kind!r}")
    if "q" in content and not kind.startswith("q_"):
        raise ValueError(f"q: only q_{kind} has it")
    parameter = DISTRIBUTIONS[kind](**content | {"distribution": kind})
    if method == "grid" and kind not in IN_A_GRID:
        raise ValueError(
            f"distribution: a grid can't visit every value of {kind}; "
            "give values: [...] or use another method"
        )
    if isinstance(parameter, WeightedChoice):
        weights = parameter.probabilities
        if len(weights) != len(parameter.values) or not math.isclose(sum(weights), 1, rel_tol=1e-5):
            raise ValueError("probabilities: must be one for each value, with the sum 1")
    elif isinstance(parameter, Choice) and method == "grid":
        distinct = {stored(value): value for value in parameter.values}
        parameter.values = list(distinct.values())
    elif isinstance(parameter, Range):
        if parameter.min >= parameter.max:
            raise ValueError(f"min: must be below max, got {parameter.min}")
        if kind == "q_uniform" and method == "grid":  # as W&B's, it does not reach max
            count = math.ceil((parameter.max - parameter.min) / parameter.q)
            values = [_round(parameter.min + index * parameter.q) for index in range(count)]
            return Choice(distribution=kind, values=values)
        optuna_distribution(parameter)  # raises `OverflowError` if an exponent is too large
    return parameter


def _default_distribution(content: dict[str, Any]) -> str:
    """The distribution of a parameter that names none, as W&B infers it."""
    if "value" in content:
        return "constant"
    if "values" in content:
        return "categorical_w_probabilities" if "probabilities" in content else "categorical"
    is_int = type(content.get("min")) is int and type(content.get("max")) is int
    return "int_uniform" if is_int else "uniform"


def _round(value: float) -> float:
    """A multiple of q, as an integer if it is one: this is how W&B sends it."""
    value = round(value, 12)
    return int(value) if value.is_integer() else value


def stored(value: Any) -> Any:
    """What Optuna stores for a value of a list."""
    is_plain = value is None or type(value) in (int, float, str)  # true would be equal to 1
    return value if is_plain else json.dumps(value)


def optuna_distribution(parameter: Parameter) -> BaseDistribution:
    """The distribution that Optuna searches, of one value if it can't search the parameter's."""
    kind = parameter.distribution
    if isinstance(parameter, Choice):
        return CategoricalDistribution([stored(value) for value in parameter.values])
    if isinstance(parameter, IntRange):
        return IntDistribution(parameter.min, parameter.max)
    if isinstance(parameter, Range):
        low, high = parameter.min, parameter.max
        if kind == "inv_log_uniform":
            low, high = -high, -low
    elif isinstance(parameter, Normal):
        low = high = random.normalvariate(parameter.mu, parameter.sigma)
    else:
        low = high = random.betavariate(parameter.a, parameter.b)
    is_log = "log" in kind
    if is_log and not kind.endswith("_values"):  # the logarithms were given
        low, high = math.exp(low), math.exp(high)
    return FloatDistribution(low, high, log=is_log)


def suggest(trial: Trial, name: str, parameter: Parameter) -> Any:
    """A new trial's value of a parameter."""
    distribution = optuna_distribution(parameter)
    if isinstance(parameter, WeightedChoice):
        return random.choices(parameter.values, parameter.probabilities)[0]
    if isinstance(parameter, Choice):
        choice = trial.suggest_categorical(name, distribution.choices)
        return parameter.values[distribution.choices.index(choice)]
    low, high = distribution.low, distribution.high
    if isinstance(parameter, IntRange):
        return trial.suggest_int(name, low, high)
    value = trial.suggest_float(name, low, high, log=distribution.log)
    if parameter.distribution.startswith("q_"):
        value = _round(round(value / parameter.q) * parameter.q)
    return value
