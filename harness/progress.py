"""How far training has come: Progress (the position), Meter (means), Best (the model to keep)."""

import math
import operator
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from harness import distributed
from harness.errors import UserError
from harness.session import Session


class Progress:
    """Position in training, the batches that are left, and what is due after a batch.

    `epoch` and `batch` count from 1 over the whole run, the current batch included; `step`, W&B's
    step, is the number of training examples seen. The batches of an epoch must follow from the seed
    and the epoch alone. `bar` is tqdm's: `bar.write` prints a line above it.
    """

    def __init__(self, session: Session, examples: int, held_out: int):
        """`examples` and `held_out`: how many there are for training and for validation.

        Raises `UserError` if the batches can't be shared among the ranks.
        """
        settings = session.settings
        if settings.patience and not held_out:
            raise UserError("--patience needs examples to judge by, but none are held out")
        if settings.batch_size > examples:
            problem = f"is more than the {examples} training examples"
            raise UserError(f"--batch_size {settings.batch_size} {problem}")
        last_batch = examples % settings.batch_size or settings.batch_size
        ranks = distributed.world_size()
        if last_batch < ranks:
            problem = f"{ranks} processes can't share the last batch of an epoch"
            size = f"which has {last_batch} of the {examples} examples"
            advice = "choose another --batch_size, or fewer processes"
            raise UserError(f"{problem}, {size}: {advice}")
        self.epoch = 1
        self.batch = 0
        self.step = 0
        self.batches_per_epoch = math.ceil(examples / settings.batch_size)
        batches = settings.epochs * self.batches_per_epoch
        self.total_batches = min(batches, settings.max_steps or batches)
        self.watch_every = settings.watch_every or self.batches_per_epoch
        session.config["watch_every"] = self.watch_every
        self._settings = settings
        self.session = session

    def __str__(self) -> str:
        """The batch that comes next; at the end of an epoch, its last one."""
        batch = self.batch - (self.epoch - 1) * self.batches_per_epoch
        if not self.epoch_ends:
            batch += 1
        return f"epoch {self.epoch}, batch {batch} of {self.batches_per_epoch}"

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the interrupted one first; on a terminal, with a bar."""
        # A resumed run logs its histograms in the same batches as one that was not interrupted.
        self._first_watched = math.ceil(self.batch / self.watch_every) * self.watch_every + 1
        bar = tqdm(
            total=self.total_batches,
            initial=self.batch,
            unit="batch",
            disable=None,
            file=sys.stdout,
        )
        with self.session.stop_requests.training(), bar as self.bar:
            for epoch in range(self.epoch, self._settings.epochs + 1):
                self.epoch = epoch
                self._epoch_started = self._row_started = time.perf_counter()
                self._row_step = self.step
                yield epoch
                if self.batch == self.total_batches:
                    return

    def remaining(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the epoch's remaining batches of indices and advance the position.

        Raises `ValueError` for another number of batches than a resumed run would count on.
        """
        if not isinstance(batches, Sequence) or len(batches) != self.batches_per_epoch:
            got = type(batches).__name__
            if isinstance(batches, Sequence):
                got = f"{len(batches)} batches"
            needed = f"{self.batches_per_epoch} batches of indices, as --batch_size makes them"
            raise ValueError(f"progress.remaining needs {needed}, in a list; got {got}")
        done = self.batch - (self.epoch - 1) * self.batches_per_epoch
        left_in_run = self.total_batches - self.batch
        for indices in batches[done : done + left_in_run]:
            self.batch += 1
            self.step += len(indices)
            yield indices
            self.bar.update()

    @property
    def watch_is_due(self) -> bool:
        """Whether `run.watch` is to be called now, before the model sees this batch."""
        watching = self._settings.watch != "off" and not self.session.run.wandb.disabled
        return watching and self.batch == self._first_watched

    @property
    def epoch_ends(self) -> bool:
        """Whether this batch is the last of its epoch, or of the run."""
        last_of_epoch = self.batch % self.batches_per_epoch == 0
        return self.batch > 0 and (last_of_epoch or self.batch == self.total_batches)

    @property
    def row_is_due(self) -> bool:
        """Whether to log training metrics: every `--log_every` batches and at an epoch's end."""
        return self.batch % self._settings.log_every == 0 or self.epoch_ends

    def examples_per_second(self) -> float:
        """Training throughput since the last call, or since the epoch began."""
        examples = self.step - self._row_step
        now = time.perf_counter()
        seconds = now - self._row_started
        self._row_step = self.step
        self._row_started = now
        return examples / seconds

    def show(self, figures: Mapping[str, float]) -> None:
        """Show figures beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()})

    def print_epoch(self, results: Mapping[str, float]) -> None:
        """Print the epoch's losses, accuracies and monitored metric, and the seconds it took."""
        shown = [
            f"{name} {value:.4f}"
            for name, value in results.items()
            if name.endswith(("/loss", "/acc", "_epoch")) or name == self._settings.monitor
        ]
        seconds = time.perf_counter() - self._epoch_started
        self.bar.write(f"epoch {self.epoch}: {', '.join(shown)}, {seconds:.1f} s")

    def check_finite(self, name: str, loss: float) -> None:
        """Raise `UserError`, with all rows written, if a loss is NaN or infinite.

        `name` is the part of the data.
        """
        if not math.isfinite(loss):
            self.session.run.commit()
            rate = f"learning rate {self.session.config['learning_rate']:g}"
            when = f"in epoch {self.epoch} by step {self.step}, {rate}"
            advice = "a lower --learning_rate may help"
            raise UserError(f"the {name} loss is {loss} {when}; {advice}", status=1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": math.ceil(self.batch / self.batches_per_epoch),  # 0 before the first batch
            "batch": self.batch,
            "step": self.step,
            "epoch_ends": self.epoch_ends,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = max(1, state["epoch"])
        self.batch = state["batch"]
        self.step = state["step"]


class Meter:
    """Means over examples of what is summed batch by batch.

    `add` does not wait for an accelerator; `take_row` and `state_dict` do.
    """

    def __init__(self, device: torch.device | str | None = None):
        self._device = device
        self._sums: dict[str, Tensor] = {}  # of this rank, since the last row: float32 scalars
        self._epoch: dict[str, float] = {}  # of all ranks, over the rows of the epoch

    def add(self, examples: int, **sums: Tensor | float) -> None:
        """Add a batch: how many examples this rank had, and sums (not means) over them."""
        self._add({**sums, "examples": examples})

    def _add(self, sums: Mapping[str, Tensor | float]) -> None:
        for name, value in sums.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros((), device=self._device)
            self._sums[name] += value.detach() if isinstance(value, Tensor) else value

    def take_row(self) -> dict[str, float]:
        """Means over the examples of all ranks since the last call."""
        distributed.sum_over_ranks(*self._sums.values())
        values = torch.stack(list(self._sums.values())).tolist()
        row = dict(zip(self._sums, values))
        self._sums = {}
        for name, value in row.items():
            self._epoch[name] = self._epoch.get(name, 0.0) + value
        return _means(row)

    def take_epoch(self) -> dict[str, float]:
        """Means over the rows since the last call."""
        means = _means(self._epoch)
        self._epoch = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        sums = {name: value.item() for name, value in self._sums.items()}
        return {"sums": sums, "epoch": dict(self._epoch)}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Restore the state of a rank, or of several, whose sums are added up."""
        self._sums = {}
        self._epoch = dict(states[0]["epoch"])
        for state in states:
            self._add(state["sums"])


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    return {name: value / sums["examples"] for name, value in sums.items() if name != "examples"}


class Best:
    """The model to keep: the best so far by the monitored metric.

    The last one if nothing is validated.
    """

    def __init__(self, monitor: str, lower_is_better: bool):
        """`monitor` is the name of the metric, such as "valid/loss"."""
        self.monitor = monitor
        self.lower_is_better = lower_is_better
        self.epoch = 0
        self.value: float | None = None
        self.weights: dict[str, Tensor] = {}  # a state dict

    def offer(self, epoch: int, metrics: Mapping[str, float], model: nn.Module) -> bool:
        """Keep a copy of the model's weights if it is the best so far; returns whether it is.

        Raises `UserError` if something was validated, but not the monitored metric.
        """
        validated = [name for name in metrics if name.startswith("valid/")]
        if validated and self.monitor not in metrics:
            raise UserError(f"--monitor {self.monitor}: there are {', '.join(validated)}")
        # From rank 0, so that all ranks decide the same.
        value = distributed.broadcast(metrics.get(self.monitor))
        improves = operator.lt if self.lower_is_better else operator.gt
        better = self.value is None or math.isnan(self.value) or improves(value, self.value)
        if better:
            self.epoch = epoch
            self.value = None if value is None else float(value)  # not a NumPy number
            # On the CPU, so that machines without an accelerator can load what is saved.
            weights = model.state_dict()
            self.weights = {name: weights[name].to("cpu", copy=True) for name in weights}
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "value": self.value, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.value = state["value"]
        self.weights = state["weights"]
