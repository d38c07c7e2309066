"""The validation examples that a run predicted: read from its directory, and shown as sentences or images."""

import csv
import functools
import hashlib
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from harness.errors import UserError
from metrics import ConfusionMatrix, calibration
from reporting.markup import paragraph, picture, table
from reporting.runs import Run, text
from tasks.digits import MNIST_SHA256, TORCHVISION_CLASS, ImageSet, load_digits, split_digits

csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
MAX_CLASSES = 1000  # a confusion matrix of more is too large for a page


@dataclass
class Predictions:
    """The content of a predictions.csv."""

    labels: Tensor  # int64 (examples,)
    predictions: Tensor  # int64 (examples,)
    probabilities: Tensor  # float64 (examples, classes)
    losses: Tensor  # float64 (examples,), in nats
    sentences: list[str]  # empty for images
    sources: list[str]

    @property
    def correct(self) -> Tensor:
        """bool (examples,)."""
        return self.predictions == self.labels

    @property
    def examples(self) -> str:
        """A digest of the classes, labels and sentences, which two runs must share to be compared."""
        content = repr((self.probabilities.shape[1], self.labels.tolist(), self.sentences))
        return hashlib.sha256(content.encode()).hexdigest()


def read_predictions(path: Path) -> Predictions:
    """The predictions of the run in a directory. Raises `UserError` if they are missing or unreadable."""
    if not (path / "predictions.csv").is_file():
        raise UserError("no predictions.csv")
    try:
        with (path / "predictions.csv").open(
            newline="", encoding="utf-8", errors="replace"
        ) as file:
            header, *rows = csv.reader(file)
        columns = dict(zip(header, zip(*rows, strict=True)))
        labels, predictions = (
            torch.tensor([*map(int, columns[name])]) for name in ("label", "prediction")
        )
        cells = [
            columns[f"probability_{i}"]
            for i in range(sum(name.startswith("probability_") for name in columns))
        ]
        if len(cells) > MAX_CLASSES:
            raise ValueError("too many classes")
        probabilities = torch.tensor(
            [[*map(float, column)] for column in cells], dtype=torch.float64
        ).T
        losses = torch.tensor([*map(float, columns["loss"])], dtype=torch.float64)
        ConfusionMatrix(probabilities.shape[1]).update(predictions, labels)  # checks the range
        calibration(probabilities, labels)  # checks the probabilities
    except (OSError, ValueError, KeyError, IndexError, csv.Error):
        raise UserError("predictions.csv can't be read") from None
    texts = (list(columns.get(name, ())) for name in ("sentence", "source"))
    return Predictions(labels, predictions, probabilities, losses, *texts)


def images_of(run: Run, of: Predictions) -> Tensor | None:
    """The images that a run of train_mnist.py predicted, uint8 (examples, 1, 28, 28); None if they are not here."""
    try:
        part = _held_out(
            *(run.config[name] for name in ("dataset", "data_dir", "valid_size", "slice"))
        )
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return part.images if torch.equal(part.labels, of.labels) else None


@functools.lru_cache(maxsize=1)  # the two lists of a comparison show the same part
def _held_out(name: str, data_dir: str, valid_size: int, every: int) -> ImageSet:
    raw = Path(data_dir, TORCHVISION_CLASS.get(name, ""), "raw")
    if name != "synthetic" and not all((raw / file).is_file() for file in MNIST_SHA256):
        raise UserError("not here")  # load_digits would download them
    digits = split_digits(load_digits(name, data_dir), valid_size, every)
    return digits.valid if len(digits.valid.labels) else digits.test


def show_examples(
    run: Run, of: Predictions, indices: list[int], beside: Predictions | None = None
) -> str:
    """Examples as images, sentences or numbers, with the label, the prediction and its probability.

    `beside` adds a column: the probability that another run gave the label.
    """
    if not indices:
        return paragraph("None.", "soft")
    names = run.class_names(of.probabilities.shape[1])
    labels, predictions = of.labels.tolist(), of.predictions.tolist()
    confidence = of.probabilities.max(1).values.tolist()
    images = None if of.sentences else images_of(run, of)
    if images is not None:
        figures = []
        for i in indices:
            buffer = io.BytesIO()
            Image.fromarray(images[i, 0].numpy()).save(buffer, format="png")
            words = html.escape(
                f"{text(names[labels[i]])} as {text(names[predictions[i]])}, {confidence[i]:.0%}"
            )
            figures.append(
                f"<figure>{picture(buffer.getvalue(), 'small')}<figcaption>{words}</figcaption></figure>"
            )
        caption = paragraph("Label as prediction, and its probability:", "soft")
        return f'{caption}<div class="images">{"".join(figures)}</div>'
    header, rows = ["label", "prediction", "its probability"], []
    for i in indices:
        row: list[Any] = [names[labels[i]], names[predictions[i]], confidence[i]]
        row += [float(beside.probabilities[i, labels[i]])] if beside else []
        rows.append([of.sentences[i], *of.sources[i : i + 1], *row] if of.sentences else [i, *row])
    header = [
        *(["sentence", "source"][: 1 + bool(of.sources)] if of.sentences else ["example"]),
        *header,
    ]
    return table([*header, "the other run's probability of the label"] if beside else header, rows)
