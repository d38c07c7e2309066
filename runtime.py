"""A run's life around its training loop: seeds, device, the files it writes, its checkpoint and its journal."""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pickle
import platform
import random
import secrets
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from PIL import Image

import monitoring
import parallel
from metrics import Evaluation, TrainingFigures
from options import OF_THE_RUN, SharedSettings, UserError, warn_loudly

LIBRARIES = ("torch", "torchvision", "transformers", "wandb", "numpy")
CONFIG, JOURNAL, METRICS = "config.json", "history.jsonl", "metrics.json"
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
OUTCOMES = (JOURNAL, CHECKPOINT, PREVIOUS, METRICS)  # what a run leaves once it has begun to train
# What does not change the numbers of a run, and what says that the run is to find a setting itself.
MAY_CHANGE = (*OF_THE_RUN, "data_dir", "checkpoint_every", "watch", "watch_every", "log_model")
LEFT_OPEN = {"dataset": "auto", "device": "auto", "precision": "auto", "model": None, "learning_rate": None}
PROBE_BYTES = 8 << 20  # a run that can't write this much when it starts has no space


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
    """The device `--device` asks for; "auto" takes the fastest kind there is. Raises `UserError`.

    Of several processes on a machine, each takes a GPU of its own; MPS can't be shared.
    """
    mps = torch.backends.mps.is_available() and parallel.world_size() == 1
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    if name != "cuda" or parallel.world_size() == 1:
        return torch.device(name)
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise UserError(f"{here} processes on a machine with {gpus} GPUs: start {gpus}, or take --device cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name, torch.cuda.current_device())


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


def settle_run(settings: SharedSettings, task: str) -> None:
    """Fill in what a run is called and where it goes: W&B mode, project, run id and output directory.

    A run that is resumed keeps its project and its id; of a sweep's run, W&B knows both. Raises `UserError`.
    """
    if settings.resume and not settings.output_dir:
        raise UserError("--resume needs to know which run: give the --output_dir it had")
    before = _read_json(Path(settings.output_dir, CONFIG)) or {} if settings.resume else {}
    settings.wandb = monitoring.wandb_mode(settings.wandb)
    for name in ("project", "entity", "id"):
        wanted = getattr(settings, name) or os.environ.get({"id": "WANDB_RUN_ID"}.get(name, f"WANDB_{name.upper()}"))
        if before.get(name) and wanted and before[name] != wanted:
            raise UserError(f"--resume: the run in {settings.output_dir} has --{name} {before[name]}, not {wanted}")
        setattr(settings, name, before.get(name) or wanted)
    settings.project = settings.project or task
    settings.id = settings.id or secrets.token_hex(4)
    settings.output_dir = settings.output_dir or f"runs/{task}-{settings.id}"
    if "WANDB_SWEEP_ID" in os.environ:
        settings.project = settings.entity = settings.id = None  # its agent has told W&B, which warns of others


@contextlib.contextmanager
def output_directory(settings: SharedSettings) -> Iterator[Path]:
    """The directory for the files of a run, made where it is missing, and held: no other process can use it.

    It must be able to receive files and, without `--resume`, hold no other run. Raises `UserError` where it can't.
    If the block raises before there is an outcome, nothing is left.
    """
    path, made, began = Path(settings.output_dir), [], False
    try:
        made += [p for p in (path, *path.parents) if not p.exists()]
        for taken in (CONFIG, *OUTCOMES):
            if (path / taken).exists() and not settings.resume:
                problem = f"--output_dir {path} already holds another run ({taken})"
                raise UserError(f"{problem}; name another one, or go on with that run: --resume")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _temporary_beside(path / "probe") as probe:
                probe.write_bytes(bytes(PROBE_BYTES))
        except OSError as error:
            status = 1 if settings.resume else 2
            raise UserError(f"--output_dir {path}: can't write there ({error.strerror})", status) from None
        with _locked(path):
            for left in path.glob(".*.tmp"):  # by a process that was killed while it wrote
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            if not (path / CONFIG).exists():  # a run that is killed before it has more keeps its id
                write_json(path / CONFIG, dataclasses.asdict(settings))
                began = True
            yield path
    except BaseException:
        if began and not any((path / outcome).exists() for outcome in OUTCOMES):
            (path / CONFIG).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: what was written is kept
            for directory in made:
                directory.rmdir()
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out; the system lifts the lock however this one ends. Raises `UserError`."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # else it is a file system without locks
                problem = f"--output_dir {directory}: another process is at work there"
                raise UserError(f"{problem}; wait for it, or end it") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def save_checkpoint(
    output_dir: Path,
    settings: SharedSettings,
    stateful: Mapping[str, Any],
    figures: TrainingFigures,
    position: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write `checkpoint.pt`, after the journal it belongs to; the checkpoint before it is kept.

    It holds the state of everything in `stateful`, of `figures` and the random generators in each process, and `more`
    tensors and plain values. The first process writes it, the others only add theirs.
    """
    processes = parallel.gathered({"figures": figures.state_dict(), "random": random_state()})
    if parallel.rank() > 0:
        return
    state = {name: thing.state_dict() for name, thing in stateful.items()}
    state |= {"processes": processes, "position": dict(position), "settings": dataclasses.asdict(settings), **more}
    with (output_dir / JOURNAL).open("a+b") as journal:
        os.fsync(journal.fileno())
        state["journal"] = journal.tell()
        if position["epoch_ends"]:  # without its own row, which is logged again
            journal.seek(max(0, state["journal"] - 65536))
            state["journal"] -= len(journal.read().splitlines(keepends=True)[-1])
    path = output_dir / CHECKPOINT
    with _temporary_beside(path) as temporary:
        _save(temporary, state)
        if path.exists():
            os.replace(path, output_dir / PREVIOUS)
        os.replace(temporary, path)


def restore(checkpoint: Mapping[str, Any], stateful: Mapping[str, Any], figures: TrainingFigures) -> None:
    """Put back the state of everything in `stateful`, of `figures` and of the random generators.

    With another number of processes the first one takes over the sums of all, and the generators stay as seeded.
    """
    for name, thing in stateful.items():
        thing.load_state_dict(checkpoint[name])
    processes = checkpoint["processes"]
    if len(processes) != parallel.world_size():
        numbers = f"begun with {len(processes)} process(es) and goes on with {parallel.world_size()}"
        print(f"The run was {numbers}: the same batches; sums are rounded, and dropout is drawn, in another way.")
        sums = sum(process["figures"]["sums"] for process in processes) * (parallel.rank() == 0)
        figures.load_state_dict(processes[0]["figures"] | {"sums": sums})
        return
    figures.load_state_dict(processes[parallel.rank()]["figures"])
    state = processes[parallel.rank()]["random"]
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def load_checkpoint(output_dir: Path, settings: SharedSettings) -> dict[str, Any] | None:
    """The state to go on from and, in `settings`, what the run had settled; None where a run begins.

    A checkpoint that can't be read is reported, and the one before it used. Raises `UserError` where neither can be
    read, or where the settings asked for are not those that the run was begun with.
    """
    paths = [path for path in (output_dir / CHECKPOINT, output_dir / PREVIOUS) if path.exists()]
    problems, state = [], None
    for path in paths:
        try:
            state = _read_checkpoint(path)
            break
        except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            problems.append(f"{path} can't be read: {str(error).splitlines()[0]}")
    if paths and state is None:
        raise UserError(f"{'; '.join(problems)}; to start from the beginning, give another --output_dir", status=1)
    if problems:
        warn_loudly(*problems, f"Going on from {path}, which is older.")
    if state:
        os.replace(path, output_dir / CHECKPOINT)  # or the next one would put a damaged one in its place
    journal = output_dir / JOURNAL
    if state is None:
        if journal.exists() and journal.stat().st_size and not (output_dir / METRICS).exists():
            raise UserError(f"{output_dir} has lost its checkpoint; give another --output_dir", status=1)
        return None
    asked, used = dataclasses.asdict(settings), state["settings"]
    differ = [
        f"--{name} was {used[name]!r}, is {asked[name]!r}"
        for name in used.keys() - set(MAY_CHANGE)
        if asked[name] not in (used[name], LEFT_OPEN.get(name, used[name]))
    ]
    if differ and "WANDB_SWEEP_ID" not in os.environ:  # a sweep may set them in W&B's config only
        problem = "; ".join(sorted(differ))
        raise UserError(f"--resume: the run in {output_dir} was begun with other settings: {problem}")
    for name, value in used.items():
        if name not in MAY_CHANGE or name in ("project", "entity", "id") or asked[name] is None:
            setattr(settings, name, value)
    return state


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises one of many errors where a byte is missing or another."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load does not compare the checksums
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write to; at the end of the block it becomes `path`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as parent:
        temporary = Path(parent) / path.name
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.replace(path, Path(parent) / "before")
        os.replace(temporary, path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or no whole one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as an indented JSON object, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_weights(path: Path, content: Mapping[str, Any]) -> None:
    """`torch.save` a state dict, whole or not at all."""
    with replacing(path) as temporary:
        _save(temporary, content)


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(content, file)
            file.flush()
        except RuntimeError as error:  # of torch, which hides why it could not write
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        os.fsync(file.fileno())


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
    with monitoring.forgiving(run):
        run.config.update({k: v for k, v in used.items() if run.config.get(k) != v}, allow_val_change=True)
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), settings.dataset)))
    write_json(output_dir / CONFIG, used | {"versions": versions()})
    if settings.save_code:
        here = Path(__file__).parent
        run.log_code(here, include_fn=lambda path: Path(path).parent == here and path.endswith((".py", ".yaml")))


def log_numbers(run: wandb.Run, output_dir: Path, numbers: Mapping[str, float], step: int) -> None:
    """Log a row of numbers to W&B and to the journal, `history.jsonl`. `step`: training examples seen.

    Of several processes only the first does.
    """
    if parallel.rank() > 0:
        return
    path, line = output_dir / JOURNAL, json.dumps({"step": step, **numbers}) + "\n"
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as journal:
            journal.write(line)
    except OSError:
        os.truncate(path, size)  # no half of a row
        raise
    run.log(dict(numbers), step=step)


def rewind_journal(output_dir: Path, checkpoint: Mapping[str, Any]) -> list[dict[str, float]]:
    """Cut the journal to the rows up to a checkpoint's position, and return these; what follows is computed again.

    At the end of an epoch so is its own row, since W&B may have lost the tables and pictures in it. Raises
    `UserError` where the journal has lost rows.
    """
    path, position, kept = output_dir / JOURNAL, checkpoint["position"], []
    end = position["step"] + (not position["epoch_ends"])
    try:
        content = path.read_bytes()
        if len(content) < checkpoint["journal"]:
            raise ValueError("rows are missing")
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] >= end:
                break
            kept.append(line)
    except (FileNotFoundError, ValueError) as error:
        problem = f"{path} does not go with the checkpoint ({error})"
        raise UserError(f"{problem}: the run can't be resumed; give another --output_dir", status=1) from None
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return [json.loads(line) for line in kept]


def finished(output_dir: Path, settings: SharedSettings, checkpoint: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The content of metrics.json, the last file of a run, if nothing is left to do, which is said; else None."""
    metrics = _read_json(output_dir / METRICS)
    if metrics is None:
        return None
    last_step = checkpoint["position"]["step"] if checkpoint else -1
    if checkpoint and not monitoring.is_complete(settings.id, settings.wandb, last_step):
        print(f"{output_dir} is finished, but W&B does not have all of it: the end is done again.")
        return None
    print(f"{output_dir} is finished: see {output_dir / METRICS}")
    return metrics


def fingerprint(parts: Iterable[Iterable[Any]]) -> int:
    """A checksum of all tensors in the parts of a data set."""
    checksum = 0
    for tensor in (thing for part in parts for thing in part if isinstance(thing, torch.Tensor)):
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy(), checksum)
    return checksum


def diverged(name: str, loss: float, epoch: int, step: int, learning_rate: float) -> UserError:
    """What to raise when a loss, of training or validation, is NaN or infinite."""
    return UserError(
        f"the {name} loss is {loss} in epoch {epoch} by step {step}, learning rate {learning_rate:g}; training has "
        "stopped, what was logged is kept; a lower --learning_rate may help",
        status=1,
    )
