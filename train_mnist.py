"""Train a ConvNet on MNIST, monitored by Weights & Biases: options, data, model, evaluation, loop, export.

The model and the task are those of the W&B PyTorch tutorial. Read it from top to bottom.
"""

import dataclasses

import options
from options import Stopped, UserError, option

# ---------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True)
class Settings(options.SharedSettings):
    dataset: str = option(
        "auto",
        "auto: MNIST, or built-in digits where it can't be had",
        choices=("auto", "mnist", "fashion_mnist", "kmnist", "synthetic"),
    )
    schedule: str = option("onecycle", "of the learning rate", choices=("onecycle", "constant"))
    kernels: list[int] = option([16, 32], "channels of the two convolutions", length=2, at_least=1)
    slice: int = option(1, "use every n-th image of each part only", at_least=1)
    valid_size: int = option(5000, "training images held out, the last ones", at_least=0)


if __name__ == "__main__":
    options.check_before_imports(Settings)

import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn
from tqdm import tqdm

import data
import metrics
import monitoring
import parallel
import runtime
import viz

# -------------------------------------------------------------------------------------------------- data


def load(settings: Settings) -> tuple[data.Digits, list[data.Part]]:
    """The data set and its training, validation and test part; what the settings leave open is filled in.

    Raises `UserError` where the settings don't go with the data.
    """
    digits = data.load_digits(settings.dataset, settings.data_dir)
    parts = data.split_digits(digits, settings.valid_size, settings.slice)
    examples = len(parts[0].images)
    if settings.batch_size > examples:
        raise UserError(f"--batch_size {settings.batch_size} is more than the {examples} training images")
    if settings.patience and not settings.valid_size:
        raise UserError("--patience needs images to judge by: --valid_size is 0")
    parallel.check_shares(examples, settings.batch_size)
    runtime.find_device(settings.device)
    settings.dataset = digits.name
    settings.watch_every = settings.watch_every or math.ceil(examples / settings.batch_size)
    return digits, parts


def pixels(images: Tensor) -> Tensor:
    """What the model sees of uint8 images: float32 in 0..1, as torchvision's ToTensor makes it."""
    return images.float().div_(255)


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
        # Pooling before ReLU gives the same as after it, both being monotone, on a quarter of the values.
        x = F.max_pool2d(self.conv1(images), 2).relu()
        x = F.max_pool2d(self.conv2(x), 2).relu()
        return self.fc(x.flatten(1))


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: ConvNet, part: data.Part) -> metrics.Evaluation:
    """Answer every image, in float32 as the exported model does; of several processes, each answers a share."""
    model.eval()
    logits = torch.zeros(len(part.images), model.fc.out_features, device=part.images.device)
    batches = list(zip(part.images.split(200), logits.split(200)))
    for images, answers in batches[parallel.rank() :: parallel.world_size()]:
        answers.copy_(
            ConvNet.forward(model, pixels(images))
        )  # the method: wandb.watch counts calls of the model itself
    parallel.add_up(logits)  # what other processes answer is zero here
    return metrics.evaluation(logits, part.labels)


def log_charts(
    run: wandb.Run, name: str, part: data.Part, result: metrics.Evaluation, class_names: list[str], step: int
) -> None:
    """Log the charts and tables of `name`, "valid" or "test", into the row of this step."""
    labels, predictions = result.labels.tolist(), result.predictions.tolist()
    picture = viz.confusion_matrix_picture(result.confusion.counts, class_names, name)
    charts = {
        f"{name}/confusion_matrix": wandb.plot.confusion_matrix(
            y_true=labels, preds=predictions, class_names=class_names
        ),
        f"{name}/confusion_matrix_image": wandb.Image(picture),
        f"{name}/mistakes": viz.digit_mistakes_table(part.images.cpu(), result, class_names, step),
        f"{name}/logits": wandb.Histogram(result.logits.numpy()),
    }
    run.log(charts, step=step)


# ---------------------------------------------------------------------------------------------- training


class Best(NamedTuple):
    """The model to keep: the best one so far, or the last one where nothing is held out to judge by."""

    epoch: int
    value: float  # of the monitored figure
    weights: dict[str, Tensor]


def train(
    run: wandb.Run,
    settings: Settings,
    model: ConvNet,
    parts: list[data.Part],
    class_names: list[str],
    output_dir: Path,
    checkpoint: dict[str, Any] | None,
    stop: list[Stopped],
) -> tuple[Best, int]:
    """Train `model`, from `checkpoint` on if there is one; returns the model to keep and the last step.

    The step is the number of images seen. Raises the first entry of `stop` after the batch, with all saved. Of
    several processes, each computes a share of every batch, and the first one logs and writes.
    """
    rank, world_size = parallel.rank(), parallel.world_size()
    train_part, valid_part, _ = parts
    device, examples = train_part.images.device, len(train_part.images)
    batches = math.ceil(examples / settings.batch_size)
    last_batch = min(settings.epochs * batches, settings.max_steps or math.inf)

    loss_function = nn.CrossEntropyLoss(reduction="sum")
    betas = (0.7, 0.9) if settings.schedule == "onecycle" else (0.9, 0.999)  # short memories suit short schedules
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, betas, fused=device.type != "mps")
    if settings.schedule == "onecycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, last_batch, pct_start=0.1, cycle_momentum=False
        )
    else:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    if settings.compile:
        model.forward = torch.compile(model.forward)  # model.compile() would take in the hooks of watch

    best = Best(0, math.nan, {})
    batch = step = 0
    epoch_ends = False
    figures = metrics.TrainingFigures(device)
    numbers, shown = {}, ()  # the latest row; some images of the latest batch, and what is predicted for them
    fingerprint = runtime.fingerprint(parts)
    if world_size > 1:
        parallel.check_same(fingerprint, runtime.fingerprint([model.state_dict().values()]))

    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}

    def save_checkpoint() -> None:
        epoch = math.ceil(batch / batches)
        position = {"epoch": epoch, "batch": batch, "step": step, "epoch_ends": epoch_ends}
        weights = {} if epoch_ends and best.epoch == epoch else best.weights  # the model's own are written once
        more = {
            "row": numbers,
            "shown": shown,
            "best": best._replace(weights=weights)._asdict(),
            "data": fingerprint,
        }
        runtime.save_checkpoint(output_dir, settings, stateful, figures, position, **more)

    if checkpoint:
        if checkpoint["data"] != fingerprint:
            raise UserError("--resume: the images are not those that the run was begun with")
        runtime.restore(checkpoint, stateful, figures)
        batch, step, epoch_ends = (checkpoint["position"][name] for name in ("batch", "step", "epoch_ends"))
        numbers, best = checkpoint["row"], Best(**checkpoint["best"])
        best = best._replace(weights=best.weights or checkpoint["model"])
        shown = checkpoint["shown"]
    else:
        save_checkpoint()
    watch_from = math.ceil(batch / settings.watch_every) * settings.watch_every  # so that it keeps its rhythm
    bar = tqdm(total=last_batch, initial=batch, unit="batch", disable=None, file=sys.stdout)

    for epoch in range(max(1, math.ceil(batch / batches)), settings.epochs + 1):
        epoch_started = row_started = time.perf_counter()
        row_began = step
        model.train()
        # Drawn from (seed, epoch) alone, so that a resumed run draws the same.
        order = torch.from_numpy(np.random.default_rng((settings.seed, epoch)).permutation(examples))
        drawn = order.to(device).split(settings.batch_size)
        done = batch - (epoch - 1) * batches
        for indices in drawn[done : done + last_batch - batch]:
            if settings.watch != "off" and batch == watch_from:
                run.watch(model, loss_function, log=settings.watch, log_freq=settings.watch_every)
            share = indices[rank::world_size]
            images, labels = train_part.images[share], train_part.labels[share]
            batch, step = batch + 1, step + len(indices)
            epoch_ends = batch % batches == 0 or batch == last_batch
            if settings.watch != "off" and batch % settings.watch_every == 0:
                run.log({}, step=step, commit=False)  # opens the row that the histograms belong to

            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(pixels(images))
                loss = loss_function(logits, labels)
            (loss / len(indices)).backward()
            parallel.add_up(*(weight.grad for weight in model.parameters() if weight.grad is not None))
            optimizer.step()
            optimizer.zero_grad()
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            figures.add(loss, logits, labels)
            bar.update()

            if batch % settings.log_every == 0 or epoch_ends:
                parallel.add_up(figures.sums)
                row = figures.take_row()
                numbers = {
                    "epoch": epoch,
                    "train/loss_step": row["loss"],
                    "train/acc_step": row["acc"],
                    "train/learning_rate": learning_rate,
                    "train/examples_per_second": (step - row_began) / (time.perf_counter() - row_started),
                }
                if not math.isfinite(row["loss"]):
                    raise runtime.diverged("training", row["loss"], epoch, step, learning_rate)
                bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['acc']:.2%}")
                row_began, row_started = step, time.perf_counter()
                if epoch_ends:
                    shown = share[:16], logits[:16].argmax(1)
                    break  # this row is logged below, with the figures of the epoch
                runtime.log_numbers(run, output_dir, numbers, step)
            agreeing = world_size == 1 or batch % settings.log_every == 0  # the others are not asked each time
            stopping = agreeing and parallel.any_of_them(bool(stop))
            if batch % settings.checkpoint_every == 0 or stopping:
                save_checkpoint()
            if stopping:
                raise stop[0] if stop else Stopped("another process", 0)

        run.log({}, step=step)  # opens the row, if nothing has yet: media files are named by the open one
        whole = figures.epoch()
        numbers |= {"train/loss_epoch": whole["loss"], "train/acc_epoch": whole["acc"]}
        line = f"epoch {epoch}: train loss {whole['loss']:.4f} acc {whole['acc']:.2%}"
        if rank == 0:
            inputs, answers = shown
            digits = viz.captioned_digits(
                train_part.images[inputs].cpu(), answers, train_part.labels[inputs], class_names
            )
            run.log({"train/inputs": digits}, step=step)
        value, improved = math.nan, True
        if len(valid_part.images):
            valid = evaluate(model, valid_part)
            if not math.isfinite(valid.figures["loss"]):
                runtime.log_numbers(run, output_dir, numbers, step)
                raise runtime.diverged("validation", valid.figures["loss"], epoch, step, settings.learning_rate)
            if rank == 0:
                log_charts(run, "valid", valid_part, valid, class_names, step)
            numbers |= {f"valid/{name}": figure for name, figure in valid.figures.items()}
            value = parallel.from_the_first(numbers[settings.monitor])
            improved = best.epoch in (0, epoch) or options.is_better(settings.monitor, value, best.value)
            line += f", valid loss {valid.figures['loss']:.4f} acc {valid.figures['acc']:.2%}"
        runtime.log_numbers(run, output_dir, numbers, step)
        if improved:
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            best = Best(epoch, value, weights)
        save_checkpoint()
        if settings.log_model == "all" and rank == 0:
            log_model(run, model.state_dict(), numbers, ["latest", "best"] if improved else ["latest"])
        bar.write(f"{line}, {time.perf_counter() - epoch_started:.1f} s")
        if batch == last_batch or 0 < settings.patience <= epoch - best.epoch:
            break
        figures.start_epoch()
        run.log({}, step=step, commit=True)  # a row that is still open dies with the process
    bar.close()
    return best, step


# ------------------------------------------------------------------------------------- from start to end


def export_onnx(path: Path, model: ConvNet) -> None:
    """One file that holds the weights too: `images`, float (batch, 1, 28, 28) in 0..1, to `logits`."""
    program = torch.onnx.export(
        model.cpu().to(memory_format=torch.contiguous_format),
        (torch.zeros(2, 1, 28, 28),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # where the source lay on this machine
    with runtime.replacing(path) as temporary:
        program.save(temporary, external_data=False)


def log_model(run: wandb.Run, weights: dict[str, Tensor], figures: dict[str, float], aliases: list[str]) -> None:
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=figures)
    with artifact.new_file("model.pt", mode="wb") as file:
        torch.save(weights, file)
    run.log_artifact(artifact, aliases=aliases)


def init(settings: Settings, mode: str, stop: list[Stopped]) -> wandb.Run:
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name,
        id=settings.id,
        job_type=settings.job_type,
        group=settings.group,
        notes=settings.notes,
        tags=settings.tags or None,
        config=dataclasses.asdict(settings),
        mode=mode,
        save_code=settings.save_code or None,
        resume="allow" if settings.resume and mode == "online" else None,
        settings=monitoring.wandb_settings(settings, stop),
    )


def log_dataset(run: wandb.Run, digits: data.Digits) -> None:
    artifact = wandb.Artifact(digits.name, type="dataset")
    for file in digits.files:
        artifact.add_reference(file.resolve().as_uri(), name=file.name)  # its checksum, not a copy
    if not digits.files:
        artifact.add_file(data.__file__)  # what draws the built-in digits
    run.log_artifact(artifact)


def conclude(
    run: wandb.Run, settings: Settings, best: Best, parts: list[data.Part], digits: data.Digits, step: int
) -> dict[str, Any]:
    """Test the model to keep, log and write what it answers, export it; returns the figures."""
    _, valid_part, test_part = parts
    output_dir, class_names = Path(settings.output_dir), digits.class_names
    model = ConvNet(settings.kernels).to(test_part.images.device, memory_format=torch.channels_last)
    model.load_state_dict(best.weights)
    test, valid = evaluate(model, test_part), evaluate(model, valid_part) if len(valid_part.images) else None
    if not math.isfinite(test.figures["loss"]):
        raise runtime.diverged("test", test.figures["loss"], best.epoch, step, settings.learning_rate)
    if parallel.rank() > 0:
        return {}
    figures = {f"test/{name}": figure for name, figure in test.figures.items()}
    log_charts(run, "test", test_part, test, class_names, step)
    runtime.log_numbers(run, output_dir, figures, step)
    run.log({}, step=step, commit=True)  # or the open row would overwrite the summary
    summary = {"best/epoch": best.epoch}
    shown, part, result = "test", test_part, test  # what there is to show where nothing was held out
    if valid:
        shown, part, result = "valid", valid_part, valid
        summary |= {f"best/{name}": figure for name, figure in valid.figures.items()}
        figures |= {f"valid/{name}": figure for name, figure in valid.figures.items()}

    runtime.write_predictions(output_dir / "predictions.csv", result)
    picture = viz.confusion_matrix_picture(result.confusion.counts, class_names, shown)
    runtime.write_png(output_dir / "confusion_matrix.png", picture)
    picture = viz.digit_mistakes_picture(part.images.cpu(), result, class_names, shown)
    runtime.write_png(output_dir / "mistakes.png", picture)
    runtime.save_weights(output_dir / "model.pt", best.weights)
    export_onnx(output_dir / "model.onnx", model)
    with monitoring.forgiving(run):
        run.summary.update(summary)
        run.save(output_dir / "model.*", base_path=output_dir, policy="now")
    if settings.log_model == "best":
        log_model(run, best.weights, figures, ["latest", "best"])
    return {**figures, f"{shown}/majority_share": result.confusion.majority_share()}


def fit(
    run: wandb.Run,
    settings: Settings,
    digits: data.Digits,
    parts: list[data.Part],
    checkpoint: dict[str, Any] | None,
    stop: list[Stopped],
) -> tuple[Best, dict[str, Any]]:
    """Build the model, train it, test the one to keep; returns that and the figures. All processes do this together."""
    device = runtime.find_device(settings.device)
    parts = [data.Part(part.images.to(device), part.labels.to(device)) for part in parts]
    runtime.seed_everything(settings.seed, settings.deterministic)
    model = ConvNet(settings.kernels).to(device, memory_format=torch.channels_last)
    torch.manual_seed(settings.seed + parallel.rank())  # the model is the same in all processes, dropout is not
    sizes = " + ".join(f"{len(part.images):,}" for part in parts)
    print(f"{digits.name}: {sizes} images for training, validation and test\n{model}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters on {device.type} in {settings.precision}, seed {settings.seed}")
    best, step = train(run, settings, model, parts, digits.class_names, Path(settings.output_dir), checkpoint, stop)
    return best, conclude(run, settings, best, parts, digits, step)


def lead(settings: Settings, stop: list[Stopped]) -> dict[str, Any]:
    """What the first process does, mostly the only one: begin or resume a run, `fit`, and end it."""
    started = time.perf_counter()
    runtime.settle_run(settings, "mnist")
    with runtime.output_directory(settings) as output_dir:
        checkpoint = runtime.load_checkpoint(output_dir, settings)
        if summary := runtime.finished(output_dir, settings, checkpoint):
            parallel.from_the_first(None)
            return summary
        rows = runtime.rewind_journal(output_dir, checkpoint) if checkpoint else []
        asked, digits, parts = dataclasses.replace(settings), None, []
        if "WANDB_SWEEP_ID" not in os.environ:
            digits, parts = load(settings)
        run, held = monitoring.start(lambda mode: init(asked, mode, stop), asked)
        with monitoring.finishing(run):
            # A sweep may have set part of the config: from here on, the config is what counts.
            configured = settings if checkpoint else options.from_config(asked, run.config)
            if digits is None or configured not in (asked, settings):
                settings = configured
                digits, parts = load(settings)
            device = runtime.find_device(settings.device)
            settings.device, settings.precision = device.type, runtime.find_precision(settings.precision, device)
            settings.id = run.id
            runtime.record_settings(run, settings, output_dir)
            log_dataset(run, digits)
            monitoring.log_again(run, rows, held)
            parallel.from_the_first((settings, checkpoint))
            best, figures = fit(run, settings, digits, parts, checkpoint, stop)
            last_line = monitoring.where_to_look(run, output_dir)
        summary = {
            "dataset": digits.name,
            "model": f"ConvNet {settings.kernels}",
            "best/epoch": best.epoch,
            **figures,
            "seconds": time.perf_counter() - started,
        }
        runtime.write_json(output_dir / "metrics.json", summary)  # the last file: a run that has it is finished
    images = f"{len(parts[2].images):,} images"
    print(f"test accuracy {summary['test/acc']:.2%} of {images}, best epoch {best.epoch}\n{last_line}")
    return summary


def follow(stop: list[Stopped]) -> dict[str, Any]:
    """What the other processes of torchrun do: `fit`, with the settings of the first and without a word."""
    begun = parallel.from_the_first()
    if begun:
        settings, checkpoint = begun
        digits, parts = load(settings)
        with parallel.after_the_first(), contextlib.redirect_stdout(open(os.devnull, "w")):
            fit(wandb.init(mode="disabled"), settings, digits, parts, checkpoint, stop)
    return {}


@monitoring.for_agents
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and export as the command-line arguments say; returns the content of metrics.json."""
    settings = options.parse(Settings, argv)
    with parallel.joined(), monitoring.stop_requests() as stop:
        return lead(settings, stop) if parallel.rank() == 0 else follow(stop)


if __name__ == "__main__":
    options.run_script(main)
