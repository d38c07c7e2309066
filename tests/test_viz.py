"""viz.py: contents and layout of the pictures."""

import itertools
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

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
        return picture.getpixel((x, y)) == ImageColor.getrgb(viz.PAPER)

    assert [[is_paper(row, column) for column in range(3)] for row in range(3)] == [
        [False, False, True],
        [True, False, True],
        [True, True, False],
    ]


def luminance(rgb: tuple[float, ...]) -> float:
    """Relative luminance of an sRGB color, as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Contrast ratio of two colors of 0 to 255, from 1 to 21."""
    dark, light = sorted(luminance([c / 255 for c in color]) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.quick
def test_counts_are_legible_on_every_shade(monkeypatch):
    """White on a cell of 30 % had a contrast of 2.7:1."""
    seen, draw = [], viz.ImageDraw.ImageDraw.text

    def text(self, place, words, *others, **more):
        if "\n" in words:  # an older Pillow calls itself for each line
            corner = (place[0] - 50, place[1] - 50)
            seen.append(contrast(self._image.getpixel(corner), ImageColor.getrgb(more["fill"])))
        draw(self, place, words, *others, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    for count in range(0, 101, 5):
        counts = torch.tensor([[count, 100 - count], [38, 62]])
        viz.confusion_matrix_picture(counts, ["a", "b"], "valid")
    assert len(seen) == 2 * 21 + 2 * 21 - 2 and min(seen) >= 4.5


@pytest.mark.quick
def test_counts_fit_their_cells(monkeypatch):
    """The first and the last digit of 123,456,789 were cut off."""
    widths, draw = [], viz.ImageDraw.ImageDraw.text

    def text(self, place, words, *colored, **more):
        if "\n" in words:
            widths.append(more["font"].getlength(words.split("\n")[0]))
        draw(self, place, words, *colored, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    viz.confusion_matrix_picture(torch.tensor([[123_456_789, 2], [3, 4]]), ["a", "b"], "valid")
    assert len(widths) == 4 and max(widths) <= 120


@pytest.mark.parametrize("mistakes, rows", [(0, 0), (7, 1), (11, 2), (60, 4)])
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
    assert "zero as one, 100%" in written
    heading = "valid: 1 of 1 mistakes in 1 examples, most confident first, label as prediction"
    assert heading in written


@pytest.mark.quick
def test_names_with_line_breaks_are_drawn_on_one_line(monkeypatch):
    """A label of two lines, quoted in a CSV file, ended the run in a traceback after an epoch."""
    texts = written(monkeypatch)
    result = evaluation([0], [1], [30.0])
    names = ["two\nlines", "one", "two"]
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    viz.confusion_matrix_picture(result.confusion.counts, names, "valid")
    viz.digit_mistakes_picture(images, result, names, "valid")
    assert {"two lines", "two lines as one, 100%"} <= set(texts)


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
    table = viz.mistakes_table(
        result,
        {"sentence": [str(i) for i in range(1500)], "source": ["x"] * 1500},
        ["a", "b", "c"],
        7,
    )
    assert len(table.data) == 1000 and table.data[0][0] == "1499"
    assert {row[table.columns.index("mistakes")] for row in table.data} == {1500}


def test_the_largest_sources_have_a_row():
    sources = ["large"] * 3 + [f"s{i}" for i in range(300)]
    result = evaluation([0] * 303, [0, 0, 1] + [0] * 300, [5.0] * 303)
    rows = {row[0]: row[1:3] for row in viz.per_source_table(result, sources).data}
    assert len(rows) == 200 and rows["large"] == [3, pytest.approx(2 / 3)]


# ------------------------------------------------------------------------------- letters of any language

KOREAN = ["긍정", "부정"]


def write_korean_font(path: Path) -> None:
    """Pillow's own font, with a circumflex for each Korean syllable and letters that are one letter."""
    groups = [(0x20, 0x7E, 40), (0xAC00, 0xD7A3, 66)]
    table = struct.pack(">HHIIII", 13, 0, 16 + 12 * len(groups), 0, len(groups), *groups[0][:1])
    table = table[:16] + b"".join(struct.pack(">III", *group) for group in groups)
    table = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + table
    font = bytearray(ImageFont.load_default(20).font_bytes)
    entry = font.index(b"cmap")
    font[entry + 8 : entry + 16] = struct.pack(">II", len(font), len(table))
    path.write_bytes(font + table)


@pytest.fixture
def no_fonts(tmp_path, monkeypatch):
    """A machine without fonts and fontconfig, apart from what a test adds in bin/ and fonts/."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "fonts").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "bin"))
    caches = (viz._find_font, viz._open_font, viz._drawable)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def files(monkeypatch) -> dict[str, Any]:
    """The file of the font that each text is drawn with."""
    fonts, draw = {}, viz.ImageDraw.ImageDraw.text

    def text(self, place, words, *colored, **more):
        if not colored:  # an older Pillow draws each line of a text by another call
            fonts[words] = more["font"].path
        draw(self, place, words, *colored, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    return fonts


def korean_pictures() -> list[Image.Image]:
    """The pictures that take a user's text."""
    logits = torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
    result = metrics.evaluation(logits, torch.tensor([0, 0, 1]))
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    return [
        viz.confusion_matrix_picture(result.confusion.counts, KOREAN, "valid"),
        viz.digit_mistakes_picture(images, result, KOREAN, "valid"),
        viz.curves_picture(history(2), {"손실": ("train/loss_step", "valid/loss")}, 1),
    ]


@pytest.mark.quick
@pytest.mark.parametrize("found_by", ["fontconfig", "folder"])
def test_names_are_drawn_with_a_font_that_has_their_letters(
    found_by, no_fonts, files, tmp_path, capsys
):
    """They were boxes: Pillow's own font has Latin letters only."""
    file = tmp_path / ("any.ttf" if found_by == "fontconfig" else "fonts/malgun.ttf")
    write_korean_font(file)
    if found_by == "fontconfig":
        if os.name == "nt":
            pytest.skip("Windows has no fontconfig")
        (tmp_path / "bin/fc-match").write_text(f"#!/bin/sh\necho -n '{file}'\n")
        (tmp_path / "bin/fc-match").chmod(0o755)
    korean_pictures()
    for text in (*KOREAN, "긍정 as 부정, 99%", "손실"):
        assert Path(files[text]).resolve() == file
    assert not isinstance(files["prediction"], str | Path)  # the look of Latin text does not change
    assert capsys.readouterr().out == ""


@pytest.mark.quick
def test_without_a_font_names_are_numbers_that_are_printed_once(no_fonts, files, capsys):
    """They were boxes, and nothing said so."""
    korean_pictures()
    korean_pictures()
    assert "0 as 1, 99%" in files and {"0", "1"} <= files.keys()
    assert not any(name in text for name in KOREAN for text in files)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("PNG pictures show numbers: {0: '긍정', 1: '부정'}")


# ------------------------------------------------------------------------------------- learning curves

PANELS = {"loss": ("train/loss_step", "valid/loss")}
PLOT = slice(
    viz.TOP // 2 + 3, viz.BOTTOM // 2 - 2
)  # the rows of pixels inside the frame of a chart


def history(epochs: int, rows_per_epoch: int = 10, **validation: float) -> list[dict[str, float]]:
    """Rows with a falling training loss; an epoch's last one has a validation loss and `validation`."""
    rows = []
    for step in range(1, epochs * rows_per_epoch + 1):
        share = step / (epochs * rows_per_epoch)
        epoch = 1 + (step - 1) // rows_per_epoch
        rows.append({"step": 64 * step, "epoch": epoch, "train/loss_step": 2.5 - 2 * share})
        if step % rows_per_epoch == 0:
            rows[-1] |= {"valid/loss": 2.6 - 2 * share, **validation}
    return rows


def drawn(picture, color: str, panel: int = 0) -> list[tuple[int, int]]:
    """x and y of the pixels inside a panel's plot that are close to a color."""
    pixels = torch.tensor(np.asarray(picture)[PLOT, 560 * panel : 560 * (panel + 1)].astype(int))
    close = (pixels - torch.tensor(ImageColor.getrgb(color))).abs().sum(2) <= 20
    ys, xs = close.nonzero(as_tuple=True)
    return list(zip(xs.tolist(), (ys + PLOT.start).tolist()))


def written(monkeypatch) -> list[str]:
    """What `viz` writes from now on."""
    texts, draw = [], viz.ImageDraw.ImageDraw.text

    def text(self, place, words, *each_line, **more):
        if each_line:  # an older Pillow draws the lines one by one
            return draw(self, place, words, *each_line, **more)
        texts.append(words)
        box = self.textbbox(place, words, font=more["font"], anchor=more["anchor"])
        assert box[0] >= 0 and box[2] <= self.im.size[0], f"{words} is cut off"
        draw(self, place, words, **more)

    monkeypatch.setattr(viz.ImageDraw.ImageDraw, "text", text)
    return texts


def test_curves_show_validation_and_the_best_epoch():
    rows = [
        {"step": step, "epoch": 1 + step // 1001, "train/loss_step": 1 / step}
        for step in range(100, 3001, 100)
    ]
    for end, loss in ((9, 0.3), (19, 0.1), (29, 0.2)):
        rows[end]["valid/loss"] = loss
    picture = viz.curves_picture(rows, PANELS, best_epoch=2)

    left, right = viz.LEFT / 2, viz.RIGHT / 2
    best = [x for x, _ in drawn(picture, viz.DEEP)]
    assert best and all(abs(x - (left + (right - left) * 2 / 3)) <= 2.5 for x in best)
    valid = [x for x, _ in drawn(picture, viz.WARM)]
    assert min(valid) == pytest.approx(left + (right - left) / 3, abs=8)
    assert max(valid) == pytest.approx(right, abs=8)


def test_curves_of_a_regression(monkeypatch):
    """A panel with validation only, one with training only, one that no row has, one with either."""
    texts = written(monkeypatch)
    panels = {
        "mean absolute error": ("", "valid/mae"),
        "gradient norm": ("train/loss_step", "valid/missing"),
        "nothing": ("train/none", "valid/none"),
        **PANELS,
    }
    picture = viz.curves_picture(history(5, **{"valid/mae": 12.5}), panels, best_epoch=4)
    assert picture.size == (4 * 560, 660)
    colors = (viz.DEEP, viz.MIDDLE, viz.WARM)
    assert [[bool(drawn(picture, c, panel)) for c in colors] for panel in range(4)] == [
        [True, False, True],
        [False, True, False],
        [False, False, False],
        [True, True, True],
    ]
    assert texts.count("best epoch: 4") == texts.count("training") == texts.count("validation") == 2
    assert "accuracy" not in texts
    ys = {
        y for _, y in drawn(picture, viz.WARM)
    }  # a constant is in the middle, between 6.25 and 18.75
    assert min(ys) + max(ys) == pytest.approx(viz.TOP / 2 + viz.BOTTOM / 2, abs=2)
    assert {"10", "15"} <= set(texts)


def y_of(share: float) -> float:
    """The row of pixels of a value at this share of a panel's range."""
    return (viz.TOP + (0.97 - 0.94 * share) * (viz.BOTTOM - viz.TOP)) / 2


@pytest.mark.quick
def test_curves_begin_where_training_began():
    """The first tenth was cut: a loss that fell from 2.3 seemed to start at 0.13."""
    rows = [
        {"step": 64 * i, "epoch": 1, "train/loss_step": 2.3 * 0.95**i, "train/lr": 1 - i / 101}
        for i in range(101)
    ][1:]
    picture = viz.curves_picture(rows, PANELS | {"learning rate": ("train/lr", "")}, 0)
    points = drawn(picture, viz.MIDDLE)
    assert min(x for x, _ in points) <= viz.LEFT / 2 + 7
    # A falling exponential is a straight line on a log scale: half way, it is in the middle.
    middle = (viz.LEFT + viz.RIGHT) / 4
    ys = [y for x, y in points if abs(x - middle) < 1]
    assert sum(ys) / len(ys) == pytest.approx(y_of(0.5), abs=4)
    for panel in (0, 1):
        ys = [y for _, y in drawn(picture, viz.MIDDLE, panel)]
        assert min(ys) == pytest.approx(y_of(1), abs=4) and max(ys) == pytest.approx(y_of(0), abs=4)


@pytest.mark.quick
@pytest.mark.parametrize(
    "values, log, labels",
    [
        ([2.3, 0.4, 0.1, 0.05], True, {"0.1", "0.3", "1"}),  # a loss
        ([1e-15, 1e15], True, {"1e-15", "1e-10", "1e-05", "1", "100000", "1e+10", "1e+15"}),
        ([26.0, 4.0, 2.5], True, {"3", "4", "6", "10", "20"}),  # not 30, which is out of range
        ([0.03, 0.9, 0.95, 0.97], False, {"0.2", "0.8"}),  # an accuracy
        ([0.01, 1.0, 0.8, 0.6, 0.4, 0.2, 0.01], False, {"0.2", "0.8"}),  # a learning rate
        ([2.3, 0.3, 0.24], False, {"0.5", "2"}),  # less than a factor of 10
        ([2.3, 0.1, 0.0], False, {"0", "2"}),
        ([30.0, 0.1, -0.1], False, {"0", "30"}),
    ],
)
def test_log_scales_are_for_small_values_and_named(values, log, labels, monkeypatch):
    texts = written(monkeypatch)
    rows = [{"step": i + 1, "epoch": i + 1, "valid/x": value} for i, value in enumerate(values)]
    viz.curves_picture(rows, {"x": ("", "valid/x")}, 1)
    assert ("x (log scale)" in texts) == log != ("x" in texts)
    assert labels <= set(texts)
    if log:
        assert set(texts[: texts.index("0")]) == labels  # the x-axis begins at 0


@pytest.mark.quick
def test_rows_count_by_their_examples(monkeypatch):
    """Rows of two batches at an epoch's start counted like rows of ten: the curves had jumps."""
    texts = written(monkeypatch)
    rows = [{"step": 900, "train/loss_step": 0.0}, {"step": 1000, "train/loss_step": 10.0}]
    picture = viz.curves_picture(rows, PANELS, 0)
    # Two halves of 500 examples; in the second one, 400 * 0 + 100 * 10 = 500 * 2.
    assert {"0", "2"} <= set(texts) and not {"4", "5", "10"} & set(texts)
    start = min(x for x, _ in drawn(picture, viz.MIDDLE))
    assert start == pytest.approx((viz.LEFT + viz.RIGHT) / 4, abs=8)


@pytest.mark.quick
@pytest.mark.parametrize("panels", [1, 2, 3, 4])
def test_panels_have_room_for_any_title(panels, monkeypatch):
    """Long titles and numbers were cut off at the edge."""
    texts = written(monkeypatch)
    titles = ["root mean squared error of the logarithm of the price in euros"] + [""] * 3
    rows = [
        {"step": 10**9 * i, "epoch": i, "v": -1e-20 * (1 + 1e-4 * i), "t": i} for i in range(1, 6)
    ]
    keys = dict.fromkeys(range(panels), ("t", "v"))
    named = {titles[i] or f"panel {i}": keys[i] for i in keys}
    picture = viz.curves_picture(rows, named | {titles[0]: ("", "v")}, 3)
    assert picture.size == (560 * panels, 660)
    assert titles[0] in texts and any(len(text) >= 10 and "e-20" in text for text in texts)


def test_curves_of_hundreds_of_epochs_have_no_markers():
    """With a marker for each of 400 epochs, the curve would be a band."""
    few = drawn(viz.curves_picture(history(20), {"": ("", "valid/loss")}, 0), viz.WARM)
    many = drawn(viz.curves_picture(history(400), {"": ("", "valid/loss")}, 0), viz.WARM)

    def thickness(points: list[tuple[int, int]]) -> int:
        """The largest number of pixels above each other."""
        xs = [x for x, _ in points]
        return max(xs.count(x) for x in set(xs))

    assert thickness(few) > 10 > thickness(many)
    xs = {x for x, _ in many}
    assert len(xs) >= (viz.RIGHT - viz.LEFT) / 2 - 5, "the curve has gaps"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e308, -1e308])
def test_curves_leave_out_values_that_are_not_finite(bad):
    rows = history(6)
    expected = viz.curves_picture(rows[:40], PANELS, 2)
    for row in rows[40:]:
        row.update(dict.fromkeys(PANELS["loss"], bad) if "valid/loss" in row else {})
        row["train/loss_step"] = bad
    picture = viz.curves_picture(rows, PANELS, 2)
    # The same range of values, so the same rows of pixels, and nothing in the last third.
    for color in (viz.MIDDLE, viz.WARM):
        ys = [y for _, y in drawn(picture, color)]
        expected_ys = [y for _, y in drawn(expected, color)]
        assert min(ys) == pytest.approx(min(expected_ys), abs=1)
        assert max(ys) == pytest.approx(max(expected_ys), abs=1)
        end = viz.LEFT / 2 + (viz.RIGHT - viz.LEFT) / 2 * 4 / 6
        assert max(x for x, _ in drawn(picture, color)) <= end + 8


@pytest.mark.parametrize(
    "values",
    [
        [2.3025851, 2.3025852],  # a model that does not learn
        [1e20, 1e20],
        [0.0, 5e-324],
        [123456.7, 234567.8],
        [1.5e30, 2e29],
        [-0.0002, -0.0001],
        [0],
    ],
)
def test_labels_of_any_values_differ_and_fit(values, monkeypatch):
    texts = written(monkeypatch)
    rows = [
        {"step": 10**6 * (i + 1), "epoch": i + 1, "valid/x": value}
        for i, value in enumerate(values)
    ]
    picture = viz.curves_picture(rows, {"": ("", "valid/x")}, 1)
    assert drawn(picture, viz.WARM)
    x_name = texts.index("thousands of training examples")
    texts = texts[: x_name - 1]  # the labels of both axes
    x_start = max(i for i, text in enumerate(texts) if text == "0")
    assert len(set(texts[:x_start])) == len(texts[:x_start]) >= 2
    assert len(set(texts[x_start:])) == len(texts[x_start:]) >= 2


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "epoch": 1, "train/loss_step": 0.5}],
        [{"step": 5, "epoch": 1}],
        [{"step": 5, "something else": 1.0}],
        [{"step": 5, "epoch": 1, "train/loss_step": 0.5}],
        [{"step": 5, "epoch": 1, "train/loss_step": float("nan"), "valid/loss": float("nan")}],
        [{"step": 5, "epoch": 1, "valid/loss": 10**400}],
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
    panels = PANELS | {"learning rate": ("train/learning_rate", "")}
    assert viz.curves_picture(rows, panels, best_epoch=1).size == (2 * 560, 660)


# ------------------------------------------------------------------------------------------ calibration


def test_calibration_bars_are_as_high_as_the_accuracy():
    logits = torch.tensor([[0.0, 3.0]] * 4)  # confidence 0.953, in the last of 15 bins
    picture = viz.calibration_picture(
        metrics.evaluation(logits, torch.tensor([1, 1, 1, 0])), "valid"
    )
    left, right = viz.LEFT / 2, viz.RIGHT / 2
    top, bottom = viz.TOP / 2, viz.BOTTOM / 2
    x = round(left + (right - left) * 14.3 / 15)
    deep = ImageColor.getrgb(viz.DEEP)
    bar = [y for y in range(round(top), round(bottom)) if picture.getpixel((x, y)) == deep]
    assert len(bar) == pytest.approx(0.75 * 0.94 * (bottom - top), abs=4)


def test_pictures_need_no_metrics(monkeypatch):
    """A script may have chosen only some metrics."""
    texts = written(monkeypatch)
    logits, labels = torch.tensor([[0.0, 3.0]] * 4), torch.tensor([1, 1, 1, 0])
    result = metrics.evaluation(logits, labels, ["loss"])
    viz.calibration_picture(result, "valid")
    assert "confidence (expected calibration error 0.203)" in texts
    assert "its accuracy, 75.0%, " in viz.one_class_warning(result, ["a", "b"])


# ----------------------------------------------------------------------------------------- attributions


@pytest.mark.quick
def test_text_is_legible_on_every_shade():
    """Black on the darkest blue had a contrast of 3.9 : 1; WCAG's level AA is 4.5 : 1."""
    values = [i / 100 for i in range(-100, 101)]
    sentence = viz.shaded_tokens(["token"] * len(values), values, "heading")
    shades = re.findall(r"rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", sentence)
    ink, paper = (
        ImageColor.getrgb(re.search(rf"[; ]{name}: (#\w+)", viz.SHADED_HEAD)[1])
        for name in ("color", "background")
    )
    contrasts = []
    for *color, alpha in shades:
        blended = [float(alpha) * int(c) + (1 - float(alpha)) * p for c, p in zip(color, paper)]
        contrasts.append(contrast(ink, blended))
    assert len(contrasts) == 201 and max(contrasts) > 15 and min(contrasts) >= 4.5
    # The legend shows the same two colors.
    ends = re.findall(r"rgb\((.*?)\)", viz.SHADED_HEAD)
    assert ends == [", ".join(shade[:3]) for shade in (shades[0], ["255"] * 3, shades[-1])]


@pytest.mark.quick
def test_page_of_attributions_fits_a_phone():
    assert viz.SHADED_HEAD.startswith(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    )
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in viz.SHADED_HEAD
    for words in ("toward the mistake", "away from the mistake"):
        assert words in viz.SHADED_HEAD


@pytest.mark.quick
def test_a_learning_rate_is_no_mean(monkeypatch):
    """Its peak was lower, and it had kinks, because it was averaged as a loss is."""
    seen = []
    monkeypatch.setattr(viz, "_means", lambda points: seen.append(points) or points)
    rows = [{"step": step, "train/learning_rate": 0.1 * step} for step in (1, 2, 3)]
    viz.curves_picture(rows, {"learning rate": ("train/learning_rate", "")}, 1)
    assert seen == []
    viz.curves_picture(rows, {"loss": ("train/learning_rate", "valid/loss")}, 1)
    assert len(seen) == 1
