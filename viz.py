"""Pictures, tables and charts for W&B and PNG files.

The sections on learning curves and drawing serve any task. The others, and the import from
metrics.py, are for classifiers: of anything, of digits, of sentences.
"""

import contextlib
import functools
import html
import itertools
import math
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import wandb
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from wandb.plot import CustomChart

from metrics import (
    ConfusionMatrix,
    Evaluation,
    calibration,
    expected_calibration_error,
    precision_recall_curve,
    roc_curve,
)

INK = "#141820"
FAINT = "#969ca6"
GRID = "#e2e5ea"
PAPER = "#ffffff"
DEEP = "hsl(212, 73%, 35%)"
WARM = "#ce601e"
MIDDLE = "#6e829b"

# Size of a chart and the edges of its plot, in pixels. A picture shows charts at half this size.
CHART = (1120, 1320)
LEFT = 190
TOP = 210
RIGHT = 1050
BOTTOM = 1140

Point = tuple[float, float]
History = Sequence[Mapping[str, float]]  # the rows of a run's history, each with `step`

# ------------------------------------------------------------ learning curves, any task

MAX_MARKERS = 20  # of a curve; more would hide it


def curves_picture(
    rows: History, panels: Mapping[str, tuple[str, str]], best_epoch: int
) -> Image.Image:
    """Draw learning curves over the number of training examples seen, in panels side by side.

    `panels` maps a panel's title to the keys of its curves, for training and validation. A key that
    no row has, such as "", gives no curve. Values that are not finite are left out. The best epoch
    is marked in the panels that have its validation. A panel whose values are positive, span more
    than a factor of 10 and are mostly small, like a loss, has a logarithmic scale.
    """
    charts = [_curves_panel(rows, title, keys, best_epoch) for title, keys in panels.items()]
    return Image.fromarray(np.hstack(charts)).reduce(2)


def _curves_panel(rows: History, title: str, keys: tuple[str, str], best_epoch: int) -> Image.Image:
    """One panel of `curves_picture`, at twice its final size."""
    train_key, valid_key = keys
    train = _points(rows, train_key)
    valid = _points(rows, valid_key)
    if valid_key:  # the learning rate has none, and is no mean over examples
        train = _means(train)
    values = [y for _, y in train + valid] or [0.0, 1.0]
    low, high = min(values), max(values)
    log = 0 < 10 * low < high and statistics.median_low(values) < 0.4 * high
    if log:
        title += " (log scale)"
    if math.isclose(low, high, rel_tol=1e-5, abs_tol=1e-300):  # the ticks' labels would be equal
        margin = abs(low) / 2 if abs(low) > 1e-300 else 0.5
        low -= margin
        high += margin
    best = []
    for row in rows:
        if row.get("epoch") == best_epoch and valid_key in row:
            best = [(row["step"], low), (row["step"], high)]

    last_x = max([1, *(row["step"] for row in rows)]) / 1000
    chart, to_pixels = _chart(title, "thousands of training examples", last_x, low, high, log)
    draw = ImageDraw.Draw(chart)
    curves = [
        (f"best epoch: {best_epoch}", best, DEEP),
        ("training", train, MIDDLE),
        ("validation", valid, WARM),
    ]
    legend_x = LEFT
    for name, points, color in curves:
        if not points:
            continue
        pixels = [to_pixels(step / 1000, y) for step, y in points]
        draw.line(pixels, color, width=9, joint="curve")
        if points is not best and len(points) <= MAX_MARKERS:
            for pixel in pixels:
                draw.circle(pixel, 13, color)
        _draw_text(chart, legend_x, TOP - 26, name, 44, "ls", color)
        legend_x += 40 + _font(44, name).getlength(name)
    return chart


def _points(rows: History, key: str) -> list[Point]:
    """Step and value of the rows with `key`, except NaN, infinity, and what overflows in a sum."""
    return [(row["step"], row[key]) for row in rows if abs(row.get(key, math.nan)) < 1e250]


def _means(points: list[Point]) -> list[Point]:
    """Means over up to 150 equal parts of training.

    A row's value is a mean over the examples since the last row. Its weight in a part of training
    is the number of those examples that are in the part.
    """
    if len(points) < 2:
        return points
    parts = min(len(points), 150)
    steps, values = np.array(points).T
    edges = np.linspace(0, steps[-1], parts + 1)
    means = []
    for low, high in itertools.pairwise(edges):
        examples = np.diff(steps.clip(low, high), prepend=low)
        means.append((high, np.average(values, weights=examples)))
    return means


# --------------------------------------------------------------------- drawing, any task


def _chart(
    title: str, x_name: str, last_x: float, low: float, high: float, log: bool = False
) -> tuple[Image.Image, Callable[[float, float], Point]]:
    """An empty chart, and the function that turns (x, y) into pixels.

    x ranges from 0 to `last_x`, y from `low` to `high`, on a logarithmic scale if `log`. The chart
    has twice its final size: lines are smooth once it is reduced.
    """
    width = RIGHT - LEFT
    scale = math.log10 if log else float
    lowest = scale(low)
    highest = scale(high)

    def to_pixels(x: float, y: float) -> Point:
        height = (scale(y) - lowest) / (highest - lowest)  # from 0 to 1
        return LEFT + x / last_x * width, TOP + (0.97 - 0.94 * height) * (BOTTOM - TOP)

    ticks = _ticks(lowest, highest)
    if log:  # rounded to one digit
        ticks = [float(f"{10**exponent:.0e}") for exponent in ticks]
    chart = Image.new("RGB", CHART, PAPER)
    draw = ImageDraw.Draw(chart)
    for tick in ticks:
        _, y = to_pixels(0, tick)
        if TOP < y < BOTTOM:
            draw.line((LEFT, y, RIGHT, y), GRID, width=4)
            _draw_text(chart, LEFT - 18, y, f"{tick:.7g}", 42, "rm", max_width=LEFT - 22)
    for tick in _ticks(0, last_x):
        x, _ = to_pixels(tick, low)
        draw.line((x, BOTTOM, x, BOTTOM + 14), FAINT, width=4)
        _draw_text(chart, x, BOTTOM + 24, f"{tick:g}", 42, "mt", max_width=140)
    draw.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline=FAINT, width=4)
    _draw_text(chart, LEFT, 34, title, 60, "la", max_width=width)
    _draw_text(chart, LEFT + width / 2, BOTTOM + 136, x_name, 44, "ms")
    return chart, to_pixels


def _ticks(low: float, high: float) -> np.ndarray:
    """Two to seven round numbers between `low` and `high`."""
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    for factor in (0.2, 0.5, 1, 2):
        step = factor * magnitude
        if (high - low) / step <= 6:
            break
    return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)


# Fonts of Windows, macOS and Linux with many letters; Pillow searches the systems' folders.
KNOWN_FONTS = [
    "malgun",
    "YuGothM",
    "msyh",
    "Nirmala",
    "segoeui",
    "Arial Unicode",
    "NotoSansCJK-Regular",
    "DejaVuSans",
]


@functools.cache
def _open_font(file: str, size: float) -> ImageFont.FreeTypeFont:
    """The font in a file; Pillow's own font if `file` is ""."""
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def _font_files(text: str) -> Iterator[str]:
    """Files of fonts that may have the letters of a text; "" is Pillow's own font."""
    yield ""
    charset = " ".join(f"{ord(letter):x}" for letter in set(text))
    command = ["fc-match", "--format=%{file}", f"sans:charset={charset}"]
    with contextlib.suppress(OSError):
        yield subprocess.run(command, capture_output=True, text=True).stdout
    yield from KNOWN_FONTS


@functools.cache
def _find_font(text: str) -> str | None:
    """The first of `_font_files` with all letters of a text; None if no font has them."""
    for file in _font_files(text):
        with contextlib.suppress(OSError):  # not there, or not in this size
            font = _open_font(file, 20)
            missing = bytes(font.getmask("\uffff"))  # no font has U+FFFF
            masks = [bytes(font.getmask(letter)) for letter in text if not letter.isspace()]
            if missing not in masks:
                return file
    return None


def _font(size: float, text: str) -> ImageFont.FreeTypeFont:
    """A font with the letters of the text, if there is one."""
    return _open_font(_find_font(text) or "", size)


@functools.cache  # prints once
def _drawable(class_names: tuple[str, ...]) -> list[str]:
    """The names of the classes, each on one line; their numbers if no font has all letters."""
    if _find_font("".join(class_names)) is not None:
        return [" ".join(name.split()) for name in class_names]
    legend = dict(enumerate(class_names[:MAX_CLASSES]))
    print(f"No font has the letters of the class names. PNG pictures show numbers: {legend}")
    return [str(label) for label in range(len(class_names))]


def _draw_text(
    canvas: Image.Image,
    x: float,
    y: float,
    text: str,
    size: float,
    anchor: str = "mm",
    color: str = INK,
    max_width: float = math.inf,
) -> None:
    """Draw text with its `anchor`, by default its middle, at (x, y).

    Its font has `size` pixels, or as many fewer as make it no wider than `max_width` pixels.
    """
    font = _font(size, text)
    width = max(map(font.getlength, text.split("\n")))
    if width > max_width:
        font = _font(max(1, size * max_width // width), text)
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), text, fill=color, font=font, anchor=anchor, align="center")


# -------------------------------------------------------------------------- classifiers

MAX_CLASSES = 30  # more don't fit on a picture or a chart
MAX_CURVES = 20  # a thousand would take W&B a minute, and nobody could tell them apart


def one_class_warning(result: Evaluation, class_names: list[str]) -> str | None:
    """A warning if the model predicts the same class for every example, which accuracy may hide."""
    predicted = result.predictions.unique()
    if len(predicted) > 1:
        return None
    return (
        f"the model predicts {class_names[predicted[0]]!r} for every example; "
        f"its accuracy, {result.confusion.accuracy():.1%}, is the share of that class"
    )


def most_confused_classes(counts: Tensor) -> list[int]:
    """The `MAX_CLASSES` classes with the most mistakes, in ascending order; all if there are fewer.

    `counts` is a confusion matrix, integer (classes, classes) with a row per label.
    """
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    order = mistakes.argsort(descending=True, stable=True)
    return sorted(order[:MAX_CLASSES].tolist())


def confusion_matrix_chart(result: Evaluation, class_names: list[str]) -> CustomChart:
    """W&B's confusion matrix, of the most confused classes if there are many."""
    counts = result.confusion.counts
    shown = most_confused_classes(counts)
    title = "Confusion matrix"
    if len(shown) < len(class_names):
        title += f" of the {MAX_CLASSES} most confused classes"
    counts = counts[shown][:, shown]
    pairs = counts.nonzero().repeat_interleave(counts[counts > 0], 0)  # W&B counts pairs itself
    labels, predictions = pairs.T.tolist()
    return wandb.plot.confusion_matrix(
        y_true=labels,
        preds=predictions,
        class_names=[class_names[label] for label in shown],
        title=title,
    )


def confusion_matrix_picture(counts: Tensor, class_names: list[str], part: str) -> Image.Image:
    """Draw a confusion matrix: the counts and each one's share of its row.

    `counts` is integer (classes, classes) with a row per label. `part` is the name of the data
    split, for the heading. Of more than `MAX_CLASSES`, only the most confused ones are shown.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = most_confused_classes(counts)
    class_names = _drawable(tuple(class_names))
    names = [class_names[label][:40] for label in shown]
    title = f"{part}, {int(counts.sum()):,} examples"
    if len(shown) < len(class_names):
        title += f", the {len(shown)} most confused of {len(class_names):,} classes"

    cell = 58 if len(shown) > 4 else 120
    side = cell * len(shown)
    names_width = math.ceil(max(_font(15, name).getlength(name) for name in names))
    names_fit = names_width <= cell - 6  # below their columns; otherwise they are turned
    left = names_width + 58
    top = 46
    bottom = top + side
    names_height = 20 if names_fit else names_width
    canvas = Image.new("RGB", (left + side + 24, bottom + names_height + 52), PAPER)

    center = left + side / 2
    _draw_text(canvas, center, 22, title, 19)
    _draw_text(canvas, center, canvas.height - 20, "prediction", 19)
    _draw_text(canvas, left - 10, top, "label", 19, "rs")
    for i, name in enumerate(names):
        middle = cell * (i + 0.5)
        _draw_text(canvas, left - 10, top + middle, name, 15, "rm")
        if names_fit:
            _draw_text(canvas, left + middle, bottom + 8, name, 15, "mt")
    if not names_fit:
        row_names = canvas.crop((left - 10 - names_width, top, left - 10, bottom))
        canvas.paste(row_names.rotate(90, expand=True), (left, bottom + 8))
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(shown):
        for column, prediction in enumerate(shown):
            x = left + cell * column
            y = top + cell * row
            count = int(counts[label, prediction])
            share = float(shares[label, prediction])
            shade = f"hsl(212, 73%, {100 - 65 * share**0.5:.2f}%)"  # white to `DEEP`
            draw.rectangle((x, y, x + cell, y + cell), shade, outline=GRID)
            color = PAPER if share > 0.62 else "black"  # a contrast of at least 4.5:1
            text = f"{count:,}\n{share:.1%}" if count else "0"
            _draw_text(
                canvas,
                x + cell / 2,
                y + cell / 2,
                text,
                cell * 0.22,
                color=color,
                max_width=cell - 6,
            )
    return canvas


def calibration_picture(result: Evaluation, part: str) -> Image.Image:
    """Draw a reliability diagram: the accuracy of predictions over their confidence.

    `part` is the name of the data split. A calibrated model's bars end at the diagonal.
    """
    counts, _, accuracies = calibration(result.probabilities, result.labels)
    error = expected_calibration_error(result.probabilities, result.labels)
    x_name = f"confidence (expected calibration error {error:.3f})"
    chart, to_pixels = _chart(f"{part}: accuracy by confidence", x_name, 1, 0, 1)
    draw = ImageDraw.Draw(chart)
    bins = len(counts)
    for i in counts.nonzero().flatten().tolist():
        left, bottom = to_pixels(i / bins, 0)
        right, top = to_pixels((i + 1) / bins, float(accuracies[i]))
        draw.rectangle((left + 2, top, right - 2, bottom), DEEP)
    draw.line((to_pixels(0, 0), to_pixels(1, 1)), WARM, width=8)
    return chart.reduce(2)


def roc_chart(result: Evaluation, class_names: list[str]) -> CustomChart:
    """ROC curves: that of the positive class if there are two classes, otherwise one per class."""
    return _curves_chart(
        result, class_names, roc_curve, "ROC: true over false positive rate", "false positive rate"
    )


def precision_recall_chart(result: Evaluation, class_names: list[str]) -> CustomChart:
    """Precision-recall curves, for the same classes as `roc_chart`."""

    def curve(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        precision, recall, _ = precision_recall_curve(scores, labels)
        return recall, precision

    return _curves_chart(result, class_names, curve, "Precision over recall", "recall")


def _curves_chart(
    result: Evaluation,
    class_names: list[str],
    curve: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    title: str,
    x_name: str,
) -> CustomChart:
    """W&B's chart of a curve per class, each thinned to at most 1,000 points.

    It has the `MAX_CURVES` most frequent of the classes that have positive and negative examples.
    `curve` takes scores and labels; x and y are the first of what it returns.
    """
    frequency = result.confusion.counts.sum(1)
    if len(frequency) == 2:
        frequency[1 - result.positive] = 0  # the curve of the positive class is enough
    order = frequency.argsort(descending=True, stable=True).tolist()
    classes = [label for label in order if 0 < frequency[label] < len(result.labels)]
    xs = []
    ys = []
    names = []
    for label in classes[:MAX_CURVES]:
        x, y, *_ = curve(*result.one_against_rest(label))
        points = min(len(x), 1000)
        kept = torch.linspace(0, len(x) - 1, points).round().long()
        xs.append(x[kept].tolist())
        ys.append(y[kept].tolist())
        names.append(class_names[label])
    if len(names) == 1:
        title += f", positive class: {names[0]}"
    return wandb.plot.line_series(
        xs=xs or [[]],  # W&B requires a line even if there is no curve
        ys=ys or [[]],
        keys=names or [""],
        title=title,
        xname=x_name,
    )


def most_confident_mistakes(result: Evaluation) -> Tensor:
    """Indices of the wrong predictions, int64 (mistakes,): most confident first, ties by index."""
    wrong = (result.predictions != result.labels).nonzero().flatten()
    confidence = result.probabilities[wrong].max(1).values
    return wrong[confidence.argsort(descending=True, stable=True)]


def mistakes_table(
    result: Evaluation,
    inputs: Mapping[str, Sequence],
    class_names: list[str],
    step: int,
    most: int = 1000,
) -> wandb.Table:
    """A table of the `most` most confident mistakes; its column "mistakes" is the number of all.

    `inputs`: the first columns, such as "sentence" and "source", with a value per example. Images
    are uint8 (examples, 1, height, width).
    """
    wrong = most_confident_mistakes(result)
    table = wandb.Table([*inputs, "label", "prediction", "probability", "loss", "step", "mistakes"])
    for i in wrong[:most].tolist():
        values = []
        for column in inputs.values():
            value = column[i]
            if isinstance(value, Tensor):
                value = wandb.Image(value[0].numpy())
            values.append(value)
        table.add_data(
            *values,
            class_names[result.labels[i]],
            class_names[result.predictions[i]],
            float(result.probabilities[i].max()),
            float(result.losses[i]),
            step,
            len(wrong),
        )
    return table


# ------------------------------------------------------------------------------- digits


def digit_mistakes_picture(
    images: Tensor, result: Evaluation, class_names: list[str], part: str
) -> Image.Image:
    """Draw the 40 most confident mistakes. `part` is the name of the data split, for the heading.

    `images` is uint8 (examples, 1, height, width). A 7 that was predicted to be a 1 with
    probability 98% has the caption "7 as 1, 98%".
    """
    wrong = most_confident_mistakes(result)
    shown = wrong[:40]
    names = _drawable(tuple(class_names))
    captions = []
    for i in shown.tolist():
        label = names[result.labels[i]]
        prediction = names[result.predictions[i]]
        confidence = float(result.probabilities[i].max())
        captions.append(f"{label[:14]} as {prediction[:14]}, {confidence:.0%}")
    title = (
        f"{part}: {len(shown)} of {len(wrong):,} mistakes in {len(images):,} examples, "
        "most confident first, label as prediction"
    )

    gap = 12
    side = 84  # of an image
    caption_widths = [_font(13, caption).getlength(caption) for caption in captions]
    column_width = math.ceil(max([side, *caption_widths])) + gap
    row_height = side + 30
    columns = min(10, 1000 // column_width)
    rows = math.ceil(len(captions) / columns)
    canvas = Image.new("RGB", (columns * column_width + gap, 48 + rows * row_height), PAPER)
    _draw_text(canvas, gap, 14, title, 19, "la")
    for i, caption in enumerate(captions):
        row, column = divmod(i, columns)
        center = column_width * (column + 0.5) + gap / 2
        y = 48 + row * row_height
        image = Image.fromarray(images[shown[i], 0].numpy())
        image = ImageOps.contain(image, (side, side), Image.Resampling.BOX)
        canvas.paste(image, (round(center - image.width / 2), y))
        _draw_text(canvas, center, y + side + 4, caption, 13, "mt")
    return canvas


# ---------------------------------------------------------------------------- sentences

MAX_SOURCES = 200  # rows of a table


def per_source_table(result: Evaluation, sources: list[str]) -> wandb.Table:
    """Accuracy and Matthews correlation per source of sentences, lowest accuracy first.

    There is a row for each of the `MAX_SOURCES` sources with the most sentences.
    """
    source_array = np.array(sources, dtype=object)
    both = torch.stack([result.predictions, result.labels])
    rows = []
    for source, count in Counter(sources).most_common(MAX_SOURCES):
        chosen = torch.from_numpy(source_array == source)
        # Only of the classes that occur here: a matrix of many would be slow.
        classes, (predictions, labels) = both[:, chosen].unique(return_inverse=True)
        confusion = ConfusionMatrix(max(2, len(classes)))
        confusion.update(predictions, labels)
        rows.append([source, count, confusion.accuracy(), confusion.matthews_corrcoef()])
    rows.sort(key=lambda row: row[2])
    return wandb.Table(columns=["source", "sentences", "acc", "mcc"], data=rows)


# Goes before what `shaded_tokens` returns. Text has a contrast of at least 4.5:1 on every shade.
SHADED_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attributions</title>
<style>
body { margin: 16px auto; padding: 0 16px; max-width: 1000px; overflow-wrap: anywhere;
  font: 16px/1.8 sans-serif; color: #141820; background: #ffffff; }
h1, h2 { margin: 16px 0; font-size: 20px; line-height: 1.3; }
.tokens { margin: 20px 0; }
.tokens small { display: block; font-size: 14px; }
.tokens span { padding: 3px; border-radius: 3px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.legend { display: flex; gap: 10px; line-height: 1.3; align-items: center; }
.legend i { flex: 0 1 200px; min-width: 60px; height: 20px; background: linear-gradient(
  to right, rgb(110, 165, 245), rgb(255, 255, 255), rgb(240, 120, 105)); }
</style>
</head>
<h1>The most confident mistakes</h1>
<div>What each token does to the decision, compared with the strongest of its sentence:</div>
<div class="legend">away from the mistake <i></i> toward the mistake</div>
"""


def shaded_tokens(tokens: list[str], attributions: list[float], heading: str) -> str:
    """HTML of a sentence: red tokens pushed the model to its mistake, blue tokens away from it.

    A positive attribution is red, and the largest magnitude gets the full color.
    """
    largest = max(map(abs, attributions)) or 1.0
    spans = []
    for token, value in zip(tokens, attributions):
        color = "240, 120, 105" if value > 0 else "110, 165, 245"
        spans.append(
            f'<span style="background: rgba({color}, {abs(value) / largest:.2f})" '
            f'title="{value:+.4f}">{html.escape(token)}</span>'
        )
    return f'<p class="tokens"><small>{html.escape(heading)}</small>{" ".join(spans)}</p>\n'
