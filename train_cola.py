"""Fine-tune BERT on CoLA, monitored by Weights & Biases: options, data, model, evaluation, loop, saved model.

Is a sentence acceptable English? The job of the Lightning tutorial. Read it from top to bottom.
"""

import dataclasses

import options
from options import Stopped, UserError, option

# ---------------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(kw_only=True)
class Settings(options.SharedSettings):
    dataset: str = option(
        "auto",
        "auto: CoLA, or built-in sentences where it can't be had",
        choices=("auto", "cola", "synthetic", "files"),
    )
    train_file: str | None = option(None, "your own training data: TSV or CSV with columns sentence and label")
    valid_file: str | None = option(None, "your own validation data")
    model: str | None = option(
        None, "an encoder of the hub, a directory, wandb:ENTITY/PROJECT/NAME:ALIAS, or scratch [BERT-tiny]"
    )
    epochs: int = option(10, "passes over the training data", at_least=1)
    batch_size: int = option(64, "sentences in a batch", at_least=1)
    learning_rate: float | None = option(None, "the highest learning rate [1e-4; 1e-3 for scratch]", above=0)
    schedule: str = option("linear", "of the learning rate, after the warm-up", choices=("linear", "constant"))
    warmup_ratio: float = option(0.1, "share of the batches over which the learning rate rises", at_least=0, below=1)
    weight_decay: float = option(0.01, "of the weights of linear layers", at_least=0)
    clip_norm: float = option(1.0, "longest gradient; 0 clips none", at_least=0)
    max_length: int = option(128, "longest sentence in tokens; what is beyond is cut", at_least=4)
    monitor: str = option(
        "valid/mcc", "figure that chooses the best model", choices=tuple(f"valid/{name}" for name in options.FIGURES)
    )


if __name__ == "__main__":
    options.check_before_imports(Settings)

import contextlib
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import wandb
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import batches
import data
import metrics
import models
import monitoring
import parallel
import runtime
import viz

# -------------------------------------------------------------------------------------------------- data


def load(settings: Settings) -> data.Corpus:
    """The corpus; what the settings leave open becomes what was found: dataset, model and learning rate."""
    corpus = data.load_corpus(settings.dataset, settings.data_dir, settings.train_file, settings.valid_file)
    settings.dataset = corpus.name
    if settings.batch_size > len(corpus.train.labels):
        raise UserError(f"--batch_size {settings.batch_size} is more than the {len(corpus.train.labels)} sentences")
    parallel.check_shares(len(corpus.train.labels), settings.batch_size)
    settings.model = models.find_model(settings.model)
    if settings.model.startswith("wandb:") and settings.wandb != "online":
        raise UserError(f"--model {settings.model} is fetched from W&B, but this run is {settings.wandb}")
    runtime.find_device(settings.device)
    settings.watch_every = settings.watch_every or math.ceil(len(corpus.train.labels) / settings.batch_size)
    settings.learning_rate = settings.learning_rate or (1e-3 if settings.model == "scratch" else 1e-4)
    return corpus


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(model: PreTrainedModel, part: batches.Part) -> metrics.Evaluation:
    """Answer every sentence, in float32 as the saved model does; of several processes, each answers a share."""
    model.eval()
    logits = torch.zeros(len(part.labels), model.config.num_labels, device=part.labels.device)
    drawn = part.lengths.argsort(stable=True).split(64)
    for indices in drawn[parallel.rank() :: parallel.world_size()]:
        # The method, since wandb.watch counts the calls of the model itself.
        answers = type(model).forward(model, **batches.inputs_of(part, indices)).logits
        logits[indices.to(logits.device)] = answers
    parallel.add_up(logits)  # what other processes answer is zero here
    return metrics.evaluation(logits, part.labels)


def attribute(model: PreTrainedModel, part: batches.Part, index: int, answer: int, label: int) -> Tensor:
    """How much each token of a sentence moved the decision for `answer` and against `label`: float (tokens,).

    Gradient × input (Shrikumar et al., 2016): the derivative of the difference of the two logits by a token's
    embedding, times that embedding, summed over its dimensions.
    """
    inputs = batches.inputs_of(part, torch.tensor([index]))
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with torch.enable_grad():
        logits = type(model).forward(model, inputs_embeds=embedded, **inputs).logits[0]
        (gradient,) = torch.autograd.grad(logits[answer] - logits[label], embedded)
    return (gradient * embedded).sum(-1)[0, : part.lengths[index]].detach().cpu()


def log_charts(
    run: wandb.Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    part: batches.Part,
    result: metrics.Evaluation,
    corpus: data.Corpus,
    step: int,
) -> None:
    """Log the charts and tables of the validation sentences into the row of this step."""
    names = corpus.class_names
    mistakes = viz.surest_mistakes(result).tolist()
    pages = []
    for i in mistakes[:20]:
        label, prediction = int(result.labels[i]), int(result.predictions[i])
        shades = attribute(model, part, i, prediction, label)
        words = tokenizer.convert_ids_to_tokens(part.tokens[i, : len(shades)].tolist())
        heading = f"{names[label]} taken for {names[prediction]}, {result.probabilities[i].max():.1%}"
        pages.append(viz.shaded_tokens(words, shades, heading))
    sources = viz.per_source_table(result, corpus.valid.sources)
    run.log(
        {
            "valid/confusion_matrix": wandb.plot.confusion_matrix(
                y_true=result.labels.tolist(), preds=result.predictions.tolist(), class_names=names
            ),
            "valid/confusion_matrix_image": wandb.Image(
                viz.confusion_matrix_picture(result.confusion.counts, names, "valid")
            ),
            "valid/mistakes": viz.sentence_mistakes_table(result, corpus, step),
            "valid/logits": wandb.Histogram(result.logits.numpy()),
            "valid/roc": viz.roc_chart(result, names),
            "valid/pr": viz.precision_recall_chart(result, names),
            "valid/per_source": sources,
            "valid/per_source_chart": wandb.plot.bar(sources, "source", "acc", title="Accuracy per source"),
            "valid/attributions": wandb.Html("".join(pages) or "<p>No mistakes.</p>", inject=False),
        },
        step=step,
    )


def warn_of_one_class(run: wandb.Run, result: metrics.Evaluation, class_names: list[str], epoch: int) -> None:
    """Say so plainly where the model gives every sentence the same answer: accuracy does not show it."""
    answers = result.predictions.unique()
    if len(answers) == 1:
        text = (
            f"Epoch {epoch}: the model answers {class_names[answers[0]]!r} to every validation sentence; its "
            f"accuracy, {result.figures['acc']:.1%}, is that of always answering so."
        )
        tqdm.write(f"WARNING: {text}")
        if not (run.offline or run.disabled):
            run.alert(title="One class only", text=text, level=wandb.AlertLevel.WARN)


# ---------------------------------------------------------------------------------------------- training


class Best(NamedTuple):
    """The best model so far."""

    epoch: int
    value: float  # of the monitored figure
    weights: dict[str, Tensor]


def train(
    run: wandb.Run,
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: list[batches.Part],
    corpus: data.Corpus,
    output_dir: Path,
    checkpoint: dict[str, Any] | None,
    stop: list[Stopped],
) -> tuple[Best, int]:
    """Train `model`, from `checkpoint` on if there is one; returns the best model and the last step.

    The step is the number of sentences seen. Raises the first entry of `stop` after the batch, with all saved. Of
    several processes, each computes a share of every batch, and the first one logs and writes.
    """
    rank, world_size = parallel.rank(), parallel.world_size()
    train_part, valid_part = parts
    device, examples = train_part.tokens.device, len(train_part.lengths)
    batches_per_epoch = math.ceil(examples / settings.batch_size)
    last_batch = min(settings.epochs * batches_per_epoch, settings.max_steps or math.inf)
    warmup = int(settings.warmup_ratio * last_batch)

    def learning_rate_factor(batch: int) -> float:
        if batch < warmup:
            return (batch + 1) / (warmup + 1)
        return (last_batch - batch) / (last_batch - warmup) if settings.schedule == "linear" else 1.0

    loss_function = nn.CrossEntropyLoss(reduction="sum")
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    others = [weight for weight in model.parameters() if weight.ndim == 1 or weight in embeddings]  # biases, LayerNorm
    decayed = [weight for weight in model.parameters() if weight.ndim > 1 and weight not in embeddings]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        settings.learning_rate,
        fused=device.type != "mps",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    if settings.compile:
        model.forward = torch.compile(model.forward, dynamic=True)  # model.compile() would take in watch's hooks

    best = Best(0, math.nan, {})
    batch = step = 0
    epoch_ends = False
    figures = metrics.TrainingFigures(device)
    numbers = {}  # the latest row
    fingerprint = runtime.fingerprint(parts)
    if world_size > 1:
        parallel.check_same(fingerprint, runtime.fingerprint([model.state_dict().values()]))

    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}

    def save_checkpoint() -> None:
        epoch = math.ceil(batch / batches_per_epoch)
        position = {"epoch": epoch, "batch": batch, "step": step, "epoch_ends": epoch_ends}
        weights = {} if epoch_ends and best.epoch == epoch else best.weights  # the model's own are written once
        more = {"row": numbers, "best": best._replace(weights=weights)._asdict(), "data": fingerprint}
        runtime.save_checkpoint(output_dir, settings, stateful, figures, position, **more)

    if checkpoint:
        if checkpoint["data"] != fingerprint:
            raise UserError("--resume: the sentences are not those that the run was begun with")
        runtime.restore(checkpoint, stateful, figures)
        batch, step, epoch_ends = (checkpoint["position"][name] for name in ("batch", "step", "epoch_ends"))
        numbers, best = checkpoint["row"], Best(**checkpoint["best"])
        best = best._replace(weights=best.weights or checkpoint["model"])
    else:
        save_checkpoint()
    watch_from = math.ceil(batch / settings.watch_every) * settings.watch_every  # so that it keeps its rhythm
    bar = tqdm(total=last_batch, initial=batch, unit="batch", disable=None, file=sys.stdout)

    for epoch in range(max(1, math.ceil(batch / batches_per_epoch)), settings.epochs + 1):
        epoch_started = row_started = time.perf_counter()
        row_began = step
        model.train()  # from_pretrained returns it in eval mode, without dropout
        # Drawn from (seed, epoch) alone, so that a resumed run draws the same.
        drawn = batches.by_length(
            train_part.lengths, settings.batch_size, np.random.default_rng((settings.seed, epoch))
        )
        done = batch - (epoch - 1) * batches_per_epoch
        for indices in drawn[done : done + last_batch - batch]:
            if settings.watch != "off" and batch == watch_from:
                run.watch(model, loss_function, log=settings.watch, log_freq=settings.watch_every)
            share = indices[rank::world_size]
            labels = train_part.labels[share.to(device, non_blocking=True)]
            batch, step = batch + 1, step + len(indices)
            epoch_ends = batch % batches_per_epoch == 0 or batch == last_batch
            if settings.watch != "off" and batch % settings.watch_every == 0:
                run.log({}, step=step, commit=False)  # opens the row that the histograms belong to

            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = model(**batches.inputs_of(train_part, share)).logits
                loss = loss_function(logits, labels)
            (loss / len(indices)).backward()
            parallel.add_up(*(weight.grad for weight in model.parameters() if weight.grad is not None))
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
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
                    "train/grad_norm": float(grad_norm),
                    "train/examples_per_second": (step - row_began) / (time.perf_counter() - row_started),
                }
                if not math.isfinite(row["loss"]):
                    raise runtime.diverged("training", row["loss"], epoch, step, learning_rate)
                bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['acc']:.2%}")
                row_began, row_started = step, time.perf_counter()
                if epoch_ends:
                    break  # this row is logged below, with the figures of the epoch
                runtime.log_numbers(run, output_dir, numbers, step)
            agreeing = world_size == 1 or batch % settings.log_every == 0  # the others are not asked each time
            stopping = agreeing and parallel.any_of_them(bool(stop))
            if batch % settings.checkpoint_every == 0 or stopping:
                save_checkpoint()
            if stopping:
                raise stop[0] if stop else Stopped("another process", 0)

        run.log({}, step=step)  # opens the row, if nothing has yet: media files are named by the open one
        whole, valid = figures.epoch(), evaluate(model, valid_part)
        numbers |= {"train/loss_epoch": whole["loss"], "train/acc_epoch": whole["acc"]}
        if not math.isfinite(valid.figures["loss"]):
            runtime.log_numbers(run, output_dir, numbers, step)
            raise runtime.diverged("validation", valid.figures["loss"], epoch, step, settings.learning_rate)
        if rank == 0:
            log_charts(run, model, tokenizer, valid_part, valid, corpus, step)
        numbers |= {f"valid/{name}": figure for name, figure in valid.figures.items()}
        numbers["valid/majority_share"] = valid.confusion.majority_share()
        runtime.log_numbers(run, output_dir, numbers, step)
        value = parallel.from_the_first(numbers[settings.monitor])
        improved = best.epoch in (0, epoch) or options.is_better(settings.monitor, value, best.value)
        if improved:
            weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            best = Best(epoch, value, weights)
        save_checkpoint()
        if settings.log_model == "all" and rank == 0:
            log_model(run, model, tokenizer, numbers, ["latest", "best"] if improved else ["latest"])
        line = f"epoch {epoch}: train loss {whole['loss']:.4f} acc {whole['acc']:.2%}, valid loss "
        line += "{loss:.4f} acc {acc:.2%} mcc {mcc:.3f}".format(**valid.figures)
        bar.write(f"{line}, {time.perf_counter() - epoch_started:.1f} s")
        warn_of_one_class(run, valid, corpus.class_names, epoch)
        if batch == last_batch or 0 < settings.patience <= epoch - best.epoch:
            break
        figures.start_epoch()
        run.log({}, step=step, commit=True)  # a row that is still open dies with the process
    bar.close()
    return best, step


# ------------------------------------------------------------------------------------- from start to end


def log_model(
    run: wandb.Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    figures: dict[str, float],
    aliases: list[str],
) -> None:
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=figures)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        artifact.add_dir(directory)
    run.log_artifact(artifact, aliases=aliases)


def fetch_model(run: wandb.Run, name: str) -> str:
    """`name`, or for wandb:ENTITY/PROJECT/NAME:ALIAS the directory that the artifact was downloaded to."""
    if not name.startswith("wandb:"):
        return name
    try:
        return run.use_artifact(name.removeprefix("wandb:")).download()
    except (wandb.errors.CommError, ValueError) as error:
        raise UserError(f"--model {name} can't be fetched: {error}") from None


def load_model(settings: Settings, corpus: data.Corpus, place: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of `place`; where weights are random, of a new head or of all, they follow the seed."""
    runtime.seed_everything(settings.seed, settings.deterministic)
    return models.load_model(place, corpus.train.sentences, corpus.class_names, settings.max_length)


def log_dataset(run: wandb.Run, corpus: data.Corpus) -> None:
    artifact = wandb.Artifact(corpus.name, type="dataset")
    for file in corpus.files:
        artifact.add_file(str(file))
    if not corpus.files:
        for name, part in (("train", corpus.train), ("valid", corpus.valid)):
            with artifact.new_file(f"{name}.tsv", encoding="utf-8") as file:
                file.writelines(f"{source}\t{label}\t{sentence}\n" for sentence, label, source in zip(*part))
    run.log_artifact(artifact)


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


def conclude(
    run: wandb.Run,
    settings: Settings,
    best: Best,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    valid_part: batches.Part,
    corpus: data.Corpus,
    step: int,
) -> dict[str, Any]:
    """Log and write what the best model answers, save it; returns the figures."""
    output_dir = Path(settings.output_dir)
    model.load_state_dict(best.weights)
    result = evaluate(model, valid_part)
    if parallel.rank() > 0:
        return {}
    figures = {"valid/majority_share": result.confusion.majority_share()}
    figures |= {f"valid/{name}": figure for name, figure in result.figures.items()}
    domains = {}
    for domain, where in corpus.domains.items():
        of_domain = metrics.evaluation(result.logits[where], result.labels[where])
        domains |= {f"valid_{domain}/{name}": figure for name, figure in of_domain.figures.items()}
    if domains:
        runtime.log_numbers(run, output_dir, domains, step)
    run.log({}, step=step, commit=True)  # or the open row would overwrite the summary
    with monitoring.forgiving(run):
        of_best = {key.replace("valid/", "best/"): figure for key, figure in figures.items()}
        run.summary.update({"best/epoch": best.epoch, **of_best})

    columns = {"sentence": corpus.valid.sentences, "source": corpus.valid.sources}
    runtime.write_predictions(output_dir / "predictions.csv", result, columns)
    picture = viz.confusion_matrix_picture(result.confusion.counts, corpus.class_names, "valid")
    runtime.write_png(output_dir / "confusion_matrix.png", picture)
    with runtime.replacing_directory(output_dir / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if settings.log_model == "best":
        log_model(run, model, tokenizer, figures, ["latest", "best"])
    low, high = metrics.matthews_corrcoef_interval(result.confusion)
    return {**figures, "valid/mcc_low": low, "valid/mcc_high": high, **domains}


def fit(
    run: wandb.Run,
    settings: Settings,
    corpus: data.Corpus,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    checkpoint: dict[str, Any] | None,
    stop: list[Stopped],
) -> tuple[Best, dict[str, Any]]:
    """Tokenise, train, evaluate the best model; returns that and the figures. All processes do this together."""
    model, tokenizer = loaded
    device = runtime.find_device(settings.device)
    runtime.seed_everything(settings.seed, settings.deterministic)
    torch.manual_seed(settings.seed + parallel.rank())  # each process drops out others
    model.to(device)
    parts = [
        batches.tokenise(part.sentences, part.labels, tokenizer, settings.max_length, device)
        for part in (corpus.train, corpus.valid)
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    models.train_used_rows(model, [part.tokens for part in parts])
    if cut := sum(part.cut for part in parts):
        print(f"{cut} sentences are longer than --max_length {settings.max_length} tokens: the rest is cut.")
    share = parts[1].labels.bincount().max() / len(parts[1].labels)
    print(
        f"{corpus.name}: {len(corpus.train.labels):,} + {len(corpus.valid.labels):,} sentences for training "
        f"and validation, {share:.1%} of the latter in the most frequent class\n"
        f"{settings.model}: {parameters:,} parameters, "
        f"{len(tokenizer):,} tokens, on {device.type} in {settings.precision}, seed {settings.seed}"
    )
    output_dir = Path(settings.output_dir)
    best, step = train(run, settings, model, tokenizer, parts, corpus, output_dir, checkpoint, stop)
    return best, conclude(run, settings, best, model, tokenizer, parts[1], corpus, step)


def lead(settings: Settings, stop: list[Stopped]) -> dict[str, Any]:
    """What the first process does, mostly the only one: begin or resume a run, `fit`, and end it."""
    started = time.perf_counter()
    runtime.settle_run(settings, "cola")
    with runtime.output_directory(settings) as output_dir:
        checkpoint = runtime.load_checkpoint(output_dir, settings)
        if summary := runtime.finished(output_dir, settings, checkpoint):
            parallel.from_the_first(None)
            return summary
        rows = runtime.rewind_journal(output_dir, checkpoint) if checkpoint else []
        asked, corpus, loaded = dataclasses.replace(settings), None, None
        if "WANDB_SWEEP_ID" not in os.environ:
            corpus = load(settings)
            # What is wrong with a model shows before anything is written, unless W&B has to be asked for it.
            loaded = None if settings.model.startswith("wandb:") else load_model(settings, corpus, settings.model)
        run, held = monitoring.start(lambda mode: init(asked, mode, stop), asked)
        with monitoring.finishing(run):
            # A sweep may have set part of the config: from here on, the config is what counts.
            configured = settings if checkpoint else options.from_config(asked, run.config)
            if corpus is None or configured not in (asked, settings):
                settings, loaded = configured, None
                corpus = load(settings)
            device = runtime.find_device(settings.device)
            settings.device, settings.precision = device.type, runtime.find_precision(settings.precision, device)
            settings.id = run.id
            runtime.record_settings(run, settings, output_dir)
            log_dataset(run, corpus)
            monitoring.log_again(run, rows, held)
            place = fetch_model(run, settings.model)
            loaded = loaded or load_model(settings, corpus, place)
            parallel.from_the_first((settings, place, checkpoint))
            best, figures = fit(run, settings, corpus, loaded, checkpoint, stop)
            last_line = monitoring.where_to_look(run, output_dir)
        summary = {
            "dataset": corpus.name,
            "model": settings.model,
            "best/epoch": best.epoch,
            **figures,
            "seconds": time.perf_counter() - started,
        }
        runtime.write_json(output_dir / "metrics.json", summary)  # the last file: a run that has it is finished
    print(
        "best epoch {best/epoch}: Matthews correlation {valid/mcc:.3f} (95 % interval {valid/mcc_low:.3f} to "
        "{valid/mcc_high:.3f}), accuracy {valid/acc:.2%} where always answering the same gives "
        "{valid/majority_share:.2%}".format(**summary)
    )
    print(last_line)
    return summary


def follow(stop: list[Stopped]) -> dict[str, Any]:
    """What the other processes of torchrun do: `fit`, with the settings of the first and without a word."""
    begun = parallel.from_the_first()
    if begun:
        settings, place, checkpoint = begun
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            corpus = load(settings)
            loaded = load_model(settings, corpus, place)
            with parallel.after_the_first():
                fit(wandb.init(mode="disabled"), settings, corpus, loaded, checkpoint, stop)
    return {}


@monitoring.for_agents
def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fine-tune, evaluate and save as the command-line arguments say; returns the content of metrics.json."""
    settings = options.parse(Settings, argv)
    with parallel.joined(), monitoring.stop_requests() as stop:
        return lead(settings, stop) if parallel.rank() == 0 else follow(stop)


if __name__ == "__main__":
    options.run_script(main)
