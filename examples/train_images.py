"""Train a ResNet on a folder of images, logged with Weights & Biases: a copy of train_mnist.py.

Reads root/class/*.png or .jpg, of any sizes, in the workers of a DataLoader; by default a folder of
made-up shapes that it writes itself. A sixth of the images is for validation, a sixth for testing.
"""

import dataclasses
import sys
from pathlib import Path

# A copy beside train_mnist.py does not need this.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import options, script
from harness.options import option

# ----------------------------------------------------------------------------- settings

METRICS = {"loss": "min", "acc": "max", "f1_macro": "max", "ece": "min"}  # which way is better


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    folder: str | None = option(None, "your folder of images [shapes, made up]", path=True)
    image_size: int = option(32, "side of the images that the model sees", at_least=8)
    norm: str = option("batch", "group: GroupNorm, for torchrun", choices=("batch", "group"))
    init_from: str | None = option(None, "begin with these, model.pt of another run", path=True)
    workers: int = option(2, "processes that load images", may_change=True, at_least=0)
    epochs: int = option(20, "passes over the training data", at_least=1, below=10**6)
    batch_size: int = option(32, "images in a batch", at_least=1)
    monitor: str = option(
        "valid/loss",
        "metric that selects the best model",
        choices=[f"valid/{name}" for name in METRICS],
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import os
import random
import re
import textwrap
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import wandb
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank, shuffled
from harness.errors import UserError
from harness.loading import iterate, load_batches
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb
from metrics import Evaluation, evaluation

# --------------------------------------------------------------------------------- data


class Folder(NamedTuple):
    """Three parts of a folder; an item is float32 (3, size, size) in 0..1, and its label."""

    name: str
    train: Subset  # with random augmentation
    valid: Subset
    test: Subset
    class_names: list[str]
    content: list[tuple[str, int]]  # name and size of each file


def write_shapes(root: Path) -> None:
    """Draw shapes in random places and colors."""
    rng = random.Random(0)
    for name, corners in {"circle": 30, "square": 4, "triangle": 3}.items():
        (root / name).mkdir()
        for number in range(160):
            image = Image.new("RGB", (32, 32), tuple(rng.choices(range(100), k=3)))
            draw = ImageDraw.Draw(image)
            circle = (rng.randint(12, 20), rng.randint(12, 20), rng.randint(7, 12))
            color = tuple(rng.choices(range(120, 256), k=3))
            draw.regular_polygon(circle, corners, rng.randint(-20, 20), color)
            image.save(root / name / f"{number:03}.png")


def read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # `convert` would cut off what is above 255
                raise OSError(f"its mode is {image.mode}; 8 bits per channel are needed")
            if image.has_transparency_data:  # `convert` would lose what is drawn
                raise OSError("save it without transparency")
            return ImageOps.exif_transpose(image).convert("RGB")  # as a camera was held
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def load(settings: Settings) -> Folder:
    """The folder in three parts. Raises `UserError`."""
    root = Path(settings.folder or Path(settings.data_dir, "shapes"))
    if not settings.folder and not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing_directory(root) as temporary:
            write_shapes(temporary)
    size = settings.image_size
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    resize = v2.Resize(size)
    plain = v2.Compose([resize, v2.CenterCrop(size), *to_tensor])
    moved = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
    colors = v2.ColorJitter(0.2, 0.2, 0.2)
    augment = v2.Compose([resize, *moved, colors, *to_tensor])
    try:
        images = ImageFolder(root, plain, loader=read_image)
        augmented = ImageFolder(root, augment, loader=read_image)
    except OSError as error:
        raise UserError(f"{root} can't be read: {error}") from None
    if len(images.classes) < 2 or len(images) < 12:
        raise UserError(f"{root}: needs two classes and twelve images")
    others = sum(path.is_file() for path in root.rglob("*")) - len(images)
    print(f"classes: {files.list_names(images.classes)}; {others} other files are left out")
    content = []
    for path, _ in images.samples:
        content.append((os.path.relpath(path, root), os.path.getsize(path)))
    part = torch.arange(len(images)) % 6  # the images are in order of their classes
    chosen = (part < 4, part == 4, part == 5)
    train, valid, test = (rows.nonzero().flatten().tolist() for rows in chosen)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", root.resolve().name)[:64]  # W&B takes no others
    parts = (Subset(augmented, train), Subset(images, valid), Subset(images, test))
    return Folder(name, *parts, images.classes, content)


@logs_to_wandb
def log_dataset(run: Run, folder: Folder) -> None:
    run.add_tag(folder.name)
    artifact = wandb.Artifact(folder.name, type="dataset")
    artifact.metadata = {"classes": folder.class_names, "images": len(folder.content)}
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int, norm: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        outer = self.norm2(self.conv2(inner))
        return (outer + self.shortcut(x)).relu()


class ResNet(nn.Sequential):
    """Takes float (batch, 3, height, width) in 0..1, returns logits, float (batch, classes)."""

    def __init__(self, norm: str, classes: int):
        make_norm = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 8)
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block1 = Block(16, 16, 1, make_norm)
        self.block2 = Block(16, 32, 2, make_norm)
        self.block3 = Block(32, 64, 2, make_norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)


def make_model(settings: Settings, data: Folder, device: torch.device) -> ResNet:
    if settings.norm == "batch" and distributed.world_size() > 1:
        raise UserError("--norm batch is for one process: torchrun needs --norm group")
    model = ResNet(settings.norm, len(data.class_names))
    return model.to(device, memory_format=torch.channels_last)


def load_weights(model: ResNet, path: str) -> None:
    """Begin with a state dict. Raises `UserError` if it does not fit."""
    try:
        weights = files.read_tensors(Path(path))
        new = model.state_dict()
        if weights["fc.bias"].shape != new["fc.bias"].shape:
            weights |= {name: new[name] for name in ("fc.weight", "fc.bias")}
            print(f"--init_from {path} is of other classes: the last layer is new.")
        model.load_state_dict(weights)
    except Exception as error:  # of torch, pickle and others
        reason = textwrap.shorten(str(error), 200)
        raise UserError(f"--init_from {path} does not fit this model: {reason}") from None


def make_optimizer(
    model: ResNet, settings: Settings, batches: int
) -> tuple[Optimizer, LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    batches = max(batches, 2)  # OneCycleLR would give a single batch almost no learning rate
    return optimizer, OneCycleLR(optimizer, settings.learning_rate, batches, cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: ResNet, part: Subset, workers: int) -> Evaluation:
    """Predict every image, shared among the ranks."""
    model.eval()
    device = model.fc.bias.device
    rows = distributed.share_of(torch.arange(len(part)))
    loader = DataLoader(Subset(part, rows.tolist()), batch_size=100, num_workers=workers)
    logits = torch.zeros(len(part), model.fc.out_features, device=device)
    for indices, (images, _) in zip(rows.split(100), iterate(loader)):
        logits[indices] = model(images.to(device))
    distributed.sum_over_ranks(logits)  # the other ranks' logits are zero here
    labels = torch.tensor(part.dataset.targets)[part.indices]
    return evaluation(logits, labels, METRICS)


@logs_to_wandb
def log_charts(run: Run, data: Folder, name: str, result: Evaluation) -> None:
    """Log charts and tables of `name`, "valid" or "test"."""
    part = getattr(data, name)
    classes = data.class_names
    if warning := viz.one_class_warning(result, classes):
        run.alert("One class only", warning)
    mistakes = wandb.Table(columns=["image", "label", "prediction", "probability", "step"])
    for i in viz.most_confident_mistakes(result)[:100].tolist():
        path, label = part.dataset.samples[part.indices[i]]
        prediction = classes[result.predictions[i]]
        probability = float(result.probabilities[i].max())
        mistakes.add_data(wandb.Image(path), classes[label], prediction, probability, run.step)
    matrix = viz.confusion_matrix_picture(result.confusion.counts, classes, name)
    charts = {"confusion_matrix": viz.confusion_matrix_chart(result, classes)}
    charts |= {"confusion_matrix_image": wandb.Image(matrix), "mistakes": mistakes}
    run.log({f"{name}/{chart}": charts[chart] for chart in charts})


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


def train(session: Session, progress: Progress, model: ResNet, data: Folder) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    device = session.device
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    checkpoints = Checkpoints(
        progress,
        data.content,
        meter,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        best=best,
    )
    checkpoints.restore_or_begin()  # a new run saves its first checkpoint here

    for epoch in progress.epochs():
        model.train()
        batches = shuffled(len(data.train), settings.seed, epoch).split(settings.batch_size)
        loaded = load_batches(progress, data.train, batches, num_workers=settings.workers)
        for indices, (images, labels) in loaded:  # after a resume, the rest of the epoch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch)  # histograms of this batch
            size = settings.micro_batch_size or len(labels)
            for inputs, targets in zip(images.split(size), labels.to(device).split(size)):
                with session.autocast():
                    logits = model(inputs.to(device))
                    loss = F.cross_entropy(logits, targets, reduction="sum")
                (loss / len(indices)).backward()  # parts and ranks add up to the batch's gradient
                meter.add(len(targets), loss=loss, acc=(logits.argmax(1) == targets).sum())
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
        valid = evaluate(model, data.valid, settings.workers)
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


def conclude(session: Session, progress: Progress, best: Best, data: Folder) -> dict[str, Any]:
    """Test and export the best model, and write its predictions.

    Returns the content of metrics.json.
    """
    run = session.run
    output_dir = session.output_dir
    settings = session.settings
    model = make_model(settings, data, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data.test, settings.workers)
    progress.check_finite("test", test.metrics["loss"])
    valid = evaluate(model, data.valid, settings.workers)
    if distributed.rank() > 0:
        return {}

    names = [data.content[i][0] for i in data.valid.indices]
    files.write_csv(output_dir / "predictions.csv", {"file": names} | valid.columns())
    for prefix, name, result in (("", "valid", valid), ("test_", "test", test)):
        matrix = viz.confusion_matrix_picture(result.confusion.counts, data.class_names, name)
        files.write_png(output_dir / f"{prefix}confusion_matrix.png", matrix)
    files.write_tensors(output_dir / "model.pt", best.weights)
    inputs = torch.zeros(2, 3, settings.image_size, settings.image_size)
    files.write_onnx(output_dir / "model.onnx", model, output="logits", images=inputs)

    log_charts(run, data, "test", test)
    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(test.named("test"))
    run.update_summary({"best/epoch": best.epoch})
    run.update_summary(valid.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | valid.named("valid")
    if settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    print(
        f"test accuracy {results['test/acc']:.2%} of {len(data.test):,} images, "
        f"best epoch {best.epoch}"
    )
    return {
        "dataset": data.name,
        "model": f"ResNet, {settings.norm} norm",
        "class_names": data.class_names,
        "best/epoch": best.epoch,
        **results,
        "valid/majority_share": valid.confusion.majority_share(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured on the command line.

    Returns the content of metrics.json.
    """
    with open_session(options.parse(Settings, argv), "images", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # which draws the shapes
            data = load(settings)
        progress = Progress(session, len(data.train), held_out=len(data.valid))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        if settings.init_from and not session.checkpoint:
            load_weights(model, settings.init_from)
        seed_rank(settings.seed)
        print(
            f"{data.name}: {len(data.train):,} + {len(data.valid):,} + "
            f"{len(data.test):,} images for training, validation and test"
        )
        print(model)
        session.describe("ResNet", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
