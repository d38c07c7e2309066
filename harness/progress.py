"""How far training has come: Progress (the position), Meter (running means) and Best (the model to keep)."""

import math
import operator
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import wandb
from torch import Tensor, nn
from tqdm import tqdm

from harness import distributed
from harness.errors import UserError
from harness.options import SharedSettings

if TYPE_CHECKING:
    from harness.session import Session


def check_batches(settings: SharedSettings, examples: int, held_out: int) -> None:
    """Check that the ranks can share the batches, and resolve `watch_every`. Raises `UserError`."""
    if settings.patience and not held_out:
        raise UserError("--patience needs examples to judge by, but none are held out")
    if settings.batch_size > examples:
        raise UserError(
            f"--batch_size {settings.batch_size} is more than the {examples} training examples"
        )
    smallest, ranks = (
        examples % settings.batch_size or settings.batch_size,
        distributed.world_size(),
    )
    if smallest < ranks:
        problem = f"can't share the last batch of an epoch, which has {smallest} of the {examples} examples"
        raise UserError(
            f"{ranks} processes {problem}: choose another --batch_size, or fewer processes"
        )
    settings.watch_every = settings.watch_every or math.ceil(examples / settings.batch_size)


class Progress:
    """Position in training, the batches that are left, and what is due after a batch.

    `epoch` and `batch` count from 1 over the whole run; `step`, the step of W&B, is the number of examples seen. They
    already include the batch that is under way. The batches of an epoch must follow from the seed and the epoch alone.
    `bar` is tqdm's: `bar.set_postfix` shows values beside it, `bar.write` prints a line above it.
    """

    def __init__(self, session: "Session", examples: int):
        """`examples` is the size of the training set."""
        self.epoch, self.batch, self.step = 1, 0, 0
        self.batches_per_epoch = math.ceil(examples / session.settings.batch_size)
        batches = session.settings.epochs * self.batches_per_epoch
        self.total_batches = min(batches, session.settings.max_steps or batches)
        self._settings, self._run, self._history = session.settings, session.run, session.history
        self._stop_requests = session.stop_requests

    def __str__(self) -> str:
        """The batch that comes next; at the end of an epoch, its last one."""
        batch = self.batch + (not self.epoch_ends) - (self.epoch - 1) * self.batches_per_epoch
        return f"epoch {self.epoch}, batch {batch} of {self.batches_per_epoch}"

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the one that was interrupted first, with a progress bar on a terminal."""
        settings, first = self._settings, self.epoch
        # A resumed run logs its histograms in the same batches as one that was never interrupted.
        self._first_watched = (
            math.ceil(self.batch / settings.watch_every) * settings.watch_every + 1
        )
        bar = {
            "total": self.total_batches,
            "initial": self.batch,
            "unit": "batch",
            "disable": None,
            "file": sys.stdout,
        }
        with self._stop_requests.training(), tqdm(**bar) as self.bar:
            for self.epoch in range(first, settings.epochs + 1):
                self._epoch_started = self._row_started = time.perf_counter()
                self._row_step = self.step
                yield self.epoch
                if self.batch == self.total_batches:
                    return

    def remaining(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Those of an epoch's batches of indices that are left, each counted as it begins."""
        done = self.batch - (self.epoch - 1) * self.batches_per_epoch
        for indices in batches[done : done + self.total_batches - self.batch]:
            self.batch, self.step = self.batch + 1, self.step + len(indices)
            self._history.begin_row(self.step)
            yield indices
            self.bar.update()

    @property
    def watch_starts(self) -> bool:
        """Whether `run.watch` is to be called before this batch."""
        watching = self._settings.watch != "off" and not self._run.disabled
        return watching and self.batch == self._first_watched

    @property
    def epoch_ends(self) -> bool:
        """Whether this batch is the last of its epoch, or of the run."""
        return self.batch > 0 and (
            self.batch % self.batches_per_epoch == 0 or self.batch == self.total_batches
        )

    @property
    def row_is_due(self) -> bool:
        """Whether this batch ends with a row of training metrics: every `--log_every` batches and at an epoch's end."""
        return self.batch % self._settings.log_every == 0 or self.epoch_ends

    def examples_per_second(self) -> float:
        """Training throughput since the last call, or since the epoch began."""
        step, started = self._row_step, self._row_started
        self._row_step, self._row_started = self.step, time.perf_counter()
        return (self.step - step) / (self._row_started - started)

    def warn(self, title: str, text: str) -> None:
        """Print a warning, and send it as an alert if the run is online."""
        self.bar.write(f"WARNING: after epoch {self.epoch}, {text}")
        if not (self._run.offline or self._run.disabled):
            self._run.alert(title=title, text=text, level=wandb.AlertLevel.WARN)

    def end_epoch(self, results: Mapping[str, float], *names: str) -> None:
        """Print those of the epoch's results that are named, and the seconds that it took."""
        shown = ", ".join(f"{name} {results[name]:.4f}" for name in names if name in results)
        self.bar.write(
            f"epoch {self.epoch}: {shown}, {time.perf_counter() - self._epoch_started:.1f} s"
        )

    def check_finite(self, name: str, loss: float) -> None:
        """Raise `UserError`, with all rows written, if a loss is NaN or infinite. `name` is the part of the data."""
        if not math.isfinite(loss):
            self._history.commit()
            place = f"in epoch {self.epoch} by step {self.step}, learning rate {self._settings.learning_rate:g}"
            raise UserError(
                f"the {name} loss is {loss} {place}; a lower --learning_rate may help", status=1
            )

    def state_dict(self) -> dict[str, Any]:
        epoch = math.ceil(self.batch / self.batches_per_epoch)  # 0 before the first batch
        return {
            "epoch": epoch,
            "batch": self.batch,
            "step": self.step,
            "epoch_ends": self.epoch_ends,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.batch, self.step = max(1, state["epoch"]), state["batch"], state["step"]


class Meter:
    """Means over examples of what is summed batch by batch; only reading a row waits for an accelerator."""

    def __init__(self, device: torch.device | str | None = None):
        self._device = device
        self._sums: dict[str, Tensor] = {}  # of this rank, since the last row: float32 scalars
        self._epoch: dict[str, float] = {}  # of all ranks, over the rows of the epoch

    def add(self, examples: int, **sums: Tensor | float) -> None:
        """Add a batch: how many examples this rank had, and the sum of each quantity over them."""
        for name, value in {**sums, "examples": examples}.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), device=self._device)
            self._sums[name] += value.detach() if isinstance(value, Tensor) else value

    def take_row(self) -> dict[str, float]:
        """Means over the examples of all ranks since the last call."""
        distributed.sum_over_ranks(*self._sums.values())
        row = dict(zip(self._sums, torch.stack([*self._sums.values()]).tolist()))
        self._sums = {}
        self._epoch = {name: self._epoch.get(name, 0.0) + row[name] for name in row}
        return _means(row)

    def take_epoch(self) -> dict[str, float]:
        """Means over the rows since the last call."""
        epoch, self._epoch = self._epoch, {}
        return _means(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": {name: value.item() for name, value in self._sums.items()},
            "epoch": dict(self._epoch),
        }

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Restore the state of a rank, or of several, whose sums are added up."""
        self._sums, self._epoch = {}, dict(states[0]["epoch"])
        for state in states:
            for name, value in state["sums"].items():
                self._sums[name] = (
                    self._sums.get(name, torch.zeros((), device=self._device)) + value
                )


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    return {name: value / sums["examples"] for name, value in sums.items() if name != "examples"}


class Best:
    """The model to keep: the one with the best monitored metric so far, or the last one if nothing is validated."""

    def __init__(self, monitor: str, lower_is_better: bool):
        """`monitor` is the name of the metric, such as "valid/loss"."""
        self.monitor, self.lower_is_better = monitor, lower_is_better
        self.epoch, self.value = 0, None
        self.weights: dict[str, Tensor] = {}  # a state dict

    def offer(self, epoch: int, metrics: Mapping[str, float], model: nn.Module) -> bool:
        """Keep a copy of the model's weights if it is better than the best so far; whether it is."""
        value = distributed.broadcast(metrics.get(self.monitor))  # all ranks must decide alike
        improves = operator.lt if self.lower_is_better else operator.gt
        better = self.value is None or math.isnan(self.value) or improves(value, self.value)
        if better:
            self.epoch, self.value = epoch, value
            # On the CPU, so that machines without an accelerator can load what is saved.
            self.weights = {
                name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()
            }
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "value": self.value, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.value, self.weights = state["epoch"], state["value"], state["weights"]
