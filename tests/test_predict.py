"""A run's model on new data: the same answers as in the run, whatever form the data has, and its metrics."""

import contextlib
import csv
import io
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from conftest import clean_environment, wandb_records, write_mnist
from PIL import Image, ImageOps

import predict
from harness import script
from harness.errors import UserError
from tasks.digits import split_digits, synthetic_digits


@pytest.fixture(scope="module")
def text_run(references) -> Path:
    return references["train_cola.py"].out


@pytest.fixture(scope="module")
def kept(text_run) -> list[dict[str, str]]:
    """The sentences that the run was validated on, and what it predicted."""
    with (text_run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers(*arguments: object) -> tuple[list[dict[str, str]], str]:
    """The rows on standard output, and what is on standard error."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        predict.main(list(map(str, arguments)))
    return list(csv.DictReader(io.StringIO(out.getvalue()))), err.getvalue()


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        answers(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def metric(err: str, name: str) -> float:
    return next(float(line.split()[1]) for line in err.splitlines() if line.startswith(f"{name} "))


def test_sentences_have_the_answers_of_the_run(text_run, kept, tmp_path):
    metrics = json.loads((text_run / "metrics.json").read_text())
    names = metrics["class_names"]
    with (tmp_path / "valid.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["text", "class"])
        writer.writerows([row["sentence"], names[int(row["label"])]] for row in kept)
    rows, err = answers(text_run, tmp_path / "valid.tsv", "--evaluate", "--batch_size", 5)
    assert list(rows[0]) == ["input", "truth", "label", *(f"probability_{name}" for name in names)]
    for row, before in zip(rows, kept, strict=True):
        assert row["input"] == before["sentence"]
        assert row["truth"] == names[int(before["label"])]
        for index, name in enumerate(names):
            probability = float(before[f"probability_{index}"])
            assert float(row[f"probability_{name}"]) == pytest.approx(probability, abs=1e-5)
        assert row["label"] == max(names, key=lambda name: float(row[f"probability_{name}"]))
    for name in ("loss", "acc", "mcc", "f1_macro", "roc_auc"):
        assert metric(err, name) == pytest.approx(metrics[f"valid/{name}"], abs=2e-4)


def test_forms_of_sentences(text_run, kept, tmp_path):
    texts = [row["sentence"] for row in kept[:5]]
    expected, _ = answers(text_run, *texts)
    assert [row["input"] for row in expected] == texts
    with (tmp_path / "one.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["sentence"], *([text] for text in texts)])
    lines = "".join(f"{text}\n" for text in texts)
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
    records = "".join(json.dumps({"id": 1, "sentence": text}) + "\n" for text in texts)
    (tmp_path / "records.jsonl").write_text(records)
    table = "".join(f"{number}\t{text}\n" for number, text in enumerate(texts))
    (tmp_path / "other.tsv").write_text("id\tutterance\n" + table)
    # As .txt, JSON and tables, label and all, were sentences, and a column's name was missing in plain lines.
    (tmp_path / "records.txt").write_text(records)
    (tmp_path / "table.txt").write_text("\nid\tsentence\n" + table)  # a blank line hid the header
    with (tmp_path / "table2.txt").open("w", newline="") as file:
        csv.writer(file).writerows([["label", "Sentence"], *(["no", text] for text in texts)])
    for name in ("one.csv", "lines.txt", "records.jsonl", "records.txt", "table.txt", "table2.txt"):
        assert answers(text_run, tmp_path / name)[0] == expected
    # A first line that begins as a header might, but is a sentence, was lost.
    (tmp_path / "COMMA.TXT").write_text("Text, nothing more.\nHello, you!\n")  # was a table
    found, _ = answers(text_run, tmp_path / "COMMA.TXT")
    assert [row["input"] for row in found] == ["Text, nothing more.", "Hello, you!"]
    column = ("--text_column", "utterance")
    for name in ("other.tsv", "lines.txt"):
        assert answers(text_run, tmp_path / name, *column)[0] == expected
    assert "choose one with --text_column" in refusal(text_run, tmp_path / "other.tsv")


def test_what_can_not_be_predicted(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "can't read new.tsv: No such file" in refusal(text_run, "new.tsv")
    assert "can't read new.txt: No such file" in refusal(text_run, "new.txt")
    assert "holds no finished run" in refusal(tmp_path, "A sentence.")
    Path("there.csv").touch()
    assert "exists already" in refusal(text_run, "A sentence.", "--output", "there.csv")
    assert "--batch_size must be" in refusal(text_run, "A sentence.", "--batch_size", 0)
    Path("l.tsv").write_text("sentence\tlabel\nIt is so.\tyes\nIt is.\tno\n")
    assert "the model has no class no, yes; it has" in refusal(text_run, "l.tsv", "--evaluate")
    Path("p.csv").write_text("premise,hypothesis\nIt is so.,It is not.\n")
    assert "was trained on single sentences" in refusal(text_run, "p.csv")
    copy = tmp_path / "copy"
    shutil.copytree(text_run, copy)
    (copy / "model/model.safetensors").write_bytes(b"damaged")
    assert "copy/model can't be loaded: " in refusal(copy, "A sentence.")
    shutil.rmtree(copy / "model")  # "A sentence. can't be read as an image"
    assert "copy/model can't be loaded: " in refusal(copy, "A sentence.")
    # Options of these names decided, so that a copy's model got the preprocessing of train_mnist.py.
    for other in ('"lm", "kernels": [8, 16], "max_length": 9', '"mnist"', '"cola"'):
        (copy / "config.json").write_text(f'{{"task_name": {other}}}')
        assert "neither train_cola.py nor train_mnist.py" in refusal(copy, "A sentence.")


def test_the_encoding_of_the_training_data_is_not_that_of_new_files(text_run, tmp_path):
    """A file in UTF-8 was read as Latin-1, in silence."""
    copy = tmp_path / "run"
    shutil.copytree(text_run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"encoding": "latin-1"}))
    (tmp_path / "new.tsv").write_text("text\nLe café était là.\n", encoding="utf-8")
    ((row,), _) = answers(copy, tmp_path / "new.tsv")
    assert row["input"] == "Le café était là."
    (tmp_path / "old.tsv").write_text("text\nLe café était là.\n", encoding="latin-1")
    assert "pass the file's --encoding" in refusal(copy, tmp_path / "old.tsv")
    ((again,), _) = answers(copy, tmp_path / "old.tsv", "--encoding", "latin-1")
    assert again == row


def test_files_that_are_no_sentences(text_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "can't read new.txt: No such file" in refusal(text_run, "new.txt")  # a traceback
    for content in ("", "\n \n"):  # IndexError
        Path("empty.txt").write_text(content)
        assert "empty.txt contains no sentences" in refusal(text_run, "empty.txt")
    assert "an input is empty" in refusal(text_run, "It is so.", " ")  # had a label
    Path("folder").mkdir()  # its name was the sentence
    assert "can't read folder: Is a directory" in refusal(text_run, "folder")
    Path("p.csv").write_text("premise,hypothesis\nIt is so.,It is not.\n")
    # A pair became the sentence "('It is so.', 'It is not.')".
    assert "was trained on single sentences" in refusal(text_run, "It is so.", "p.csv")
    Path("odd.txt").write_bytes("It is\u2028so.\x0b\r\nIt is.\n".encode())  # were three
    rows, _ = answers(text_run, "odd.txt")
    assert [row["input"] for row in rows] == ["It is\u2028so.\x0b", "It is."]
    inside_a_file = [str(text_run), "It is.", "--output", "odd.txt/out.csv"]
    assert script.status_of(lambda: predict.main(inside_a_file)) == 2  # a traceback
    assert "odd.txt: File exists" in capsys.readouterr().err


def test_an_output_that_can_not_be_written_is_noticed_before_the_work(tmp_path, monkeypatch):
    """It was after it, as a temporary file."""
    monkeypatch.setattr(predict.os, "access", lambda path, _: path != tmp_path)  # root may write
    output = ("--output", tmp_path / "out.csv")
    assert f"--output {output[1]}: can't write there" in refusal("no run", "It is.", *output)


def test_digits_have_the_answers_of_the_run(small_mnist, tmp_path):
    """As IDX files and as a folder per class."""
    digits = split_digits(synthetic_digits(), 4000, 5)
    raw = write_mnist(tmp_path, digits)
    images = raw / "t10k-images-idx3-ubyte"
    out = tmp_path / "out/digits.csv"
    _, err = answers(small_mnist.files, images, "--evaluate", "--output", out)
    for name in ("loss", "acc", "mcc"):
        assert metric(err, name) == pytest.approx(small_mnist.metrics[f"test/{name}"], abs=2e-4)
    with out.open(newline="") as file:
        from_idx = list(csv.DictReader(file))
    assert from_idx[7]["input"] == f"{images}:7"
    folder = tmp_path / "folder"
    for index in (0, 1, 2):
        label = digits.test.labels[index]
        (folder / f"{label}").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(digits.test.images[index, 0].numpy())
        picture.save(folder / f"{label}/{index}.png")
    (folder / "notes.md").write_text("not an image")
    from_folder, _ = answers(small_mnist.files, folder, "--evaluate")
    before = {row["probability_3"] for row in from_idx[:3]}
    assert {row["probability_3"] for row in from_folder} == before
    assert [Path(row["input"]).parent.name for row in from_folder] == [
        row["truth"] for row in from_folder
    ]
    large = ImageOps.invert(picture).resize((56, 56))
    large.save(tmp_path / "large.png")
    _, err = answers(small_mnist.files, tmp_path / "large.png")
    assert "1 of 1 images are not 28×28" in err and "1 of 1 images are mostly light" in err


def test_images_that_can_not_be_predicted(small_mnist, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    assert "can't be read as an image" in refusal(small_mnist.files, tmp_path / "x.png")
    # A form of DDS that Pillow does not implement was a traceback.
    header = struct.pack("<31I", 124, *[0] * 17, 32, 1 << 23, *[0] * 11)
    (tmp_path / "x.dds").write_bytes(b"DDS " + header)
    assert "can't be read as an image" in refusal(small_mnist.files, tmp_path / "x.dds")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refusal(small_mnist.files, tmp_path / "empty")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "y.png")
    problem = refusal(small_mnist.files, tmp_path / "y.png", "--evaluate")
    assert f"no class {tmp_path.name}" in problem
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("metrics.json", "config.json"):
        shutil.copy(small_mnist.files / name, copy)
    assert "model.pt does not hold the weights of this model: " in refusal(copy, tmp_path / "y.png")


def test_forms_of_images(small_mnist, tmp_path):
    """White on a transparent ground was read as white, 16 bits as white, and a photo as it lay in the camera."""
    drawn = Image.fromarray((np.arange(784).reshape(28, 28) % 200).astype(np.uint8))
    opaque = Image.merge("RGBA", [drawn] * 3 + [Image.new("L", (28, 28), 255)])
    opaque.save(tmp_path / "opaque.png")
    drawn.save(tmp_path / "gray.png")
    drawn.rotate(90).save(tmp_path / "upright.png")
    camera = Image.Exif()
    camera[0x0112] = 8  # to be turned by 90° counterclockwise
    drawn.save(tmp_path / "photo.png", exif=camera)
    names = ("gray.png", "opaque.png", "upright.png", "photo.png")
    rows, _ = answers(small_mnist.files, *(tmp_path / name for name in names))
    gray, same, upright, photo = (list(row.values())[1:] for row in rows)
    assert same == gray and photo == upright and gray != upright
    Image.merge("LA", [Image.new("L", (28, 28), 255), drawn]).save(tmp_path / "drawing.png")
    Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("drawing.png", "deep.png"):
        problem = "save it without transparency, and with 8 bits a pixel"
        assert problem in refusal(small_mnist.files, tmp_path / name)


@pytest.mark.quick
def test_a_name_of_two_lines_is_printed_on_one(capsys):
    predicted = predict.Predicted({}, ["two\nlines"], torch.tensor([[1.0, 0.0]]))
    predict.evaluate(predicted, ["two\nlines", "one"], None)
    assert "\ntwo lines                 1      0\n" in capsys.readouterr().out


def test_predictions_are_logged_if_asked_for(text_run, tmp_path, monkeypatch):
    """Even if W&B's data directory, by default in a home that may be read-only, can't be written: a traceback before."""
    monkeypatch.chdir(tmp_path)
    for name, value in clean_environment(tmp_path, WANDB_DATA_DIR="/proc/nowhere").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "l.csv").write_text("sentence,label\nHe ran.,1\nHe run.,0\n")
    wandb.teardown()  # or W&B would keep to the directory and environment of another test
    rows, err = answers(text_run, "l.csv", "--evaluate", "--wandb", "offline")
    wandb.teardown()
    items = {}
    for record in wandb_records(tmp_path):
        if record["type"] == "history":
            items |= record["history"]["item"]
    assert items["test/acc"] == pytest.approx(metric(err, "acc"), abs=1e-4)
    (file,) = (tmp_path / "wandb/latest-run/files/media/table").glob("predictions_*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(rows[0])
    assert [row[0] for row in table["data"]] == ["He ran.", "He run."]
