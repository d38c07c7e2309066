"""Train a ConvNet on MNIST, logged with Weights & Biases: settings, data, model, evaluation, training, export.

The model and the task are those of the W&B PyTorch tutorial. `run.log` collects the row of a step, which is written
when the next batch begins. Under torchrun all ranks run this, and rank 0 alone logs, writes files and prints.
"""

import dataclasses

from harness import options, script
from harness.options import option

# ---------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True)
class Settings(options.SharedSettings):
    dataset: str = option(
        "auto",
        "auto: MNIST, or built-in digits if it is not available",
        choices=("auto", "mnist", "fashion_mnist", "kmnist", "synthetic"),
    )
    schedule: str = option("onecycle", "learning rate schedule", choices=("onecycle", "constant"))
    kernels: list[int] = option([16, 32], "channels of the two convolutions", length=2, at_least=1)
    slice: int = option(1, "use every n-th image of each part", at_least=1, below=10**6)
    valid_size: int = option(
        5000, "number of training images held out for validation, from the end", at_least=0
    )
    monitor: str = option(
        "valid/loss", "metric that selects the best model", choices=options.metric_names("valid")
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
from tasks.digits import Digits, ImageSet, load_digits, split_digits

# -------------------------------------------------------------------------------------------------- data


def load(settings: Settings) -> Digits:
    """The data on the device, in three parts. Resolves `dataset` and `watch_every`; raises `UserError`."""
    device = find_device(settings.device)
    digits = split_digits(
        load_digits(settings.dataset, settings.data_dir), settings.valid_size, settings.slice
    )
    check_batches(settings, examples=len(digits.train.labels), held_out=len(digits.valid.labels))
    settings.dataset = digits.name
    return digits.to(device)


def shuffled(examples: int, seed: int, epoch: int) -> Tensor:
    """Indices in random order, int64 (examples,), from seed and epoch alone, so that a resumed run repeats it."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(examples))


def pixels(images: Tensor) -> Tensor:
    """The model's input for uint8 images: float32 in 0..1, as from torchvision's ToTensor."""
    return images.float().div_(255)


@logs_to_wandb
def log_dataset(run: wandb.Run, digits: Digits) -> None:
    artifact = wandb.Artifact(digits.name, type="dataset")
    for file in digits.files:
        artifact.add_reference(file.resolve().as_uri(), name=file.name)  # a checksum, not a copy
    run.log_artifact(artifact)


# ------------------------------------------------------------------------------------------------- model


class ConvNet(nn.Module):
    """Two 5×5 convolutions, each with max-pooling and ReLU, and a linear layer.

    Takes float (batch, 1, 28, 28) in 0..1 and returns logits, float (batch, 10).
    """

    def __init__(self, kernels: list[int]):
        super().__init__()
        self.conv1 = nn.Conv2d(1, kernels[0], kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(kernels[0], kernels[1], kernel_size=5, padding=2)
        self.fc = nn.Linear(7 * 7 * kernels[1], 10)

    def forward(self, images: Tensor) -> Tensor:
        # Pooling before ReLU gives the same result, with a quarter of the values left for ReLU.
        x = F.max_pool2d(self.conv1(images), 2).relu()
        x = F.max_pool2d(self.conv2(x), 2).relu()
        return self.fc(x.flatten(1))


def make_model(settings: Settings, device: torch.device) -> ConvNet:
    return ConvNet(settings.kernels).to(device, memory_format=torch.channels_last)


def make_optimizer(
    model: ConvNet, settings: Settings, batches: int
) -> tuple[Optimizer, LRScheduler]:
    """Adam and its learning rate schedule over all `batches`."""
    betas = (
        (0.7, 0.9) if settings.schedule == "onecycle" else (0.9, 0.999)
    )  # a short schedule needs short averages
    optimizer = torch.optim.Adam(
        model.parameters(), settings.learning_rate, betas, fused=not model.fc.weight.is_mps
    )
    if settings.schedule == "constant":
        return optimizer, ConstantLR(optimizer, factor=1)
    rise = 0.11 if batches == 10 else 0.1  # OneCycleLR divides by rise * batches - 1
    return optimizer, OneCycleLR(
        optimizer, settings.learning_rate, batches, pct_start=rise, cycle_momentum=False
    )


def export_onnx(path: Path, model: ConvNet) -> None:
    """One file that includes the weights: from `images`, float (batch, 1, 28, 28) in 0..1, to `logits`."""
    program = torch.onnx.export(
        model.cpu().to(memory_format=torch.contiguous_format),
        (torch.zeros(2, 1, 28, 28),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of the source code on this machine
    with files.replacing(path) as temporary:
        program.save(temporary, external_data=False)


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: ConvNet, part: ImageSet) -> Evaluation:
    """Predict every image, in float32 like the exported model; each rank predicts a share of the batches."""
    model.eval()
    logits = torch.zeros(len(part.images), model.fc.out_features, device=part.images.device)
    batches = list(zip(part.images.split(200), logits.split(200)))
    for images, slots in distributed.share_of(batches):
        slots.copy_(
            type(model).forward(model, pixels(images))
        )  # model(...) would run the hooks of run.watch
    distributed.sum_over_ranks(logits)  # the other ranks' logits are zero here
    return evaluation(logits, part.labels)


@logs_to_wandb
def log_charts(
    run: wandb.Run, data: Digits, name: str, result: Evaluation, progress: Progress
) -> None:
    """Log the charts and tables of `name`, "valid" or "test", and warn of a model that predicts one class only."""
    if warning := viz.one_class_warning(result, data.class_names):
        progress.warn("One class only", warning)
    images, classes = getattr(data, name).images.cpu(), data.class_names
    picture = viz.confusion_matrix_picture(result.confusion.counts, classes, name)
    charts = {
        f"{name}/confusion_matrix": viz.confusion_matrix_chart(result, classes),
        f"{name}/confusion_matrix_image": wandb.Image(picture),
        f"{name}/calibration": wandb.Image(viz.calibration_picture(result, name)),
        f"{name}/mistakes": viz.digit_mistakes_table(images, result, classes, progress.step),
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


def write_pictures(output_dir: Path, data: Digits, name: str, result: Evaluation) -> None:
    """Write the confusion matrix and the most confident mistakes as PNG."""
    picture = viz.confusion_matrix_picture(result.confusion.counts, data.class_names, name)
    files.write_png(output_dir / "confusion_matrix.png", picture)
    picture = viz.digit_mistakes_picture(
        getattr(data, name).images.cpu(), result, data.class_names, name
    )
    files.write_png(output_dir / "mistakes.png", picture)


@logs_to_wandb
@torch.inference_mode()
def log_inputs(run: wandb.Run, model: ConvNet, data: Digits, indices: Tensor, step: int) -> None:
    """Log some training images with the model's predictions."""
    images, labels = data.train.images[indices], data.train.labels[indices]
    predictions = type(model).forward(model.eval(), pixels(images)).argmax(1)
    run.log(
        {"train/inputs": viz.captioned_digits(images.cpu(), predictions, labels, data.class_names)},
        step=step,
    )


# ---------------------------------------------------------------------------------------------- training


def train(session: Session, model: ConvNet, data: Digits) -> tuple[Best, Progress]:
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
            images, labels = train_set.images[share], train_set.labels[share]

            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(pixels(images))
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
        log_inputs(run, model, data, batches[-1][:16], progress.step)
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
        f"test accuracy {results['test/acc']:.2%} of {len(data.test.labels):,} images, best epoch {best.epoch}"
    )
    identity = {
        "dataset": data.name,
        "model": f"ConvNet {settings.kernels}",
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
    with open_session(options.parse(Settings, argv), "mnist", load, init) as session:
        if not session.finished:
            settings, data, device = session.settings, session.data, session.device
            log_dataset(session.run, data)
            seed_everything(settings.seed, settings.deterministic)
            model = make_model(settings, device)
            seed_rank(settings.seed)
            sizes = " + ".join(
                f"{len(part.labels):,}" for part in (data.train, data.valid, data.test)
            )
            print(f"{data.name}: {sizes} images for training, validation and test\n{model}")
            parameters = sum(parameter.numel() for parameter in model.parameters())
            print(
                f"{parameters:,} parameters on {device.type} in {settings.precision}, seed {settings.seed}"
            )
            best, progress = train(session, model, data)
            session.metrics = conclude(session, best, progress)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
