"""Train an MLP on a table, logged with Weights & Biases: a copy of train_mnist.py for regression.

What does a flat cost? Reads a CSV file with a header, by default one that it writes itself. Columns
of numbers are normalised, columns of text become one column per word, fitted on the training part.
"""

import dataclasses
import sys
from pathlib import Path

# A copy beside train_mnist.py does not need this.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import options, script
from harness.options import option

# ----------------------------------------------------------------------------- settings

METRICS = {"loss": "min", "mae": "min", "r2": "max"}  # of an evaluation: which way is better


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    file: str | None = option(None, "your CSV file [flats.csv, which is made up]", path=True)
    target: str = option("price", "the column to predict")
    hidden: list[int] = option(
        [64, 64],
        "units of the two hidden layers",
        length=2,
        at_least=1,
    )
    epochs: int = option(20, "passes over the training data", at_least=1)
    schedule: str = option(
        "onecycle",
        "learning rate schedule",
        choices=("onecycle", "constant"),
    )
    monitor: str = option(
        "valid/mae",
        "metric that selects the best model",
        choices=[f"valid/{name}" for name in METRICS],
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import csv
import math
import random
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank, shuffled
from harness.errors import UserError
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb

# --------------------------------------------------------------------------------- data


class Part(NamedTuple):
    """The rows for training, validation or test."""

    features: Tensor  # float32 (rows, features)
    targets: Tensor  # float32 (rows,), normalised


class Table(NamedTuple):
    """A CSV file in three parts."""

    name: str
    train: Part
    valid: Part
    test: Part
    mean: float  # of the target, in its own unit
    scale: float  # its standard deviation


def write_flats(path: Path) -> None:
    """Write a table of 3,000 flats with made-up prices."""
    rng = random.Random(0)
    columns: dict[str, list[Any]] = {name: [] for name in ("area", "age", "district", "price")}
    for _ in range(3000):
        area = round(rng.uniform(20, 180), 1)
        age = rng.randrange(120)
        district = rng.choice(["Hafen", "Mitte", "Nord"])
        rate = {"Hafen": 6.5, "Mitte": 5.0, "Nord": 3.0}[district]
        price = area * rate * (1 - age / 400) + rng.gauss(0, 10)
        for column, value in zip(columns.values(), (area, age, district, round(price, 1))):
            column.append(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_csv(path, columns)


def load(settings: Settings, device: torch.device) -> Table:
    """The table on the device, in three parts. Raises `UserError`."""
    path = Path(settings.file or Path(settings.data_dir, "flats.csv"))
    if not settings.file and not path.exists():
        write_flats(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    if len(rows) < 20 or settings.target not in rows[0]:
        names = ", ".join(rows[0]) if rows else "no rows"
        raise UserError(f"{path}: needs 20 rows and a column {settings.target!r}; it has {names}")
    held_out = len(rows) // 6
    random.Random(0).shuffle(rows)
    fitted = rows[2 * held_out :]
    columns = []
    for name in rows[0]:
        if name != settings.target:
            columns += encode(name, rows, fitted)
    features = torch.tensor(columns).T
    try:
        values = torch.tensor([float(row[settings.target]) for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: column {settings.target!r}: {error}") from None
    mean = values[2 * held_out :].mean()
    scale = values[2 * held_out :].std()
    targets = (values - mean) / scale
    sizes = [held_out, held_out, len(fitted)]
    parts = zip(features.to(device).split(sizes), targets.to(device).split(sizes))
    valid, test, train = (Part(*part) for part in parts)
    return Table(path.stem, train, valid, test, float(mean), float(scale))


def encode(name: str, rows: list[dict], fitted: list[dict]) -> list[list[float]]:
    """Columns of floats for one of the file: normalised, or one per word if it is not numeric."""
    try:
        values = [float(row[name]) for row in fitted]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) or 1.0
        return [[(float(row[name]) - mean) / deviation for row in rows]]
    except ValueError:
        words = sorted({row[name] for row in fitted})
        return [[float(row[name] == word) for row in rows] for word in words]


@logs_to_wandb
def log_dataset(run: Run, table: Table) -> None:
    run.add_tag(table.name)
    artifact = wandb.Artifact(table.name, type="dataset")
    artifact.metadata = {name: len(getattr(table, name).targets) for name in ("train", "test")}
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


class MLP(nn.Module):
    """Two hidden layers. Takes float (batch, features) and returns float (batch,)."""

    def __init__(self, features: int, hidden: list[int]):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1)


def make_model(settings: Settings, table: Table, device: torch.device) -> MLP:
    return MLP(table.train.features.shape[1], settings.hidden).to(device)


def make_optimizer(model: MLP, settings: Settings, batches: int) -> tuple[Optimizer, LRScheduler]:
    """Adam and its learning rate schedule over all `batches`."""
    rate = settings.learning_rate
    optimizer = torch.optim.Adam(model.parameters(), rate)
    if settings.schedule == "constant":
        return optimizer, ConstantLR(optimizer, factor=1)
    return optimizer, OneCycleLR(optimizer, rate, batches, cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


class Result(NamedTuple):
    """Predictions on the CPU, in the unit of the target, and their metrics."""

    predictions: Tensor  # float32 (rows,)
    targets: Tensor  # float32 (rows,)
    metrics: dict[str, float]

    def named(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}


@torch.inference_mode()
def evaluate(model: MLP, part: Part, table: Table) -> Result:
    """Predict every row; few enough for each rank to predict all of them."""
    model.eval()
    predictions = type(model).forward(model, part.features).cpu()  # without the hooks of run.watch
    targets = part.targets.cpu()
    loss = F.mse_loss(predictions, targets)
    metrics = {
        "loss": float(loss),
        "mae": table.scale * float((predictions - targets).abs().mean()),
        "r2": 1 - float(loss / targets.var(correction=0)),
    }
    predictions = table.mean + table.scale * predictions
    targets = table.mean + table.scale * targets
    return Result(predictions, targets, metrics)


@logs_to_wandb
def log_charts(run: Run, name: str, result: Result) -> None:
    """Log the largest errors and the distribution of all."""
    errors = result.predictions - result.targets
    largest = wandb.Table(columns=["target", "prediction", "error", "step"])
    for i in errors.abs().argsort(descending=True)[:100].tolist():
        row = [float(column[i]) for column in (result.targets, result.predictions, errors)]
        largest.add_data(*row, run.step)
    run.log(
        {
            f"{name}/errors": wandb.Histogram(errors.numpy()),
            f"{name}/largest_errors": largest,
        }
    )


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "mean absolute error": ("", "valid/mae"),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: MLP, data: Table) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    train_set = data.train
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    checkpoints = Checkpoints(
        progress,
        [data.train, data.valid, data.test],
        meter,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        best=best,
    )
    checkpoints.restore_or_begin()  # a new run saves its first checkpoint here

    for epoch in progress.epochs():
        model.train()
        order = shuffled(len(train_set.targets), settings.seed, epoch).to(session.device)
        batches = order.split(settings.batch_size)
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            run.log({}, step=progress.step)  # begin the row of this batch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch, log_freq=progress.watch_freq)
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            for part in share.split(settings.micro_batch_size or len(share)):
                features = train_set.features[part]
                targets = train_set.targets[part]
                with session.autocast():
                    loss = F.mse_loss(model(features), targets, reduction="sum")
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
            # Writes the row, except an epoch's last, which stays open for the rest; saves if due.
            # Ctrl-C or SIGTERM: saves, and raises Stopped. A second one kills.
            checkpoints.end_batch()

        mean = meter.take_epoch()
        results = {"train/loss_epoch": mean["loss"]}
        run.log(results)  # into the row of the last batch, like what follows
        valid = evaluate(model, data.valid, data)
        progress.check_finite("validation", valid.metrics["loss"])
        log_charts(run, "valid", valid)
        run.log(valid.named("valid"))
        results |= valid.named("valid")
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            run.log_weights(model.state_dict(), results, is_best=improved)
        progress.print_epoch(results)
        if 0 < settings.patience <= epoch - best.epoch:
            break
    return best


# ----------------------------------------------------------------- from start to finish


def conclude(session: Session, progress: Progress, best: Best, data: Table) -> dict[str, Any]:
    """Test and export the best model, write its predictions.

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

    columns = {"target": valid.targets.tolist(), "prediction": valid.predictions.tolist()}
    files.write_csv(output_dir / "predictions.csv", columns)
    files.write_tensors(output_dir / "model.pt", best.weights)
    inputs = data.test.features[:2].cpu()
    files.write_onnx(output_dir / "model.onnx", model, output="prediction", features=inputs)

    log_charts(run, "test", test)
    curves = run.call(wandb.Image, str(output_dir / "curves.png"))
    run.log({"curves": curves})
    run.log(test.named("test"), commit=True)  # or it would overwrite the summary below
    run.summary["best/epoch"] = best.epoch
    run.summary.update(valid.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | valid.named("valid")
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    error = f"{results['test/mae']:.4g} in {len(data.test.targets):,} rows"
    print(f"test: mean absolute error {error}, best epoch {best.epoch}")
    return {
        "dataset": data.name,
        "model": f"MLP {session.settings.hidden}",
        "best/epoch": best.epoch,
        **results,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured on the command line.

    Returns the content of metrics.json.
    """
    with open_session(options.parse(Settings, argv), "tabular", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # which writes the table
            data = load(settings, session.device)
        progress = Progress(session, len(data.train.targets), held_out=len(data.valid.targets))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        seed_rank(settings.seed)
        print(
            f"{data.name}: {len(data.train.targets):,} + {len(data.valid.targets):,} + "
            f"{len(data.test.targets):,} rows for training, validation and test"
        )
        print(model)
        session.describe("MLP", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
