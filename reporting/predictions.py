"""Reads the examples that a run predicted, and shows them as a table."""

import csv
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError
from metrics import ConfusionMatrix, calibration
from reporting.markup import table
from reporting.runs import PREDICTIONS, RunFiles, format_value

csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
MOST_SHOWN = 24  # examples


@dataclass
class Predictions:
    """The content of a run's predictions.csv or test_predictions.csv: classes, or numbers."""

    run: RunFiles
    labels: Tensor  # int64 (examples,), or the targets: float64 (examples,)
    predictions: Tensor  # of the same type
    probabilities: Tensor | None  # float64 (examples, classes); None if numbers are predicted
    losses: Tensor  # float64 (examples,): cross-entropy in nats, or the absolute error
    texts: dict[str, tuple[str, ...]]  # the columns that are not numbers, such as "sentence"
    class_names: list[str]  # in alphabetical order, whatever that of the model is
    metric: str = ""  # the monitored one, of these data

    @property
    def correct(self) -> Tensor:
        """bool (examples,)."""
        return self.predictions == self.labels

    @property
    def examples(self) -> str:
        """The classes, labels and texts; runs with the same ones can be compared."""
        return repr((self.class_names, self.labels.tolist(), self.texts))


def read_predictions(run: RunFiles, file: str = PREDICTIONS) -> Predictions:
    """The predictions of a run. Raises `UserError` if they are missing or of another kind."""
    path = run.path / file
    if not path.is_file():
        raise UserError(f"no {file}")
    probabilities = []
    others = []
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as lines:
            table = csv.reader(lines)
            header = next(table)
            is_probability = [name.startswith("probability_") for name in header]
            is_other = [not probability for probability in is_probability]
            for row in table:
                # Row by row: of a thousand classes, all cells as text would take gigabytes.
                probabilities.append(np.fromiter(compress(row, is_probability), float))
                others.append(list(compress(row, is_other)))
        columns = dict(zip(compress(header, is_other), zip(*others, strict=True)))
        predictions = arrange(run, torch.from_numpy(np.array(probabilities)), columns)
        predictions.metric = run.metric_in(file)
        return predictions
    except (OSError, StopIteration, ValueError, csv.Error):
        raise UserError(
            f"{file} can't be read, or a label or a probability in it is invalid"
        ) from None


def arrange(run: RunFiles, probabilities: Tensor, columns: dict[str, Any]) -> Predictions:
    """The predictions from the `probabilities`, float64 (examples, classes), and other columns.

    The classes have their indices as names if the run's metrics.json does not name them.
    Raises `UserError` if some are missing, `ValueError` if they are wrong.
    """
    numbers = {}
    texts = {}
    for name, column in columns.items():
        try:
            numbers[name] = torch.from_numpy(np.array(column, float))
        except ValueError:
            texts[name] = column
    if probabilities.numel() and {"label", "prediction"} <= numbers.keys():
        labels = numbers["label"].long()
        predictions = numbers["prediction"].long()
        classes = probabilities.shape[1]
        ConfusionMatrix(classes).update(predictions, labels)  # checks the range
        calibration(probabilities, labels)  # checks the probabilities
        probabilities = probabilities.clamp(min=1e-300)  # whose logarithm is finite
        losses = -probabilities[range(len(labels)), labels].log()
        names = (run.metrics or {}).get("class_names")
        if not isinstance(names, list) or len(names) != classes:
            names = range(classes)
        names = [format_value(name) for name in names]
        order = torch.from_numpy(np.argsort(names))
        rank = order.argsort()
        return Predictions(
            run,
            rank[labels],
            rank[predictions],
            probabilities[:, order],
            losses,
            texts,
            sorted(names),
        )
    if {"target", "prediction"} <= numbers.keys():
        targets = numbers["target"]
        predictions = numbers["prediction"]
        errors = (predictions - targets).abs()
        return Predictions(run, targets, predictions, None, errors, texts, class_names=[])
    raise UserError(
        "the predictions have neither label, prediction and probability_0, ... nor target and "
        "prediction as columns of numbers"
    )


def largest_first(values: Tensor, chosen: Tensor) -> list[int]:
    """The indices of the chosen examples, by falling value."""
    order = values.argsort(descending=True, stable=True)
    return order[chosen[order]].tolist()


def show_examples(predictions: Predictions, indices: list[int], *others: Predictions) -> str:
    """A table of the first few of some examples: texts or numbers, labels and predictions.

    The last columns have the loss of the run, and those of `others`.
    """
    columns = dict(predictions.texts) or {"example": range(len(predictions.labels))}
    labels = predictions.labels.tolist()
    predicted = predictions.predictions.tolist()
    if names := predictions.class_names:
        columns["label"] = [names[label] for label in labels]
        columns["prediction"] = [names[label] for label in predicted]
    else:
        columns |= {"target": labels, "prediction": predicted}
    for run in (predictions, *others):
        columns[f"{'loss' if names else 'error'} of {run.run.label}"] = run.losses.tolist()
    rows = [list(columns)]
    for i in indices[:MOST_SHOWN]:
        rows.append([column[i] for column in columns.values()])
    return table(rows)
