"""Train an MLP on tabular data, logged with Weights & Biases: a copy of train_mnist.py with its own data and model.

Which of three spirals is a point on? Settings, data, model and evaluation are new; the rest is train_mnist.py's.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # a copy beside train_mnist.py does not need this

from harness import options, script
from harness.options import option

# ---------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True)
class Settings(options.SharedSettings):
    dataset: str = option("spirals", "the only one there is", choices=("spirals",))
    examples: int = option(
        6000, "points on the spirals; a sixth of them each for validation and test", at_least=600
    )
    noise: float = option(0.1, "standard deviation of the points around their spiral", at_least=0)
    hidden: list[int] = option([64, 64], "units of the two hidden layers", length=2, at_least=1)
    epochs: int = option(10, "passes over the training data", at_least=1)
    schedule: str = option("onecycle", "learning rate schedule", choices=("onecycle", "constant"))
    monitor: str = option(
        "valid/loss", "metric that selects the best model", choices=options.metric_names("valid")
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import math
import shutil
from typing import Any, NamedTuple

import numpy as np
import torch
import wandb
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import find_device, seed_everything, seed_rank
from harness.progress import Best, Meter, Progress, check_batches
from harness.session import Session, open_session
from harness.wandb_run import logs_to_wandb, tolerate_wandb_errors
from metrics import Evaluation, evaluation, lower_is_better

# -------------------------------------------------------------------------------------------------- data


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


def load(settings: Settings) -> Spirals:
    """The data on the device, in three parts. Resolves `watch_every`; raises `UserError`."""
    device, generator = find_device(settings.device), torch.Generator().manual_seed(0)
    labels = torch.randint(3, (settings.examples,), generator=generator)
    radius = torch.rand(settings.examples, generator=generator).sqrt()
    angle = 2 * math.pi * (radius + labels / 3)
    features = 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    features += settings.noise * torch.randn(features.shape, generator=generator)
    held_out = settings.examples // 6
    sizes = [settings.examples - 2 * held_out, held_out, held_out]
    parts = (
        Points(*part)
        for part in zip(features.to(device).split(sizes), labels.to(device).split(sizes))
    )
    check_batches(settings, examples=sizes[0], held_out=held_out)
    return Spirals("spirals", *parts, class_names=["red", "green", "blue"])


def shuffled(examples: int, seed: int, epoch: int) -> Tensor:
    """Indices in random order, int64 (examples,), from seed and epoch alone, so that a resumed run repeats it."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(examples))


@logs_to_wandb
def log_dataset(run: wandb.Run, data: Spirals) -> None:
    artifact = wandb.Artifact(data.name, type="dataset")
    for name, part in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        columns = [*part.features.T.tolist(), part.labels.tolist()]
        artifact.add(wandb.Table(columns=["x", "y", "label"], data=list(zip(*columns))), name)
    run.log_artifact(artifact)


# ------------------------------------------------------------------------------------------------- model


class MLP(nn.Module):
    """Two hidden layers. Takes float (batch, 2) and returns logits, float (batch, 3)."""

    def __init__(self, hidden: list[int]):
        super().__init__()
        hidden_layers = (
            nn.Linear(2, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
        )
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(hidden[1], 3))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def make_model(settings: Settings, device: torch.device) -> MLP:
    return MLP(settings.hidden).to(device)


def make_optimizer(model: MLP, settings: Settings, batches: int) -> tuple[Optimizer, LRScheduler]:
    """Adam and its learning rate schedule over all `batches`."""
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    if settings.schedule == "constant":
        return optimizer, ConstantLR(optimizer, factor=1)
    return optimizer, OneCycleLR(optimizer, settings.learning_rate, batches, cycle_momentum=False)


def export_onnx(path: Path, model: MLP) -> None:
    """One file that includes the weights: from `features`, float (batch, 2), to `logits`."""
    program = torch.onnx.export(
        model.cpu(),
        (torch.zeros(2, 2),),
        input_names=["features"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    with files.replacing(path) as temporary:
        program.save(temporary, external_data=False)


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: MLP, part: Points) -> Evaluation:
    """Predict every point; small enough for each rank to predict all of them."""
    model.eval()
    return evaluation(
        type(model).forward(model, part.features), part.labels
    )  # spares the hooks of run.watch


@logs_to_wandb
def log_charts(
    run: wandb.Run, data: Spirals, name: str, result: Evaluation, progress: Progress
) -> None:
    """Log the charts and tables of `name`, "valid" or "test"."""
    points, classes = getattr(data, name).features, data.class_names
    mistakes = wandb.Table(columns=["x", "y", "label", "prediction", "probability", "step"])
    for i in viz.most_confident_mistakes(result).tolist():
        outcome = (
            classes[result.labels[i]],
            classes[result.predictions[i]],
            float(result.probabilities[i].max()),
        )
        mistakes.add_data(*points[i].tolist(), *outcome, progress.step)
    picture = viz.confusion_matrix_picture(result.confusion.counts, classes, name)
    charts = {
        f"{name}/confusion_matrix": viz.confusion_matrix_chart(result, classes),
        f"{name}/confusion_matrix_image": wandb.Image(picture),
        f"{name}/calibration": wandb.Image(viz.calibration_picture(result, name)),
        f"{name}/mistakes": mistakes,
        f"{name}/logits": wandb.Histogram(result.logits.numpy()),
    }
    run.log(charts, step=progress.step)


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "accuracy": ("train/acc_step", "valid/acc"),
    }
    if distributed.rank() == 0:
        files.write_png(
            session.output_dir / "curves.png",
            viz.curves_picture(session.history.rows, panels, best_epoch),
        )


def write_pictures(output_dir: Path, data: Spirals, name: str, result: Evaluation) -> None:
    """Write the confusion matrix as PNG."""
    picture = viz.confusion_matrix_picture(result.confusion.counts, data.class_names, name)
    files.write_png(output_dir / "confusion_matrix.png", picture)


# ---------------------------------------------------------------------------------------------- training


def train(session: Session, model: MLP, data: Spirals) -> tuple[Best, Progress]:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model and the progress."""
    settings, run, device, train_set = session.settings, session.run, session.device, data.train
    progress = Progress(session, examples=len(train_set.labels))
    loss_function = nn.CrossEntropyLoss(reduction="sum", label_smoothing=settings.label_smoothing)
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    if settings.compile:
        model.forward = torch.compile(
            model.forward
        )  # not model.compile(), which includes the hooks of run.watch
    meter, best = Meter(device), Best(settings.monitor, lower_is_better(settings.monitor))
    stateful = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "meter": meter,
        "best": best,
    }
    checkpoints = Checkpoints(session, progress, data=data, **stateful)
    checkpoints.restore_or_begin()  # a new run saves its first one here

    for epoch in progress.epochs():
        model.train()
        batches = (
            shuffled(len(train_set.labels), settings.seed, epoch)
            .to(device)
            .split(settings.batch_size)
        )
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_starts:
                run.watch(model, log=settings.watch, log_freq=settings.watch_every)
            share = distributed.share_of(
                indices
            )  # all of them, unless torchrun started several processes
            features, labels = train_set.features[share], train_set.labels[share]

            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(features)
                loss = loss_function(logits, labels)
            (
                loss / len(indices)
            ).backward()  # the size of the whole batch: gradients are summed over ranks
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
                    },
                    step=progress.step,
                )
                progress.bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['acc']:.2%}")
            schedule.step()
            checkpoints.save_if_due()  # and at an epoch's end; on a request to stop it saves, then raises Stopped

        mean = meter.take_epoch()
        results = {"epoch": epoch, "train/loss_epoch": mean["loss"], "train/acc_epoch": mean["acc"]}
        run.log(results, step=progress.step)
        if len(data.valid.labels):
            valid = evaluate(model, data.valid)
            progress.check_finite("validation", valid.metrics["loss"])
            log_charts(run, data, "valid", valid, progress)
            results |= valid.named("valid")
            run.log(results, step=progress.step)
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            log_model(
                run, model.state_dict(), results, ["latest", "best"] if improved else ["latest"]
            )
        progress.end_epoch(
            results, "train/loss_epoch", "train/acc_epoch", "valid/loss", "valid/acc"
        )
        if 0 < settings.patience <= epoch - best.epoch:
            break
    return best, progress


# ------------------------------------------------------------------------------------- from start to finish


@logs_to_wandb
def log_model(
    run: wandb.Run, weights: dict[str, Tensor], metadata: dict[str, float], aliases: list[str]
) -> None:
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
    with artifact.new_file("model.pt", mode="wb") as file:
        torch.save({name: weight.cpu() for name, weight in weights.items()}, file)
    run.log_artifact(artifact, aliases=aliases)


def conclude(session: Session, best: Best, progress: Progress) -> dict[str, Any]:
    """Test and export the best model, write its predictions; returns the content of metrics.json."""
    settings, run, data, output_dir = (
        session.settings,
        session.run,
        session.data,
        session.output_dir,
    )
    model = make_model(settings, session.device)
    model.load_state_dict(best.weights)
    test, valid = (
        evaluate(model, data.test),
        evaluate(model, data.valid) if len(data.valid.labels) else None,
    )
    progress.check_finite("test", test.metrics["loss"])
    if distributed.rank() > 0:
        return {}
    log_charts(run, data, "test", test, progress)
    with tolerate_wandb_errors(run):
        run.log({"curves": wandb.Image(str(output_dir / "curves.png"))}, step=progress.step)
    run.log(
        test.named("test"), step=progress.step, commit=True
    )  # W&B: an open row would overwrite the summary
    name, shown = ("valid", valid) if valid else ("test", test)
    results = test.named("test") | shown.named(name)
    files.write_csv(output_dir / "predictions.csv", shown.columns())
    write_pictures(output_dir, data, name, shown)
    files.write_tensors(output_dir / "model.pt", best.weights)
    export_onnx(output_dir / "model.onnx", model)
    with tolerate_wandb_errors(run):
        run.summary.update({"best/epoch": best.epoch, **(valid.named("best") if valid else {})})
        for file in ("model.pt", "model.onnx") if not run.disabled else ():
            copy = shutil.copy(
                output_dir / file, run.dir
            )  # W&B would only link to it, and warn of that
            run.save(copy, base_path=run.dir, policy="now", glob=False)
    if settings.log_model == "best":
        log_model(run, best.weights, results, ["latest", "best"])
    print(
        f"test accuracy {results['test/acc']:.2%} of {len(data.test.labels):,} points, best epoch {best.epoch}"
    )
    identity = {
        "dataset": data.name,
        "model": f"MLP {settings.hidden}",
        "class_names": data.class_names,
    }
    return {
        **identity,
        "best/epoch": best.epoch,
        **results,
        f"{name}/majority_share": shown.confusion.majority_share(),
    }


def init(settings: Settings, /, **more: Any) -> wandb.Run:
    """Start the W&B run; `more` is what the session adds: id, mode, resume ..."""
    config = dataclasses.asdict(settings)
    return wandb.init(
        project=settings.project,
        name=settings.name,
        tags=settings.tags or None,
        config=config,
        **more,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured on the command line; returns the content of metrics.json."""
    with open_session(options.parse(Settings, argv), "spirals", load, init) as session:
        if not session.finished:
            settings, data, device = session.settings, session.data, session.device
            log_dataset(session.run, data)
            seed_everything(settings.seed, settings.deterministic)
            model = make_model(settings, device)
            seed_rank(settings.seed)
            sizes = " + ".join(
                f"{len(part.labels):,}" for part in (data.train, data.valid, data.test)
            )
            print(f"{data.name}: {sizes} points for training, validation and test\n{model}")
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(
                f"{parameters:,} parameters on {device.type} in {settings.precision}, seed {settings.seed}"
            )
            best, progress = train(session, model, data)
            session.metrics = conclude(session, best, progress)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
