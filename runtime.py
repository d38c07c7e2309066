"""A run's life around its training loop: seeds, device, W&B mode, the files that are written, the journal."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import platform
import random
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from PIL import Image

from metrics import Evaluation
from options import SharedSettings, UserError

LIBRARIES = ("torch", "torchvision", "transformers", "wandb", "numpy")
PROBE_BYTES = 8 << 20  # a run that can't write this much when it starts has no space


def warn_loudly(*lines: str) -> None:
    """A framed warning on stderr."""
    frame = "!" * 100
    print("", frame, *(f"!!  {line}" for line in lines), frame, "", sep="\n", file=sys.stderr, flush=True)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy, torch and CUDA; where `deterministic`, forbid algorithms whose bits may vary."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # every device's generator
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this to repeat its sums
        torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a tenth of the time
    # Only a warning where CUDA has no other algorithm, as for the histograms of wandb.watch.
    torch.use_deterministic_algorithms(deterministic, warn_only=torch.cuda.is_available())


def find_device(name: str) -> torch.device:
    """The device `--device` asks for; "auto" takes the fastest kind there is. Raises `UserError`."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def find_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" takes bf16 where the hardware has instructions for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 can't tell
        native = device.type == "cpu" and capabilities.get("avx512_bf16", False)
    return "bf16" if native else "fp32"


def wandb_mode(choice: str) -> str:
    """The mode for `wandb.init` that `--wandb` asks for.

    "auto" obeys `WANDB_MODE` and W&B's settings files where they say offline or disabled, and else is online
    where credentials are configured and offline where none are; it never prompts. Raises `UserError` where
    "online" was asked for and there are no credentials.
    """
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B would refuse it
    mode = wandb.setup().settings.mode if choice == "auto" else choice
    if mode != "online":
        return mode
    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        problem = "no API key is configured"
    except wandb.errors.AuthenticationError as error:
        problem = f"the API key can't be used: {error}"
    if choice == "online":
        raise UserError(f"--wandb online: {problem}; run `wandb login`, or use --wandb offline")
    print(f"W&B is offline: {problem}.")
    return "offline"


def settle_run(settings: SharedSettings, task: str) -> None:
    """Fill in what a run is called and where it goes: W&B mode, project, run id and output directory."""
    settings.wandb = wandb_mode(settings.wandb)
    settings.project = settings.project or os.environ.get("WANDB_PROJECT") or task
    settings.id = settings.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    settings.output_dir = settings.output_dir or f"runs/{task}-{settings.id}"


@contextlib.contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """Make the directory of a new run, which must be able to receive files and hold no other run.

    Raises `UserError` where it can't. If the block raises before a file was written, no directory is left.
    """
    path, made = Path(path), []
    try:
        made += [p for p in (path, *path.parents) if not p.exists()]
        for taken in ("config.json", "history.jsonl", "checkpoint.pt", "metrics.json"):
            if (path / taken).exists():
                raise UserError(f"--output_dir {path} already holds another run ({taken}); name another one")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _temporary_beside(path / "probe") as probe:
                probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            raise UserError(f"--output_dir {path}: can't write there ({error.strerror})") from None
        yield path
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: what was written is kept
            for directory in made:
                directory.rmdir()
        raise


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; at the end of the block it becomes `path`, whole or not at all."""
    with _temporary_beside(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write to; at the end of the block it becomes `path`, which does not exist yet."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as parent:
        temporary = Path(parent) / path.name
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as an indented JSON object, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_weights(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` a state dict or a checkpoint of tensors and plain values, whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a file does not say why it could not write
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_predictions(path: Path, result: Evaluation, more: Mapping[str, Iterable[Any]] = {}) -> None:
    """Write a CSV row for each example, in order: label, prediction, probabilities, loss and `more` columns."""
    columns = {"label": result.labels.tolist(), "prediction": result.predictions.tolist()}
    columns |= {f"probability_{c}": p.tolist() for c, p in enumerate(result.probabilities.T)}
    columns |= {"loss": result.losses.tolist(), **more}
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def write_png(path: Path, picture: Image.Image) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="png")


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    return {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}}


def record_settings(run: wandb.Run, settings: SharedSettings, output_dir: Path) -> None:
    """Write the settings as used to W&B's config and, with versions, to `config.json`; the data set becomes a tag.

    With `--save_code` the project's code is logged too.
    """
    used = dataclasses.asdict(settings)
    run.config.update({k: v for k, v in used.items() if run.config[k] != v}, allow_val_change=True)
    run.tags = tuple(dict.fromkeys((*(run.tags or ()), settings.dataset)))
    write_json(output_dir / "config.json", used | {"versions": versions()})
    if settings.save_code:
        here = Path(__file__).parent
        run.log_code(here, include_fn=lambda path: Path(path).parent == here and path.endswith((".py", ".yaml")))


@contextlib.contextmanager
def finishing(run: wandb.Run) -> Iterator[wandb.Run]:
    """End the W&B run with the block, as failed if it raises.

    `run` itself would do as a context manager, but prints a traceback for any exception, even a `UserError`.
    """
    try:
        yield run
    except BaseException as error:
        run.finish(exit_code=getattr(error, "status", 1))
        raise
    run.finish()


def log_numbers(run: wandb.Run, output_dir: Path, numbers: Mapping[str, float], step: int) -> None:
    """Log a row of numbers to W&B and to the journal, `history.jsonl`. `step`: training examples seen."""
    with (output_dir / "history.jsonl").open("a") as journal:
        journal.write(json.dumps({"step": step, **numbers}) + "\n")
    run.log(dict(numbers), step=step)


def diverged(name: str, loss: float, epoch: int, step: int, learning_rate: float) -> UserError:
    """What to raise when a loss, of training or validation, is NaN or infinite."""
    return UserError(
        f"the {name} loss is {loss} in epoch {epoch} by step {step}, learning rate {learning_rate:g}; training has "
        "stopped, what was logged is kept; a lower --learning_rate may help",
        status=1,
    )


def where_to_look(run: wandb.Run, output_dir: Path) -> str:
    """The line that ends a run: where its files are, and how to see them in W&B."""
    line = f"Files of this run: {output_dir}"
    if run.disabled:
        return f"{line} (W&B is disabled)"
    directory = os.path.relpath(Path(run.dir).parent)
    upload = f"upload it: wandb sync {directory}" if run.offline else f"on the web: {run.url}"
    return f"{line} | look at it: wandb leet {directory} | {upload}"
