"""Train an MLP on a table, logged with Weights & Biases: a copy of train_mnist.py.

Reads a CSV file with a header, by default of made-up flats. A column of numbers (1234.5) is
normalised, any other is one-hot: a feature for each word that training has.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not for a copy beside it

from harness import options, script
from harness.errors import UserError
from harness.options import option

# ----------------------------------------------------------------------------- settings

METRICS = {  # of an evaluation, by --task: which way each is better
    "regression": {"loss": "min", "mae": "min", "r2": "max"},
    "classification": {"loss": "min", "acc": "max"},
}
MISSING = {"", "?", "nan", "na", "n/a", "#n/a", "<na>", "null", "none"}  # values, in lower case


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    file: str | None = option(None, "your CSV file [flats.csv]", path=True)
    target: str = option("price", "the column to predict")
    task: str = option("regression", "predict a number or a class", choices=list(METRICS))
    hidden: int = option(64, "units in each of the two hidden layers", at_least=1)
    epochs: int = option(20, "passes over the training data", at_least=1, below=10**6)
    monitor: str = option("valid/loss", "metric that selects the best model")

    def __post_init__(self) -> None:
        names = [f"valid/{name}" for name in METRICS[self.task]]
        if self.monitor not in names:
            raise UserError(f"--monitor: must be one of {', '.join(names)}; got {self.monitor!r}")


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

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
    file: Path
    features: Tensor  # float32 (rows, features)
    targets: Tensor  # normalised, float32 (rows, 1), or indices of classes, int64 (rows,)
    classes: list[str]  # none for regression
    mean: float  # of the target in training, in its own unit
    scale: float  # its standard deviation
    valid: Tensor  # row numbers, int64, as test and train
    test: Tensor
    train: Tensor


def read_columns(path: Path, target: str) -> dict[str, np.ndarray]:
    """The columns of a CSV file by name, str (rows,), shuffled. Raises `UserError`."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = [line for line in file if line.strip()]
        if len(lines) < 21:
            raise UserError(f"{path} needs a header and 20 rows; it has {len(lines)} lines")
        cells = np.loadtxt(lines, str, comments=None, delimiter=",", quotechar='"', ndmin=2)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as CSV: {str(error).partition(';')[0]}") from None
    names, *rows = np.char.strip(cells).tolist()
    if target not in names or len(set(names)) < max(len(names), 2):
        raise UserError(f"{path} needs {target!r} and others, no name twice: {', '.join(names)}")
    rows = np.random.default_rng(0).permutation(rows)
    return dict(zip(names, rows.T))


def encode(name: str, words: np.ndarray, first: int) -> Tensor:
    """A column as float32 (rows, features), fitted to rows `first` and on. Raises `UserError`."""
    if MISSING.intersection(np.char.lower(words)):
        raise UserError(f"column {name!r} lacks values")
    try:
        values = torch.from_numpy(words.astype(float))[:, None]
        values = (values - values[first:].mean()) / values[first:].std(correction=0)
    except ValueError:
        values = torch.from_numpy(words[:, None] == np.unique(words[first:]))
    print(f"{name}, such as {max(words):.50}: {values.shape[1]} number(s)")
    values = values.float()
    if len(values[first:].unique()) == 1 or not values.isfinite().all():
        raise UserError(f"column {name!r} is infinite, or training has only one value")
    return values


def load(settings: Settings, device: torch.device) -> Table:
    """The table on the device, in three parts. Raises `UserError`."""
    path = Path(settings.file or Path(__file__).with_name("flats.csv"))
    columns = read_columns(path, settings.target)
    words = columns.pop(settings.target)
    first = len(words) // 3  # row for training
    features = torch.cat([encode(name, columns[name], first) for name in columns], 1).to(device)
    targets = encode(settings.target, words, first)
    classes = []
    mean, scale = 0.0, 1.0
    if settings.task == "classification":
        classes = np.unique(words[first:]).tolist()
        if unknown := set(words.tolist()).difference(classes):
            raise UserError(f"no training row has the {settings.target} {unknown.pop()!r}")
        targets = torch.tensor([classes.index(word) for word in words])
    else:
        try:
            values = words.astype(float)
        except ValueError:
            advice = "write its numbers as 1234.5, or use --task classification"
            raise UserError(f"{settings.target!r} is text: {advice}") from None
        mean = float(values[first:].mean())
        scale = float(values[first:].std())
    parts = torch.arange(len(words), device=device).tensor_split([first // 2, first])
    return Table(path, features, targets.to(device), classes, mean, scale, *parts)


@logs_to_wandb
def log_dataset(run: Run, table: Table) -> None:
    artifact = wandb.Artifact("table", type="dataset")
    artifact.add_reference(table.file.absolute().as_uri())  # a checksum, not a copy
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


def make_model(settings: Settings, data: Table, device: torch.device) -> nn.Sequential:
    """An MLP: float (batch, features) to float (batch, classes), or (batch, 1)."""
    return nn.Sequential(
        nn.Linear(data.features.shape[1], settings.hidden),
        nn.ReLU(),
        nn.Linear(settings.hidden, settings.hidden),
        nn.ReLU(),
        nn.Linear(settings.hidden, len(data.classes) or 1),
    ).to(device)


def make_optimizer(model: nn.Module, rate: float, batches: int) -> tuple[Adam, OneCycleLR]:
    optimizer = Adam(model.parameters(), rate)
    return optimizer, OneCycleLR(optimizer, rate, max(batches, 2), cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


class Result(NamedTuple):
    columns: dict[str, list[Any]]  # of predictions.csv
    metrics: dict[str, float]

    def named(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}

    def table(self) -> wandb.Table:
        rows = [list(row) for row in zip(*self.columns.values())]
        return wandb.Table(list(self.columns), rows[:100])


@torch.inference_mode()
def evaluate(model: nn.Module, table: Table, rows: Tensor) -> Result:
    """Predict some rows; few enough for each rank to predict all of them."""
    outputs = model.eval()(table.features[rows]).cpu()
    targets = table.targets[rows].cpu()
    if table.classes:
        result = evaluation(outputs, targets, METRICS["classification"])
        return Result(result.columns(), result.metrics)
    targets = table.mean + table.scale * targets.flatten().double()
    predictions = table.mean + table.scale * outputs.flatten().double()
    mse = F.mse_loss(predictions, targets)
    metrics = {
        "loss": float(mse) / table.scale**2,
        "mae": float(F.l1_loss(predictions, targets)),
        "r2": 1 - float(mse / targets.var(correction=0)),
    }
    return Result({"target": targets.tolist(), "prediction": predictions.tolist()}, metrics)


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "learning rate": ("train/learning_rate", ""),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: nn.Module, data: Table) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    optimizer, schedule = make_optimizer(model, settings.learning_rate, progress.total_batches)
    best = Best(settings.monitor, METRICS[settings.task])
    meter = Meter()
    loss_function = F.cross_entropy if data.classes else F.mse_loss
    # Also saves position, meter and random state. An epoch's last save precedes its validation.
    checkpoints = Checkpoints(
        progress,
        [data.features, data.targets, data.classes, data.mean, data.scale],
        meter,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        best=best,
    )
    checkpoints.restore_or_begin()  # a new run saves its first checkpoint here

    for epoch in progress.epochs():
        model.train()
        order = shuffled(len(data.train), settings.seed, epoch).to(session.device)
        batches = data.train[order].split(settings.batch_size)
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch)  # histograms of this batch
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            for part in share.split(settings.micro_batch_size or len(share)):
                with session.autocast():
                    outputs = model(data.features[part])
                    loss = loss_function(outputs, data.targets[part], reduction="sum")
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
        valid = evaluate(model, data, data.valid)
        progress.check_finite("validation", valid.metrics["loss"])
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
    """Test and export the best model; returns the content of metrics.json."""
    run = session.run
    output_dir = session.output_dir
    model = make_model(session.settings, data, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data, data.test)
    progress.check_finite("test", test.metrics["loss"])
    valid = evaluate(model, data, data.valid)
    if distributed.rank() > 0:
        return {}

    files.write_csv(output_dir / "predictions.csv", valid.columns)
    files.write_tensors(output_dir / "model.pt", best.weights)
    files.write_onnx(output_dir / "model.onnx", model, "output", features=data.features[:2].cpu())

    run.log({"test/predictions": run.call(test.table)})
    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(test.named("test"))
    run.update_summary({"best/epoch": best.epoch})
    run.update_summary(valid.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | valid.named("valid")
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    print(f"test: {test.metrics}, best epoch {best.epoch}")
    return {
        "dataset": data.file.name,
        "class_names": data.classes,
        "best/epoch": best.epoch,
        **results,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured; returns the content of metrics.json."""
    settings = options.parse(Settings, argv)
    with open_session(settings, "tabular", METRICS[settings.task]) as session:
        if session.finished:
            return session.metrics
        with distributed.rank_0_first():  # which reads the table
            data = load(settings, session.device)
        progress = Progress(session, len(data.train), held_out=len(data.valid))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        seed_rank(settings.seed)
        print(
            f"{data.file.name}: {len(data.train):,} + {len(data.valid):,} + "
            f"{len(data.test):,} rows for training, validation and test"
        )
        print(model)
        session.describe("MLP", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
