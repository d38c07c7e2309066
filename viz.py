"""Pictures, tables and charts of a model's predictions, for W&B and PNG files."""

import html

import wandb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics import Evaluation, evaluation, precision_recall_curve, roc_curve

INK, FAINT, PAPER = (20, 24, 32), (150, 156, 166), (255, 255, 255)
DEEP = (24, 86, 156)  # the shade of a cell that holds 100 % of its row


def most_confident_mistakes(result: Evaluation) -> Tensor:
    """Indices of the wrong predictions, most confident first, ties in example order: int64 (mistakes,)."""
    confidence = result.probabilities.max(1).values
    wrong = (result.predictions != result.labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)]


def confusion_matrix_picture(counts: Tensor, class_names: list[str], part: str) -> Image.Image:
    """Draw a confusion matrix, integer (classes, classes) with a row per label: counts and shares of the row.

    `part` is the name of the data split, for the heading.
    """
    counts = counts.cpu()
    classes = len(class_names)
    cell = 58 if classes > 4 else 120
    big, small = ImageFont.load_default(size=cell * 0.27), ImageFont.load_default(size=cell * 0.21)
    text, heading = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    longest = max(text.getlength(name) for name in class_names)
    vertical = longest > cell - 6  # some class name is wider than its column
    left, top = int(longest) + 58, 46
    side = cell * classes
    canvas = Image.new("RGB", (left + side + 24, top + side + (longest if vertical else 20).__ceil__() + 52), PAPER)
    draw = ImageDraw.Draw(canvas)

    draw.text((left + side / 2, 22), f"{part}, {int(counts.sum()):,} examples", fill=INK, font=heading, anchor="mm")
    draw.text((left + side / 2, canvas.height - 20), "prediction", fill=INK, font=heading, anchor="mm")
    _draw_vertical(canvas, (22, top + side / 2), "label", heading)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    for row in range(classes):
        y = top + cell * row
        draw.text((left - 10, y + cell / 2), class_names[row], fill=INK, font=text, anchor="rm")
        for column in range(classes):
            x = left + cell * column
            count, share = int(counts[row, column]), float(shares[row, column])
            shade = tuple(round(p + (d - p) * share**0.5) for p, d in zip(PAPER, DEEP))
            draw.rectangle((x, y, x + cell, y + cell), fill=shade, outline=(214, 218, 224))
            ink = FAINT if count == 0 else PAPER if share > 0.3 else INK
            draw.text((x + cell / 2, y + cell * 0.4), f"{count:,}", fill=ink, font=big, anchor="mm")
            if count:
                percent = f"{100 * share:.1f} %"
                draw.text((x + cell / 2, y + cell * 0.72), percent, fill=ink, font=small, anchor="mm")
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
    """All wrong predictions, one per row, most confident first."""
    table = wandb.Table(columns=["sentence", "source", "label", "prediction", "probability", "loss", "step"])
    for i in most_confident_mistakes(result).tolist():
        label, prediction = class_names[result.labels[i]], class_names[result.predictions[i]]
        probability, loss = float(result.probabilities[i].max()), float(result.losses[i])
        table.add_data(sentences[i], sources[i], label, prediction, probability, loss, step)
    return table


def per_source_table(result: Evaluation, sources: list[str]) -> wandb.Table:
    """Accuracy and Matthews correlation per source of sentences, lowest accuracy first."""
    indices: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        indices.setdefault(source, []).append(i)
    rows = []
    for source, chosen in indices.items():
        part = evaluation(result.logits[chosen], result.labels[chosen])
        rows.append([source, len(chosen), part.metrics["acc"], part.metrics["mcc"]])
    return wandb.Table(columns=["source", "sentences", "acc", "mcc"], data=sorted(rows, key=lambda row: row[2]))


def roc_chart(result: Evaluation, class_names: list[str]) -> wandb.plot.CustomChart:
    """ROC curves: one for the second class if there are two classes, otherwise one per class."""
    curves = [(name, *roc_curve(scores, labels)[:2]) for name, scores, labels in _one_vs_rest(result, class_names)]
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
    cases = [(class_names[c], result.probabilities[:, c], (result.labels == c).long()) for c in classes]
    drawn = [case for case in cases if 0 < case[2].sum() < len(case[2])]
    return sorted(drawn, key=lambda case: int(case[2].sum()), reverse=True)[:20]


def _line_chart(curves: list[tuple[str, Tensor, Tensor]], title: str, x_name: str) -> wandb.plot.CustomChart:
    return wandb.plot.line_series(
        xs=[x.tolist() for _, x, _ in curves] or [[]],  # it wants one, even if no class has a curve
        ys=[y.tolist() for _, _, y in curves] or [[]],
        keys=[name for name, _, _ in curves] or [""],
        title=title,
        xname=x_name,
    )


def shaded_tokens(tokens: list[str], attributions: Tensor, heading: str) -> str:
    """HTML of a sentence: red tokens pushed the model towards its mistake, blue tokens away from it.

    `attributions` is float (tokens,): positive is red, and the largest magnitude gets the full colour.
    """
    largest = float(attributions.abs().max()) or 1.0
    words = []
    for token, value in zip(tokens, attributions.tolist()):
        colour = "214, 60, 50" if value > 0 else "50, 100, 214"
        shade = f"background: rgba({colour}, {abs(value) / largest:.2f})"
        words.append(f'<span style="{shade}; padding: 2px" title="{value:+.4f}">{html.escape(token)}</span>')
    return f'<p style="font: 15px sans-serif"><small>{html.escape(heading)}</small><br>{" ".join(words)}</p>'


def captioned_digits(images: Tensor, predictions: Tensor, labels: Tensor, class_names: list[str]) -> list[wandb.Image]:
    """W&B images of uint8 (n, 1, 28, 28) digits, with captions like "Pred: 3 Truth: 8"."""
    return [
        wandb.Image(image[0].numpy(), caption=f"Pred: {class_names[prediction]} Truth: {class_names[label]}")
        for image, prediction, label in zip(images, predictions.tolist(), labels.tolist())
    ]


def digit_mistakes_table(images: Tensor, result: Evaluation, class_names: list[str], step: int) -> wandb.Table:
    """The 100 most confident mistakes on uint8 (examples, 1, 28, 28) images, one per row."""
    table = wandb.Table(columns=["image", "label", "prediction", "probability", "step"])
    for i in most_confident_mistakes(result)[:100].tolist():
        label, prediction = class_names[result.labels[i]], class_names[result.predictions[i]]
        table.add_data(wandb.Image(images[i, 0].numpy()), label, prediction, float(result.probabilities[i].max()), step)
    return table


def digit_mistakes_picture(images: Tensor, result: Evaluation, class_names: list[str], part: str) -> Image.Image:
    """Draw the 40 most confident mistakes on uint8 (examples, 1, 28, 28) images, ten per row.

    A 7 that was predicted to be a 1 with probability 98 % has the caption "7 as 1, 98%".
    """
    wrong = most_confident_mistakes(result)
    shown = "no mistakes" if not len(wrong) else f"the {min(40, len(wrong))} most confident of {len(wrong)} mistakes"
    title = f"{part}: {shown} in {len(images):,} examples, label as prediction"
    images = images[wrong[:40], 0]
    captions = [
        f"{class_names[result.labels[i]]} as {class_names[result.predictions[i]]}, {result.probabilities[i].max():.0%}"
        for i in wrong[:40].tolist()
    ]
    scale, columns, gap = 3, 10, 12
    height, width = images.shape[1] * scale, images.shape[2] * scale
    rows = max(1, -(-len(images) // columns))
    canvas = Image.new("RGB", (gap + columns * (width + gap), 48 + rows * (height + 30)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 14), title, fill=INK, font=ImageFont.load_default(size=19))
    for i, caption in enumerate(captions):
        x, y = gap + i % columns * (width + gap), 48 + i // columns * (height + 30)
        picture = Image.fromarray(images[i].numpy()).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (x, y))
        font = ImageFont.load_default(size=min(13.0, 13 * width / ImageFont.load_default(size=13).getlength(caption)))
        draw.text((x + width / 2, y + height + 4), caption, fill=INK, font=font, anchor="mt")
    return canvas


def _draw_vertical(canvas: Image.Image, centre: tuple[float, float], words: str, font: ImageFont.FreeTypeFont) -> None:
    """Draw `words` centred on `centre`, reading bottom to top."""
    label = Image.new("L", (int(font.getlength(words)) + 4, int(font.size * 1.5)))
    ImageDraw.Draw(label).text((label.width / 2, label.height / 2), words, fill=255, font=font, anchor="mm")
    label = label.rotate(90, expand=True)
    corner = (round(centre[0] - label.width / 2), round(centre[1] - label.height / 2))
    canvas.paste(INK, (*corner, corner[0] + label.width, corner[1] + label.height), label)
