"""Settings of a run, from the command line or from a sweep: declared, parsed and checked.

Imports the standard library only, so that `--help` and a misspelt option are answered at once.
"""

import atexit
import contextlib
import dataclasses
import difflib
import errno
import gc
import math
import os
import re
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

# What a run is called and where it goes is settled before W&B is asked for its config, and stays so.
OF_THE_RUN = (
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
)


class UserError(Exception):
    """What the user can put right: ends the program in one line and with `status`, without a traceback."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """The run was asked to stop, by a signal or by W&B, and can be resumed; `status` is its exit status."""

    def __init__(self, reason: str, status: int):
        super().__init__(f"stopped by {reason}; the same command with --resume goes on where it was")
        self.status = status


def warn_loudly(*lines: str) -> None:
    """A framed warning on stderr."""
    frame = "!" * 100
    print("", frame, *(f"!!  {line}" for line in lines), frame, "", sep="\n", file=sys.stderr, flush=True)


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field that is also a command-line option.

    `limits` may hold `at_least`, `above` and `below` (numbers), `choices` (a tuple) and `length` (of a list).
    """
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


FIGURES = ("loss", "acc", "precision_macro", "recall_macro", "f1_macro",
           "precision_micro", "recall_micro", "f1_micro", "mcc")  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class SharedSettings:
    """The options that both scripts have, with a line of help each."""

    dataset: str = option("auto", "which data to train on")
    data_dir: str = option("downloads", "directory that holds the data, or receives them")
    output_dir: str | None = option(None, "directory for this run's files [runs/<task>-<run id>]")
    resume: bool = option(False, "go on with the run in --output_dir, if there is one")

    epochs: int = option(5, "passes over the training data", at_least=1)
    batch_size: int = option(128, "examples in a batch", at_least=1)
    learning_rate: float = option(0.005, "the highest learning rate of the schedule", above=0)
    seed: int = option(42, "seeds Python, NumPy, torch and CUDA", at_least=0, below=2**32)
    max_steps: int | None = option(None, "end after this many optimizer steps", at_least=1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "auto: bf16 where the hardware computes in it", choices=("auto", "fp32", "bf16"))
    deterministic: bool = option(True, "only use algorithms that give the same bits every time")
    compile: bool = option(False, "compile the model with torch.compile")

    monitor: str = option(
        "valid/loss", "figure that chooses the best model", choices=tuple(f"valid/{f}" for f in FIGURES)
    )
    patience: int = option(0, "stop after this many epochs without a better one; 0 never does", at_least=0)
    checkpoint_every: int = option(500, "batches between checkpoints; each epoch ends with one", at_least=1)
    log_every: int = option(10, "batches between rows of training figures", at_least=1)
    watch: str = option("all", "histograms of the weights", choices=("off", "gradients", "parameters", "all"))
    watch_every: int | None = option(None, "batches between histograms [once an epoch]", at_least=1)

    wandb: str = option(
        "auto",
        "auto: online with an API key, else offline",
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
    """Settings from command-line arguments (`sys.argv` where None).

    Raises `UserError` for an option that is unknown, misspelt or has a value it can't have.
    """
    return _build(settings_class, vars(_read(settings_class, argv)), prefix="--")


def from_config(asked: Settings, config: Mapping[str, Any]) -> Settings:
    """`asked` with what a W&B run's config says, where a sweep may have set some; checked like the command line.

    Keys that are no option are left alone, and so are the settings `OF_THE_RUN`. Raises `UserError`.
    """
    names = {field.name for field in dataclasses.fields(asked)} - set(OF_THE_RUN)
    configured = _build(type(asked), {k: v for k, v in config.items() if k in names}, prefix="config.")
    return dataclasses.replace(configured, **{name: getattr(asked, name) for name in OF_THE_RUN})


def is_better(figure: str, value: float, than: float) -> bool:
    """Whether a monitored figure has improved: losses are to fall, everything else is to rise."""
    return value < than if figure.endswith("loss") else value > than


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def _read(settings_class: type, argv: Sequence[str] | None) -> Namespace:
    """The options that were given, as the strings that were given."""
    module = sys.modules[settings_class.__module__]
    description = (module.__doc__ or "").strip().splitlines()[0]
    parser = _Parser(description=description, usage="%(prog)s [--OPTION VALUE ...]", allow_abbrev=False)
    for field in dataclasses.fields(settings_class):
        kind = _kind(settings_class, field.name)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        choices = field.metadata.get("choices")
        parser.add_argument(
            f"--{field.name}",
            # A flag may stand alone (--compile) or carry its value, as a sweep writes it (--compile=True).
            nargs="?" if kind is bool else "*" if kind in (list[int], list[str]) else None,
            const="true" if kind is bool else None,
            default=dataclasses.MISSING,
            metavar="{" + ",".join(choices) + "}" if choices and len(choices) < 6 else field.name.upper(),
            help=field.metadata["help"].replace("%", "%%")
            + (f" [{_as_typed(default)}]" if default not in (None, []) else ""),
        )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].split("=")[0], [f"--{f.name}" for f in dataclasses.fields(settings_class)], 1, 0.7
        )
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return Namespace(**{k: v for k, v in vars(given).items() if v is not dataclasses.MISSING})


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
    """The declared type of an option, without the `| None` of an optional one."""
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
    choices: tuple[str, ...] | None = None,
    length: int | None = None,
    **limits: float,
) -> Any:
    """`value`, a string or what a sweep's config holds, as `kind`; `ValueError` says what is wrong with it."""
    if optional and (value is None or value == "None"):
        return None
    if kind in (list[int], list[str]):
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(parts) == 1 and re.fullmatch(r"\[.*\]|\(.*\)", str(parts[0])):  # as a sweep writes a list: "[16, 32]"
            parts = [part.strip(" '\"") for part in str(parts[0])[1:-1].split(",") if part.strip()]
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
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be one of {', '.join(choices)}; got {value!r}{hint}")
        return str(value)
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
    if at_least is not None and number < at_least:
        raise ValueError(f"must be at least {at_least}, got {value!r}")
    if above is not None and number <= above:
        raise ValueError(f"must be above {above}, got {value!r}")
    if below is not None and number >= below:
        raise ValueError(f"must be below {below}, got {value!r}")
    return int(number) if whole else number


def check_before_imports(settings_class: type[SharedSettings]) -> None:
    """Answer `--help` and mistakes in the options, before a script imports what takes seconds to load.

    And set what has to be set by then, for this process: how OpenMP's threads wait, the collector, Ctrl-C, and that
    nothing but W&B's runs is sent anywhere.
    """
    if _is_first() and (status := status_of(lambda: parse(settings_class))):
        sys.exit(status)
    # A thread of OpenMP that waits is to sleep soon, not to spin: where other programs want the processor too,
    # spinning keeps it from the very thread that is waited for, and training takes ten times as long.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"
    os.environ.setdefault("OTEL_SDK_DISABLED", "true")  # W&B's own usage statistics wait for a server at the exit
    gc.disable()  # until the imports are done: what they make is no garbage, and there is much of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until then Ctrl-C just ends the process


def run_script(main: Callable[[], Any]) -> None:
    """Call `main` and end the process; what the user can put right ends in one line on stderr and its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # the collector leaves alone what was imported
    gc.enable()
    gc.set_threshold(50_000)  # and looks rarely, since the ONNX exporter is imported later
    try:
        status = status_of(main)
    finally:
        gc.unfreeze()  # or triton would complain below a traceback
    if sys.modules["__main__"].__spec__ or sys.flags.interactive:
        sys.exit(status)  # `python -m cProfile train_mnist.py` and the like have yet to report
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)  # at once: Python would take apart all modules first, which takes nearly a second


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR)


def status_of(action: Callable[[], Any]) -> int:
    """The exit status of `action`; what the user can put right has been said by then, in one line."""
    try:
        action()
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
        return 0
    except Stopped as stopped:
        message, status = str(stopped), stopped.status
        if not _is_first():
            return status  # the first process says it
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or closing it would fail once more
        message, status = "error: what reads the output has gone", 1
    except UserError as error:
        message, status = f"error: {error}", error.status
    except OSError as error:
        if error.errno not in FULL + REFUSED:
            raise
        message, status = f"error: {error.filename or 'writing'}: {error.strerror}", 1 if error.errno in FULL else 2
    except Exception as error:
        message, status = _of_wandb(error), 2
        if message is None:
            raise
    if not _is_first():
        message = f"process {os.environ['RANK']}: {message}"
    with contextlib.suppress(OSError):
        sys.stdout.flush()  # so that this is the last line where both go to one file
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status


def _is_first() -> bool:
    """Whether this is the first of the processes of torchrun, or the only one."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


def _of_wandb(error: Exception) -> str | None:
    """What W&B found wrong with its settings, on the command line or in the environment; None for other errors."""
    wandb, pydantic = sys.modules.get("wandb"), sys.modules.get("pydantic_core")  # importing them would take long
    if wandb and isinstance(error, wandb.errors.UsageError):
        return f"error: W&B: {error}"
    if pydantic and isinstance(error, pydantic.ValidationError):
        problem = error.errors()[0]
        return f"error: W&B: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return None
