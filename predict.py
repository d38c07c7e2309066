"""Apply a run's best model to new data: python predict.py RUN INPUT...

Inputs are sentences or files of them for a run of train_cola.py; image files, folders of them, and
IDX files for one of train_mnist.py. Writes a CSV: input, label, a probability per class.
"""

import argparse
import contextlib
import csv
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import files
from harness.directory import CONFIG_FILE, METRICS_FILE
from harness.errors import UserError
from harness.files import list_names
from harness.options import Parser, command_line
from harness.script import run_script
from tasks.text_files import OwnFiles, Sentences, read_inputs

if __name__ == "__main__":
    # Ctrl-C during the imports ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import transformers
import wandb
from torch import Tensor
from tqdm.auto import tqdm

import viz
from harness import wandb_service
from harness.device import find_device
from metrics import Evaluation, evaluation
from tasks.batching import inputs_of, tokenise
from tasks.downloads import one_line
from tasks.image_files import read_images
from train_mnist import ConvNet, pixels

COLUMN_OPTIONS = ("text_column", "text_pair_column", "label_column")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command-line arguments."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="sentences, files or folders")
    parser.add_argument("--evaluate", action="store_true", help="compare with the inputs' labels")
    parser.add_argument("--batch_size", type=int, default=64, help="inputs in a batch [64]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--output", type=Path, help="the CSV file to write [standard output]")
    parser.add_argument(
        "--wandb",
        default="disabled",
        choices=("auto", "online", "offline", "disabled"),
        help="log the predictions, as a run of their own [disabled]",
    )
    parser.add_argument("--encoding", help="of the inputs [UTF-8, or UTF-16 by its mark]")
    for name in COLUMN_OPTIONS:
        parser.add_argument(f"--{name}", help="of the inputs, as for train_cola.py")
    arguments = parser.parse_args(command_line(__name__) if argv is None else argv)
    if arguments.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    return arguments


# --------------------------------------------------------------------------- prediction


class Predicted(NamedTuple):
    """A model's predictions for the inputs."""

    inputs: dict[str, Sequence[str]]  # columns: the sentences, or the names of the images
    truth: list[str]  # the labels of the inputs, with --evaluate
    logits: Tensor  # float32 (inputs, classes), on the CPU


def read_sentences(arguments: argparse.Namespace, config: dict[str, Any]) -> Sentences:
    """The inputs: sentences, or files of them. Raises `UserError`."""
    # The encoding of the training data may not be that of a new file.
    chosen = {"encoding": arguments.encoding}
    for name in COLUMN_OPTIONS:
        chosen[name] = getattr(arguments, name) or config.get(name)
    part = Sentences([], [], [])
    for text in arguments.inputs:
        if not text.strip():
            raise UserError("an input is empty")
        more = Sentences([text], [""], [""])
        if os.path.exists(text) or re.search(r"\.\w{2,7}$", text) or arguments.evaluate:
            more = read_inputs(Path(text), OwnFiles(**chosen), arguments.evaluate)
        part.extend(more)
    return part


def predict_sentences(
    arguments: argparse.Namespace, config: dict[str, Any], device: torch.device
) -> Predicted:
    """Apply the model that train_cola.py has saved. Raises `UserError`."""
    part = read_sentences(arguments, config)
    with open(arguments.run / "predictions.csv", encoding="utf-8") as file:
        trained_on_pairs = "sentence2" in file.readline()
    if any(isinstance(text, tuple) != trained_on_pairs for text in part.sentences):
        wanted = "pairs of sentences" if trained_on_pairs else "single sentences"
        raise UserError(f"the model of {arguments.run} was trained on {wanted}")
    path = arguments.run / "model"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    except Exception as error:  # transformers raises arbitrary exceptions
        raise UserError(f"{path} can't be loaded: {one_line(error)}") from None
    model.to(device).eval()
    limit = config["max_length"]
    tokens = tokenise(part.sentences, [], tokenizer, limit, device)  # without labels
    if tokens.cut:
        print(f"{tokens.cut} sentences are longer than {limit} tokens and are truncated.")
    logits = torch.zeros(len(part.labels), model.config.num_labels)
    batches = tokens.lengths.argsort(stable=True).split(arguments.batch_size)
    for indices in tqdm(batches, unit="batch", leave=False):
        logits[indices] = model(**inputs_of(tokens, indices)).logits.cpu()
    inputs = part.columns("input")
    del inputs["source"]
    return Predicted(inputs, part.labels, logits)


def predict_images(
    arguments: argparse.Namespace,
    config: dict[str, Any],
    class_names: list[str],
    device: torch.device,
) -> Predicted:
    """Apply the model that train_mnist.py has saved. Raises `UserError`."""
    part = read_images(arguments.inputs, class_names, arguments.evaluate)
    model = ConvNet(config["kernels"], len(class_names))
    files.load_weights(model, str(arguments.run))
    model.eval().to(device)
    batches = tqdm(part.images.split(arguments.batch_size), unit="batch", leave=False)
    logits = [model(pixels(batch.to(device))).cpu() for batch in batches]
    return Predicted({"input": part.names}, part.labels, torch.cat(logits))


# ------------------------------------------------------------------------------- results


def evaluate(predicted: Predicted, names: list[str], positive: str | None) -> Evaluation:
    """Compare with the labels of the inputs, and print metrics and confusion matrix."""
    if unknown := set(predicted.truth) - set(names):
        raise UserError(
            f"--evaluate: the model has no class {list_names(unknown)}; it has {list_names(names)}"
        )
    labels = torch.tensor([names.index(label) for label in predicted.truth])
    positive_class = names.index(positive) if positive else 1
    result = evaluation(predicted.logits, labels, positive=positive_class)
    for name, value in result.metrics.items():
        print(f"{name:20}{value:.4f}")
    print("confusion matrix, rows are labels and columns predictions:")
    for name, counts in zip(names, result.confusion.counts.tolist()):
        print(f"{one_line(name)[:19]:20}", *(f"{count:6}" for count in counts))
    return result


def log_to_wandb(
    arguments: argparse.Namespace,
    project: str | None,
    columns: dict[str, Sequence[Any]],
    result: Evaluation | None,
    class_names: list[str],
) -> None:
    """Log the columns as a table, and the evaluation if there is one, as a run of their own."""
    mode = wandb_service.find_mode(arguments.wandb)
    wandb_service.find_caches()
    config = {"run": str(arguments.run), "inputs": arguments.inputs}
    rows = list(zip(*columns.values()))
    with wandb.init(project=project, job_type="predict", mode=mode, config=config) as run:
        logged = {"predictions": wandb.Table(list(columns), rows)}
        if result:
            logged["test/confusion_matrix"] = viz.confusion_matrix_chart(result, class_names)
            logged |= result.named("test")
        run.log(logged)


@torch.inference_mode()
def predict(arguments: argparse.Namespace) -> dict[str, Sequence[Any]]:
    """The columns of the CSV file. Evaluates and logs them if asked to. Raises `UserError`."""
    metrics = files.read_json(arguments.run / METRICS_FILE)
    config = files.read_json(arguments.run / CONFIG_FILE)
    if not metrics or not config:
        raise UserError(f"{arguments.run} holds no finished run: there is no {METRICS_FILE}")
    device = find_device(arguments.device)
    torch.backends.cudnn.allow_tf32 = False  # float32, as in the run's own evaluation
    class_names = metrics.get("class_names")
    task = config.get("task_name")
    if task == "cola" and "max_length" in config:
        predicted = predict_sentences(arguments, config, device)
    elif task == "mnist" and "kernels" in config:
        predicted = predict_images(arguments, config, class_names, device)
    else:
        raise UserError(f"{arguments.run} is a run of neither train_cola.py nor train_mnist.py")
    columns = predicted.inputs
    result = None
    if arguments.evaluate:
        result = evaluate(predicted, class_names, metrics.get("positive_label"))
        columns["truth"] = predicted.truth
    columns["label"] = [class_names[index] for index in predicted.logits.argmax(1)]
    for name, probabilities in zip(class_names, predicted.logits.double().softmax(1).T):
        columns[f"probability_{name}"] = probabilities.tolist()
    if arguments.wandb != "disabled":
        log_to_wandb(arguments, config.get("project"), columns, result, class_names)
    return columns


def main(argv: list[str] | None = None) -> dict[str, Sequence[Any]]:
    """Predict as asked for on the command line; returns the columns of the CSV file."""
    arguments = parse_arguments(argv)
    output = arguments.output
    if output:  # fails before the work, not after it
        if output.exists():
            raise UserError(f"--output {output} exists already: choose another name")
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise UserError(f"--output {output}: can't write there")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the CSV
        columns = predict(arguments)
    if output:
        files.write_csv(output, columns)
    else:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
    return columns


if __name__ == "__main__":
    run_script(main)
