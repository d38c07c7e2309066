"""How far training has come: Progress (the position), Meter (means), Best (the model to keep)."""

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from harness import distributed
from harness.errors import UserError
from harness.script import in_ipython
from harness.session import Session

Indices = TypeVar("Indices", bound=Sequence[int] | Tensor)  # of the examples of a batch


class Progress:
    """Position in training, the batches that are left, and what is due after a batch.

    `epoch` and `batch` count from 1 over the whole run, the current batch included; `step`, W&B's
    step, is the number of training examples seen. `bar` is tqdm's: `bar.write` prints a line
    above it.
    """

    def __init__(
        self,
        session: Session,
        examples: int,
        held_out: int,
        batches: int | Sequence[int] | None = None,
    ):
        """`examples` and `held_out`: how many there are for training and for validation.

        `batches`: how many an epoch has, or each of the epochs, unless --batch_size decides.
        Raises `UserError` if the batches can't be shared among the ranks.
        """
        settings = session.settings
        if settings.patience and not held_out:
            raise UserError("--patience needs examples to judge by, but none are held out")
        if batches is None:
            if settings.batch_size > examples:
                raise UserError(
                    f"--batch_size {settings.batch_size} is more than the {examples} training "
                    "examples"
                )
            _check_size(examples % settings.batch_size or settings.batch_size)
            batches = math.ceil(examples / settings.batch_size)
        if isinstance(batches, int):
            batches = [batches] * settings.epochs
        if len(batches) != settings.epochs or min(batches) < 1:
            raise ValueError(f"Progress needs a number of batches for each epoch, got {batches}")
        self.epoch = 1
        self.batch = 0
        self.step = 0
        self._ends = [0, *itertools.accumulate(batches)]  # batches by the end of each epoch
        self.total_batches = min(self._ends[-1], settings.max_steps or self._ends[-1])
        self.watch_every = settings.watch_every or batches[0]
        self.batch_ended = True  # `Checkpoints.end_batch` was called
        self.indices: Any = None  # of this batch; after a resume, their text
        self.random_state: Tensor | None = None  # of torch, which the first batch has to find
        self._settings = settings
        self._patience_from = 0  # the epoch after which patience counts
        self.session = session

    def __str__(self) -> str:
        """The batch that comes next; at the end of an epoch, its last one."""
        batch = self.batch - self._ends[self.epoch - 1]
        if not self.epoch_ends:
            batch += 1
        return f"epoch {self.epoch}, batch {batch} of {self.batches_in_epoch}"

    @property
    def batches_in_epoch(self) -> int:
        return self._ends[self.epoch] - self._ends[self.epoch - 1]

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, the interrupted one first; on a terminal, with a bar."""
        bar = tqdm(
            total=self.total_batches,
            initial=self.batch,
            unit="batch",
            disable=False if in_ipython() else None,  # None: without a terminal
            file=sys.stdout,
        )
        with self.session.stop_requests.training(), bar as self.bar:
            for epoch in range(self.epoch, self._settings.epochs + 1):
                self.epoch = epoch
                self._epoch_started = self._row_started = time.perf_counter()
                self._row_step = self.step
                yield epoch
                if not (self.batch_ended and self.epoch_ends):
                    raise ValueError(f"epoch {epoch} was left before its last batch had ended")
                if self.batch == self.total_batches:
                    return

    def left(self, batches: Sequence[Indices]) -> Sequence[Indices]:
        """The batches of this epoch that training has not seen; all without a resume.

        `batches` are the epoch's, the same whenever it is repeated: they follow from seed and
        epoch alone. Raises `ValueError` if they don't, or are not as many as `Progress` was told.
        """
        if not isinstance(batches, Sequence):
            raise ValueError(
                f"expected a list of batches of indices, not {batches!r}; "
                "a DataLoader is for load_batches"
            )
        if not self.batch_ended:
            raise ValueError(
                "a batch begins before the last one has ended: "
                "use one `load_batches` or `remaining` at a time"
            )
        if self.random_state is not None:
            if not torch.equal(self.random_state, torch.get_rng_state()):
                raise ValueError(
                    "random numbers are drawn between restore_or_begin and the first batch, where "
                    "a resumed run draws others: draw them before, or from a generator of their own"
                )
            self.random_state = None
        if len(batches) != self.batches_in_epoch:
            raise ValueError(
                f"epoch {self.epoch} has {len(batches)} batches, but Progress was told of "
                f"{self.batches_in_epoch}: give it `batches`"
            )
        _check_size(min(map(len, batches)))
        done = self.batch - self._ends[self.epoch - 1]
        texts = distributed.gather(as_text(batches[done - 1]))
        expected = texts[0]
        if done and self.indices is not None:  # as in a checkpoint of an older version
            expected = as_text(self.indices)
        if set(texts) != {expected}:
            raise ValueError(
                f"the batches of epoch {self.epoch} differ between processes, or from those before "
                "the interruption: they must follow from seed and epoch alone"
            )
        return batches[done : done + self.total_batches - self.batch]

    def remaining(self, batches: Sequence[Indices]) -> Iterator[Indices]:
        """Yield the batches that are `left`: advance the position, and begin the row of each."""
        for indices in self.left(batches):
            self.batch += 1
            self.step += len(indices)
            self.session.run.log({}, step=self.step)
            self.batch_ended = False
            self.indices = indices
            yield indices
            if not self.batch_ended:
                raise ValueError("call checkpoints.end_batch() at the end of each batch")
            self.bar.update()

    @property
    def watch_is_due(self) -> bool:
        """Whether to call `run.watch` for this batch, before the model sees it."""
        watching = self._settings.watch != "off" and not self.session.run.wandb.disabled
        return watching and self.batch % self.watch_every == 0

    @property
    def epoch_ends(self) -> bool:
        """Whether this batch is the last of its epoch, or of the run."""
        return self.batch > 0 and self.batch in (self._ends[self.epoch], self.total_batches)

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

    def patience_ends(self, best_epoch: int) -> bool:
        """Whether `--patience` epochs have passed since the best one, or since a run grew."""
        waited = self.epoch - max(best_epoch, self._patience_from)
        return 0 < self._settings.patience <= waited

    def print_epoch(self, results: Mapping[str, float]) -> None:
        """Print the epoch's training figures, the first two metrics and the monitored one."""
        first = [f"valid/{name}" for name in list(self.session.config["metrics"])[:2]]
        shown = [
            f"{name} {value:.4f}"
            for name, value in results.items()
            if name.endswith("_epoch") or name in (*first, self._settings.monitor)
        ]
        seconds = time.perf_counter() - self._epoch_started
        self.bar.write(f"epoch {self.epoch}: {', '.join(shown)}, {seconds:.1f} s")

    def check_finite(self, name: str, loss: float) -> None:
        """Raise `UserError`, with all rows written, if a loss is NaN or infinite.

        `name` is the part of the data.
        """
        if not math.isfinite(loss):
            self.session.run.commit()
            raise UserError(
                f"the {name} loss is {loss} in epoch {self.epoch} by step {self.step}, "
                f"learning rate {self.session.config['learning_rate']:g}; "
                "a lower --learning_rate may help",
                status=1,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch if self.batch else 0,
            "batch": self.batch,
            "step": self.step,
            "epoch_ends": self.epoch_ends,
            "batches_in_epoch": self.batches_in_epoch,
            "total_batches": self.total_batches,
            "patience_from": self._patience_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = max(1, state["epoch"])
        if state["batches_in_epoch"] != self.batches_in_epoch:
            raise ValueError(f"epoch {self.epoch} had {state['batches_in_epoch']} batches")
        self.batch = state["batch"]
        self.step = state["step"]
        self._patience_from = state["patience_from"]
        if state["total_batches"] != self.total_batches:
            self._patience_from = self.epoch


def _check_size(batch: int) -> None:
    ranks = distributed.world_size()
    if batch < ranks:
        raise UserError(
            f"{ranks} processes can't share a batch of {batch}: "
            "choose another --batch_size, or fewer processes"
        )


def as_text(indices: Any) -> str:
    """The indices of a batch, to compare and save."""
    return str(indices.tolist() if hasattr(indices, "tolist") else indices)


class Meter:
    """Means over examples of what is summed batch by batch.

    `add` does not wait for an accelerator; `take_row` and `state_dict` do.
    """

    def __init__(self) -> None:
        self._sums = Counter()  # of this rank, since the last row: numbers and scalar tensors
        self._epoch = Counter()  # of all ranks, over the rows of the epoch: numbers

    def add(self, examples: int, /, **sums: Tensor | float) -> None:
        """Add a batch: how many examples this rank had, and sums (not means) over them.

        A mean is over the examples that were added with its name.
        """
        for name, value in sums.items():
            if isinstance(value, Tensor):
                value = value.detach()
                if not isinstance(self._sums[name], Tensor):
                    value = value.float()  # a long sum in bf16 would lose its last terms
            self._sums[name] = self._sums[name] + value  # += fails after inference mode
            self._sums[f"{name}/examples"] += examples

    def take_row(self) -> dict[str, float]:
        """Means over the examples of all ranks since the last call."""
        own = self.state_dict()["sums"]
        self._sums.clear()
        row = Counter()
        for rank in distributed.gather(own):  # which may have other names
            row.update(rank)
        self._epoch.update(row)
        return _means(row)

    def take_epoch(self) -> dict[str, float]:
        """Means over the examples of all ranks since the last call."""
        self.take_row()  # a script may log rows of its own choice
        means = _means(self._epoch)
        self._epoch.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"sums": sums, "epoch": dict(self._epoch)}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Restore the state of a rank, or of several, whose sums are added up."""
        self._sums.clear()
        self._epoch = Counter(states[0]["epoch"])
        for state in states:
            self._sums.update(state["sums"])


def _means(sums: Counter[str]) -> dict[str, float]:
    counts = {name: sums[f"{name}/examples"] for name in sums}
    return {name: sums[name] / count for name, count in counts.items() if count}


class Best:
    """The model to keep: the best so far by the monitored metric, of equal ones by "valid/loss".

    The last one if nothing is validated.
    """

    def __init__(self, monitor: str, directions: Mapping[str, str]):
        """`monitor` is a metric such as "valid/loss"; `directions["loss"]` is "min" or "max".

        Raises `ValueError` if no direction is declared.
        """
        direction = directions.get(monitor.split("/", 1)[-1])
        if direction not in ("min", "max"):
            raise ValueError(f"{monitor}: declare whether it is best at its 'min' or 'max'")
        self.monitor = monitor
        self._sign = 1 if direction == "min" else -1
        self.epoch = 0
        self.score: tuple[float, float] | None = None  # lower is better
        self.weights: dict[str, Tensor] = {}  # a state dict

    def offer(self, epoch: int, metrics: Mapping[str, float], model: nn.Module) -> bool:
        """Keep a copy of the model's weights if it is the best so far; returns whether it is.

        Raises `UserError` if something was validated, but not the monitored metric.
        """
        validated = [
            name for name in metrics if name.startswith("valid/") or f"valid/{name}" == self.monitor
        ]
        if validated and self.monitor not in metrics:
            raise UserError(f"--monitor {self.monitor}: there are {', '.join(validated)}")
        score = None  # this epoch was not validated
        if self.monitor in metrics:
            value = float(metrics[self.monitor])  # not a NumPy number
            score = (self._sign * value, float(metrics.get("valid/loss", 0)))
        score = distributed.broadcast(score)  # from rank 0, so that all ranks decide the same
        better = self.score is None
        if self.score and score:
            better = math.isnan(self.score[0]) or score < self.score
        if better:
            self.epoch = epoch
            self.score = score
            # On the CPU, so that machines without an accelerator can load what is saved.
            weights = model.state_dict()
            self.weights = {name: weights[name].to("cpu", copy=True) for name in weights}
        return better

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "score": self.score, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.score = state["score"]
        self.weights = state["weights"]
