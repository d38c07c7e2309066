"""train_cola.py as users see it: files, W&B records, the saved model, printed output, bad input."""

import base64
import copy
import csv
import hashlib
import html
import itertools
import json
import math
import re
import shutil
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import sklearn.metrics
import torch
import transformers
from conftest import call, clean_environment, finished_run, made_once, merged
from PIL import Image

import train_cola
import viz
from harness import script
from metrics import (
    EVALUATION_METRICS,
    ConfusionMatrix,
    Evaluation,
    evaluation,
    matthews_corrcoef_interval,
)
from reporting.runs import PROVENANCE
from tasks import batching, encoders, sentences
from tests import killing

METRICS = set(EVALUATION_METRICS)
SMALL = "--dataset synthetic --model scratch --batch_size 125 --epochs 2 --max_steps 144 --max_length 32".split()
CSV = """label,sentence
none,"Nobody slept, said the girl."
one,The boy sleeps.
many,"The boys ""sleep"" in the garden."
one,The girl waits.
many,The girls wait near the river every day.
none,Not a doctor arrived.
"""
TEST_CSV = "label,sentence\none,The boy sleeps.\nmany,The girl waits.\none,The girl sleeps.\n"


@pytest.fixture(scope="session")
def small_cola(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with everything on, shared by many tests: one epoch of 96 batches and half of another."""
    arguments = (*SMALL, "--log_model", "all")
    run = made_once(
        tmp_path_factory, "small_cola", lambda cwd: finished_run("train_cola.py", cwd, *arguments)
    )
    run.ends = [row for row in run.history if "valid/loss" in row]
    run.best = next(row for row in run.ends if row["epoch"] == run.metrics["best/epoch"])
    run.rows = predictions(run)
    return run


@pytest.fixture(scope="session")
def own_files(small_cola, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The model saved by `small_cola`, trained on a user's three-class file with a negligible learning rate."""
    arguments = "--train_file t.csv --valid_file v.csv --batch_size 2 --max_length 7 --epochs 3 --schedule constant"
    fixed = "--learning_rate 1e-12 --precision fp32 --warmup_ratio 0 --log_every 1"
    model = small_cola.files / "model"

    def make(cwd: Path) -> SimpleNamespace:
        (cwd / "t.csv").write_text(CSV)
        (cwd / "v.csv").write_text(CSV)
        (cwd / "x.csv").write_text(TEST_CSV)
        given = [*arguments.split(), *fixed.split(), "--test_file", "x.csv", "--model", model]
        return finished_run("train_cola.py", cwd, *given)

    return made_once(tmp_path_factory, "own_files", make)


def predictions(run: SimpleNamespace, name: str = "predictions.csv") -> list[dict[str, str]]:
    with (run.files / name).open(newline="") as file:
        return list(csv.DictReader(file))


def as_arrays(
    rows: list[dict[str, str]], classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and probabilities from predictions.csv."""
    probabilities = np.array(
        [[float(row[f"probability_{c}"]) for c in range(classes)] for row in rows]
    )
    return *(
        np.array([int(row[name]) for row in rows]) for name in ("label", "prediction")
    ), probabilities


def media(run: SimpleNamespace, row: dict, key: str) -> str:
    """The table or HTML file that a history row logged under `key`."""
    return (run.cwd / "wandb/latest-run/files" / row[f"{key}.path"]).read_text()


def config_in_wandb(run: SimpleNamespace) -> dict:
    first = next(
        record["run"]["config"]["update"] for record in run.records if record["type"] == "run"
    )
    return first | merged(run.records, "config")


def written(directory: Path) -> list[Path]:
    """Everything below `directory` except W&B's own logs in the user's cache."""
    return sorted(path for path in directory.rglob("*") if ".cache" not in path.parts)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


# --------------------------------------------------------------------------------------- files and records


def test_every_file_is_there(small_cola):
    files = "config.json history.jsonl checkpoint.pt metrics.json predictions.csv confusion_matrix.png model".split()
    files += ["attributions.html", "curves.png", "checkpoint.previous.pt"]
    assert {file.name for file in small_cola.files.iterdir()} == set(files)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in (small_cola.files / "model").iterdir()
    }
    checkpoint = torch.load(small_cola.files / "checkpoint.pt", weights_only=True)
    assert checkpoint["position"] == {
        "epoch": 2,
        "batch": 144,
        "step": 18_000,
        "epoch_ends": True,
        "batches_in_epoch": 96,
        "total_batches": 144,
        "patience_from": 0,
    }
    assert checkpoint["model"].keys() == weights(small_cola.files / "model").keys()
    config = {k: v for k, v in small_cola.config.items() if k not in (*PROVENANCE, "versions")}
    assert (config["dataset"], config["model"], config["learning_rate"]) == (
        "synthetic",
        "scratch",
        1e-3,
    )
    assert config.items() <= config_in_wandb(small_cola).items()


def test_every_key_is_in_the_right_rows(small_cola):
    train = ("loss_step", "acc_step", "learning_rate", "examples_per_second", "grad_norm")
    steps = {"epoch", *(f"train/{key}" for key in train)}
    charts = {
        "confusion_matrix_table",
        "confusion_matrix_image",
        "mistakes",
        "logits",
        "roc_table",
        "pr_table",
    }
    charts |= {
        "calibration",
        "per_class",
        "per_source",
        "per_source_chart_table",
        "majority_share",
        "attributions",
    }
    epoch = {"train/loss_epoch", "train/acc_epoch", *(f"valid/{key}" for key in METRICS | charts)}
    assert [row["_step"] for row in small_cola.ends] == [12_000, 18_000]
    for row in small_cola.history:
        plain = {
            re.sub(r"\..*", "", key)
            for key in row
            if not key.startswith(("gradients/", "parameters/", "_"))
        }
        last = {"curves"} if row is small_cola.ends[-1] else set()
        assert plain == steps | (epoch if row in small_cola.ends else set()) | last
    images = {
        (row["valid/logits._type"], row["valid/confusion_matrix_image._type"])
        for row in small_cola.ends
    }
    assert images == {("histogram", "image-file")}


def test_steps_count_sentences(small_cola):
    batches = [
        *range(10, 100, 10),
        96,
        *range(100, 150, 10),
        144,
    ]  # every tenth, and the last of each epoch
    assert [row["_step"] for row in small_cola.history] == [125 * batch for batch in batches]
    assert [row["epoch"] for row in small_cola.history] == [1] * 10 + [2] * 6


def test_journal_and_wandb_hold_the_same_numbers(small_cola):
    history = {row["_step"]: row for row in small_cola.history}
    numbers = [{k: v for k, v in row.items() if k != "step"} for row in small_cola.journal]
    for row, logged in zip(small_cola.journal, numbers):
        assert {key: history[row["step"]][key] for key in logged} == logged
    # and the journal has every number that W&B has
    for step, row in history.items():
        scalars = {
            k for k, v in row.items() if type(v) in (int, float) and k[0] != "_" and "." not in k
        }
        assert scalars == {
            key for r, n in zip(small_cola.journal, numbers) if r["step"] == step for key in n
        }


def test_watch_logs_every_weight_once_per_epoch(small_cola):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        small_cola.files / "model"
    )
    names = {
        f"{what}/{name}"
        for what in ("gradients", "parameters")
        for name, _ in model.named_parameters()
    }
    for row in small_cola.history:
        found = {
            k.removesuffix("._type")
            for k in row
            if k.startswith(("grad", "param")) and k.endswith("._type")
        }
        assert found == (names if row["_step"] == 12_000 else set())


def test_summary_and_metrics_hold_the_best_epoch(small_cola):
    mcc = [row["valid/mcc"] for row in small_cola.ends]
    assert (
        small_cola.summary["best/epoch"]
        == small_cola.metrics["best/epoch"]
        == 1 + mcc.index(max(mcc))
    )
    for name in METRICS | {"majority_share"}:
        logged = small_cola.best[f"valid/{name}"]
        assert small_cola.summary[f"best/{name}"] == small_cola.metrics[f"valid/{name}"] == logged
    assert (small_cola.metrics["dataset"], small_cola.metrics["model"]) == ("synthetic", "scratch")


def test_artifacts(small_cola, own_files):
    artifacts = [
        record["artifact"] for record in small_cola.records if record["type"] == "artifact"
    ]
    models = [artifact for artifact in artifacts if artifact["type"] == "model"]
    mcc = [row["valid/mcc"] for row in small_cola.ends]
    assert [set(m["aliases"]) for m in models] == [
        {"latest", "best"},
        {"latest", *["best"] * (mcc[1] > mcc[0])},
    ]
    for model in models:
        paths = {entry["path"] for entry in model["manifest"]["contents"]}
        assert paths == {file.name for file in (small_cola.files / "model").iterdir()}
    (dataset,) = (artifact for artifact in artifacts if artifact["type"] == "dataset")
    assert dataset["name"] == "synthetic" and not dataset["manifest"].get("contents")
    artifacts = [record["artifact"] for record in own_files.records if record["type"] == "artifact"]
    assert not [artifact for artifact in artifacts if artifact["type"] == "model"]


def test_own_files_are_not_copied_for_wandb(own_files):
    """Before, the artifact held the files themselves, and each run left a copy of them in W&B's staging directory."""
    artifacts = [record["artifact"] for record in own_files.records if record["type"] == "artifact"]
    (dataset,) = (artifact for artifact in artifacts if artifact["type"] == "dataset")
    entries = {entry["path"]: entry for entry in dataset["manifest"]["contents"]}
    assert set(entries) == {"0-t.csv", "1-v.csv", "2-x.csv"}
    for entry in entries.values():
        content = (own_files.cwd / entry["path"][2:]).read_bytes()
        assert entry["digest"] == base64.b64encode(hashlib.md5(content).digest()).decode()
        assert entry["ref"].startswith("file:///") and not entry.get("local_path")
    staged = list((own_files.cwd / ".local/share/wandb/artifacts/staging").iterdir())
    assert staged and not {CSV, TEST_CSV} & {file.read_text() for file in staged}


@pytest.mark.quick
def test_log_data_uploads_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    file = tmp_path / "훈련 #1%.csv"
    file.write_bytes(CSV.encode())
    corpus = sentences.synthetic_sentences(4, 2)._replace(name="files", files=[file])
    for upload in (False, True):
        logged = []
        run = SimpleNamespace(add_tag=lambda tag: None, log_artifact=logged.append)
        train_cola.log_dataset(run, corpus, upload)
        (entry,) = logged[0].manifest.entries.values()
        assert entry.path == f"0-{file.name}" and entry.size == len(CSV)
        assert (entry.ref is None) == upload
        copies = list((tmp_path / "data").rglob("tmp*"))
        assert [copy.read_text() for copy in copies] == [CSV] * upload


def test_own_test_file_is_reported(own_files):
    """Before, there was no test file, and the interval ignored that the epoch was chosen on the same sentences."""
    with (own_files.files / "test_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(predictions(own_files)[0])
    assert [(row["sentence"], row["label"], row["source"]) for row in rows] == [
        ("The boy sleeps.", "2", "x.csv"),
        ("The girl waits.", "0", "x.csv"),
        ("The girl sleeps.", "2", "x.csv"),
    ]
    labels, predicted, probabilities = as_arrays(rows, 3)
    metrics = own_files.metrics
    accuracy = sklearn.metrics.accuracy_score(labels, predicted)
    assert metrics["test/acc"] == accuracy
    loss = sklearn.metrics.log_loss(labels, probabilities, labels=[0, 1, 2])
    assert metrics["test/loss"] == pytest.approx(loss, abs=1e-12)
    assert (
        own_files.summary["test/loss"] == own_files.journal[-1]["test/loss"] == metrics["test/loss"]
    )
    assert "test/mcc_low" in metrics and "valid/mcc_low" not in metrics
    for name in ("precision", "recall", "f1"):  # there were only averages
        score = getattr(sklearn.metrics, f"{name}_score")
        expected = score(labels, predicted, labels=range(3), average=None, zero_division=0)
        classes = metrics["class_names"]
        found = [metrics[f"test/{name}/{name_of_class}"] for name_of_class in classes]
        assert found == pytest.approx(expected.tolist(), abs=1e-12)
        assert f"valid/{name}/{classes[0]}" in metrics
    assert metrics["mcc_interval"] == "on the test file"
    lines = own_files.out.splitlines()
    assert ", 3 for the test" in next(line for line in lines if line.startswith("files: 6 + 6"))
    assert "on the test file" in lines[-2] and f"accuracy {accuracy:.2%}" in lines[-2]
    assert metrics["positive_label"] is None and "positive class" not in own_files.out


def test_own_test_file_has_its_pictures(own_files):
    """The result was of the test sentences, but every picture was of the validation sentences."""
    last = own_files.history[-1]

    def charts(part: str) -> set[str]:
        names = {re.sub(r"\..*", "", name) for name in last if name.startswith(f"{part}/")}
        return {name.removeprefix(f"{part}/") for name in names}

    assert charts("test") == charts("valid") - {"majority_share"}
    assert "<h2>test, 3 examples</h2>" in media(own_files, last, "test/attributions")
    labels, predicted, _ = as_arrays(predictions(own_files, "test_predictions.csv"), 3)
    counts = torch.from_numpy(sklearn.metrics.confusion_matrix(labels, predicted, labels=range(3)))
    picture = viz.confusion_matrix_picture(counts, own_files.metrics["class_names"], "test")
    logged = own_files.cwd / "wandb/latest-run/files" / last["test/confusion_matrix_image.path"]
    for file in (own_files.files / "test_confusion_matrix.png", logged):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture))


def test_without_a_test_file_the_interval_is_called_too_optimistic(small_cola):
    note = "too optimistic: the epoch was chosen on these sentences"
    assert note in small_cola.out.splitlines()[-2] and small_cola.metrics["mcc_interval"] == note


@pytest.mark.quick
def test_charts_name_the_positive_class():
    """Before, it was always the second one of the model, and no title said so."""
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    for positive, name in enumerate(("-1", "1")):
        result = evaluation(logits, labels, positive=positive)
        for chart in (viz.roc_chart, viz.precision_recall_chart):
            shown = chart(result, ["-1", "1"])
            assert {row[1] for row in shown.table.data} == {name}
            assert shown.spec.string_fields["title"].endswith(f", positive class: {name}")
    three = evaluation(torch.eye(3), torch.arange(3))
    assert "positive class" not in viz.roc_chart(three, ["a", "b", "c"]).spec.string_fields["title"]


# -------------------------------------------------------------------------------------- training and metrics


def test_metrics_match_the_predictions(small_cola):
    labels, predicted, probabilities = as_arrays(small_cola.rows, 2)
    assert (probabilities.argmax(1) == predicted).all()
    metrics, sk = small_cola.metrics, sklearn.metrics
    expected = {
        "acc": sk.accuracy_score(labels, predicted),
        "mcc": sk.matthews_corrcoef(labels, predicted),
    }
    for name in ("precision", "recall", "f1"):
        for average in ("macro", "micro"):
            expected[f"{name}_{average}"] = getattr(sk, f"{name}_score")(
                labels, predicted, average=average
            )
    expected["loss"] = sk.log_loss(labels, probabilities)
    expected["balanced_acc"] = sk.balanced_accuracy_score(labels, predicted)
    expected["roc_auc"] = sk.roc_auc_score(labels, probabilities[:, 1])
    expected["average_precision"] = sk.average_precision_score(labels, probabilities[:, 1])
    confidence, edges = probabilities.max(1), np.arange(16) / 15
    bins = [(confidence > low) & (confidence <= high) for low, high in itertools.pairwise(edges)]
    gaps = [abs((labels == predicted)[inside].sum() - confidence[inside].sum()) for inside in bins]
    expected["ece"] = sum(gaps) / len(labels)
    assert {key: metrics[f"valid/{key}"] for key in METRICS} == pytest.approx(expected, abs=1e-12)
    losses = [float(row["loss"]) for row in small_cola.rows]
    assert losses == pytest.approx(
        -np.log(probabilities[np.arange(len(labels)), labels]), abs=1e-12
    )
    assert metrics["valid/majority_share"] == max(np.bincount(labels)) / 1000


def test_predictions_are_in_corpus_order(small_cola):
    valid = sentences.synthetic_sentences().valid
    assert [row["sentence"] for row in small_cola.rows] == valid.sentences
    assert [row["source"] for row in small_cola.rows] == valid.sources
    names = ["unacceptable", "acceptable"]
    assert [names[int(row["label"])] for row in small_cola.rows] == valid.labels


def test_interval_is_that_of_the_predictions(small_cola):
    """Which is compared with NumPy's in test_metrics.py, on fixed predictions."""
    labels, predicted, _ = as_arrays(small_cola.rows, 2)
    confusion = ConfusionMatrix(2)
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    figures = (small_cola.metrics["valid/mcc_low"], small_cola.metrics["valid/mcc_high"])
    assert figures == matthews_corrcoef_interval(confusion)


def test_best_model_is_kept_and_domains_are_reported_separately(tmp_path, monkeypatch):
    """A small archive stands in for CoLA. The predictions are made up: which epoch is the best depended on rounding."""
    valid = sentences.synthetic_sentences(16, 60).valid
    domains = {"in_domain": slice(0, 25), "out_of_domain": slice(25, 60)}
    with zipfile.ZipFile(tmp_path / "cola_public_1.1.zip", "w") as archive:
        for name, part in {"train": slice(0, 60), **domains}.items():
            file = "in_domain_train" if name == "train" else f"{name}_dev"
            lines = [
                f"{source}\t{int(label == 'acceptable')}\t\t{sentence}\n"
                for sentence, label, source in zip(*valid)
            ]
            archive.writestr(f"cola_public/raw/{file}.tsv", "".join(lines[part]))
    content = (tmp_path / "cola_public_1.1.zip").read_bytes()
    monkeypatch.setattr(sentences, "COLA_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.chdir(tmp_path)
    seen = {}  # the epoch of each state of the model

    def evaluate(task: train_cola.Task, part: train_cola.TokenSet) -> Evaluation:
        """The model of an epoch takes so many sentences, from the first one, for the other class."""
        weights = tuple(task.model.classifier.weight.flatten().tolist())
        mistakes = (20, 5, 10)[seen.setdefault(weights, len(seen))]
        predicted = torch.where(torch.arange(60) < mistakes, 1 - part.labels, part.labels)
        logits = torch.nn.functional.one_hot(predicted, 2).float()
        return evaluation(logits, part.labels, train_cola.METRICS, task.positive)

    monkeypatch.setattr(train_cola, "evaluate", evaluate)
    arguments = (
        "--dataset cola --data_dir . --model scratch --wandb disabled --output_dir out --epochs 3"
    )
    metrics = train_cola.main([*arguments.split(), "--batch_size", "4"])
    assert (
        metrics == json.loads((tmp_path / "out/metrics.json").read_text())
        and metrics["dataset"] == "cola"
    )
    assert not (tmp_path / "wandb").exists()

    *_, last = rows = [
        json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()
    ]
    mcc = [row["valid/mcc"] for row in rows if "valid/mcc" in row]
    assert (metrics["best/epoch"], metrics["valid/mcc"]) == (2, mcc[1])
    labels, predicted, _ = as_arrays(predictions(SimpleNamespace(files=tmp_path / "out")), 2)
    assert sklearn.metrics.matthews_corrcoef(labels, predicted) == pytest.approx(mcc[1], abs=1e-12)
    by_domain = {
        d: sklearn.metrics.matthews_corrcoef(labels[part], predicted[part])
        for d, part in domains.items()
    }
    assert by_domain["in_domain"] != by_domain["out_of_domain"]
    for domain, expected in by_domain.items():
        assert (
            metrics[f"valid_{domain}/mcc"]
            == last[f"valid_{domain}/mcc"]
            == pytest.approx(expected, abs=1e-12)
        )


def test_same_command_same_weights_same_vocabulary(tmp_path):
    """With W&B or without, and whatever the order of the sets from which the vocabulary is made."""
    files = f"--train_file {killing.SENTENCES} --valid_file {killing.SENTENCES}"
    arguments = f"{files} --model scratch --epochs 2 --batch_size 16 --max_length 32".split()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = finished_run("train_cola.py", tmp_path / "one", *arguments, "--wandb", "offline")
    two = finished_run(
        "train_cola.py", tmp_path / "two", *arguments, "--wandb", "disabled", PYTHONHASHSEED="2"
    )
    for file in ("model/model.safetensors", "model/tokenizer.json", "predictions.csv"):
        assert (one.files / file).read_bytes() == (two.files / file).read_bytes(), file
    assert {file.name for file in one.files.iterdir()} == {
        file.name for file in two.files.iterdir()
    }
    assert (tmp_path / "one/wandb").exists() and not (tmp_path / "two/wandb").exists()


def test_learning_rate_rises_and_falls(small_cola):
    """Linear warmup over a tenth of the 144 batches (14), then linear decay to almost zero."""
    for row in small_cola.history:
        before = row["_step"] // 125 - 1
        factor = (before + 1) / 15 if before < 14 else (144 - before) / 130
        assert row["train/learning_rate"] == pytest.approx(1e-3 * factor, rel=1e-9)
    assert small_cola.history[-1]["train/learning_rate"] < 1e-5
    assert all(0 < row["train/grad_norm"] < 100 for row in small_cola.history)


def test_defaults_learn_the_built_in_sentences(tmp_path):
    """One epoch reaches 0.35 to 0.6, depending on the seed, and ten 0.98; a bag of words reaches 0.03."""
    arguments = "--dataset synthetic --model scratch --epochs 1 --wandb disabled"
    run = finished_run("train_cola.py", tmp_path, *arguments.split())
    assert run.metrics["valid/mcc"] >= 0.2
    assert "WARNING" not in run.out


def test_batches_by_length():
    lengths = torch.from_numpy(np.random.default_rng(0).geometric(0.1, 3210)).clamp(3, 60)

    def epoch(seed: int, number: int) -> list[list[int]]:
        return [batch.tolist() for batch in batching.by_length(lengths, 32, seed=(seed, number))]

    one, two = epoch(7, 1), epoch(7, 2)
    assert one == epoch(7, 1) != epoch(8, 1)
    assert set(map(frozenset, one)).isdisjoint(map(frozenset, two)), "repeated batches"
    for drawn in (one, two):
        assert sorted(index for batch in drawn for index in batch) == list(range(3210))
        assert len(drawn) == math.ceil(3210 / 32) and Counter(map(len, drawn)) == {32: 100, 10: 1}
        cells = sum(len(batch) * int(lengths[batch].max()) for batch in drawn)
        assert cells < 1.1 * int(lengths.sum())
        in_random_order = sum(len(part) * int(part.max()) for part in lengths.split(32))
        assert in_random_order > 2 * cells, "choose other lengths: these prove nothing"
        longest = [int(lengths[batch].max()) for batch in drawn]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3  # not ordered by length
        assert longest[0] == int(lengths.max())


# ------------------------------------------------------------------------------------- tables and charts


def test_mistakes_table_has_every_mistake_most_confident_first(small_cola):
    table = json.loads(media(small_cola, small_cola.best, "valid/mistakes"))
    assert table["columns"] == [
        "sentence",
        "source",
        "label",
        "prediction",
        "probability",
        "loss",
        "step",
        "mistakes",
    ]
    names, step = ("unacceptable", "acceptable"), small_cola.best["_step"]
    expected = []
    for row in small_cola.rows:
        label, prediction = int(row["label"]), int(row["prediction"])
        if label != prediction:
            numbers = float(row[f"probability_{prediction}"]), float(row["loss"]), step
            expected.append(
                [row["sentence"], row["source"], names[label], names[prediction], *numbers]
            )
    assert len(expected) > 100 and expected != sorted(expected, key=lambda row: -row[4])
    assert [row[:-1] for row in table["data"]] == sorted(expected, key=lambda row: -row[4])
    assert {row[-1] for row in table["data"]} == {len(expected)}


def test_per_source_table(small_cola):
    for key in ("valid/per_source", "valid/per_source_chart_table"):
        table = json.loads(media(small_cola, small_cola.best, key))
        assert table["columns"] == ["source", "sentences", "acc", "mcc"] and len(table["data"]) == 3
        for source, count, acc, mcc in table["data"]:
            labels, predicted, _ = as_arrays(
                [row for row in small_cola.rows if row["source"] == source], 2
            )
            assert count == len(labels) and acc == pytest.approx(
                (labels == predicted).mean(), abs=1e-12
            )
            assert mcc == pytest.approx(
                sklearn.metrics.matthews_corrcoef(labels, predicted), abs=1e-12
            )
        assert [row[2] for row in table["data"]] == sorted(row[2] for row in table["data"])


def test_confusion_chart_matches_the_predictions(small_cola):
    table = json.loads(media(small_cola, small_cola.best, "valid/confusion_matrix_table"))
    names = ("unacceptable", "acceptable")
    counts = Counter(
        (names[int(row["label"])], names[int(row["prediction"])]) for row in small_cola.rows
    )
    assert {(label, prediction): n for label, prediction, n in table["data"] if n} == counts


def test_roc_and_pr_curves(small_cola):
    labels, _, probabilities = as_arrays(small_cola.rows, 2)
    curves = {}
    for name in ("roc", "pr"):
        table = json.loads(media(small_cola, small_cola.best, f"valid/{name}_table"))
        assert {row[1] for row in table["data"]} == {"acceptable"}
        curves[name] = np.array([[x, y] for x, _, y in table["data"]])
    roc, pr = curves["roc"], curves["pr"]
    assert roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1]
    assert pr[0].tolist() == [1, labels.mean()] and pr[-1].tolist() == [0, 1]
    auc = np.sum(np.diff(roc[:, 0]) * (roc[1:, 1] + roc[:-1, 1]) / 2)
    assert auc == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, probabilities[:, 1]), abs=1e-12
    )
    precision = -np.sum(np.diff(pr[:, 0]) * pr[:-1, 1])
    # The chart has at most 1,000 of the 1,001 points.
    assert precision == pytest.approx(
        sklearn.metrics.average_precision_score(labels, probabilities[:, 1]), abs=1e-4
    )


def test_attributions_show_the_20_most_confident_mistakes(small_cola):
    page = media(small_cola, small_cola.best, "valid/attributions")
    assert page.startswith("<!doctype html>") and "<h2>valid, 1,000 examples</h2>" in page
    paragraphs = re.findall(r"<p .*?</p>", page)
    assert len(paragraphs) == page.count("<p") == 20
    mistakes = json.loads(media(small_cola, small_cola.best, "valid/mistakes"))["data"]
    for paragraph, (sentence, _, label, prediction, probability, *_) in zip(paragraphs, mistakes):
        assert f"{label} taken for {prediction}, {100 * probability:.1f}%" in paragraph
        tokens = re.findall(r"<span [^>]*>([^<]*)</span>", paragraph)
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
        text = "".join(tokens[1:-1]).replace("##", "")
        assert text == sentence.lower().replace(" ", "")
        shades = [float(s) for s in re.findall(r"rgba\(\d+, \d+, \d+, ([\d.]+)\)", paragraph)]
        scores = [float(s) for s in re.findall(r'title="([-+.\d]+)"', paragraph)]
        assert len(tokens) == len(shades) == len(scores) and max(shades) == 1
        assert shades == pytest.approx([abs(s) / max(map(abs, scores)) for s in scores], abs=0.02)


def test_attributions_escape_html():
    page = train_cola.viz.shaded_tokens(["<script>", "&", '"'], [1.0, -2.0, 0.0], "<b> taken for a")
    assert "<script>" not in page and "<b>" not in page
    assert html.unescape(re.sub(r"<[^>]*>", "|", page)).count("<script>") == 1
    assert (
        "rgba(240, 120, 105, 0.50)" in page and "rgba(110, 165, 245, 1.00)" in page
    )  # red towards the mistake


class Linear(torch.nn.Module):
    """Logits are linear in the embeddings, with separate weights per position; masked positions are ignored."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(9, 4)
        self.by_position = torch.nn.Parameter(torch.randn(5, 4, 3))

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        shown = inputs_embeds * attention_mask[..., None]
        return SimpleNamespace(
            logits=torch.einsum("ntd,tdc->nc", shown, self.by_position[: shown.shape[1]])
        )


def test_attribution_is_gradient_times_input():
    torch.manual_seed(0)
    model = Linear()
    tokens = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 7, 0, 0]])
    flat = torch.cat([torch.tensor([0]), tokens[0], tokens[1, :3]]).int()
    part = batching.TokenSet(flat, torch.tensor([1, 6, 9]), torch.tensor([0, 1]), cut=0)
    for index, length in ((0, 5), (1, 3)):
        scores = encoders.attribute(model, part, index, answer=2, label=1)
        weight = model.by_position[:length, :, 2] - model.by_position[:length, :, 1]
        assert scores.shape == (length,)
        assert torch.allclose(
            scores, (model.embedding(tokens[index, :length]) * weight).sum(1), atol=1e-6
        )


def test_attribution_of_bert_matches_finite_differences(small_cola):
    """Attribution is the derivative of the logit difference with respect to scaling a token's embedding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        small_cola.files / "model"
    ).double()
    tokens = torch.tensor([[2, 40, 50, 60, 3, 0, 0]])
    flat = torch.cat([torch.tensor([0]), tokens[0, :5]]).int()
    part = batching.TokenSet(flat, torch.tensor([1, 6]), torch.tensor([0]), cut=0)
    scores = encoders.attribute(model, part, 0, answer=1, label=0)
    embedded = model.get_input_embeddings()(tokens[:, :5]).detach()
    for i in range(5):
        ends = []
        for scale in (1 + 1e-4, 1 - 1e-4):
            changed = embedded.clone()
            changed[0, i] *= scale
            logits = model(inputs_embeds=changed).logits[0].detach()
            ends.append(float(logits[1] - logits[0]))
        assert float(scores[i]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4, abs=1e-9)
    assert scores.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------ the saved model


def test_pipeline_gives_the_same_predictions(small_cola):
    answer = transformers.pipeline(
        "text-classification", str(small_cola.files / "model"), device="cpu"
    )
    assert answer.tokenizer.model_max_length == 32
    rows = small_cola.rows[::5]
    for row, scores in zip(rows, answer([row["sentence"] for row in rows], top_k=None)):
        scores = {score["label"]: score["score"] for score in scores}
        expected = {
            "unacceptable": float(row["probability_0"]),
            "acceptable": float(row["probability_1"]),
        }
        assert scores == pytest.approx(expected, abs=1e-5)
    (top,) = answer(rows[0]["sentence"])
    assert top["label"] == ("unacceptable", "acceptable")[int(rows[0]["prediction"])]


def test_model_is_loaded_from_a_saved_directory(small_cola, own_files):
    """Nothing is learned here, so the saved encoder equals the loaded one; only the head is new."""
    place = str(small_cola.files / "model")
    assert (
        own_files.config["model"] == own_files.metrics["model"] == place
        and f"{place}: " in own_files.out
    )
    assert own_files.err.count("!!") == 0
    before, after = weights(small_cola.files / "model"), weights(own_files.files / "model")
    assert after["classifier.weight"].shape == (3, 128)
    for name in before.keys() - {"classifier.weight", "classifier.bias"}:
        assert torch.allclose(before[name], after[name], atol=1e-9), name
    labels = "acceptable, unacceptable"
    line = f"The head of {place} has other labels, {labels}: a new one with 3 replaces it."
    assert line in own_files.out.splitlines()


def test_replaced_head_is_reported_once(own_files):
    assert own_files.out.count("The head of") == 1


def test_user_file_with_three_classes(own_files):
    config = json.loads((own_files.files / "model/config.json").read_text())
    assert config["id2label"] == {"0": "many", "1": "none", "2": "one"}
    assert config["label2id"] == {"many": 0, "none": 1, "one": 2}
    rows = predictions(own_files)
    assert [row["label"] for row in rows] == ["1", "2", "0", "2", "0", "1"]
    assert rows[2]["sentence"] == 'The boys "sleep" in the garden.' and {
        row["source"] for row in rows
    } == {"v.csv"}
    labels, predicted, probabilities = as_arrays(rows, 3)
    assert own_files.metrics["valid/mcc"] == pytest.approx(
        sklearn.metrics.matthews_corrcoef(labels, predicted)
    )
    assert own_files.metrics["valid/loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities), abs=1e-12
    )
    row = own_files.history[-1]
    for chart in ("roc", "pr"):  # one line per class
        lines = {
            line[1] for line in json.loads(media(own_files, row, f"valid/{chart}_table"))["data"]
        }
        assert lines == {"many", "none", "one"}
    assert own_files.config["dataset"] == own_files.metrics["dataset"] == "files"


def test_training_uses_dropout_and_evaluation_does_not(own_files):
    """Nothing is learned here, so only dropout can make epochs differ; the model is loaded in eval mode."""
    ends = [row for row in own_files.journal if "valid/loss" in row]
    assert len(ends) == 3
    assert len({round(row["train/loss_epoch"], 4) for row in ends}) > 1
    assert max(row["valid/loss"] for row in ends) - min(row["valid/loss"] for row in ends) < 1e-6
    assert {row["train/learning_rate"] for row in own_files.journal if len(row) > 1} == {
        1e-12
    }  # constant schedule


def test_missing_data_and_model_are_found_out_quickly(tmp_path, monkeypatch):
    for name, value in clean_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "urllib.request._opener", None
    )  # a cached opener would keep the old proxies
    started = time.perf_counter()
    assert sentences.load_corpus("auto", str(tmp_path)).name == "synthetic"
    assert encoders.find_model(None) in ("scratch", encoders.BERT_TINY)
    assert time.perf_counter() - started < 60


def test_batches_are_padded_and_long_sentences_cost_nothing(small_cola):
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_cola.files / "model")
    texts = ["The boy sleeps."] * 2500 + ["The old boy sleeps. " * 90]
    part = batching.tokenise(texts, [0] * 2501, tokenizer, 400, torch.device("cpu"))
    rows = tokenizer(texts[2499:], truncation=True, max_length=400)["input_ids"]
    stored = [part.tokens[part.offsets[i] : part.offsets[i + 1]].tolist() for i in (2499, 2500)]
    assert stored == rows and part.tokens.dtype == torch.int32
    for indices in (torch.tensor([2499, 2500]), torch.tensor([0, 7])):
        padded = [rows[i == 2500] for i in indices.tolist()]
        longest = max(map(len, padded))  # it was rounded up to a multiple of eight
        inputs = batching.inputs_of(part, indices)
        assert inputs["input_ids"].tolist() == [
            ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in padded
        ]
        assert inputs["attention_mask"].tolist() == [
            [int(i < len(ids)) for i in range(longest)] for ids in padded
        ]
        assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}
    with torch.autocast("cpu", torch.bfloat16):
        widths = [
            batching.inputs_of(part, torch.tensor([i]))["input_ids"].shape[1] for i in (0, 2500)
        ]
    assert len(rows[0]) == 6 and widths == [8, len(rows[1])]  # never beyond the longest sentence
    used = sum(t.nbytes for t in part if isinstance(t, torch.Tensor))
    assert used / len(texts) < 60


def test_truncation_is_reported_with_a_count(small_cola, own_files):
    """In each file two of six sentences have 6 tokens, "[CLS] the boy sleeps . [SEP]"; the others have 9 or more."""
    assert own_files.out.count("8 sentences are longer than --max_length 7 tokens") == 1
    assert "--max_length 32" not in small_cola.out
    assert (
        json.loads((own_files.files / "model/tokenizer_config.json").read_text())[
            "model_max_length"
        ]
        == 7
    )


def test_only_longer_sentences_count_as_truncated(small_cola):
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_cola.files / "model")
    sentences = ["The boy sleeps.", "The old boy sleeps."]
    tokenised = batching.tokenise(sentences, [0, 1], tokenizer, 6, torch.device("cpu"))
    assert (tokenised.lengths.tolist(), tokenised.cut) == ([6, 6], 1)


def test_clipping_and_weight_decay(small_cola, tmp_path):
    """Clipping the gradient to almost zero leaves only weight decay: 1% per step, on linear layers only."""
    lines = [
        "sentence\tlabel\tsource",
        *(
            f'The "boy {i} sleeps.\t{("Unacceptable", "Acceptable")[i % 2]}\tfrom {i % 2}'
            for i in range(8)
        ),
    ]
    for part in ("t.tsv", "v.tsv"):
        (tmp_path / part).write_text("\n".join(lines))
    files = "--train_file t.tsv --valid_file v.tsv --epochs 2 --batch_size 4 --schedule constant --warmup_ratio 0"
    decay = "--clip_norm 1e-13 --weight_decay 10 --learning_rate 1e-3 --log_every 1 --wandb disabled --max_length 32"
    place = small_cola.files / "model"
    run = finished_run("train_cola.py", tmp_path, *files.split(), *decay.split(), "--model", place)
    assert all(
        row["train/grad_norm"] > 1e-3 for row in run.journal if "train/grad_norm" in row
    )  # before clipping
    checkpoint = torch.load(run.files / "checkpoint.pt", weights_only=True)
    last, vocabulary = (
        checkpoint["model"],
        len(weights(place)["bert.embeddings.word_embeddings.weight"]),
    )
    rows = [moments["exp_avg"].shape[0] for moments in checkpoint["optimizer"]["state"].values()]
    assert vocabulary not in rows  # only words that occur are trained
    for name, before in weights(place).items():
        if "LayerNorm" in name or "embeddings" in name or name.endswith("bias"):
            assert torch.allclose(last[name], before, atol=1e-6), name
        else:
            assert torch.allclose(last[name], before * 0.99**4, atol=1e-6), name
    assert "The head of" not in run.out
    rows = predictions(run)
    # The later one in the data's order, and the first one of the model's.
    assert run.metrics["positive_label"] == run.config["positive_label"] == "Unacceptable"
    labels, _, probabilities = as_arrays(rows, 2)
    assert run.metrics["valid/average_precision"] == pytest.approx(
        sklearn.metrics.average_precision_score(labels == 0, probabilities[:, 0])
    )
    assert "positive class: Unacceptable" in run.out
    assert rows[3]["sentence"] == 'The "boy 3 sleeps.' and rows[3]["source"] == "from 1"
    assert json.loads((run.files / "model/config.json").read_text())["id2label"] == {
        "0": "Unacceptable",
        "1": "Acceptable",
    }


def test_label_smoothing_changes_the_training_loss_only(small_cola, tmp_path):
    model = shutil.copytree(small_cola.files / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    changed = weights(model)
    changed["classifier.weight"] *= 0.1
    changed["classifier.bias"] = torch.tensor([0.0, 2.0])  # sure, however it was trained
    safetensors.torch.save_file(changed, model / "model.safetensors", {"format": "pt"})
    lines = [
        "sentence\tlabel",
        "The boy sleeps.\tacceptable",
        "The old girl took the book.\tacceptable",
        "The old farmer the book chose every day.\tunacceptable",
    ]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    arguments = "--train_file t.tsv --valid_file t.tsv --model model --epochs 1 --learning_rate 1e-12 --batch_size 3"
    options = f"{arguments} --max_length 32 --precision fp32 --label_smoothing 0.3 --wandb disabled"
    run = finished_run(
        "train_cola.py", tmp_path, *options.split(), *"--positive_label acceptable".split()
    )
    labels, _, probabilities = as_arrays(predictions(run), 2)
    assert "positive class: acceptable" in run.out
    assert run.metrics["valid/average_precision"] == pytest.approx(
        sklearn.metrics.average_precision_score(labels, probabilities[:, 1])
    )
    right, every = np.log(probabilities[range(3), labels]).mean(), np.log(probabilities).mean()
    assert run.metrics["valid/loss"] == pytest.approx(-right, abs=1e-6)
    assert run.journal[-1]["train/loss_epoch"] == pytest.approx(
        -0.7 * right - 0.3 * every, abs=1e-5
    )
    assert abs(right - every) > 1e-2


def test_only_used_rows_of_an_embedding_are_trained(tmp_path):
    """Losses match those of the whole embedding, unused rows keep every bit, and the files hold all rows."""
    config = transformers.BertConfig(
        vocab_size=500,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    whole = transformers.BertForSequenceClassification(config).train()
    used_only = copy.deepcopy(whole)
    tokens = (
        torch.randint(1, 500, (4, 6)) // 10 * 10
    )  # fewer than half of the rows, even with padding
    encoders.train_used_rows(used_only, [tokens[:2], tokens[2:]])
    before = whole.state_dict()["bert.embeddings.word_embeddings.weight"].clone()
    assert used_only.get_input_embeddings().weight.shape[0] == len(tokens.unique()) + (
        0 not in tokens
    )
    losses = []
    for model in (whole, used_only):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
        for _ in range(3):
            loss = model(input_ids=tokens, labels=torch.tensor([0, 1, 0, 1])).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-6) and losses[2] < losses[0]
    used_only.save_pretrained(tmp_path)
    saved = weights(tmp_path)
    assert saved.keys() == whole.state_dict().keys()
    for name, expected in whole.state_dict().items():
        assert torch.allclose(saved[name], expected, atol=1e-4), name
    unused = [i for i in range(500) if i not in tokens]
    assert torch.equal(saved["bert.embeddings.word_embeddings.weight"][unused], before[unused])
    used_only.load_state_dict(whole.state_dict())
    assert killing.same(dict(used_only.state_dict()), dict(whole.state_dict()))


# ------------------------------------------------------------------------------------------------ printed output


def test_printed_lines(small_cola):
    lines = small_cola.out.splitlines()
    assert [line[:8] for line in lines if line.startswith("epoch")] == ["epoch 1:", "epoch 2:"]
    mcc = small_cola.ends[-1]["valid/mcc"]
    assert f" valid/mcc {mcc:.4f}" in next(line for line in lines if line.startswith("epoch 2:"))
    assert "12,000 + 1,000 sentences" in small_cola.out and "50.0% of the latter" in small_cola.out
    assert "\r" not in small_cola.out and "WARNING" not in small_cola.out
    best = lines[-2]
    for key in ("mcc", "mcc_low", "mcc_high"):
        assert f"{small_cola.metrics[f'valid/{key}']:.3f}" in best
    assert re.search(
        r"out( \| look at it: wandb leet \S+)? \| upload it: wandb sync( --append)? \S+$", lines[-1]
    )


def test_loud_fallback_and_warning_about_constant_predictions(tmp_path):
    fixed = "--max_steps 2 --learning_rate 1e-12 --batch_size 8"
    run = finished_run("train_cola.py", tmp_path, *fixed.split())
    assert "!!  This run uses the BUILT-IN synthetic data instead" in run.err
    assert "!!  This run trains the same architecture from RANDOM weights instead" in run.err
    for used in (run.config, run.metrics, config_in_wandb(run)):
        assert (used["dataset"], used["model"]) == ("synthetic", "scratch")
    (answer,) = {row["prediction"] for row in predictions(run)}
    (warning,) = [line for line in run.out.splitlines() if line.startswith("WARNING")]
    assert f"predicts {['unacceptable', 'acceptable'][int(answer)]!r} for every example" in warning
    assert "50.0%" in warning and run.metrics["valid/mcc"] == 0


# ------------------------------------------------------------------------------------------------ bad input


def test_named_model_is_not_replaced(tmp_path):
    done = call("train_cola.py", *"--dataset synthetic --model foo/bar".split(), cwd=tmp_path)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith(
        "train_cola.py: error: --model foo/bar is not a directory, not in the hub's cache"
    )
    assert not written(tmp_path)


BAD = {
    "--dataset cola --model scratch": "cola_public_1.1.zip missing, and can't be downloaded: https://nyu-mll",
    "--dataset cola --data_dir . --model scratch": "cola_public_1.1.zip is damaged: it differs from the published file",
    "--train_file t.csv --model scratch": "--train_file and --valid_file go together: name both",
    "--train_file t.csv --valid_file bad.csv --model scratch": "bad.csv, row 3: expected 2 columns, got 3",
    "--train_file one.csv --valid_file t.csv --model scratch": "one.csv: column 'label' has 1 distinct labels in 2",
    "--train_file t.csv --valid_file t.csv --model scratch": "--batch_size 64 is more than the 6 training examples",
    "--dataset synthetic --model scratch --max_length 513": "--max_length 513 is more than the model's limit, 512",
    "--dataset synthetic --model MODEL --max_length 513": "--max_length 513 is more than the model's limit, 512",
    "--dataset synthetic --model bare": "--model bare can't be used: it has no tokenizer: save it there too",
    "--dataset synthetic --model empty": "--model empty can't be used: ",
    "--dataset synthetic --model wandb:a/b/c:best": "wandb:a/b/c:best is fetched from W&B, but this run is not online",
    "--max_length 3": "--max_length: must be at least 4, got '3'",
    "--dataset snythetic": "must be one of auto, cola, synthetic, files; got 'snythetic'; did you mean synthetic?",
    "--monitor valid/auc": "--monitor: must be one of valid/loss",
    # Before, mcc was 0.0 in each epoch, and the first one was the best.
    "--train_file t.csv --valid_file same.csv --model scratch": "--monitor valid/mcc needs two classes, both in the",
    "--train_file t.csv --valid_file t.csv --monitor valid/roc_auc": "--monitor valid/roc_auc needs two classes, both",
    "--train_file t.csv --valid_file t.csv --positive_label one": "--positive_label one: must be one of two classes, but",
    "--dataset synthetic --positive_label yes": "must be one of two classes, but the data has acceptable, unacceptable",
    "--train_file t.csv --valid_file t.csv --test_file new.csv": "new.csv, row 2: the label 'few' does not occur in t",
    "--test_file t.csv --model scratch": "--train_file and --valid_file go together: name both",
}


@pytest.mark.parametrize("arguments, message", BAD.items())
def test_bad_input(tmp_path, small_cola, monkeypatch, capfd, arguments, message):
    """In-process for speed; `train_cola.py` prints the same lines."""
    (tmp_path / "cola_public_1.1.zip").write_bytes(b"PK")
    (tmp_path / "t.csv").write_text(CSV)
    (tmp_path / "bad.csv").write_text("sentence,label\nfine,one\nA comma, bare,one\n")
    (tmp_path / "one.csv").write_text("sentence,label\nx,a\ny,a\n")
    (tmp_path / "same.csv").write_text("sentence,label\nx,one\ny,one\n")
    (tmp_path / "new.csv").write_text("sentence,label\nx,few\n")
    (tmp_path / "empty").mkdir()
    without_tokenizer = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(small_cola.files / "model", tmp_path / "bare", ignore=without_tokenizer)
    before = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_cola.py"])
    monkeypatch.setattr(
        "urllib.request._opener", None
    )  # a cached opener would keep the old proxies
    for name, value in clean_environment(tmp_path, WANDB_MODE="offline").items():
        monkeypatch.setenv(name, value)
    given = arguments.replace("MODEL", str(small_cola.files / "model")).split()
    status = script.status_of(lambda: train_cola.main(given))
    (line,) = capfd.readouterr().err.splitlines()
    assert status == 2 and line.startswith("train_cola.py: error: ") and message in line
    assert written(tmp_path) == before
