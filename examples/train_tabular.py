"""Train an MLP on a table, logged with Weights & Biases: a copy of train_mnist.py.

Reads a CSV file with a header, by default of made-up flats. A column of numbers only (1234.5) is
normalised, any other becomes a feature per word; a word that training lacks has none of them.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not for a copy beside it

from harness import options, script
from harness.errors import UserError
from harness.options import option

# ----------------------------------------------------------------------------- settings

METRICS = {"loss": "min", "mae": "min", "r2": "max", "acc": "max"}  # which way each is better
METRICS_OF = {"regression": ["loss", "mae", "r2"], "classification": ["loss", "acc"]}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    file: str | None = option(None, "your CSV file [flats.csv]", path=True)
    target: str = option("price", "the column to predict")
    task: str = option("regression", "predict a number or a class", choices=list(METRICS_OF))
    hidden: list[int] = option([64, 64], "units of the two hidden layers", length=2, at_least=1)
    epochs: int = option(20, "passes over the training data", at_least=1, below=10**6)
    monitor: str = option("valid/loss", "metric that selects the best model")

    def __post_init__(self) -> None:
        names = [f"valid/{name}" for name in METRICS_OF[self.task]]
        if self.monitor not in names:
            raise UserError(f"--monitor: must be one of {', '.join(names)}; got {self.monitor!r}")


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import re
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank, shuffled
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb
from metrics import evaluation

# --------------------------------------------------------------------------------- data


class Table(NamedTuple):
    """A table in three parts, each of features, float32 (rows, features), and targets (rows,)."""

    name: str
    classes: list[str]  # the targets are int64 indices of them; none for regression
    mean: float  # of the target in training, in its own unit
    scale: float  # its standard deviation
    valid: TensorDataset
    test: TensorDataset
    train: TensorDataset


@np.errstate(all="ignore")  # what is not finite is an error below
def load(settings: Settings, device: torch.device) -> Table:
    """The table on the device, in three parts. Raises `UserError`."""
    path = Path(settings.file or Path(__file__).with_name("flats.csv"))
    try:
        with path.open(encoding="utf-8-sig") as file:
            table = np.loadtxt(filter(str.strip, file), str, None, ",", ndmin=2, quotechar='"')
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as CSV: {str(error).partition(';')[0]}") from None
    header = np.char.strip(table[:1]).flatten().tolist()
    if len(table) < 21 or settings.target not in header or len(set(header)) < max(len(header), 2):
        needed = f"20 rows, {settings.target!r} and others, no name twice"
        raise UserError(f"{path} needs {needed}; it has {len(table)} lines of {', '.join(header)}")
    columns = dict(zip(header, np.random.default_rng(0).permutation(np.char.strip(table[1:])).T))
    first = len(table) // 3  # row for training
    missing = {"", "?", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"}
    for name, words in columns.items():
        if missing.intersection(np.char.lower(words)) or len(set(words[first:])) == 1:
            raise UserError(f"{path}: column {name!r} lacks values, or training has only one value")
    words = columns.pop(settings.target)
    features = {name: encode(columns[name], first) for name in columns}
    classes, mean, scale = [], 0.0, 1.0
    if settings.task == "classification":
        classes = sorted(set(words[first:].tolist()))
        if unknown := set(words.tolist()).difference(classes):
            raise UserError(f"{path}: no training row has the {settings.target} {unknown.pop()!r}")
        targets = torch.tensor([classes.index(word) for word in words])
    else:
        try:
            values = words.astype(float)
        except ValueError:
            advice = "write its numbers as 1234.5, or use --task classification"
            raise UserError(f"{settings.target!r} is text: {advice}") from None
        mean = float(values[first:].mean())
        scale = float(values[first:].std())
        targets = torch.from_numpy((values - mean) / scale).float()
    for name, values in (features | {settings.target: targets}).items():
        print(f"{name}, such as {max(columns.get(name, words)):.50}: {values[0].numel()} number(s)")
        if not values.isfinite().all():
            raise UserError(f"{path}: column {name!r} is infinite, or training has only one value")
    whole = (torch.cat(list(features.values()), 1).to(device), targets.to(device))
    parts = zip(*(column.tensor_split([first // 2, first]) for column in whole))
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:64]  # W&B takes no others
    return Table(name, classes, mean, scale, *(TensorDataset(*part) for part in parts))


def encode(words: np.ndarray, first: int) -> Tensor:
    """A column as float32 (rows, features), fitted to the rows from `first` on."""
    try:
        values = words.astype(float)[:, None]
        values = (values - values[first:].mean()) / values[first:].std()
    except ValueError:
        values = words[:, None] == np.unique(words[first:])
    return torch.from_numpy(values).float()


@logs_to_wandb
def log_dataset(run: Run, table: Table) -> None:
    run.add_tag(table.name)
    run.log_artifact(wandb.Artifact(table.name, "dataset", metadata={"rows": len(table.train)}))


# -------------------------------------------------------------------------------- model


def make_model(settings: Settings, data: Table, device: torch.device) -> nn.Sequential:
    """Two hidden layers: float (batch, features) to float (batch, classes), or (batch, 1)."""
    sizes = [len(data.train[0][0]), *settings.hidden, len(data.classes) or 1]
    first, second, last = map(nn.Linear, sizes, sizes[1:])
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).to(device)


def make_optimizer(model: nn.Module, rate: float, batches: int) -> tuple[Adam, OneCycleLR]:
    optimizer = Adam(model.parameters(), rate)
    return optimizer, OneCycleLR(optimizer, rate, max(batches, 2), cycle_momentum=False)


def total_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(outputs.squeeze(1), targets, reduction="sum")
    return F.cross_entropy(outputs, targets, reduction="sum")


# --------------------------------------------------------------------------- evaluation


class Result(NamedTuple):
    """Predictions on the CPU and their metrics."""

    columns: dict[str, list[Any]]  # of predictions.csv
    metrics: dict[str, float]

    def named(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}


@torch.inference_mode()
def evaluate(model: nn.Module, part: TensorDataset, table: Table) -> Result:
    """Predict every row; few enough for each rank to predict all of them."""
    features, targets = part.tensors
    outputs = model.eval()(features).cpu()
    if table.classes:
        result = evaluation(outputs, targets, METRICS_OF["classification"])
        return Result(result.columns(), result.metrics)
    targets = table.mean + table.scale * targets.cpu().double()
    predictions = table.mean + table.scale * outputs.squeeze(1).double()
    errors = predictions - targets
    mse, mae = errors.square().mean(), float(errors.abs().mean())
    r2 = 1 - float(mse / targets.var(correction=0))
    metrics = {"loss": float(mse) / table.scale**2, "mae": mae, "r2": r2}
    return Result({"target": targets.tolist(), "prediction": predictions.tolist()}, metrics)


@logs_to_wandb
def log_charts(run: Run, name: str, result: Result) -> None:
    """Log the first 100 predictions."""
    rows = [list(row) for row in zip(*result.columns.values())]
    run.log({f"{name}/predictions": wandb.Table(columns=list(result.columns), data=rows[:100])})


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    name = METRICS_OF[session.settings.task][1]
    panels = {"loss": ("train/loss_step", "valid/loss"), name: ("", f"valid/{name}")}
    panels["learning rate"] = ("train/learning_rate", "")
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: nn.Module, data: Table) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    train_set = data.train
    optimizer, schedule = make_optimizer(model, settings.learning_rate, progress.total_batches)
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    # Also saves position, meter and random state. An epoch's last save precedes its validation.
    checkpoints = Checkpoints(
        progress,
        [data.classes, data.mean, data.scale, *(part.tensors for part in data[-3:])],
        meter,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        best=best,
    )
    checkpoints.restore_or_begin()  # a new run saves its first checkpoint here

    for epoch in progress.epochs():
        model.train()
        order = shuffled(len(train_set), settings.seed, epoch).to(session.device)
        batches = order.split(settings.batch_size)
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch)  # histograms of this batch
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            for part in share.split(settings.micro_batch_size or len(share)):
                features, targets = train_set[part]
                with session.autocast():
                    loss = total_loss(model(features), targets)
                (loss / len(indices)).backward()  # parts and ranks add up to the batch's gradient
                meter.add(len(part), loss=loss)
            distributed.sum_gradients(model)
            optimizer.step()
            optimizer.zero_grad()

            if progress.row_is_due:
                row = meter.take_row()  # means over the batches since the last row
                progress.check_finite("training", row["loss"])
                run.log(
                    {
                        "epoch": epoch,
                        "train/loss_step": row["loss"],
                        "train/learning_rate": schedule.get_last_lr()[0],
                        "train/examples_per_second": progress.examples_per_second(),
                    }
                )
                progress.show(row)
            schedule.step()
            # Writes the row, and saves if due. An epoch's last row stays open for the validation.
            # Ctrl-C or SIGTERM: saves, and raises Stopped. A second Ctrl-C kills.
            checkpoints.end_batch()

        mean = meter.take_epoch()
        results = {"train/loss_epoch": mean["loss"]}
        valid = evaluate(model, data.valid, data)
        progress.check_finite("validation", valid.metrics["loss"])
        log_charts(run, "valid", valid)
        results |= valid.named("valid")
        run.log(results)  # into the row of the last batch, which is still open
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            run.log_weights(model.state_dict(), results, is_best=improved)
        progress.print_epoch(results)
        if progress.patience_ends(best.epoch):
            break
    return best


# ----------------------------------------------------------------- from start to finish


def conclude(session: Session, progress: Progress, best: Best, data: Table) -> dict[str, Any]:
    """Test and export the best model, and write its predictions.

    Returns the content of metrics.json.
    """
    run = session.run
    output_dir = session.output_dir
    model = make_model(session.settings, data, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data.test, data)
    progress.check_finite("test", test.metrics["loss"])
    valid = evaluate(model, data.valid, data)
    if distributed.rank() > 0:
        return {}

    files.write_csv(output_dir / "predictions.csv", valid.columns)
    files.write_tensors(output_dir / "model.pt", best.weights)
    files.write_onnx(output_dir / "model.onnx", model, "output", features=data.test[:2][0].cpu())

    log_charts(run, "test", test)
    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(test.named("test"))
    run.update_summary({"best/epoch": best.epoch} | valid.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | valid.named("valid")
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    print(f"test: {test.metrics}, best epoch {best.epoch}")
    about = {"dataset": data.name, "class_names": data.classes, "best/epoch": best.epoch}
    return about | results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured on the command line.

    Returns the content of metrics.json.
    """
    with open_session(options.parse(Settings, argv), "tabular", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # which reads the table
            data = load(settings, session.device)
        progress = Progress(session, len(data.train), held_out=len(data.valid))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        seed_rank(settings.seed)
        print(
            f"{data.name}: {len(data.train):,} + {len(data.valid):,} + "
            f"{len(data.test):,} rows for training, validation and test"
        )
        print(model)
        session.describe("MLP", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
