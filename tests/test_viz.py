"""viz.py: contents and layout of the pictures."""

import pytest
import torch

import metrics
import viz


def evaluation(labels: list[int], predictions: list[int], confidences: list[float]) -> metrics.Evaluation:
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
        x, y = right - cell * (3 - column) + 12, bottom - cell * (3 - row) + 12  # near a corner, clear of the text
        return picture.getpixel((x, y)) == viz.PAPER

    assert [[is_paper(row, column) for column in range(3)] for row in range(3)] == [
        [False, False, True],
        [True, False, True],
        [True, True, False],
    ]


@pytest.mark.parametrize("mistakes, rows", [(0, 1), (7, 1), (11, 2), (60, 4)])
def test_mistakes_picture_shows_at_most_forty(mistakes, rows):
    images = (torch.arange(60, dtype=torch.uint8) * 4).view(60, 1, 1, 1).expand(60, 1, 28, 28)
    result = evaluation([0] * 60, [1] * mistakes + [0] * (60 - mistakes), [60.0 - i for i in range(60)])
    picture = viz.digit_mistakes_picture(images, result, ["zero", "one", "two"], "valid")
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
    viz.digit_mistakes_picture(torch.zeros(1, 1, 28, 28, dtype=torch.uint8), result, ["zero", "one", "two"], "valid")
    assert "zero as one, 100%" in written
    assert "valid: the 1 most confident of 1 mistakes in 1 examples, label as prediction" in written
