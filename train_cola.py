"""Fine-tune BERT on CoLA, logged with Weights & Biases.

Is a sentence acceptable English? The task is that of the PyTorch Lightning tutorial. Read
train_mnist.py first: this script has the same sections.
"""

import dataclasses

from harness import options, script
from harness.options import housekeeping, option
from tasks.text_files import OwnFiles

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
    "roc_auc": "max",
    "average_precision": "max",
}


@dataclasses.dataclass(kw_only=True, frozen=True)
class Settings(OwnFiles, options.SharedSettings):  # --train_file, --fold, ...
    dataset: str = option(
        "auto",
        "auto: CoLA, or built-in sentences if it is not available",
        placeholder="auto",
        choices=("auto", "cola", "synthetic", "files"),
    )
    log_data: bool = housekeeping(False, "upload the data; else only paths and checksums")
    positive_label: str | None = option(
        None, "the positive one of two classes [the second]", placeholder=None
    )
    model: str | None = option(
        None,
        "hub name, path, wandb:ENTITY/PROJECT/NAME:ALIAS, scratch [BERT-tiny]",
        placeholder=None,
        path=True,
    )
    init_from: str | None = option(
        None, "run whose model to start from, instead of --model", path=True
    )
    epochs: int = option(10, "passes over the training data", at_least=1, below=10**6)
    batch_size: int = option(64, "sentences in a batch", at_least=1)
    learning_rate: float | None = option(
        None, "the highest learning rate [1e-4; 1e-3 for scratch]", placeholder=None, above=0
    )
    label_smoothing: float = option(
        0.0,
        "share of each label spread over all classes; the training loss includes it",
        at_least=0,
        below=1,
    )
    schedule: str = option(
        "linear", "learning rate schedule after the warm-up", choices=("linear", "constant")
    )
    warmup_ratio: float = option(
        0.1, "share of the batches in which the learning rate rises", at_least=0, below=1
    )
    weight_decay: float = option(0.01, "of the weights of linear layers", at_least=0)
    clip_norm: float = option(1.0, "largest norm of the gradient; 0: not clipped", at_least=0)
    max_length: int = option(
        128, "longest sentence in tokens; longer ones are truncated", at_least=4
    )
    monitor: str = option(
        "valid/mcc",
        "metric that selects the best model",
        choices=[f"valid/{name}" for name in METRICS],
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
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank
from harness.errors import UserError
from harness.progress import Best, Meter, Progress
from harness.session import Session, open_session
from harness.tracking import Run, logs_to_wandb
from metrics import PER_CLASS, Evaluation, evaluation, matthews_corrcoef_interval
from tasks import encoders
from tasks.batching import TokenSet, by_length, inputs_of, tokenise
from tasks.sentences import Corpus, load_corpus

# --------------------------------------------------------------------------------- data


class Task(NamedTuple):
    """The data, and the model that is trained on it."""

    corpus: Corpus
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    positive: int  # the positive class, if there are two
    train: TokenSet
    valid: TokenSet
    test: TokenSet | None = None


def load(session: Session) -> Corpus:
    """The sentences for training, validation and perhaps a test. Raises `UserError`."""
    settings = session.settings
    corpus = load_corpus(settings.dataset, settings.data_dir, settings)
    names = corpus.class_names
    present = len(set(corpus.valid.labels))
    # Correct predictions, one of each class in the validation data: a metric that is 0 or undefined
    # for them can't tell models apart.
    perfect = evaluation(torch.eye(present, len(names)), torch.arange(present))
    if not perfect.named("valid").get(settings.monitor):
        raise UserError(
            f"--monitor {settings.monitor} needs two classes, both in the validation data"
        )
    positive = settings.positive_label
    if len(names) == 2 and positive in (None, *names):
        session.config["positive_label"] = positive or names[1]
    elif positive:
        raise UserError(
            f"--positive_label {positive}: must be one of two classes, "
            f"but the data has {files.list_names(names)}"
        )
    session.config["dataset"] = corpus.name
    return corpus


def prepare(session: Session, corpus: Corpus, pretrained: encoders.Pretrained) -> Task:
    """Tokenise the sentences, and move them and the model to the device."""
    model, tokenizer = pretrained
    label2id = model.config.label2id  # a fine-tuned head has its own order of classes
    corpus = corpus._replace(class_names=list(label2id))
    limit = session.settings.max_length
    parts = []
    for part in (corpus.train, corpus.valid, corpus.test):
        if part:
            labels = [label2id[label] for label in part.labels]
            parts.append(tokenise(part.sentences, labels, tokenizer, limit, session.device))
    positive = session.config["positive_label"]
    task = Task(corpus, model, tokenizer, label2id.get(positive, 1), *parts)
    if cut := sum(part.cut for part in parts):
        print(f"{cut} sentences are longer than --max_length {limit} tokens and are truncated.")
    valid = task.valid.labels
    line = (
        f"{corpus.name}: {len(task.train.labels):,} + {len(valid):,} sentences for training and "
        f"validation, {valid.bincount().max() / len(valid):.1%} of the latter in the most "
        "frequent class"
    )
    if task.test:
        line += f", {len(task.test.labels):,} for the test"
    if positive:
        line += f", positive class: {positive}"
    print(line)
    session.describe(session.config["model"], model)
    model.to(session.device)
    encoders.train_used_rows(model, [part.tokens for part in parts])
    return task


@logs_to_wandb
def log_dataset(run: Run, corpus: Corpus, upload: bool) -> None:
    run.add_tag(corpus.name)
    artifact = wandb.Artifact(corpus.name, type="dataset")
    for number, file in enumerate(corpus.files):
        name = f"{number}-{file.name}"  # several files may have the same name
        if upload:
            artifact.add_file(str(file), name=name)
        else:
            artifact.add_reference(file.resolve().as_uri(), name=name)  # a checksum, not a copy
    run.log_artifact(artifact)


# -------------------------------------------------------------------------------- model


def load_model(settings: Settings, corpus: Corpus, source: str) -> encoders.Pretrained:
    """The model of a directory, the hub or "scratch"; new weights follow from the seed."""
    seed_everything(settings.seed, settings.deterministic)
    return encoders.load_model(
        source, corpus.train.sentences, corpus.class_names, settings.max_length
    )


def make_optimizer(
    model: PreTrainedModel, settings: Settings, learning_rate: float, batches: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW and its learning rate schedule over all `batches`.

    Weight decay spares biases, LayerNorm and embeddings.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = []
    spared = []
    for weight in model.parameters():
        group = spared if weight.ndim == 1 or weight in embeddings else decayed
        group.append(weight)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    warmup = int(settings.warmup_ratio * batches)

    def factor(batch: int) -> float:
        if batch < warmup:
            return (batch + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        return (batches - batch) / (batches - warmup)

    optimizer = torch.optim.AdamW(groups, learning_rate, fused=True)
    return optimizer, LambdaLR(optimizer, factor)


# --------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(task: Task, part: TokenSet) -> Evaluation:
    """Predict every sentence, in float32 like the saved model, shared among the ranks."""
    model = task.model.eval()
    logits = torch.zeros(len(part.labels), model.config.num_labels, device=part.labels.device)
    batches = part.lengths.argsort(stable=True).split(64)
    for indices in distributed.share_of(batches):
        output = model(**inputs_of(part, indices))
        logits[indices.to(logits.device)] = output.logits
    distributed.sum_over_ranks(logits)  # the other ranks' logits are zero here
    return evaluation(logits, part.labels, METRICS, task.positive)


def attributions(task: Task, result: Evaluation, name: str = "valid") -> str:
    """HTML of the 20 most confident mistakes in a part of the data, "valid" or "test".

    Each token is shaded by how much it moved the decision.
    """
    names = task.corpus.class_names
    part = getattr(task, name)
    page = f"{viz.SHADED_HEAD}<h2>{name}, {len(result.labels):,} examples</h2>\n"
    for i in viz.most_confident_mistakes(result)[:20].tolist():
        label = int(result.labels[i])
        prediction = int(result.predictions[i])
        shades = encoders.attribute(task.model, part, i, prediction, label)
        if shades is None:
            return f"{page}<p>No attributions: this model does not accept embeddings.</p>"
        start, end = part.offsets[i : i + 2]
        tokens = task.tokenizer.batch_decode(part.tokens[start:end, None])
        heading = (
            f"{names[label]} taken for {names[prediction]}, {result.probabilities[i].max():.1%}"
        )
        page += viz.shaded_tokens(tokens, shades.tolist(), heading)
    return page


@logs_to_wandb
def log_charts(run: Run, task: Task, name: str, result: Evaluation) -> None:
    """Log charts and tables of a part of the data, "valid" or "test"."""
    names = task.corpus.class_names
    part = getattr(task.corpus, name)
    if warning := viz.one_class_warning(result, names):  # first, because W&B may fail below
        run.alert("One class only", warning)
    matrix = viz.confusion_matrix_picture(result.confusion.counts, names, name)
    sources = viz.per_source_table(result, part.sources)
    run.log(
        {
            f"{name}/confusion_matrix": viz.confusion_matrix_chart(result, names),
            f"{name}/confusion_matrix_image": wandb.Image(matrix),
            f"{name}/mistakes": viz.mistakes_table(result, part.columns(), names, run.step),
            f"{name}/per_class": wandb.Table(PER_CLASS, result.confusion.per_class(names)),
            f"{name}/calibration": wandb.Image(viz.calibration_picture(result, name)),
            f"{name}/logits": wandb.Histogram(result.logits.numpy()),
            f"{name}/roc": viz.roc_chart(result, names),
            f"{name}/pr": viz.precision_recall_chart(result, names),
            f"{name}/per_source": sources,
            f"{name}/per_source_chart": wandb.plot.bar(
                sources, "source", "acc", title="Accuracy per source"
            ),
            f"{name}/attributions": wandb.Html(attributions(task, result, name), inject=False),
        }
    )


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "Matthews correlation": ("", "valid/mcc"),
        "learning rate": ("train/learning_rate", ""),
    }
    if distributed.rank() == 0:
        picture = viz.curves_picture(session.run.rows, panels, best_epoch)
        files.write_png(session.output_dir / "curves.png", picture)


# ----------------------------------------------------------------------------- training


def train(session: Session, progress: Progress, task: Task) -> Best:
    """Train the model, from the checkpoint if the run is resumed; returns the best model."""
    settings = session.settings
    run = session.run
    model = task.model
    train_set = task.train
    optimizer, schedule = make_optimizer(
        model, settings, session.config["learning_rate"], progress.total_batches
    )
    best = Best(settings.monitor, METRICS)
    meter = Meter()
    checkpoints = Checkpoints(
        progress,
        [train_set, task.valid, task.test],
        meter,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        best=best,
    )
    checkpoints.restore_or_begin()  # a new run saves its first checkpoint here

    for epoch in progress.epochs():
        model.train()  # from_pretrained returns it in eval mode, without dropout
        # They follow from seed and epoch alone, so that a resumed run repeats them.
        batches = by_length(train_set.lengths, settings.batch_size, seed=(settings.seed, epoch))
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_is_due:
                run.watch(model, log=settings.watch)  # histograms of this batch
            share = distributed.share_of(indices)  # all, unless torchrun started several processes
            for part in share.split(settings.micro_batch_size or len(share)):
                labels = train_set.labels[part.to(session.device)]
                with session.autocast():
                    logits = model(**inputs_of(train_set, part)).logits
                    loss = F.cross_entropy(
                        logits, labels, reduction="sum", label_smoothing=settings.label_smoothing
                    )
                (loss / len(indices)).backward()  # parts and ranks add up to the batch's gradient
                meter.add(len(part), loss=loss, acc=(logits.argmax(1) == labels).sum())
            distributed.sum_gradients(model)
            max_norm = settings.clip_norm or math.inf
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
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
                        "train/grad_norm": grad_norm,
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
        valid = evaluate(task, task.valid)
        progress.check_finite("validation", valid.metrics["loss"])
        log_charts(run, task, "valid", valid)
        results |= valid.named("valid")
        results["valid/majority_share"] = valid.confusion.majority_share()
        run.log(results)  # into the row of the last batch, which is still open
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            run.log_model(partial(save_model, task), results, is_best=improved)
        progress.print_epoch(results)
        if progress.patience_ends(best.epoch):
            break
    return best


# ----------------------------------------------------------------- from start to finish


def save_model(task: Task, directory: Path) -> None:
    task.model.save_pretrained(directory)
    task.tokenizer.save_pretrained(directory)


def conclude(session: Session, task: Task, best: Best) -> dict[str, Any]:
    """Evaluate and save the best model; returns the content of metrics.json."""
    run = session.run
    corpus = task.corpus
    class_names = corpus.class_names
    output_dir = session.output_dir
    task.model.load_state_dict(best.weights)
    valid = evaluate(task, task.valid)
    shown = evaluate(task, task.test) if task.test else valid  # what is printed in the end
    if distributed.rank() > 0:
        return {}
    extra = {}
    for domain, rows in corpus.domains.items():
        part = evaluation(valid.logits[rows], valid.labels[rows], METRICS, task.positive)
        extra |= part.named(f"valid_{domain}")
    name = "valid"
    note = "too optimistic: the epoch was chosen on these sentences"
    if sum("valid/mcc" in row for row in run.rows) == 1:
        note = "of the only epoch"
    files.write_csv(output_dir / "predictions.csv", valid.columns() | corpus.valid.columns())
    if task.test:
        name = "test"
        note = "on the test file"
        extra |= shown.named("test")
        files.write_csv(
            output_dir / "test_predictions.csv", shown.columns() | corpus.test.columns()
        )
        matrix = viz.confusion_matrix_picture(shown.confusion.counts, class_names, "test")
        files.write_png(output_dir / "test_confusion_matrix.png", matrix)
        log_charts(run, task, "test", shown)
    files.write_text(output_dir / "attributions.html", attributions(task, valid))
    matrix = viz.confusion_matrix_picture(valid.confusion.counts, class_names, "valid")
    files.write_png(output_dir / "confusion_matrix.png", matrix)
    with files.replacing_directory(output_dir / "model") as directory:
        save_model(task, directory)

    run.log({"curves": run.call(wandb.Image, str(output_dir / "curves.png"))})
    run.log(extra)
    run.update_summary(valid.named("best"))
    share = valid.confusion.majority_share()
    run.update_summary({"best/epoch": best.epoch, "best/majority_share": share})
    if session.settings.log_model == "best":
        run.log_model(partial(save_model, task), valid.named("valid"), is_best=True)

    confusion = shown.confusion
    low, high = matthews_corrcoef_interval(confusion)
    print(
        f"best epoch {best.epoch}: Matthews correlation {confusion.matthews_corrcoef():.3f} "
        f"(95% interval {low:.3f} to {high:.3f}, {note}), accuracy {confusion.accuracy():.2%} "
        f"(always the most frequent class: {confusion.majority_share():.2%})"
    )
    return {
        "dataset": corpus.name,
        "model": session.config["model"],
        "class_names": class_names,
        "positive_label": session.config["positive_label"],
        "best/epoch": best.epoch,
        **valid.named("valid", class_names),
        f"{name}/mcc_low": low,
        f"{name}/mcc_high": high,
        "mcc_interval": note,
        **extra,
        **shown.named(name, class_names),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tune, evaluate and save as configured; returns the content of metrics.json."""
    with open_session(options.parse(Settings, argv), "cola", METRICS) as session:
        if session.finished:
            return session.metrics
        settings = session.settings
        with distributed.rank_0_first():  # rank 0 downloads the data and the model
            corpus = load(session)
            can_fetch = settings.wandb == "online" or settings.resume
            source = encoders.find_model(settings.model, can_fetch, settings.init_from)
            is_artifact = source.startswith("wandb:")
            load_source = partial(load_model, settings, corpus)
            if not is_artifact:
                pretrained = load_source(source)
        default_rate = 1e-3 if source == "scratch" else 1e-4
        session.config["model"] = source
        session.config["learning_rate"] = settings.learning_rate or default_rate
        progress = Progress(session, len(corpus.train.labels), held_out=len(corpus.valid.labels))
        run = session.start(partial(wandb.init, project=settings.project, config=session.config))
        log_dataset(run, corpus, settings.log_data)
        if is_artifact:
            copy = session.output_dir / "pretrained"
            encoders.fetch_model(source, run.wandb.use_artifact, copy, load_source)
            pretrained = load_source(str(copy))
        task = prepare(session, corpus, pretrained)
        seed_everything(settings.seed, settings.deterministic)
        seed_rank(settings.seed)
        best = train(session, progress, task)
        session.metrics = conclude(session, task, best)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
