"""Settings of a run: declared as a dataclass, read from the command line and a sweep, and checked.

Imports only the standard library, so that `--help` and a misspelled option get an instant answer.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from harness.errors import UserError

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
NOT_TAKEN = {"config", "id", "output_dir", "resume"}  # by `--config`: they belong to one run
SWEEP_FILE = "WANDB_SWEEP_PARAM_PATH"  # both kinds of W&B's agent write a run's values to this file
PROVENANCE = ("command", "date", "host", "git_commit", "code", "resumed")  # of a run
# Keys of config.json that are not options.
RESERVED = {*PROVENANCE, "versions", "metrics", "task_name", "run_token"}


def option(
    default: Any,
    help: str,
    *,
    may_change: bool = False,
    tells_apart: bool = True,
    placeholder: Any = ...,
    **limits: Any,
) -> Any:
    """A dataclass field that is also a command-line option.

    `may_change`: a resumed run may have another value, because no number of the run depends on it.
    `tells_apart`: a report shows it where runs differ. `placeholder`: the value that stands for one
    found at the start, such as "auto". `limits` may hold `at_least`, `above` and `below` (numbers),
    `length` (of a list), `path` (~ is expanded) and `choices`.
    """
    metadata = {
        "help": help,
        "may_change": may_change,
        "tells_apart": tells_apart,
        "placeholder": placeholder,
        "limits": limits,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def housekeeping(default: Any, help: str, **limits: Any) -> Any:
    """An option that changes no number of a run and that a report does not show."""
    return option(default, help, may_change=True, tells_apart=False, **limits)


@dataclasses.dataclass(kw_only=True, frozen=True)
class SharedSettings:
    """The options that every script has, with a line of help each."""

    data_dir: str = housekeeping(
        "downloads", "directory to read the data from, or to download it to", path=True
    )
    output_dir: str | None = housekeeping(
        None, "directory for this run's files [runs/<task>-<run id>]", path=True
    )
    resume: bool = housekeeping(False, "continue the run in --output_dir, if there is one")
    config: str | None = housekeeping(
        None, "defaults from a run's config.json, or a YAML file", path=True
    )

    epochs: int = option(5, "passes over the training data", at_least=1, below=10**6)
    batch_size: int = option(128, "examples in a batch", at_least=1)
    micro_batch_size: int | None = option(
        None, "examples in a forward pass, if a batch does not fit in memory", at_least=1
    )
    learning_rate: float = option(0.005, "the highest learning rate of the schedule", above=0)
    seed: int = option(42, "seeds Python, NumPy and torch", at_least=0, below=2**32)
    max_steps: int | None = option(
        None, "end after this many optimizer steps, which the schedule spans", at_least=1
    )
    device: str = option(
        "auto",
        "device to train on; auto: cuda or cpu",
        placeholder="auto",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    precision: str = option(
        "auto",
        "auto: bf16 if the hardware supports it",
        placeholder="auto",
        choices=("auto", "fp32", "bf16"),
    )
    deterministic: bool = option(True, "use only algorithms that repeat to the last bit")

    patience: int = option(
        0, "stop after this many epochs without improvement; 0: never", at_least=0
    )
    checkpoint_every: int = housekeeping(
        500, "batches between checkpoints; every epoch also ends with one", at_least=1
    )
    stop_timeout: float = housekeeping(
        25, "seconds allowed after a signal to finish the batch and save", above=0, below=1e6
    )
    peer_timeout: float = housekeeping(
        300, "seconds that torchrun's processes wait for each other", above=0, below=1e6
    )
    log_every: int = option(
        10, "batches between rows of training metrics", tells_apart=False, at_least=1
    )
    watch: str = housekeeping(
        "all", "what to log histograms of", choices=("off", "gradients", "parameters", "all")
    )
    watch_every: int | None = housekeeping(
        None, "batches between histograms [once an epoch]", at_least=1
    )

    wandb: str = housekeeping(
        "auto",
        "auto: online if there is an API key, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str | None = housekeeping(None, "W&B project")
    entity: str | None = housekeeping(None, "W&B user or team")
    name: str | None = option(None, "name of the run", may_change=True)
    id: str | None = housekeeping(None, "W&B run id")
    job_type: str | None = housekeeping(None, "W&B job type")
    group: str | None = option(None, "W&B group of runs", may_change=True)
    notes: str | None = option(None, "a note about the run", may_change=True)
    tags: list[str] = option([], "tags of the run", may_change=True)
    save_code: bool = housekeeping(
        False, "log the script and the modules that it imports as an artifact"
    )
    log_model: str = housekeeping(
        "none", "which models to log as artifacts", choices=("none", "best", "all")
    )


AnySettings = TypeVar("AnySettings")


def parse(settings_class: type[AnySettings], argv: Sequence[str] | None = None) -> AnySettings:
    """Settings from the command line; the values of a sweep's run override it.

    Without `argv`, the arguments are those of this process, if its script declares the settings.
    Options that are not given come from `--config` and, on resuming, from the run. Raises
    `UserError` if an option is unknown or its value is invalid.
    """
    if argv is None:
        argv = command_line(settings_class.__module__)
    given = _check(settings_class, _read_command_line(settings_class, argv), prefix="--")
    if not issubclass(settings_class, SharedSettings):
        return settings_class(**given)
    if taken := RESERVED & _kinds(settings_class).keys():
        raise UserError(
            f"{min(taken)}: config.json uses this name; choose another one for your option"
        )
    given |= _check(settings_class, _read_sweep_file(), prefix="config.")
    if given.get("config"):
        given = _read_config(settings_class, Path(given["config"]), "--config") | given
    used = {}
    if given.get("resume") and given.get("output_dir"):
        path = Path(given["output_dir"], "config.json")
        if path.exists():
            used = _read_config(settings_class, path, "--resume")
    return settings_class(**used | given)


def _read_config(settings_class: type, path: Path, source: str) -> dict[str, Any]:
    """The options in a run's config.json, or in a YAML file. Raises `UserError`."""
    import yaml  # one of W&B's dependencies, and not needed otherwise

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no options, such as epochs: 3")
        if "run_token" in values:  # a run's, which also holds what is no option
            ignored = set(NOT_TAKEN) if source == "--config" else set()
            # This machine may be offline. WANDB_MODE takes precedence over a file.
            if values.get("wandb") == "online" or os.environ.get("WANDB_MODE"):
                ignored.add("wandb")
            names = [name for name in _kinds(settings_class) if name not in ignored]
            values = {name: values[name] for name in names if name in values}
        elif source == "--resume":
            return {}  # not a run's: `output_directory` refuses the directory
        return _check(settings_class, values, prefix="")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        problem = f"can't be read: {' '.join(str(error).split())}"
        if source == "--resume":  # the checkpoint has what matters
            print(f"{path} {problem}: options that are not given have their defaults.")
            return {}
    except UserError as error:
        problem = f"does not fit this script: {error}"
    raise UserError(f"{source}: {path} {problem}")


def given_options(settings: SharedSettings) -> list[str]:
    """The arguments that differ from the defaults, as on a command line."""
    arguments = []
    for name, default in vars(type(settings)()).items():
        value = getattr(settings, name)
        if value != default and name != "config":
            arguments.append(f"--{name}={value}")
    return arguments


def command_line(module: str) -> list[str]:
    """The arguments of this process if `module` is its script; a notebook's kernel has its own."""
    is_script = module == "__main__" and hasattr(sys.modules[module], "__file__")
    return sys.argv[1:] if is_script else []


class Parser(argparse.ArgumentParser):
    """Raises `UserError` if the command line is invalid, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")

    def parse_known_args(self, args: Sequence[Any], namespace: Any = None) -> Any:
        """Take numbers and paths too, as in main(["--epochs", 2])."""
        return super().parse_known_args(list(map(str, args)), namespace)


def _read_command_line(settings_class: type, argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that were given, still as strings."""
    description = (sys.modules[settings_class.__module__].__doc__ or "").strip().partition("\n")[0]
    usage = "%(prog)s [--OPTION VALUE ...]"
    parser = Parser(description=description, usage=usage, allow_abbrev=False)
    kinds = _kinds(settings_class)
    defaults = settings_class()
    for field in dataclasses.fields(settings_class):
        kind = kinds[field.name]
        default = getattr(defaults, field.name)
        text = field.metadata["help"].replace("%", "%%")
        if choices := field.metadata["limits"].get("choices"):
            text += f" ({', '.join(choices)})"
        if default not in (None, []):
            typed = " ".join(map(str, default)) if isinstance(default, list) else default
            text += f" [{typed}]"
        nargs = None
        if kind is bool:
            nargs = "?"  # --resume, or as sweeps write it: --resume=True
        elif get_origin(kind) is list:
            nargs = "*"
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            nargs=nargs,
            action="extend" if kind == list[str] else "store",  # --tags a --tags b
            const="true" if kind is bool else None,
            help=text,
        )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = _nearest(unknown[0].split("=")[0], [f"--{name}" for name in kinds])
        parser.error(f"unknown option {unknown[0]}{near}")
    return vars(given)


def _read_sweep_file() -> dict[str, Any]:
    """The values that W&B's agent has chosen for this run; empty without an agent."""
    path = os.environ.get(SWEEP_FILE)
    if not path:
        return {}
    import yaml  # one of W&B's dependencies, and not needed otherwise

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        content.pop("wandb_version")
        return {str(name): entry["value"] for name, entry in content.items()}
    except Exception as error:  # of the file, of YAML, or of what it holds
        raise UserError(f"{SWEEP_FILE}: {path} can't be read: {error}") from None


def _kinds(settings_class: type) -> dict[str, Any]:
    """The declared type of each option, without `| None`."""
    kinds = get_type_hints(settings_class)
    for name, kind in kinds.items():
        alternatives = get_args(kind)
        if type(None) in alternatives:
            kinds[name] = alternatives[0]
    return kinds


def _check(settings_class: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """`values` as their declared types. Raises `UserError` if one is unknown or invalid."""
    kinds = _kinds(settings_class)
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{prefix}{name}: no such option{_nearest(name, list(fields))}")
        if fields[name].default is None and value in (None, "None"):
            checked[name] = None
            continue
        try:
            checked[name] = _convert(kinds[name], value, fields[name].metadata["limits"])
        except ValueError as error:
            raise UserError(f"{prefix}{name}: {error}") from None
    return checked


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _convert(kind: Any, value: Any, limits: Mapping[str, Any]) -> Any:
    """`value`, a string or a value of a sweep, as `kind`. Raises `ValueError` if it is invalid."""
    if get_origin(kind) is list:
        return _list(*get_args(kind), value, **limits)
    if kind is bool:
        word = str(value).lower()
        if word not in BOOLEANS:
            raise ValueError(f"must be true or false, got {value!r}")
        return BOOLEANS[word]
    if kind is str:
        return _text(value, **limits)
    return _number(kind, value, **limits)


def _list(kind: type, value: Any, length: int | None = None, **limits: float) -> list[Any]:
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(parts) == 1:  # sweeps write lists as "[16, 32]"
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            written = ast.literal_eval(str(parts[0]))
            if isinstance(written, (list, tuple)):
                parts = list(written)
    if length is not None and len(parts) != length:
        raise ValueError(f"needs {length} values, got {len(parts)}: {parts}")
    return [_convert(kind, part, limits) for part in parts]


def _text(value: Any, choices: Sequence[str] = (), path: bool = False) -> str:
    if choices and str(value) == "False":
        value = "off"  # which YAML takes for false
    text = "" if value is None else str(value)
    if not choices and isinstance(value, (bool, dict, list)):  # of YAML
        raise ValueError(f"must be text, got {value!r}: put it in quotes")
    if not text:
        raise ValueError("must not be empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"must be UTF-8 text, got {value!r}")
    if choices and value not in choices:
        near = _nearest(text, choices)
        raise ValueError(f"must be one of {', '.join(choices)}; got {value!r}{near}")
    return os.path.expanduser(text) if path else text


def _number(
    kind: type,
    value: Any,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float | int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    fits = math.isfinite(number) and (kind is float or number == int(number))
    if isinstance(value, bool) or not fits:
        raise ValueError(f"must be a {'whole' if kind is int else 'finite'} number, got {value!r}")
    if kind is int and abs(number) >= 2**63:
        raise ValueError(f"is too large, got {value!r}")
    if number < at_least:
        raise ValueError(f"must be at least {at_least}, got {value!r}")
    if number <= above:
        raise ValueError(f"must be above {above}, got {value!r}")
    if number >= below:
        raise ValueError(f"must be below {below}, got {value!r}")
    return kind(number)
