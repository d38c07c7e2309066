"""Pictures, tables and charts of a model's predictions, for W&B and PNG files."""

import html
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import wandb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics import ConfusionMatrix, Evaluation, calibration, precision_recall_curve, roc_curve

INK, FAINT, GRID, PAPER = (20, 24, 32), (150, 156, 166), (226, 229, 234), (255, 255, 255)
DEEP, WARM, MIDDLE = (24, 86, 156), (206, 96, 30), (110, 130, 155)
CHART, LEFT, TOP, RIGHT, BOTTOM = (
    (840, 660),
    108,
    108,
    28,
    96,
)  # pixels, at twice the size of the picture
MAX_CLASSES = 30  # more don't fit on a picture or a chart
MAX_SOURCES, MAX_MISTAKES = 200, 1000  # rows of tables


def most_confident_mistakes(result: Evaluation) -> Tensor:
    """Indices of the wrong predictions, most confident first, ties in example order: int64 (mistakes,)."""
    confidence = result.probabilities.max(1).values
    wrong = (result.predictions != result.labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)]


def one_class_warning(result: Evaluation, class_names: list[str]) -> str | None:
    """What to say of a model that predicts the same class for every example, which accuracy may not show."""
    if len(result.predictions.unique()) > 1:
        return None
    share = f"accuracy, {result.metrics['acc']:.1%}, is the share of that class"
    return (
        f"the model predicts {class_names[result.predictions[0]]!r} for every example; its {share}"
    )


def most_confused_classes(counts: Tensor) -> list[int]:
    """The `MAX_CLASSES` classes with the most mistakes, in ascending order; all of them if there are no more.

    `counts` is a confusion matrix, integer (classes, classes) with a row per label.
    """
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    return sorted(mistakes.argsort(descending=True, stable=True)[:MAX_CLASSES].tolist())


def confusion_matrix_chart(result: Evaluation, class_names: list[str]) -> wandb.plot.CustomChart:
    """W&B's confusion matrix, of the most confused classes if there are many."""
    shown = most_confused_classes(result.confusion.counts)
    place = {label: i for i, label in enumerate(shown)}
    pairs = zip(result.labels.tolist(), result.predictions.tolist())
    pairs = [
        (place[label], place[prediction])
        for label, prediction in pairs
        if {label, prediction} <= place.keys()
    ]
    part = f" of the {MAX_CLASSES} most confused classes" if len(shown) < len(class_names) else ""
    return wandb.plot.confusion_matrix(
        y_true=[label for label, _ in pairs],
        preds=[prediction for _, prediction in pairs],
        class_names=[class_names[label] for label in shown],
        title=f"Confusion matrix{part}",
    )


def confusion_matrix_picture(counts: Tensor, class_names: list[str], part: str) -> Image.Image:
    """Draw a confusion matrix, integer (classes, classes) with a row per label: counts and shares of the row.

    `part` is the name of the data split, for the heading. Only the most confused classes if there are many.
    """
    counts = counts.cpu()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    title, shown = f"{part}, {int(counts.sum()):,} examples", most_confused_classes(counts)
    if len(shown) < len(class_names):
        title += f", the {len(shown)} most confused of {len(class_names):,} classes"
    counts, shares = counts[shown][:, shown], shares[shown][:, shown]
    class_names = [_shortened(class_names[label], 40) for label in shown]
    classes = len(shown)
    cell = 58 if classes > 4 else 120
    big, small = ImageFont.load_default(size=cell * 0.27), ImageFont.load_default(size=cell * 0.21)
    text, heading = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    longest = max(text.getlength(name) for name in class_names)
    vertical = longest > cell - 6  # some class name is wider than its column
    left, top = int(longest) + 58, 46
    side = cell * classes
    canvas = Image.new(
        "RGB", (left + side + 24, top + side + (longest if vertical else 20).__ceil__() + 52), PAPER
    )
    draw = ImageDraw.Draw(canvas)

    draw.text((left + side / 2, 22), title, fill=INK, font=heading, anchor="mm")
    draw.text(
        (left + side / 2, canvas.height - 20), "prediction", fill=INK, font=heading, anchor="mm"
    )
    _draw_vertical(canvas, (22, top + side / 2), "label", heading)
    for row in range(classes):
        y = top + cell * row
        draw.text((left - 10, y + cell / 2), class_names[row], fill=INK, font=text, anchor="rm")
        for column in range(classes):
            x = left + cell * column
            count, share = int(counts[row, column]), float(shares[row, column])
            draw.rectangle((x, y, x + cell, y + cell), fill=_shade(share**0.5), outline=GRID)
            ink = FAINT if count == 0 else PAPER if share > 0.3 else INK
            draw.text((x + cell / 2, y + cell * 0.4), f"{count:,}", fill=ink, font=big, anchor="mm")
            if count:
                percent = f"{100 * share:.1f} %"
                draw.text(
                    (x + cell / 2, y + cell * 0.72), percent, fill=ink, font=small, anchor="mm"
                )
    for column, name in enumerate(class_names):
        x, y = left + cell * (column + 0.5), top + side + 8
        if vertical:
            _draw_vertical(canvas, (x, y + text.getlength(name) / 2), name, text)
        else:
            draw.text((x, y), name, fill=INK, font=text, anchor="mt")
    return canvas


def sentence_mistakes_table(
    result: Evaluation, sentences: list[str], sources: list[str], class_names: list[str], step: int
) -> wandb.Table:
    """The `MAX_MISTAKES` most confident wrong predictions, one per row; "mistakes" is the number of all."""
    columns = [
        "sentence",
        "source",
        "label",
        "prediction",
        "probability",
        "loss",
        "step",
        "mistakes",
    ]
    table, wrong = wandb.Table(columns=columns), most_confident_mistakes(result)
    for i in wrong[:MAX_MISTAKES].tolist():
        label, prediction = class_names[result.labels[i]], class_names[result.predictions[i]]
        probability, loss = float(result.probabilities[i].max()), float(result.losses[i])
        table.add_data(
            sentences[i], sources[i], label, prediction, probability, loss, step, len(wrong)
        )
    return table


def per_source_table(result: Evaluation, sources: list[str]) -> wandb.Table:
    """Accuracy and Matthews correlation per source of sentences, lowest accuracy first.

    Beyond `MAX_SOURCES`, the sources with the fewest sentences share a row.
    """
    indices: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        indices.setdefault(source, []).append(i)
    ranked = sorted(indices, key=lambda source: -len(indices[source]))
    if rest := ranked[MAX_SOURCES:]:
        indices[f"{len(rest):,} other sources"] = [
            i for source in rest for i in indices.pop(source)
        ]
    rows = []
    for source, chosen in indices.items():
        confusion = ConfusionMatrix(result.confusion.num_classes)
        confusion.update(result.predictions[chosen], result.labels[chosen])
        rows.append([source, len(chosen), confusion.accuracy(), confusion.matthews_corrcoef()])
    return wandb.Table(
        columns=["source", "sentences", "acc", "mcc"], data=sorted(rows, key=lambda row: row[2])
    )


def roc_chart(result: Evaluation, class_names: list[str]) -> wandb.plot.CustomChart:
    """ROC curves: one for the second class if there are two classes, otherwise one per class."""
    curves = [
        (name, *roc_curve(scores, labels)[:2])
        for name, scores, labels in _one_vs_rest(result, class_names)
    ]
    return _line_chart(curves, "ROC: true over false positive rate", "false positive rate")


def precision_recall_chart(result: Evaluation, class_names: list[str]) -> wandb.plot.CustomChart:
    """Precision-recall curves: one for the second class if there are two classes, otherwise one per class."""
    curves = []
    for name, scores, labels in _one_vs_rest(result, class_names):
        precision, recall, _ = precision_recall_curve(scores, labels)
        curves.append((name, recall, precision))
    return _line_chart(curves, "Precision over recall", "recall")


def _one_vs_rest(result: Evaluation, class_names: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, probabilities (examples,) and 0/1 labels (examples,) of the classes that have positives and negatives.

    At most 20, the most frequent ones: a thousand curves take W&B a minute, and nobody can tell them apart.
    """
    classes = range(1 if len(class_names) == 2 else 0, len(class_names))
    cases = [
        (class_names[c], result.probabilities[:, c], (result.labels == c).long()) for c in classes
    ]
    drawn = [case for case in cases if 0 < case[2].sum() < len(case[2])]
    return sorted(drawn, key=lambda case: int(case[2].sum()), reverse=True)[:20]


def _line_chart(
    curves: list[tuple[str, Tensor, Tensor]], title: str, x_name: str
) -> wandb.plot.CustomChart:
    """Lines of at most 1,000 points each."""
    kept = [torch.linspace(0, len(x) - 1, min(len(x), 1000)).round().long() for _, x, _ in curves]
    return wandb.plot.line_series(
        # It wants a line even if no class has a curve.
        xs=[x[points].tolist() for (_, x, _), points in zip(curves, kept)] or [[]],
        ys=[y[points].tolist() for (_, _, y), points in zip(curves, kept)] or [[]],
        keys=[name for name, _, _ in curves] or [""],
        title=title,
        xname=x_name,
    )


def shaded_words(words: list[tuple[str, float]], heading: str) -> str:
    """HTML of a sentence: red words pushed the model towards its mistake, blue words away from it.

    `words` come with their attributions: positive is red, and the largest magnitude gets the full colour.
    """
    largest = max((abs(value) for _, value in words), default=0) or 1.0
    spans = []
    for word, value in words:
        colour = "214, 60, 50" if value > 0 else "50, 100, 214"
        shade = f"background: rgba({colour}, {abs(value) / largest:.2f})"
        spans.append(
            f'<span style="{shade}; padding: 2px" title="{value:+.4f}">{html.escape(word)}</span>'
        )
    return f'<p style="font: 15px sans-serif"><small>{html.escape(heading)}</small><br>{" ".join(spans)}</p>'


def captioned_digits(
    images: Tensor, predictions: Tensor, labels: Tensor, class_names: list[str]
) -> list[wandb.Image]:
    """W&B images of uint8 (n, 1, 28, 28) digits, with captions like "Pred: 3 Truth: 8"."""
    return [
        wandb.Image(
            image[0].numpy(), caption=f"Pred: {class_names[prediction]} Truth: {class_names[label]}"
        )
        for image, prediction, label in zip(images, predictions.tolist(), labels.tolist())
    ]


def digit_mistakes_table(
    images: Tensor, result: Evaluation, class_names: list[str], step: int
) -> wandb.Table:
    """The 100 most confident mistakes on uint8 (examples, 1, height, width) images; "mistakes" is the number of all."""
    columns = ["image", "label", "prediction", "probability", "step", "mistakes"]
    table, wrong = wandb.Table(columns=columns), most_confident_mistakes(result)
    for i in wrong[:100].tolist():
        label, prediction = class_names[result.labels[i]], class_names[result.predictions[i]]
        probability = float(result.probabilities[i].max())
        table.add_data(
            wandb.Image(images[i, 0].numpy()), label, prediction, probability, step, len(wrong)
        )
    return table


def digit_mistakes_picture(
    images: Tensor, result: Evaluation, class_names: list[str], part: str
) -> Image.Image:
    """Draw the 40 most confident mistakes on uint8 (examples, 1, height, width) images of 8×8 to 224×224 pixels.

    A 7 that was predicted to be a 1 with probability 98 % has the caption "7 as 1, 98 %".
    """
    wrong = most_confident_mistakes(result)
    shown = (
        "no mistakes"
        if not len(wrong)
        else f"the {min(40, len(wrong))} most confident of {len(wrong):,} mistakes"
    )
    title = f"{part}: {shown} in {len(images):,} examples, label as prediction"
    captions = []
    for i in wrong[:40].tolist():
        label, prediction = (
            _shortened(class_names[which[i]], 14) for which in (result.labels, result.predictions)
        )
        captions.append(f"{label} as {prediction}, {100 * result.probabilities[i].max():.0f} %")
    heading, font = ImageFont.load_default(size=19), ImageFont.load_default(size=13)
    height, width = images.shape[2:]
    scale = max(1, round(84 / max(height, width)))
    height, width, gap = height * scale, width * scale, 12
    pitch = gap + max(width, *(math.ceil(font.getlength(caption)) for caption in captions), 0)
    columns = max(4, min(10, 1000 // pitch))
    rows = max(1, math.ceil(len(captions) / columns))
    side = max(columns * pitch, math.ceil(heading.getlength(title)) + gap) + gap
    canvas = Image.new("RGB", (side, 48 + rows * (height + 30)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 14), title, fill=INK, font=heading)
    for i, caption in enumerate(captions):
        centre, y = gap + i % columns * pitch + (pitch - gap) / 2, 48 + i // columns * (height + 30)
        picture = Image.fromarray(images[wrong[i], 0].numpy()).resize(
            (width, height), Image.Resampling.NEAREST
        )
        canvas.paste(picture, (round(centre - width / 2), y))
        draw.text((centre, y + height + 4), caption, fill=INK, font=font, anchor="mt")
    return canvas


def curves_picture(
    rows: Sequence[Mapping[str, float]], panels: Mapping[str, tuple[str, str]], best_epoch: int
) -> Image.Image:
    """Draw learning curves over the training examples seen, side by side, with the best epoch marked.

    `rows` are those of a run's history, each with `step`. `panels` has by title the keys of a metric in
    training and in validation. The rows of training are averaged to at most 150 points.
    """
    canvas = Image.new("RGB", (len(panels) * CHART[0], CHART[1]), PAPER)
    last_step = max((row["step"] for row in rows), default=1)
    for i, (title, (train_key, valid_key)) in enumerate(panels.items()):
        train, valid = _points(rows, train_key, at_most=150), _points(rows, valid_key)
        values = [y for _, y in train[len(train) // 10 :] + valid] or [
            0.0,
            1.0,
        ]  # not the steep start of training
        chart, place = _chart(
            title, "training examples seen", (0, last_step), (min(values), max(values))
        )
        draw = ImageDraw.Draw(chart)
        train = [(x, y) for x, y in train if min(values) <= y <= max(values)]
        best = [
            (row["step"], row[valid_key])
            for row in rows
            if row.get("epoch") == best_epoch and valid_key in row
        ]
        for x, y in best:
            draw.line((place(x, y)[0], TOP, place(x, y)[0], CHART[1] - BOTTOM), fill=DEEP, width=4)
        for points, colour in ((train, MIDDLE), (valid, WARM)):
            drawn = [place(*point) for point in points]
            if len(drawn) > 1:
                draw.line(drawn, fill=colour, width=5, joint="curve")
            for point in drawn if points is valid or len(drawn) == 1 else ():
                draw.circle(point, 7, fill=colour)
        x = LEFT
        legend = [
            ("training", train, MIDDLE),
            ("validation", valid, WARM),
            (f"best epoch: {best_epoch}", best, DEEP),
        ]
        for name, points, colour in legend:
            if points:
                draw.text(
                    (x, TOP - 14),
                    name,
                    fill=colour,
                    font=ImageFont.load_default(size=28),
                    anchor="ls",
                )
                x += ImageFont.load_default(size=28).getlength(name) + 36
        canvas.paste(chart, (i * CHART[0], 0))
    return canvas.reduce(2)


def calibration_picture(result: Evaluation, part: str) -> Image.Image:
    """Draw a reliability diagram: the accuracy of predictions over the confidence they were made with.

    `part` is the name of the data split. A calibrated model's bars end at the diagonal; a bar's shade shows how many
    examples it stands for.
    """
    counts, _, accuracies = calibration(result.probabilities, result.labels)
    title = f"{part}: accuracy by confidence"
    chart, place = _chart(
        title,
        f"confidence (expected calibration error {result.metrics['ece']:.3f})",
        (0, 1),
        (0, 1),
    )
    draw = ImageDraw.Draw(chart)
    for i, (share, accuracy) in enumerate(
        zip((counts / counts.max()).tolist(), accuracies.tolist())
    ):
        if share:
            (left, bottom), (right, top) = (
                place(i / len(counts), 0),
                place((i + 1) / len(counts), accuracy),
            )
            draw.rectangle((left + 2, top, right - 2, bottom), fill=_shade(0.15 + 0.85 * share))
    draw.line((place(0, 0), place(1, 1)), fill=WARM, width=4)
    return chart.reduce(2)


def _points(
    rows: Sequence[Mapping[str, float]], key: str, at_most: int | None = None
) -> list[tuple[float, float]]:
    """Step and finite value of the rows that have `key`, averaged over neighbours to `at_most` points."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    size = math.ceil(len(points) / (at_most or len(points))) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _chart(
    title: str, x_name: str, x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[Image.Image, Callable[[float, float], tuple[float, float]]]:
    """An empty chart at twice its size, so that lines are smooth once reduced, and the place of a value on it."""
    chart = Image.new("RGB", CHART, PAPER)
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(size=26)
    (low_x, high_x), (low_y, high_y) = x_range, y_range
    low_y, high_y = (low_y, high_y) if low_y < high_y else (low_y - 0.5, high_y + 0.5)
    width, height = CHART[0] - LEFT - RIGHT, CHART[1] - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return LEFT + across * width, TOP + (0.97 - 0.94 * up) * height

    for y in _ticks(low_y, high_y):
        draw.line((place(low_x, y), place(high_x, y)), fill=GRID, width=2)
        draw.text((LEFT - 14, place(0, y)[1]), f"{y:g}", fill=INK, font=font, anchor="rm")
    for x in _ticks(low_x, high_x):
        across, bottom = place(x, 0)[0], CHART[1] - BOTTOM
        draw.line((across, bottom, across, bottom + 8), fill=FAINT, width=2)
        draw.text((across, bottom + 14), _with_unit(x), fill=INK, font=font, anchor="mt")
    draw.rectangle((LEFT, TOP, CHART[0] - RIGHT, CHART[1] - BOTTOM), outline=FAINT, width=2)
    draw.text((LEFT, 18), title, fill=INK, font=ImageFont.load_default(size=36))
    draw.text((LEFT + width / 2, CHART[1] - 16), x_name, fill=INK, font=font, anchor="ms")
    return chart, place


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers between `low` and `high`."""
    magnitude = 10.0 ** math.floor(math.log10(high - low))
    step = next(
        s
        for s in (0.2 * magnitude, 0.5 * magnitude, magnitude, 2 * magnitude)
        if (high - low) / s <= 6
    )
    return [
        float(f"{k * step:.12g}") for k in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _with_unit(number: float) -> str:
    """A number of examples: 500, 20k, 1.5M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:g}{name}"
    return f"{number:g}"


def _shade(share: float) -> tuple[int, ...]:
    return tuple(round(p + (d - p) * share) for p, d in zip(PAPER, DEEP))


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _draw_vertical(
    canvas: Image.Image, centre: tuple[float, float], words: str, font: ImageFont.FreeTypeFont
) -> None:
    """Draw `words` centred on `centre`, reading bottom to top."""
    label = Image.new("L", (int(font.getlength(words)) + 4, int(font.size * 1.5)))
    ImageDraw.Draw(label).text(
        (label.width / 2, label.height / 2), words, fill=255, font=font, anchor="mm"
    )
    label = label.rotate(90, expand=True)
    corner = (round(centre[0] - label.width / 2), round(centre[1] - label.height / 2))
    canvas.paste(INK, (*corner, corner[0] + label.width, corner[1] + label.height), label)
