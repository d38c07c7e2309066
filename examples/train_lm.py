"""Train a character language model, logged with Weights & Biases: a copy of train_mnist.py.

Reads UTF-8 text: 80% for training, 10% for validation, 10% for testing. A character that training
lacks counts in the perplexity. A running average of the weights is evaluated and kept.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not for a copy beside it

from harness import options, script
from harness.options import option

# ----------------------------------------------------------------------------- settings

METRICS = {"loss": "min", "perplexity": "min"}  # of an evaluation: which way each is better


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(options.SharedSettings):
    file: str | None = option(None, "your text file [sentences.txt]", path=True)
    context: int = option(32, "characters in a sequence", at_least=1)
    layers: int = option(2, "layers of the transformer", at_least=1)
    heads: int = option(4, "attention heads in a layer, of 16 units each", at_least=1)
    clip_norm: float = option(1.0, "scale gradients down to this norm if theirs is larger", above=0)
    ema_decay: float = option(0.95, "of the running average of weights", at_least=0, below=1)
    batch_size: int = option(32, "examples in a batch", at_least=1)
    monitor: str = option(
        "valid/perplexity",
        "metric that selects the best model",
        choices=[f"valid/{name}" for name in METRICS],
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import html
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import wandb
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank, shuffled
from harness.errors import UserError
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb

# --------------------------------------------------------------------------------- data


class Text(NamedTuple):
    file: Path
    characters: str  # the vocabulary: those of the whole text
    train: Tensor  # int64 (sequences, context + 1): of each character the next is to be predicted
    valid: Tensor
    test: Tensor

    def decode(self, codes: Tensor) -> str:
        return "".join(self.characters[code] for code in codes.tolist())


def load(settings: Settings, device: torch.device) -> Text:
    """The text on the device, in three parts. Raises `UserError`."""
    path = Path(settings.file or Path(__file__).with_name("sentences.txt"))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    held_out = len(text) // 10
    length = settings.context + 1
    if held_out < length:
        raise UserError(f"{path} has {len(text):,} characters; --context needs {10 * length:,}")
    characters = "".join(sorted(set(text)))
    indices = [characters.index(character) for character in text]
    codes = torch.tensor(indices, device=device)
    parts = codes.split([len(text) - 2 * held_out, held_out, held_out])
    sequences = [part.unfold(0, length, settings.context) for part in parts]
    return Text(path, characters, *sequences)


@logs_to_wandb
def log_dataset(run: Run, text: Text) -> None:
    artifact = wandb.Artifact("text", type="dataset")
    artifact.add_reference(text.file.absolute().as_uri())  # a checksum, not a copy
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


class GPT(nn.Module):
    """A transformer: int64 (batch, length) to logits, float (batch, length, characters)."""

    def __init__(self, characters: int, settings: Settings):
        super().__init__()
        units = 16 * settings.heads
        self.characters = nn.Embedding(characters, units)
        self.positions = nn.Embedding(settings.context, units)
        layer = nn.TransformerEncoderLayer(
            units, settings.heads, 4 * units, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.output = nn.Sequential(nn.LayerNorm(units), nn.Linear(units, characters))

    def forward(self, codes: Tensor) -> Tensor:
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        positions = self.positions.weight[:length]
        x = self.characters(codes) + positions
        x = self.layers(x, mask, is_causal=True)
        return self.output(x)

    def losses(self, sequences: Tensor) -> Tensor:
        """The mean cross-entropy of each sequence's characters, in nats, float (batch,)."""
        logits = self(sequences[:, :-1]).flatten(0, 1)
        targets = sequences[:, 1:]
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return losses.view_as(targets).mean(1)


def make_model(settings: Settings, data: Text, device: torch.device) -> GPT:
    return GPT(len(data.characters), settings).to(device)


def make_optimizer(model: GPT, settings: Settings, batches: int) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW(model.parameters(), settings.learning_rate)
    batches = max(batches, 2)  # OneCycleLR would give a single batch almost no learning rate
    return optimizer, OneCycleLR(optimizer, settings.learning_rate, batches, cycle_momentum=False)


# --------------------------------------------------------------------------- evaluation


class Result(NamedTuple):
    losses: Tensor  # of each sequence, float32 (sequences,), on the CPU
    metrics: dict[str, float]

    def named(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}/{name}": value for name, value in self.metrics.items()}


@torch.inference_mode()
def evaluate(model: GPT, part: Tensor) -> Result:
    """Predict every sequence; few enough for each rank to predict all of them."""
    model.eval()
    batches = [model.losses(sequences) for sequences in part.split(64)]
    losses = torch.cat(batches).cpu()
    loss = losses.double().mean()
    metrics = {"loss": float(loss), "perplexity": float(loss.exp())}
    return Result(losses, metrics)


@torch.inference_mode()
def generate(model: GPT, text: Text, settings: Settings) -> str:
    """200 characters that the model makes up."""
    generator = torch.Generator().manual_seed(settings.seed)  # leaves that of training alone
    codes = text.valid[0, :1]
    for _ in range(200):
        logits = model(codes[None, -settings.context :])[0, -1]
        probabilities = logits.softmax(0).cpu()
        code = torch.multinomial(probabilities, 1, generator=generator)
        codes = torch.cat([codes, code.to(codes.device)])
    return text.decode(codes)


@logs_to_wandb
def log_sample(run: Run, sample: str) -> None:
    page = f"<pre>{html.escape(sample)}</pre>"
    run.log({"sample": wandb.Html(page)})


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "perplexity": ("", "valid/perplexity"),
        "learning rate": ("train/learning_rate", ""),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, model: GPT, data: Text) -> Best:
    """Train `model`, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    train_set = data.train
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    # Also saves position, meter and random state. An epoch's last save precedes its validation.
    checkpoints = Checkpoints(
        progress,
        [data.train, data.valid, data.test],
        meter,
        model=model,
        average=average,
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
                with session.autocast():
                    loss = model.losses(train_set[part]).sum()
                (loss / len(indices)).backward()  # parts and ranks add up to the batch's gradient
                meter.add(len(part), loss=loss)
            distributed.sum_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            average.update_parameters(model)
            optimizer.zero_grad()

            if progress.row_is_due:
                row = meter.take_row()  # means over the batches since the last row
                progress.check_finite("training", row["loss"])
                run.log(
                    {
                        "epoch": epoch,
                        "train/loss_step": row["loss"],
                        "train/grad_norm": norm,  # of this batch, before it is clipped
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
        valid = evaluate(average.module, data.valid)
        progress.check_finite("validation", valid.metrics["loss"])
        sample = generate(average.module, data, settings)
        log_sample(run, sample)
        if distributed.rank() == 0:
            files.write_text(session.output_dir / "sample.txt", sample)
        results |= valid.named("valid")
        run.log(results)  # into the row of the last batch, which is still open
        improved = best.offer(epoch, results, average.module)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            run.log_weights(average.module.state_dict(), results, is_best=improved)
        progress.print_epoch(results)
        if progress.patience_ends(best.epoch):
            break
    return best


# ----------------------------------------------------------------- from start to finish


def conclude(session: Session, progress: Progress, best: Best, data: Text) -> dict[str, Any]:
    """Test and export the best model; returns the content of metrics.json."""
    run = session.run
    output_dir = session.output_dir
    model = make_model(session.settings, data, session.device)
    model.load_state_dict(best.weights)
    test = evaluate(model, data.test)
    progress.check_finite("test", test.metrics["loss"])
    valid = evaluate(model, data.valid)
    if distributed.rank() > 0:
        return {}

    texts = [data.decode(codes) for codes in data.valid]
    columns = {"text": texts, "loss": valid.losses.tolist()}
    files.write_csv(output_dir / "predictions.csv", columns)
    files.write_tensors(output_dir / "model.pt", best.weights)
    files.write_onnx(output_dir / "model.onnx", model, "logits", codes=data.test[:2, :-1].cpu())

    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(test.named("test"))
    run.update_summary({"best/epoch": best.epoch})
    run.update_summary(valid.named("best"))
    run.save(output_dir / "model.pt")
    run.save(output_dir / "model.onnx")
    results = test.named("test") | valid.named("valid")
    if session.settings.log_model == "best":
        run.log_weights(best.weights, results, is_best=True)

    print(f"test perplexity {results['test/perplexity']:.4g}, best epoch {best.epoch}")
    return {
        "dataset": data.file.name,
        "characters": data.characters,
        "best/epoch": best.epoch,
        **results,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, test and export as configured; returns the content of metrics.json."""
    with open_session(options.parse(Settings, argv), "lm", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # which reads the text
            data = load(settings, session.device)
        progress = Progress(session, len(data.train), held_out=len(data.valid))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, data)
        seed_everything(settings.seed, settings.deterministic)
        model = make_model(settings, data, session.device)
        seed_rank(settings.seed)
        print(
            f"{data.file.name}: {len(data.train):,} + {len(data.valid):,} + "
            f"{len(data.test):,} sequences for training, validation and test"
        )
        print(model)
        session.describe("GPT", model)
        best = train(session, progress, model, data)
        session.metrics = conclude(session, progress, best, data)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
