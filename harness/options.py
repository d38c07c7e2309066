"""Settings of a run: declared as a dataclass, read from the command line or a sweep, and checked.

Imports the standard library only, so that `--help` and a misspelled option are answered at once.
"""

import ast
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from harness.errors import UserError

# The identity of a run and where it writes: fixed before W&B's config is read, which can't change them.
RUN_OPTIONS = (
    "output_dir",
    "resume",
    "wandb",
    "project",
    "entity",
    "name",
    "id",
    "job_type",
    "group",
    "notes",
    "tags",
    "save_code",
    "stop_timeout",
)


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a command-line option.

    `limits` may hold `at_least`, `above` and `below` (numbers), `length` (of a list), `path` (~ is expanded) and
    `choices`: a tuple, or a function that returns one, called only if the option is given.
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class SharedSettings:
    """The options that every script has, with a line of help each."""

    dataset: str = option("auto", "which data to train on")
    data_dir: str = option("downloads", "directory to read the data from, or to download it to", path=True)
    output_dir: str | None = option(None, "directory for this run's files [runs/<task>-<run id>]", path=True)
    resume: bool = option(False, "continue the run in --output_dir, if there is one")

    epochs: int = option(5, "passes over the training data", at_least=1)
    batch_size: int = option(128, "examples in a batch", at_least=1)
    learning_rate: float = option(0.005, "the highest learning rate of the schedule", above=0)
    seed: int = option(42, "seeds Python, NumPy, torch and CUDA", at_least=0, below=2**32)
    max_steps: int | None = option(None, "end after this many optimizer steps", at_least=1)
    device: str = option("auto", "device to train on", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "auto: bf16 if the hardware supports it", choices=("auto", "fp32", "bf16"))
    deterministic: bool = option(True, "use only algorithms that repeat to the last bit")
    compile: bool = option(False, "compile the model with torch.compile")

    patience: int = option(0, "stop after this many epochs without improvement; 0: never", at_least=0)
    checkpoint_every: int = option(500, "batches between checkpoints; every epoch also ends with one", at_least=1)
    stop_timeout: float = option(25, "seconds to save in after a signal, before the run stops where it is", above=0)
    log_every: int = option(10, "batches between rows of training metrics", at_least=1)
    watch: str = option("all", "histograms of the weights", choices=("off", "gradients", "parameters", "all"))
    watch_every: int | None = option(None, "batches between histograms [once an epoch]", at_least=1)

    wandb: str = option(
        "auto",
        "auto: online if there is an API key, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str | None = option(None, "W&B project")
    entity: str | None = option(None, "W&B user or team")
    name: str | None = option(None, "name of the run")
    id: str | None = option(None, "W&B run id")
    job_type: str | None = option(None, "W&B job type")
    group: str | None = option(None, "W&B group of runs")
    notes: str | None = option(None, "a note about the run")
    tags: list[str] = option([], "tags of the run")
    save_code: bool = option(False, "log the code as an artifact")
    log_model: str = option("none", "which models to log as artifacts", choices=("none", "best", "all"))


Settings = TypeVar("Settings", bound=SharedSettings)


def parse(settings_class: type[Settings], argv: Sequence[str] | None = None) -> Settings:
    """Settings from command-line arguments (`sys.argv` if None).

    Raises `UserError` if an option is unknown or its value is invalid.
    """
    return _build(settings_class, vars(_read(settings_class, argv)), prefix="--")


def from_config(requested: Settings, config: Mapping[str, Any]) -> Settings:
    """`requested`, updated from a W&B run's config, in which a sweep may have set values.

    Keys that are not options are ignored, and `RUN_OPTIONS` keep their values. Raises `UserError` if a value is
    invalid.
    """
    names = {field.name for field in dataclasses.fields(requested)} - set(RUN_OPTIONS)
    configured = _build(type(requested), {k: v for k, v in config.items() if k in names}, prefix="config.")
    return dataclasses.replace(configured, **{name: getattr(requested, name) for name in RUN_OPTIONS})


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = (
            "; a value that begins with a dash is written --option=-value" if "expected one argument" in message else ""
        )
        raise UserError(f"{message}{hint} (--help lists the options)")


def _read(settings_class: type, argv: Sequence[str] | None) -> Namespace:
    """The options that were given, still as strings."""
    module = sys.modules[settings_class.__module__]
    description = (module.__doc__ or "").strip().partition("\n")[0]
    parser = _Parser(description=description, usage="%(prog)s [--OPTION VALUE ...]", allow_abbrev=False)
    for field in dataclasses.fields(settings_class):
        kind = _kind(settings_class, field.name)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        choices = field.metadata.get("choices")
        listed = isinstance(choices, tuple) and len(choices) < 6
        parser.add_argument(
            f"--{field.name}",
            # A flag may stand alone (--compile) or carry a value, as sweeps write it (--compile=True).
            nargs="?" if kind is bool else "*" if kind in (list[int], list[str]) else None,
            action="extend" if kind == list[str] else "store",  # --tags a --tags b
            const="true" if kind is bool else None,
            default=None,
            metavar="{" + ",".join(choices) + "}" if listed else field.name.upper(),
            help=field.metadata["help"].replace("%", "%%")
            + (f" [{_as_typed(default)}]" if default not in (None, []) else ""),
        )
    given, unknown = parser.parse_known_args(argv)
    for name, value in vars(given).items():
        if value == [] and _kind(settings_class, name) not in (list[int], list[str]):  # --batch_size=--
            parser.error(f"argument --{name}: expected one argument")
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].split("=")[0], [f"--{f.name}" for f in dataclasses.fields(settings_class)], 1, 0.7
        )
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return Namespace(**{k: v for k, v in vars(given).items() if v is not None})


def _build(settings_class: type[Settings], values: Mapping[str, Any], prefix: str) -> Settings:
    checked = {}
    for field in dataclasses.fields(settings_class):
        if field.name in values:
            try:
                checked[field.name] = _convert(
                    _kind(settings_class, field.name),
                    values[field.name],
                    optional=field.default is None,
                    **{k: v for k, v in field.metadata.items() if k != "help"},
                )
            except ValueError as error:
                raise UserError(f"{prefix}{field.name}: {error}") from None
    return settings_class(**checked)


def _kind(settings_class: type, name: str) -> Any:
    """The declared type of an option, without `| None`."""
    hint = get_type_hints(settings_class)[name]
    if type(None) in get_args(hint):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _convert(
    kind: Any,
    value: Any,
    optional: bool = False,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    length: int | None = None,
    path: bool = False,
    **limits: float,
) -> Any:
    """`value`, a string or a value of a sweep's config, as `kind`. Raises `ValueError` if it is invalid."""
    if optional and (value is None or value == "None"):
        return None
    if kind in (list[int], list[str]):
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(parts) == 1:  # sweeps write lists as "[16, 32]"
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                written = ast.literal_eval(str(parts[0]))
                parts = list(written) if isinstance(written, (list, tuple)) else parts
        if length is not None and len(parts) != length:
            raise ValueError(f"needs {length} values, got {len(parts)}: {_as_typed(parts)!r}")
        (item,) = get_args(kind)
        return [_convert(item, part, **limits) for part in parts]
    if kind is bool:
        word = str(value).lower()
        if word not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"must be true or false, got {value!r}")
        return word in ("true", "1", "yes")
    if kind is str:
        if value is None or str(value) == "":
            raise ValueError("must not be empty")
        if "\0" in str(value) or any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise ValueError(f"must be UTF-8 text, got {value!r}")
        choices = choices() if callable(choices) else choices
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be one of {', '.join(choices)}; got {value!r}{hint}")
        return os.path.expanduser(str(value)) if path else str(value)
    return _number(kind, value, **limits)


def _number(
    kind: type,
    value: Any,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    whole = kind is int
    if isinstance(value, bool) or not math.isfinite(number) or (whole and number != int(number)):
        raise ValueError(f"must be a {'whole' if whole else 'finite'} number, got {value!r}")
    if whole and abs(number) >= 2**63:
        raise ValueError(f"is too large, got {value!r}")
    if at_least is not None and number < at_least:
        raise ValueError(f"must be at least {at_least}, got {value!r}")
    if above is not None and number <= above:
        raise ValueError(f"must be above {above}, got {value!r}")
    if below is not None and number >= below:
        raise ValueError(f"must be below {below}, got {value!r}")
    return int(number) if whole else number


def metric_names(prefix: str, two_classes: bool = False) -> Callable[[], tuple[str, ...]]:
    """Choices for a metric, which import torch only if they are needed; `two_classes` adds those that need two."""

    def names() -> tuple[str, ...]:
        from metrics import EVALUATION_METRICS as metrics

        return tuple(f"{prefix}/{name}" for name in metrics if two_classes or not metrics[name].two_classes)

    return names
