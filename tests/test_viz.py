"""viz.py: contents and layout of the pictures."""

import itertools

import numpy as np
import pytest
import torch

import metrics
import viz


def evaluation(
    labels: list[int], predictions: list[int], confidences: list[float]
) -> metrics.Evaluation:
    """An evaluation with these predictions; each confidence is the logit of the predicted class."""
    logits = torch.zeros(len(labels), 3)
    logits[range(len(labels)), predictions] = torch.tensor(confidences)
    return metrics.evaluation(logits, torch.tensor(labels))


def test_mistakes_are_ordered_by_confidence_and_ties_by_index():
    result = evaluation([0, 1, 2, 0, 1], [1, 1, 0, 2, 2], [1.0, 9.0, 3.0, 3.0, 2.0])
    assert viz.most_confident_mistakes(result).tolist() == [2, 3, 4, 0]


def test_rows_of_the_confusion_matrix_are_labels():
    counts = torch.tensor([[6, 4, 0], [0, 5, 0], [0, 0, 5]])
    picture = viz.confusion_matrix_picture(counts, ["a", "b", "c"], "valid")
    right, bottom = picture.width - 24, picture.height - 20 - 52  # of the bottom right cell
    cell = 120

    def is_paper(row: int, column: int) -> bool:
        x, y = (
            right - cell * (3 - column) + 12,
            bottom - cell * (3 - row) + 12,
        )  # near a corner, clear of the text
        return picture.getpixel((x, y)) == viz.PAPER

    assert [[is_paper(row, column) for column in range(3)] for row in range(3)] == [
        [False, False, True],
        [True, False, True],
        [True, True, False],
    ]


@pytest.mark.parametrize("mistakes, rows", [(0, 1), (7, 1), (11, 2), (60, 4)])
def test_mistakes_picture_shows_at_most_forty(mistakes, rows):
    images = (torch.arange(60, dtype=torch.uint8) * 4).view(60, 1, 1, 1).expand(60, 1, 28, 28)
    result = evaluation(
        [0] * 60, [1] * mistakes + [0] * (60 - mistakes), [60.0 - i for i in range(60)]
    )
    picture = viz.digit_mistakes_picture(images, result, ["0", "1", "2"], "valid")
    assert picture.height == 48 + rows * (84 + 30)
    if mistakes > 10:  # the eleventh image starts the second row
        assert picture.getpixel((12 + 40, 48 + 114 + 40)) == (40, 40, 40)


def test_captions_name_label_and_prediction(monkeypatch):
    written, draw = [], viz.ImageDraw.ImageDraw.text

    def text(self, place, words, **more):
        written.append(words)
        draw(self, place, words, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    result = evaluation([0], [1], [30.0])
    viz.digit_mistakes_picture(
        torch.zeros(1, 1, 28, 28, dtype=torch.uint8), result, ["zero", "one", "two"], "valid"
    )
    assert "zero as one, 100 %" in written
    assert "valid: the 1 most confident of 1 mistakes in 1 examples, label as prediction" in written


@pytest.mark.parametrize("size", [8, 28, 64, 224])
@pytest.mark.parametrize("name", ["7", "T-shirt/top", "a class with a name that is much too long"])
def test_mistakes_are_legible_at_any_size(size, name, monkeypatch):
    fonts, boxes, draw = [], [], viz.ImageDraw.ImageDraw.text

    def text(self, place, words, **more):
        fonts.append(more["font"].size)
        box = self.textbbox(place, words, font=more["font"], anchor=more.get("anchor"))
        boxes.append(box)
        draw(self, place, words, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    result = evaluation([0] * 50, [1] * 50, [60.0] * 50)
    images = torch.zeros(50, 1, size, size, dtype=torch.uint8)
    picture = viz.digit_mistakes_picture(images, result, [name] * 3, "valid")
    assert min(fonts) >= 13 and picture.width <= 1100
    captions = sorted(boxes[1:], key=lambda box: (box[1], box[0]))
    for (_, top, right, _), (left, next_top, _, _) in itertools.pairwise(captions):
        assert right < left or next_top > top, "captions overlap"
    assert all(
        left >= 0 and right <= picture.width and bottom <= picture.height
        for left, _, right, bottom in boxes
    )


def test_many_classes_show_the_most_confused_ones():
    counts = torch.diag(torch.full((1000,), 5))
    confused = list(range(7, 1000, 35))[
        :28
    ]  # one example each of these is taken for the class before it
    counts[confused, [label - 1 for label in confused]] = 1
    shown = viz.most_confused_classes(counts)
    assert len(shown) == 30 == len(set(shown)) and set(shown) <= {
        *confused,
        *(label - 1 for label in confused),
    }
    picture = viz.confusion_matrix_picture(counts, [f"class {i}" for i in range(1000)], "valid")
    assert max(picture.size) < 2200
    labels = torch.arange(1000).repeat_interleave(2)
    result = metrics.evaluation(torch.eye(1000)[labels.roll(1)], labels)
    chart = viz.confusion_matrix_chart(result, [f"class {i}" for i in range(1000)])
    assert len(chart.table.data) == 30 * 30


def test_mistakes_table_holds_a_thousand_and_says_of_how_many():
    result = evaluation([0] * 1500, [1] * 1500, [3.0 + i / 1500 for i in range(1500)])
    table = viz.sentence_mistakes_table(
        result, [str(i) for i in range(1500)], ["x"] * 1500, ["a", "b", "c"], 7
    )
    assert len(table.data) == 1000 and table.data[0][0] == "1499"
    assert {row[table.columns.index("mistakes")] for row in table.data} == {1500}


def test_small_sources_share_a_row():
    sources = ["large"] * 3 + [f"s{i}" for i in range(300)]
    result = evaluation([0] * 303, [0, 0, 1] + [0] * 300, [5.0] * 303)
    rows = {row[0]: row[1:3] for row in viz.per_source_table(result, sources).data}
    assert (
        len(rows) == 201
        and rows["large"] == [3, pytest.approx(2 / 3)]
        and rows["101 other sources"] == [101, 1.0]
    )


PANELS = {"loss": ("train/loss_step", "valid/loss")}


def test_curves_show_validation_and_the_best_epoch():
    rows = [
        {"step": step, "epoch": 1 + step // 1001, "train/loss_step": 1 / step}
        for step in range(100, 3001, 100)
    ]
    for end, loss in ((9, 0.3), (19, 0.1), (29, 0.2)):
        rows[end]["valid/loss"] = loss
    picture = viz.curves_picture(rows, PANELS, best_epoch=2)

    def points(colour: tuple[int, int, int]) -> list[int]:
        """The columns with pixels close to a colour."""
        pixels = torch.tensor(np.asarray(picture)[60:280].astype(int))
        return (
            (pixels - torch.tensor(colour)).abs().sum(2).le(60).any(0).nonzero().flatten().tolist()
        )

    left, right = viz.LEFT / 2, (viz.CHART[0] - viz.RIGHT) / 2
    assert points(viz.DEEP) and all(
        abs(x - (left + (right - left) * 2 / 3)) <= 1 for x in points(viz.DEEP)
    )
    assert min(points(viz.WARM)) == pytest.approx(left + (right - left) / 3, abs=5)
    assert max(points(viz.WARM)) == pytest.approx(right, abs=5)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 5, "epoch": 1}],
        [{"step": 5, "something else": 1.0}],
        [{"step": 5, "epoch": 1, "train/loss_step": 0.5}],
        [
            {"step": 5, "epoch": 1, "valid/loss": 1e-30},
            {"step": 10, "epoch": 2, "valid/loss": 1e30},
        ],
        [
            {"step": 5, "epoch": 1, "valid/loss": 0.0},
            {"step": 10, "epoch": 2, "valid/loss": float("nan")},
        ],
    ],
)
def test_curves_of_odd_histories(rows):
    assert viz.curves_picture(rows, PANELS, best_epoch=1).size == (420, 330)


def test_calibration_bars_are_as_high_as_the_accuracy():
    logits = torch.tensor([[0.0, 3.0]] * 4)  # confidence 0.953, in the last of 15 bins
    picture = viz.calibration_picture(
        metrics.evaluation(logits, torch.tensor([1, 1, 1, 0])), "valid"
    )
    left, right = viz.LEFT / 2, (viz.CHART[0] - viz.RIGHT) / 2
    top, bottom = viz.TOP / 2, (viz.CHART[1] - viz.BOTTOM) / 2
    x = round(left + (right - left) * 14.3 / 15)
    bar = [y for y in range(round(top), round(bottom)) if picture.getpixel((x, y)) == viz.DEEP]
    assert len(bar) == pytest.approx(0.75 * 0.94 * (bottom - top), abs=4)
