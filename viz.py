"""Pictures and tables from labels and predictions, for W&B and as PNG; drawn with Pillow."""

import wandb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metrics import Evaluation

INK, FAINT, PAPER = (20, 24, 32), (150, 156, 166), (255, 255, 255)
DEEP = (24, 86, 156)  # a cell that holds its whole row


def surest_mistakes(result: Evaluation) -> Tensor:
    """Indices of the wrong predictions, the most probable first: int64 (mistakes,); equals keep their order."""
    confidence = result.probabilities.max(1).values
    wrong = (result.predictions != result.labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True, stable=True)]


def confusion_matrix_picture(counts: Tensor, class_names: list[str], part: str) -> Image.Image:
    """Draw an integer (classes, classes) matrix, rows being labels: each cell's count and share of its row.

    `part` names what was predicted, for the heading.
    """
    counts = counts.cpu()
    classes = len(class_names)
    cell = 58 if classes > 4 else 120
    big, small = ImageFont.load_default(size=cell * 0.27), ImageFont.load_default(size=cell * 0.21)
    text, heading = ImageFont.load_default(size=15), ImageFont.load_default(size=19)
    longest = max(text.getlength(name) for name in class_names)
    upright = longest > cell - 6  # class names that don't fit below their column are turned
    left, top = int(longest) + 58, 46
    side = cell * classes
    canvas = Image.new("RGB", (left + side + 24, top + side + (longest if upright else 20).__ceil__() + 52), PAPER)
    draw = ImageDraw.Draw(canvas)

    draw.text((left + side / 2, 22), f"{part}, {int(counts.sum()):,} examples", fill=INK, font=heading, anchor="mm")
    draw.text((left + side / 2, canvas.height - 20), "prediction", fill=INK, font=heading, anchor="mm")
    _draw_turned(canvas, (22, top + side / 2), "label", heading)
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
        if upright:
            _draw_turned(canvas, (x, y + text.getlength(name) / 2), name, text)
        else:
            draw.text((x, y), name, fill=INK, font=text, anchor="mt")
    return canvas


def captioned_digits(images: Tensor, predictions: Tensor, labels: Tensor, class_names: list[str]) -> list[wandb.Image]:
    """uint8 (n, 1, 28, 28) images as W&B shows them, with captions like "Pred: 3 Truth: 8"."""
    return [
        wandb.Image(image[0].numpy(), caption=f"Pred: {class_names[prediction]} Truth: {class_names[label]}")
        for image, prediction, label in zip(images, predictions.tolist(), labels.tolist())
    ]


def digit_mistakes_table(images: Tensor, result: Evaluation, class_names: list[str], step: int) -> wandb.Table:
    """The 100 surest mistakes among uint8 (examples, 1, 28, 28) images, a row each."""
    table = wandb.Table(columns=["image", "label", "prediction", "probability", "step"])
    for i in surest_mistakes(result)[:100].tolist():
        label, prediction = class_names[result.labels[i]], class_names[result.predictions[i]]
        table.add_data(wandb.Image(images[i, 0].numpy()), label, prediction, float(result.probabilities[i].max()), step)
    return table


def digit_mistakes_picture(images: Tensor, result: Evaluation, class_names: list[str], part: str) -> Image.Image:
    """Draw the 40 surest mistakes among uint8 (examples, 1, 28, 28) images, in rows of ten.

    The caption of a 7 taken for a 1 with a probability of 98 % is "7 as 1, 98%".
    """
    wrong = surest_mistakes(result)
    title = f"{part}: the surest of {len(wrong)} mistakes in {len(images):,} examples, label as prediction"
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


def _draw_turned(canvas: Image.Image, centre: tuple[float, float], words: str, font: ImageFont.FreeTypeFont) -> None:
    """Write `words` upwards around `centre`."""
    label = Image.new("L", (int(font.getlength(words)) + 4, int(font.size * 1.5)))
    ImageDraw.Draw(label).text((label.width / 2, label.height / 2), words, fill=255, font=font, anchor="mm")
    label = label.rotate(90, expand=True)
    corner = (round(centre[0] - label.width / 2), round(centre[1] - label.height / 2))
    canvas.paste(INK, (*corner, corner[0] + label.width, corner[1] + label.height), label)
