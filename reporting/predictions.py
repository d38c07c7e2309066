"""Reads the validation examples that a run predicted, and shows them as sentences or images."""

import base64
import csv
import functools
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.errors import UserError
from metrics import ConfusionMatrix, calibration
from reporting.markup import paragraph, table
from reporting.runs import RunFiles, format_value
from tasks.digits import MNIST_SHA256, TORCHVISION_CLASS, load_digits, split_digits

csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
_load_digits = functools.lru_cache(maxsize=1)(load_digits)  # both runs of a comparison use it


@dataclass
class Predictions:
    """The content of a run's predictions.csv."""

    run: RunFiles
    labels: Tensor  # int64 (examples,)
    predictions: Tensor  # int64 (examples,)
    probabilities: Tensor  # float64 (examples, classes)
    losses: Tensor  # float64 (examples,), in nats
    confusion: ConfusionMatrix
    texts: dict[str, tuple[str, ...]]  # the columns "sentence" and "source"; empty for images

    @property
    def correct(self) -> Tensor:
        """bool (examples,)."""
        return self.predictions == self.labels

    @property
    def examples(self) -> str:
        """The classes, labels and sentences; runs with the same ones can be compared."""
        return repr((self.probabilities.shape[1], self.labels.tolist(), self.texts))

    @property
    def class_names(self) -> list[str]:
        """The names of the classes; their indices if the run's metrics.json does not have them."""
        classes = self.probabilities.shape[1]
        names = (self.run.metrics or {}).get("class_names")
        if not isinstance(names, list) or len(names) != classes:
            names = range(classes)
        return [format_value(name) for name in names]


def read_predictions(run: RunFiles) -> Predictions:
    """The predictions of a run. Raises `UserError` if they are missing or unreadable."""
    path = run.path / "predictions.csv"
    if not path.is_file():
        raise UserError("no predictions.csv")
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = csv.reader(file)
        columns = dict(zip(header, zip(*rows, strict=True)))
        classes = [name for name in columns if name.startswith("probability_")]
        integers = np.array([columns["label"], columns["prediction"]], int)
        labels, predictions = torch.from_numpy(integers)
        floats = torch.from_numpy(np.array([columns[name] for name in ("loss", *classes)], float))
        losses = floats[0]
        probabilities = floats[1:].T
        confusion = ConfusionMatrix(len(classes))
        confusion.update(predictions, labels)  # checks the range
        calibration(probabilities, labels)  # checks the probabilities
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError("predictions.csv can't be read") from None
    texts = {name: columns[name] for name in ("sentence", "source") if name in columns}
    return Predictions(run, labels, predictions, probabilities, losses, confusion, texts)


def find_images(predictions: Predictions) -> Tensor | None:
    """The images that train_mnist.py predicted, uint8 (examples, 1, 28, 28), if on disk."""
    config = predictions.run.config
    try:
        name = config["dataset"]
        raw = Path(config["data_dir"], TORCHVISION_CLASS.get(name, ""), "raw")
        if name != "synthetic" and not all((raw / file).is_file() for file in MNIST_SHA256):
            return None  # load_digits would download them
        digits = _load_digits(name, config["data_dir"])
        digits = split_digits(digits, config["valid_size"], config["slice"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    part = digits.valid if len(digits.valid.labels) else digits.test
    return part.images if torch.equal(part.labels, predictions.labels) else None


def show_examples(
    predictions: Predictions, indices: list[int], other: Predictions | None = None
) -> str:
    """Examples as images, sentences or numbers, with the label, the prediction and its probability.

    `other` adds a column to a table: the probability that another run gave the label.
    """
    if not indices:
        return paragraph("None.", "soft")
    images = None if predictions.texts else find_images(predictions)
    names = predictions.class_names
    figures = ""
    rows = []
    for i in indices:
        label = names[predictions.labels[i]]
        prediction = names[predictions.predictions[i]]
        confidence = float(predictions.probabilities[i].max())
        if images is not None:
            figures += _figure(images[i, 0], f"{label} as {prediction}, {confidence:.0%}")
        example = [column[i] for column in predictions.texts.values()] or [i]
        rows.append([*example, label, prediction, confidence])
        if other:
            rows[-1].append(float(other.probabilities[i, predictions.labels[i]]))
    if figures:
        heading = paragraph("Label as prediction, and its probability:", "soft")
        return f'{heading}<div class="images">{figures}</div>'
    header = [*(predictions.texts or ["example"]), "label", "prediction", "its probability"]
    if other:
        header.append("the other run's probability of the label")
    return table(header, rows)


def _figure(image: Tensor, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, format="png")
    png = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img class="small" alt="" src="data:image/png;base64,{png}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"
