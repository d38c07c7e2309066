"""Train a ConvNet on MNIST, logged with Weights & Biases.

The model and the task are those of the W&B PyTorch tutorial. To make the script yours, see README,
"Start your own".

`run` wraps the W&B run. `run.log` adds values to the row of the current step, the number of
training examples seen. A row is written when the next one begins, by `end_batch`, or on commit. It
is an error to log to a smaller step, to log to a row that was written, or to log a key twice with
different values. W&B's own errors are reported, but never reach training: neither those of `run`
nor those of functions with @logs_to_wandb, which run on rank 0 only.
"""

import dataclasses

from harness import options, script
from harness.options import option
from tasks.folds import Folds

# ----------------------------------------------------------------------------- settings

METRICS = {  # of an evaluation, and whether the lowest or the highest value is best
    "loss": "min",
    "acc": "max",
    "balanced_acc": "max",
    "precision_macro": "max",
    "recall_macro": "max",
    "f1_macro": "max",
    "precision_micro": "max",
    "recall_micro": "max",
    "f1_micro": "max",
    "mcc": "max",
    "ece": "min",
}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(Folds, options.SharedSettings):
    dataset: str = option(
        "auto",
        "auto: MNIST, or built-in digits if it is not available",
        placeholder="auto",
        choices=("auto", "mnist", "fashion_mnist", "kmnist", "synthetic"),
    )
    schedule: str = option("onecycle", "learning rate schedule", choices=("onecycle", "constant"))
    label_smoothing: float = option(
        0.0,
        "share of each label spread over all classes; the training loss includes it",
        at_least=0,
        below=1,
    )
    kernels: list[int] = option([16, 32], "channels of the two convolutions", length=2, at_least=1)
    slice: int = option(1, "use every n-th image of each part", at_least=1, below=10**6)
    valid_size: int = option(
        5000, "training images held out for validation, from the end, without --folds", at_least=0
    )
    init_from: str | None = option(
        None, "run, or file of weights such as its model.pt, to start from", path=True
    )
    monitor: str = option(
        "valid/loss",
        "metric that selects the best model",
        choices=[f"valid/{name}" for name in METRICS],
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

from functools import partial
from typing import Any

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
from metrics import PER_CLASS, Evaluation, evaluation
from tasks.digits import Digits, ImageSet, load_digits, split_digits

# --------------------------------------------------------------------------------- data


def load(settings: Settings, device: torch.device) -> Digits:
    """The data in three parts, on the device. Raises `UserError`."""
    digits = load_digits(settings.dataset, settings.data_dir)
    return split_digits(digits, settings.valid_size, settings.slice, device, settings)


def pixels(images: Tensor) -> Tensor:
    """The model's input for uint8 images: float32 in 0..1, as from torchvision's ToTensor."""
    return images.float().div_(255)


@logs_to_wandb
def log_dataset(run: Run, digits: Digits) -> None:
    run.add_tag(digits.name)
    artifact = wandb.Artifact(digits.name, type="dataset")
    for file in digits.files:
        artifact.add_reference(file.absolute().as_uri())  # a checksum, not a copy
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


class ConvNet(nn.Module):
    """Two 5×5 convolutions, each with max-pooling and ReLU, and a linear layer.

    Takes float (batch, 1, 28, 28) in 0..1 and returns logits, float (batch, classes).
    """

    def __init__(self, kernels: list[int], classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, kernels[0], 5, padding=2)
        self.conv2 = nn.Conv2d(kernels[0], kernels[1], 5, padding=2)
        self.fc = nn.Linear(7 * 7 * kernels[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        # Pooling before ReLU gives the same result, with a quarter of the values left for ReLU.
        x = F.max_pool2d(self.conv1(images), 2).relu()
        x = F.max_pool2d(self.conv2(x), 2).relu()
        return self.fc(x.flatten(1))


def make_model(settings: Settings, data: Digits, device: torch.device) -> ConvNet:
    model = ConvNet(settings.kernels, len(data.class_names))
    return model.to(device, memory_format=torch.channels_last)


def make_optimizer(
    model: ConvNet, settings: Settings, batches: int
) -> tuple[Optimizer, LRScheduler]:
    """Adam and its learning rate schedule over all `batches`."""
    rate = settings.learning_rate
    constant = settings.schedule == "constant"
    betas = (0.9, 0.999) if constant else (0.7, 0.9)  # short averages suit few steps
    optimizer = torch.optim.Adam(model.parameters(), rate, betas, fused=True)
    if constant:
        return optimizer, ConstantLR(optimizer, factor=1)
    batches = max(batches, 2)  # OneCycleLR would give a single batch almost no learning rate
    rise = 0.11 if batches == 10 else 0.1  # a rise of exactly one batch would divide by zero
    return optimizer, OneCycleLR(optimizer, rate, batches, pct_start=rise, cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: ConvNet, part: ImageSet) -> Evaluation:
    """Predict every image, in float32 like the exported model, shared among the ranks."""
    model.eval()
    logits = torch.zeros(len(part.images), model.fc.out_features, device=part.images.device)
    batches = list(zip(part.images.split(200), logits.split(200)))
    for images, rows in distributed.share_of(batches):
        rows.copy_(model(pixels(images)))  # a view of `logits`
    distributed.sum_over_ranks(logits)  # the other ranks' logits are zero here
    return evaluation(logits, part.labels, METRICS)


@logs_to_wandb
def log_charts(run: Run, data: Digits, name: str, result: Evaluation) -> None:
    """Log charts and tables of a part of the data, "valid" or "test"."""
    images = getattr(data, name).images.cpu()
    classes = data.class_names
    if warning := viz.one_class_warning(result, classes):
        run.alert("One class only", warning)
    matrix = viz.confusion_matrix_picture(result.confusion.counts, classes, name)
    mistakes = viz.mistakes_table(result, {"image": images}, classes, run.step, most=100)
    run.log(
        {
            f"{name}/confusion_matrix": viz.confusion_matrix_chart(result, classes),
            f"{name}/confusion_matrix_image": wandb.Image(matrix),
            f"{name}/calibration": wandb.Image(viz.calibration_picture(result, name)),
            f"{name}/mistakes": mistakes,
            f"{name}/per_class": wandb.Table(PER_CLASS, result.confusion.per_class(classes)),
            f"{name}/logits": wandb.Histogram(result.logits.numpy()),
        }
    )


@logs_to_wandb
@torch.inference_mode()
def log_inputs(run: Run, model: ConvNet, data: Digits, indices: Tensor) -> None:
    """Log training images with the model's predictions."""
    images = data.train.images[indices]
    labels = data.train.labels[indices]
    predictions = model.eval()(pixels(images)).argmax(1)
    inputs = []
    for image, prediction, label in zip(images.cpu(), predictions, labels):
        caption = f"Pred: {data.class_names[prediction]} Truth: {data.class_names[label]}"
        inputs.append(wandb.Image(image[0].numpy(), caption=caption))
    run.log({"train/inputs": inputs})


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "accuracy": ("train/acc_step", "valid/acc"),
        "learning rate": ("train/learning_rate", ""),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: ConvNet, data: Digits) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    train_set = data.train
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    # Also saves position, meter and random state. An epoch's last save precedes its validation.
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
        order = shuffled(len(train_set.labels), settings.seed, epoch).to(session.device)
        batches = order.split(settings.batch_size)
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch)  # histograms of this batch
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            for part in share.split(settings.micro_batch_size or len(share)):
                images = train_set.images[part]
                labels = train_set.labels[part]
                with session.autocast():
                    logits = model(pixels(images))
                    loss = F.cross_entropy(
                        logits, labels, reduction="sum", label_smoothing=settings.label_smoothing
                    )
                (loss / len(indices)).backward()  # parts and ranks add up to the batch's gradient
                meter.add(len(part), loss=loss, acc=(logits.argmax(1) == labels).sum())
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
                        "train/acc_step": row["acc"],
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
        results = {"train/loss_epoch": mean["loss"], "train/acc_epoch": mean["acc"]}
        log_inputs(run, model, data, batches[-1][:16])
        if len(data.valid.labels):
            valid = evaluate(model, data.valid)
            progress.check_finite("validation", valid.metrics["loss"])
            log_charts(run, data, "valid", valid)
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


def conclude(session: Session, progress: Progress, best: Best, data: Digits) -> dict[str, Any]:
    """Test and export the best model; returns the content of metrics.json."""
    run = session.run
    output_dir = session.output_dir
    class_names = data.class_names
    model = make_model(session.settings, data, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data.test)
    progress.check_finite("test", test.metrics["loss"])
    name = "valid" if len(data.valid.labels) else "test"  # the data to show
    part = getattr(data, name)
    shown = evaluate(model, part)
    if distributed.rank() > 0:
        return {}

    for prefix, split, result in (("", name, shown), ("test_", "test", test)):
        files.write_csv(output_dir / f"{prefix}predictions.csv", result.columns())
        matrix = viz.confusion_matrix_picture(result.confusion.counts, class_names, split)
        files.write_png(output_dir / f"{prefix}confusion_matrix.png", matrix)
    mistakes = viz.digit_mistakes_picture(part.images.cpu(), shown, class_names, name)
    files.write_png(output_dir / "mistakes.png", mistakes)
    files.write_tensors(output_dir / "model.pt", best.weights)
    files.write_onnx(
        output_dir / "model.onnx", model, output="logits", images=torch.zeros(2, 1, 28, 28)
    )

    log_charts(run, data, "test", test)
    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(test.named("test"))
    run.update_summary({"best/epoch": best.epoch})
    if name == "valid":
        run.update_summary(shown.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | shown.named(name)
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    print(
        f"test accuracy {results['test/acc']:.2%} of {len(data.test.labels):,} images, "
        f"best epoch {best.epoch}"
    )
    return {
        "dataset": data.name,
        "model": f"ConvNet {session.settings.kernels}",
        "class_names": class_names,
        "best/epoch": best.epoch,
        **test.named("test", class_names),
        **shown.named(name, class_names),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured; returns the content of metrics.json."""
    with open_session(options.parse(Settings, argv), "mnist", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # rank 0 downloads the data
            data = load(settings, session.device)
        session.config["dataset"] = data.name  # instead of "auto"
        progress = Progress(session, len(data.train.labels), held_out=len(data.valid.labels))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        if settings.init_from and not session.checkpoint:
            files.load_weights(model, settings.init_from)
        seed_rank(settings.seed)
        print(
            f"{data.name}: {len(data.train.labels):,} + {len(data.valid.labels):,} + "
            f"{len(data.test.labels):,} images for training, validation and test"
        )
        print(model)
        session.describe("ConvNet", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
