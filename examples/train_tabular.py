"""Train an MLP on tabular data, logged with Weights & Biases: a copy of train_mnist.py.

Which of three spirals is a point on? Settings, data, model and evaluation are new; the rest is
train_mnist.py's.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # a copy beside train_mnist.py does not need this

from harness import options, script
from harness.options import option

# ----------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    dataset: str = option("spirals", "the only one there is", choices=("spirals",))
    examples: int = option(
        6000, "points on the spirals; a sixth of them each for validation and test", at_least=600
    )
    noise: float = option(0.1, "standard deviation of the points around their spiral", at_least=0)
    hidden: list[int] = option(
        [64, 64],
        "units of the two hidden layers",
        length=2,
        at_least=1,
    )
    epochs: int = option(10, "passes over the training data", at_least=1)
    schedule: str = option(
        "onecycle",
        "learning rate schedule",
        choices=("onecycle", "constant"),
    )
    monitor: str = option(
        "valid/loss", "metric that selects the best model", choices=options.metric_names("valid")
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import math
from functools import partial
from pathlib import Path
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
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb
from metrics import Evaluation, evaluation

# --------------------------------------------------------------------------------- data


class Points(NamedTuple):
    """Points in the plane."""

    features: Tensor  # float32 (examples, 2)
    labels: Tensor  # int64 (examples,), 0 to 2


class Spirals(NamedTuple):
    """Points on three spirals."""

    name: str
    train: Points
    valid: Points
    test: Points
    class_names: list[str]


def load(settings: Settings, device: torch.device) -> Spirals:
    """The data on the device, in three parts."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (settings.examples,), generator=generator)
    radius = torch.rand(settings.examples, generator=generator).sqrt()
    angle = 2 * math.pi * (radius + labels / 3)
    features = 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    features += settings.noise * torch.randn(features.shape, generator=generator)
    held_out = settings.examples // 6
    sizes = [settings.examples - 2 * held_out, held_out, held_out]
    parts = zip(features.to(device).split(sizes), labels.to(device).split(sizes))
    train, valid, test = (Points(*part) for part in parts)
    return Spirals("spirals", train, valid, test, class_names=["red", "green", "blue"])


@logs_to_wandb
def log_dataset(run: Run, data: Spirals) -> None:
    run.add_tag(data.name)
    artifact = wandb.Artifact(data.name, type="dataset")
    for name, part in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        columns = [*part.features.T.tolist(), part.labels.tolist()]
        artifact.add(wandb.Table(columns=["x", "y", "label"], data=list(zip(*columns))), name)
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


class MLP(nn.Module):
    """Two hidden layers. Takes float (batch, 2) and returns logits, float (batch, 3)."""

    def __init__(self, hidden: list[int]):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], 3),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def make_model(settings: Settings, device: torch.device) -> MLP:
    return MLP(settings.hidden).to(device)


def make_optimizer(model: MLP, settings: Settings, batches: int) -> tuple[Optimizer, LRScheduler]:
    """Adam and its learning rate schedule over all `batches`."""
    rate = settings.learning_rate
    optimizer = torch.optim.Adam(model.parameters(), rate)
    if settings.schedule == "constant":
        return optimizer, ConstantLR(optimizer, factor=1)
    return optimizer, OneCycleLR(optimizer, rate, batches, cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: MLP, part: Points) -> Evaluation:
    """Predict every point; small enough for each rank to predict all of them."""
    model.eval()
    logits = type(model).forward(model, part.features)  # skips the hooks of run.watch
    return evaluation(logits, part.labels)


@logs_to_wandb
def log_charts(run: Run, data: Spirals, name: str, result: Evaluation) -> None:
    """Log charts and tables of `name`, "valid" or "test"."""
    points = getattr(data, name).features
    classes = data.class_names
    mistakes = wandb.Table(columns=["x", "y", "label", "prediction", "probability", "step"])
    for i in viz.most_confident_mistakes(result).tolist():
        label = classes[result.labels[i]]
        prediction = classes[result.predictions[i]]
        probability = float(result.probabilities[i].max())
        mistakes.add_data(*points[i].tolist(), label, prediction, probability, run.step)
    matrix = viz.confusion_matrix_picture(result.confusion.counts, classes, name)
    calibration = viz.calibration_picture(result, name)
    run.log(
        {
            f"{name}/confusion_matrix": viz.confusion_matrix_chart(result, classes),
            f"{name}/confusion_matrix_image": wandb.Image(matrix),
            f"{name}/calibration": wandb.Image(calibration),
            f"{name}/mistakes": mistakes,
            f"{name}/logits": wandb.Histogram(result.logits.numpy()),
        }
    )


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "accuracy": ("train/acc_step", "valid/acc"),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


def write_pictures(output_dir: Path, data: Spirals, name: str, result: Evaluation) -> None:
    """Write the confusion matrix as PNG."""
    matrix = viz.confusion_matrix_picture(result.confusion.counts, data.class_names, name)
    files.write_png(output_dir / "confusion_matrix.png", matrix)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: MLP, data: Spirals) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    device = session.device
    train_set = data.train
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    if settings.compile:
        model.forward = torch.compile(model.forward)  # model.compile() would include the hooks
    best = Best(settings.monitor)
    meter = Meter(device)
    checkpoints = Checkpoints(
        progress, data, meter, model=model, optimizer=optimizer, schedule=schedule, best=best
    )
    checkpoints.restore_or_begin()  # a new run saves its first one here

    for epoch in progress.epochs():
        model.train()
        order = shuffled(len(train_set.labels), settings.seed, epoch).to(device)
        batches = order.split(settings.batch_size)
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            run.log({}, step=progress.step)  # begin this batch's row
            if progress.watch_starts:
                run.watch(model, log=settings.watch, log_freq=progress.watch_every)
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            features = train_set.features[share]
            labels = train_set.labels[share]

            with torch.autocast(device.type, torch.bfloat16, enabled=session.precision == "bf16"):
                logits = model(features)
                loss = F.cross_entropy(
                    logits, labels, reduction="sum", label_smoothing=settings.label_smoothing
                )
            (loss / len(indices)).backward()  # of the whole batch: ranks sum their gradients
            distributed.sum_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            meter.add(len(share), loss=loss, acc=(logits.argmax(1) == labels).sum())

            if progress.row_is_due:
                row = meter.take_row()  # means over the batches since the last row
                progress.check_finite("training", row["loss"])
                run.log(
                    {
                        "epoch": epoch,
                        "train/loss_step": row["loss"],
                        "train/acc_step": row["acc"],
                        "train/learning_rate": schedule.get_last_lr()[0],
                        "train/examples_per_second": progress.examples_per_second(),
                    }
                )
                progress.show(row)
            schedule.step()
            checkpoints.save_if_due()  # also at an epoch's end, and on a request to stop

        mean = meter.take_epoch()
        results = {"train/loss_epoch": mean["loss"], "train/acc_epoch": mean["acc"]}
        run.log(results)
        if len(data.valid.labels):
            valid = evaluate(model, data.valid)
            progress.check_finite("validation", valid.metrics["loss"])
            log_charts(run, data, "valid", valid)
            results |= valid.named("valid")
            run.log(results)
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            run.log_weights(model.state_dict(), results, is_best=improved)
        progress.end_epoch(results)
        if 0 < settings.patience <= epoch - best.epoch:
            break
    return best


# ----------------------------------------------------------------- from start to finish


@logs_to_wandb
def log_curves(run: Run, output_dir: Path) -> None:
    run.log({"curves": wandb.Image(str(output_dir / "curves.png"))})


def conclude(session: Session, progress: Progress, best: Best, data: Spirals) -> dict[str, Any]:
    """Test and export the best model, write its predictions.

    Returns the content of metrics.json.
    """
    run = session.run
    output_dir = session.output_dir
    model = make_model(session.settings, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data.test)
    progress.check_finite("test", test.metrics["loss"])
    name = "valid" if len(data.valid.labels) else "test"
    shown = evaluate(model, getattr(data, name))
    if distributed.rank() > 0:
        return {}

    files.write_csv(output_dir / "predictions.csv", shown.columns())
    write_pictures(output_dir, data, name, shown)
    files.write_tensors(output_dir / "model.pt", best.weights)
    files.write_onnx(output_dir / "model.onnx", model, output="logits", features=torch.zeros(2, 2))

    log_charts(run, data, "test", test)
    log_curves(run, output_dir)
    run.log(test.named("test"), commit=True)  # an open row would overwrite the summary
    run.summary["best/epoch"] = best.epoch
    if name == "valid":
        run.summary.update(shown.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | shown.named(name)
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    accuracy = f"{results['test/acc']:.2%} of {len(data.test.labels):,} points"
    print(f"test accuracy {accuracy}, best epoch {best.epoch}")
    return {
        "dataset": data.name,
        "model": f"MLP {session.settings.hidden}",
        "class_names": data.class_names,
        "best/epoch": best.epoch,
        **results,
        f"{name}/majority_share": shown.confusion.majority_share(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured on the command line.

    Returns the content of metrics.json.
    """
    with open_session(options.parse(Settings, argv), "tabular") as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # which downloads the data
            data = load(settings, session.device)
        session.config["dataset"] = data.name  # what "auto" stands for
        progress = Progress(session, len(data.train.labels), held_out=len(data.valid.labels))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, session.device)
        seed_rank(settings.seed)
        sizes = [f"{len(part.labels):,}" for part in (data.train, data.valid, data.test)]
        print(f"{data.name}: {' + '.join(sizes)} points for training, validation and test")
        print(model)
        session.describe("MLP", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
