"""Checkpoints: all that training needs to continue as if it had never been interrupted."""

import pickle
import random
import time
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness import distributed
from harness.directory import CHECKPOINT, CONTENT, METRICS_FILE, PREVIOUS_CHECKPOINT
from harness.errors import Stopped, UserError
from harness.files import remove, write_tensors
from harness.progress import Meter, Progress, as_text


class Checkpoints:
    """Saves the state of training to `checkpoint.pt`, and restores it when a run is resumed.

    The checkpoint of an epoch's end is saved after its last batch and before validation, which a
    resumed run repeats. A run may go on with another number of processes.
    """

    def __init__(
        self, progress: Progress, data: Any, meter: Meter, *, model: nn.Module, **stateful: Any
    ):
        """`data`: what a resumed run must find unchanged, tensors and values in nested sequences.

        `stateful`: whatever else has a `state_dict`: the optimizer, a second model, an average.
        Raises `UserError` if the ranks would differ.
        """
        if taken := sorted(CONTENT & stateful.keys()):
            raise ValueError(f"Checkpoints has its own {taken[0]!r}: choose another name")
        session = progress.session
        self._session = session
        self._progress = progress
        self._meter = meter
        self._stateful = {
            "model": model,
            **stateful,
            "position": progress,
            "history": session.run,
        }
        models = {
            name: thing for name, thing in self._stateful.items() if isinstance(thing, nn.Module)
        }
        self._parameters = [weight for each in models.values() for weight in each.parameters()]
        self._flags: dict[str, tuple[Any, str]] = {}  # what no state_dict has
        for name, each in models.items():
            for path, layer in each.named_modules(prefix=name):
                self._flags[path] = (layer, "training")
            for path, weight in each.named_parameters(prefix=name):
                self._flags[path] = (weight, "requires_grad")
        self._check_optimizers()
        self._fingerprint = fingerprint(data)
        if distributed.world_size() > 1:
            layers = [layer for layer, _ in self._flags.values()]
            if any(getattr(layer, "track_running_stats", False) for layer in layers):
                raise UserError(
                    "running statistics, as of BatchNorm, would differ between processes: "
                    "use GroupNorm or LayerNorm, or one process"
                )
            weights = fingerprint([list(each.state_dict().values()) for each in models.values()])
            if len(set(distributed.gather((self._fingerprint, weights)))) > 1:
                raise UserError(
                    "the processes do not have the same data and model: "
                    "give all of them the same files, and make every model before seed_rank"
                )
        session.exits.enter_context(register_optimizer_step_pre_hook(self._check_step))

    def _check_optimizers(self) -> None:
        """Raise `ValueError` if an optimizer, or a weight that it trains, is not saved."""
        saved = set(self._parameters)
        for thing in self._stateful.values():
            if isinstance(thing, LRScheduler) and thing.optimizer not in self._stateful.values():
                raise ValueError("give Checkpoints the optimizer of each schedule")
            if isinstance(thing, Optimizer) and not saved.issuperset(_weights_of(thing)):
                raise ValueError("give Checkpoints each model that an optimizer trains")

    def _check_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise `ValueError` if an optimizer of a saved model steps, but is not saved itself."""
        if optimizer in self._stateful.values():
            distributed.check_gradients(_weights_of(optimizer))
        elif not set(self._parameters).isdisjoint(_weights_of(optimizer)):
            raise ValueError("give Checkpoints each optimizer of its models")

    def restore_or_begin(self) -> None:
        """Restore the checkpoint of a resumed run; save the first one of a new run.

        Raises `UserError` if the data or the model are not those of the checkpoint.
        """
        checkpoint = self._session.checkpoint
        if checkpoint is None:
            self._session.run.commit()  # a resumed run does not repeat what comes before
            self._save()
            self._progress.random_state = torch.get_rng_state()
            return
        if checkpoint["data"] != self._fingerprint:
            raise UserError("--resume: the data are not those that the run was begun with")
        try:
            self._restore(checkpoint)
        except torch.OutOfMemoryError:  # a RuntimeError, but not about the checkpoint
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"--resume: {self._session.output_dir} can't be resumed: "
                f"its checkpoint is not of this model or version ({shorten(str(error), 200)})"
            ) from None
        self._progress.random_state = torch.get_rng_state()
        self._session.stop_requests.saved_step = self._progress.step
        print(f"Resuming {self._session.output_dir} at {self._progress}")

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises one of several exceptions if the state does not fit."""
        total = self._progress.total_batches
        grows = checkpoint["position"]["total_batches"] != total
        things = self._stateful.items()
        # Schedules come last: they set their optimizer's learning rate.
        for name, thing in sorted(things, key=lambda item: isinstance(item[1], LRScheduler)):
            if (
                grows
                and isinstance(thing, LRScheduler)
                and not isinstance(thing, ReduceLROnPlateau)
            ):
                _repeat(thing, checkpoint[name]["last_epoch"], total)
            else:
                thing.load_state_dict(checkpoint[name])
        if grows:  # from here on the run is not finished
            remove(self._session.output_dir / METRICS_FILE)
        processes = checkpoint["processes"]
        rank = distributed.rank()
        self._progress.indices = processes[0].get("indices")
        flags = processes[0].get("flags", {})
        for path in flags.keys() & self._flags.keys():
            setattr(*self._flags[path], flags[path])
        meters = [process["meter"] for process in processes]
        if len(processes) == distributed.world_size():
            self._meter.load_state_dict(meters[rank])
            for weight, gradient in zip(self._parameters, processes[rank]["gradients"]):
                weight.grad = None if gradient is None else gradient.to(weight.device)
            _set_random_state(processes[rank]["random"], self._session.device)
            return
        if any(gradient is not None for gradient in processes[0]["gradients"]):
            raise UserError(
                "--resume: accumulated gradients can't be shared out among other processes: "
                f"start {len(processes)} again"
            )
        print(
            f"The run was begun with {len(processes)} process(es) and goes on with "
            f"{distributed.world_size()}: the batches are the same; rounding and dropout differ."
        )
        if rank == 0:
            self._meter.load_state_dict(*meters)
        else:
            self._meter.load_state_dict({"sums": {}, "epoch": meters[0]["epoch"]})

    def end_batch(self) -> None:
        """End the row of the batch, and save if a checkpoint is due.

        One is due every `--checkpoint_every` batches, at an epoch's end, and on a request to stop,
        then raised as `Stopped`. An epoch's last row stays open for the validation metrics.
        """
        progress = self._progress
        progress.batch_ended = True
        requests = self._session.stop_requests
        self._session.run.unwatch()
        if not progress.epoch_ends:
            self._session.run.commit()
        # Asking all ranks takes time, so only when a row is due.
        stops = []
        if distributed.world_size() == 1 or progress.row_is_due:
            stops = distributed.gather(requests.first and requests.first.status)
        stopping = [status for status in stops if status is not None]
        every = self._session.settings.checkpoint_every
        if stopping or progress.epoch_ends or progress.batch % every == 0:
            self._save()
        if stopping:
            status = max(stopping)
            # If this process got a request itself, its own reason stays.
            requests.add("a signal to another process" if status else "another process", status)
            reason = f"{requests.first.reason} at step {progress.step}, saved"
            # torchrun knows only of signals to itself and to the process that it watches.
            raise Stopped(reason, status, ends_launcher=status > 0 and requests.signal is None)

    def _save(self) -> None:
        """Write `checkpoint.pt` and keep the one before; rank 0 writes, all contribute."""
        own = {
            "meter": self._meter.state_dict(),
            "random": _random_state(self._session.device),
            "indices": as_text(self._progress.indices),
            "flags": {path: getattr(*self._flags[path]) for path in self._flags},
            "gradients": [  # if they accumulate
                None if weight.grad is None else weight.grad.cpu() for weight in self._parameters
            ],
        }
        processes = distributed.gather(own)
        if distributed.rank() > 0:
            return
        session = self._session
        state = {name: thing.state_dict() for name, thing in self._stateful.items()}
        state["processes"] = processes
        state["settings"] = {name: session.config[name] for name in vars(session.settings)}
        state["data"] = self._fingerprint
        state["seconds"] = time.perf_counter() - session.started
        path = session.output_dir / CHECKPOINT
        with session.stop_requests.writing(self._progress.step):
            try:
                write_tensors(path, state, previous=path.with_name(PREVIOUS_CHECKPOINT))
            except (pickle.PickleError, AttributeError, TypeError) as error:
                reason = str(error).rpartition("WeightsUnpickler error: ")[2]  # torch says more
                raise UserError(
                    "the state of training can't be loaded again from a checkpoint: "
                    "each state_dict must hold tensors and plain values only "
                    f"({shorten(reason, 200)})"
                ) from None


def _weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _repeat(schedule: LRScheduler, steps: int, batches: int) -> None:
    """Bring a schedule to where it would be, had it been asked for this many batches at first."""
    groups = schedule.optimizer.param_groups
    before = groups[0]["lr"]
    for group, rate in zip(groups, schedule.get_last_lr()):
        group["lr"] = rate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no steps of the optimizer in between
        for _ in range(steps):
            schedule.step()
    now = groups[0]["lr"]
    print(f"The learning rate was {before:g}, and is {now:g} in a schedule of {batches} batches.")


def fingerprint(data: Any, checksum: int = 0) -> int:
    """A checksum of tensors, text, numbers and paths in nested sequences.

    Raises `TypeError` for what would go unchecked.
    """
    if isinstance(data, (list, tuple)):
        for part in data:
            checksum = fingerprint(part, checksum)
        return zlib.crc32(b"end", checksum)
    if isinstance(data, Tensor):
        checksum = zlib.crc32(f"{data.dtype}{list(data.shape)}".encode(), checksum)
        values = data.cpu().flatten().clone(memory_format=torch.contiguous_format)
        return zlib.crc32(values.view(torch.uint8).numpy(), checksum)
    if isinstance(data, (str, int, float, Path, type(None))):
        return zlib.crc32(repr(data).encode(), checksum)
    kind = type(data).__name__
    raise TypeError(f"the data of Checkpoints must be tensors or values in lists, not {kind}")


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random generator, in types that `weights_only` loads."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "accelerator": {},  # of this rank's device, by kind: "cuda" or "mps"
    }
    if device.type != "cpu":
        state["accelerator"][device.type] = torch.get_device_module(device).get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state["accelerator"]:
        torch.get_device_module(device).set_rng_state(state["accelerator"][device.type])
