"""Fine-tune BERT on CoLA, logged with Weights & Biases: settings, data, model, evaluation, training, saved model.

Is a sentence acceptable English? The task is that of the PyTorch Lightning tutorial. Read train_mnist.py first.
"""

import dataclasses

from harness import options, script
from harness.options import option

# ---------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True)
class Settings(options.SharedSettings):
    dataset: str = option(
        "auto",
        "auto: CoLA, or built-in sentences if it is not available",
        choices=("auto", "cola", "synthetic", "files"),
    )
    train_file: str | None = option(
        None, "your training data: TSV or CSV with columns sentence and label", path=True
    )
    valid_file: str | None = option(None, "your validation data", path=True)
    model: str | None = option(
        None, "hub name, path, wandb:ENTITY/PROJECT/NAME:ALIAS, scratch [BERT-tiny]", path=True
    )
    epochs: int = option(10, "passes over the training data", at_least=1)
    batch_size: int = option(64, "sentences in a batch", at_least=1)
    learning_rate: float | None = option(
        None, "the highest learning rate [1e-4; 1e-3 for scratch]", above=0
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
        choices=options.metric_names("valid", two_classes=True),
    )


if __name__ == "__main__":
    script.check_options(Settings)  # before the imports that take seconds

import math
import tempfile
from typing import Any, NamedTuple

import torch
import wandb
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import metrics
import viz
from harness import distributed, files
from harness.checkpoints import Checkpoints
from harness.device import seed_everything, seed_rank
from harness.errors import UserError
from harness.progress import Best, Meter, Progress, check_batches
from harness.session import Session, open_session
from harness.wandb_run import logs_to_wandb, tolerate_wandb_errors
from tasks import batching, encoders
from tasks.sentences import Corpus, load_corpus

# -------------------------------------------------------------------------------------------------- data


class Task(NamedTuple):
    """What there is to learn, and what learns it."""

    corpus: Corpus
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: batching.TokenSet
    valid: batching.TokenSet


def load(
    settings: Settings,
) -> tuple[Corpus, tuple[PreTrainedModel, PreTrainedTokenizerBase] | None]:
    """The corpus and, unless W&B has it, the model. Resolves the settings left open; raises `UserError`."""
    corpus = load_corpus(
        settings.dataset, settings.data_dir, settings.train_file, settings.valid_file
    )
    check_batches(settings, examples=len(corpus.train.labels), held_out=len(corpus.valid.labels))
    logits = torch.zeros(
        len(corpus.valid.labels), len(corpus.class_names)
    )  # any will do: only the names are needed
    if settings.monitor not in metrics.evaluation(logits, torch.tensor(corpus.valid.labels)).named(
        "valid"
    ):
        raise UserError(
            f"--monitor {settings.monitor} needs two classes, both in the validation data"
        )
    settings.dataset, settings.model = corpus.name, encoders.find_model(settings.model)
    settings.learning_rate = settings.learning_rate or (
        1e-3 if settings.model == "scratch" else 1e-4
    )
    if (
        (at_wandb := settings.model.startswith("wandb:"))
        and settings.wandb != "online"
        and not settings.resume
    ):
        raise UserError(
            f"--model {settings.model} is fetched from W&B, but this run is {settings.wandb}"
        )
    return corpus, None if at_wandb else load_model(settings, corpus, settings.model)


def load_model(
    settings: Settings, corpus: Corpus, source: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a directory, the hub or "scratch"; its random weights, such as a new head's, follow the seed."""
    seed_everything(settings.seed, settings.deterministic)
    return encoders.load_model(
        source, corpus.train.sentences, corpus.class_names, settings.max_length
    )


def fetch_model(session: Session) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of the artifact wandb:ENTITY/PROJECT/NAME:ALIAS, from a copy if resumed; raises `UserError`."""
    name, data, copy = (
        session.settings.model,
        (session.settings, session.data[0]),
        session.output_dir / "pretrained",
    )
    if distributed.rank() == 0 and not copy.exists():
        with files.replacing_directory(copy) as directory:
            try:
                artifact = session.run.use_artifact(name.removeprefix("wandb:"))
                artifact.verify(
                    artifact.download(str(directory))
                )  # a download alone checks no checksums
                load_model(*data, str(directory))  # what can't be loaded isn't kept
            except Exception as error:  # there is no end to what W&B raises
                reason = str(error).replace("--model ", "").replace(str(directory), "it")
                raise UserError(f"--model {name} can't be used: {reason}") from None
    distributed.broadcast()  # the other ranks wait for the copy
    return load_model(*data, str(copy))


def prepare(session: Session) -> Task:
    """Tokenise the sentences, and take the model to the device."""
    settings, (corpus, loaded) = session.settings, session.data
    model, tokenizer = loaded or fetch_model(session)
    model.to(session.device)
    how = (tokenizer, settings.max_length, session.device)
    train_set, valid_set = (
        batching.tokenise(p.sentences, p.labels, *how) for p in (corpus.train, corpus.valid)
    )
    weights = f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens"
    encoders.train_used_rows(model, [train_set.tokens, valid_set.tokens])
    if cut := train_set.cut + valid_set.cut:
        print(
            f"{cut} sentences are longer than --max_length {settings.max_length} tokens and are truncated."
        )
    share = valid_set.labels.bincount().max() / len(valid_set.labels)
    sizes = f"{len(corpus.train.labels):,} + {len(corpus.valid.labels):,} sentences for training and validation"
    print(f"{corpus.name}: {sizes}, {share:.1%} of the latter in the most frequent class")
    print(
        f"{settings.model}: {weights}, on {session.device.type} in {settings.precision}, seed {settings.seed}"
    )
    return Task(corpus, model, tokenizer, train_set, valid_set)


@logs_to_wandb
def log_dataset(run: wandb.Run, corpus: Corpus) -> None:
    artifact = wandb.Artifact(corpus.name, type="dataset")
    for number, file in enumerate(corpus.files):
        artifact.add_file(str(file), name=f"{number}-{file.name}")  # both may be called data.tsv
    if not corpus.files:
        for name, part in (("train", corpus.train), ("valid", corpus.valid)):
            with artifact.new_file(f"{name}.tsv", encoding="utf-8") as file:
                file.writelines(
                    f"{source}\t{label}\t{sentence}\n" for sentence, label, source in zip(*part)
                )
    run.log_artifact(artifact)


def make_optimizer(
    model: PreTrainedModel, settings: Settings, batches: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW, whose weight decay spares biases, LayerNorm and embeddings, and its schedule over all `batches`."""
    warmup = int(settings.warmup_ratio * batches)

    def factor(batch: int) -> float:
        if batch < warmup:
            return (batch + 1) / (warmup + 1)
        return (batches - batch) / (batches - warmup) if settings.schedule == "linear" else 1.0

    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    spared = [weight for weight in model.parameters() if weight.ndim == 1 or weight in embeddings]
    decayed = [
        weight for weight in model.parameters() if weight.ndim > 1 and weight not in embeddings
    ]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, fused=model.device.type != "mps")
    return optimizer, LambdaLR(optimizer, factor)


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: PreTrainedModel, part: batching.TokenSet) -> metrics.Evaluation:
    """Predict every sentence, in float32 like the saved model; each rank predicts a share of the batches."""
    model.eval()
    logits = torch.zeros(len(part.labels), model.config.num_labels, device=part.labels.device)
    batches = part.lengths.argsort(stable=True).split(64)
    for indices in distributed.share_of(batches):
        output = type(model).forward(
            model, **batching.inputs_of(part, indices)
        )  # spares the hooks of run.watch
        logits[indices.to(logits.device)] = output.logits
    distributed.sum_over_ranks(logits)  # the other ranks' logits are zero here
    return metrics.evaluation(logits, part.labels)


def attributions(task: Task, result: metrics.Evaluation) -> str:
    """HTML of the 20 most confident mistakes, each word shaded by how much it moved the decision."""
    names, page = task.corpus.class_names, '<!doctype html><meta charset="utf-8">'
    for i in viz.most_confident_mistakes(result)[:20].tolist():
        label, prediction = int(result.labels[i]), int(result.predictions[i])
        shades = encoders.attribute(task.model, task.valid, i, prediction, label)
        heading = (
            f"{names[label]} taken for {names[prediction]}, {result.probabilities[i].max():.1%}"
        )
        if shades is None:
            return f"{page}<p>No attributions: this model does not accept embeddings.</p>"
        words = encoders.words_of(task.tokenizer, task.corpus.valid.sentences[i], len(shades))
        page += viz.shaded_words(
            [(word, float(shades[places].sum())) for word, places in words], heading
        )
    return page


@logs_to_wandb
def log_charts(run: wandb.Run, task: Task, result: metrics.Evaluation, progress: Progress) -> None:
    """Log the charts and tables of the validation sentences, and warn of a model that predicts one class only."""
    names, valid = task.corpus.class_names, task.corpus.valid
    if warning := viz.one_class_warning(result, names):  # first: W&B may fail
        progress.warn("One class only", warning)
    picture = viz.confusion_matrix_picture(result.confusion.counts, names, "valid")
    per_source = viz.per_source_table(result, valid.sources)
    charts = {
        "valid/confusion_matrix": viz.confusion_matrix_chart(result, names),
        "valid/confusion_matrix_image": wandb.Image(picture),
        "valid/mistakes": viz.sentence_mistakes_table(
            result, valid.sentences, valid.sources, names, progress.step
        ),
        "valid/calibration": wandb.Image(viz.calibration_picture(result, "valid")),
        "valid/logits": wandb.Histogram(result.logits.numpy()),
        "valid/roc": viz.roc_chart(result, names),
        "valid/pr": viz.precision_recall_chart(result, names),
        "valid/per_source": per_source,
        "valid/per_source_chart": wandb.plot.bar(
            per_source, "source", "acc", title="Accuracy per source"
        ),
        "valid/attributions": wandb.Html(attributions(task, result), inject=False),
    }
    run.log(charts, step=progress.step)


def write_curves(session: Session, best_epoch: int) -> None:
    """Draw the learning curves of the run so far."""
    panels = {
        "loss": ("train/loss_step", "valid/loss"),
        "accuracy": ("train/acc_step", "valid/acc"),
    }
    panels["Matthews correlation"] = ("", "valid/mcc")
    if distributed.rank() == 0:
        files.write_png(
            session.output_dir / "curves.png",
            viz.curves_picture(session.history.rows, panels, best_epoch),
        )


# ---------------------------------------------------------------------------------------------- training


def train(session: Session, task: Task) -> tuple[Best, Progress]:
    """Train the model, from the checkpoint if the run is resumed; returns the best model and the progress."""
    settings, run, device = session.settings, session.run, session.device
    model, train_set = task.model, task.train
    progress = Progress(session, examples=len(train_set.labels))
    loss_function = nn.CrossEntropyLoss(reduction="sum", label_smoothing=settings.label_smoothing)
    optimizer, schedule = make_optimizer(model, settings, progress.total_batches)
    if settings.compile:
        model.forward = torch.compile(
            model.forward, dynamic=True
        )  # not model.compile(): it includes watch's hooks
    meter, best = Meter(device), Best(settings.monitor, metrics.lower_is_better(settings.monitor))
    stateful = {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "meter": meter,
        "best": best,
    }
    checkpoints = Checkpoints(session, progress, data=[train_set, task.valid], **stateful)
    checkpoints.restore_or_begin()  # a new run saves its first one here

    for epoch in progress.epochs():
        model.train()  # from_pretrained returns it in eval mode, without dropout
        # From seed and epoch alone, so that a resumed run repeats them.
        batches = batching.by_length(
            train_set.lengths, settings.batch_size, seed=(settings.seed, epoch)
        )
        for indices in progress.remaining(batches):  # after a resume, the rest of the epoch
            if progress.watch_starts:
                run.watch(model, log=settings.watch, log_freq=settings.watch_every)
            share = distributed.share_of(
                indices
            )  # all of them, unless torchrun started several processes
            labels = train_set.labels[share.to(device, non_blocking=True)]

            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(**batching.inputs_of(train_set, share)).logits
                loss = loss_function(logits, labels)
            (
                loss / len(indices)
            ).backward()  # the size of the whole batch: gradients are summed over ranks
            distributed.sum_gradients(model)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
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
                        "train/grad_norm": float(grad_norm),
                        "train/examples_per_second": progress.examples_per_second(),
                    },
                    step=progress.step,
                )
                progress.bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['acc']:.2%}")
            schedule.step()
            checkpoints.save_if_due()  # and at an epoch's end; on a request to stop it saves, then raises Stopped

        mean, valid = meter.take_epoch(), evaluate(model, task.valid)
        results = {"epoch": epoch, "train/loss_epoch": mean["loss"], "train/acc_epoch": mean["acc"]}
        run.log(results, step=progress.step)
        progress.check_finite("validation", valid.metrics["loss"])
        log_charts(run, task, valid, progress)
        results |= {
            **valid.named("valid"),
            "valid/majority_share": valid.confusion.majority_share(),
        }
        run.log(results, step=progress.step)
        improved = best.offer(epoch, results, model)
        write_curves(session, best.epoch)
        if settings.log_model == "all":
            log_model(run, task, results, ["latest", "best"] if improved else ["latest"])
        progress.end_epoch(
            results, "train/loss_epoch", "train/acc_epoch", "valid/loss", "valid/acc", "valid/mcc"
        )
        if 0 < settings.patience <= epoch - best.epoch:
            break
    return best, progress


# ------------------------------------------------------------------------------------- from start to finish


@logs_to_wandb
def log_model(run: wandb.Run, task: Task, metadata: dict[str, float], aliases: list[str]) -> None:
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=metadata)
    with tempfile.TemporaryDirectory() as directory:
        task.model.save_pretrained(directory)
        task.tokenizer.save_pretrained(directory)
        artifact.add_dir(directory)
    run.log_artifact(artifact, aliases=aliases)


def conclude(session: Session, task: Task, best: Best, progress: Progress) -> dict[str, Any]:
    """Evaluate the best model, write its predictions and save it; returns the content of metrics.json."""
    run, corpus, output_dir = session.run, task.corpus, session.output_dir
    task.model.load_state_dict(best.weights)
    valid = evaluate(task.model, task.valid)
    if distributed.rank() > 0:
        return {}
    share, domains = valid.confusion.majority_share(), {}
    for domain, rows in corpus.domains.items():
        domains |= metrics.evaluation(valid.logits[rows], valid.labels[rows]).named(
            f"valid_{domain}"
        )
    with tolerate_wandb_errors(run):
        run.log({"curves": wandb.Image(str(output_dir / "curves.png"))}, step=progress.step)
    run.log(
        domains, step=progress.step, commit=True
    )  # W&B: an open row would overwrite the summary
    with tolerate_wandb_errors(run):
        run.summary.update(
            {"best/epoch": best.epoch, **valid.named("best"), "best/majority_share": share}
        )
    sentences = {"sentence": corpus.valid.sentences, "source": corpus.valid.sources}
    files.write_csv(output_dir / "predictions.csv", {**valid.columns(), **sentences})
    files.write_text(output_dir / "attributions.html", attributions(task, valid))
    picture = viz.confusion_matrix_picture(valid.confusion.counts, corpus.class_names, "valid")
    files.write_png(output_dir / "confusion_matrix.png", picture)
    with files.replacing_directory(output_dir / "model") as directory:
        task.model.save_pretrained(directory)
        task.tokenizer.save_pretrained(directory)
    if session.settings.log_model == "best":
        log_model(run, task, valid.named("valid"), ["latest", "best"])
    low, high = metrics.matthews_corrcoef_interval(valid.confusion)
    print(
        f"best epoch {best.epoch}: Matthews correlation {valid.metrics['mcc']:.3f} (95% interval {low:.3f} to "
        f"{high:.3f}), accuracy {valid.metrics['acc']:.2%} (always the most frequent class: {share:.2%})"
    )
    identity = {
        "dataset": corpus.name,
        "model": session.settings.model,
        "class_names": corpus.class_names,
    }
    interval = {"valid/majority_share": share, "valid/mcc_low": low, "valid/mcc_high": high}
    return {**identity, "best/epoch": best.epoch, **valid.named("valid"), **interval, **domains}


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
    """Fine-tune, evaluate and save as configured on the command line; returns the content of metrics.json."""
    with open_session(options.parse(Settings, argv), "cola", load, init) as session:
        if not session.finished:
            task = prepare(session)
            log_dataset(session.run, task.corpus)
            seed_everything(session.settings.seed, session.settings.deterministic)
            seed_rank(session.settings.seed)
            best, progress = train(session, task)
            session.metrics = conclude(session, task, best, progress)
    return session.metrics


if __name__ == "__main__":
    script.run_script(main)
