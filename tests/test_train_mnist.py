"""train_mnist.py as users see it: files, W&B records, printed output, weights."""

import csv
import fcntl
import json
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import sklearn.metrics
import torch
import wandb
from conftest import (
    REPO,
    call,
    clean_environment,
    finished_run,
    merged,
    wandb_records,
    write_mnist,
)
from PIL import Image

import train_mnist
import viz
from harness import tracking
from harness.device import seed_everything
from metrics import BINARY_METRICS, EVALUATION_METRICS
from reporting.runs import PROVENANCE
from tasks.digits import Digits, split_digits, synthetic_digits
from tests import forking, killing

QUICK = f"{killing.DIGITS} --slice 4 --valid_size 1000 --epochs 1".split()  # 8 batches

METRICS = EVALUATION_METRICS.keys() - BINARY_METRICS
CHARTS = {
    "confusion_matrix_table",
    "confusion_matrix_image",
    "mistakes",
    "logits",
    "calibration",
    "per_class",
}


def keys(row: dict) -> set[str]:
    """The keys logged in a row; W&B's reader writes the fields of an object as key.field."""
    fields = r"\.(_type|bins|values|path|size|sha256|format|width|height|count|captions|filenames|ncols|nrows|.*)$"
    return {
        re.sub(fields, "", key)
        for key in row
        if not key.startswith(("gradients/", "parameters/", "_"))
    }


def predictions(run) -> list[dict[str, str]]:
    with (run.files / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def media(run, key: str, row: dict) -> dict:
    """The table that a history row logged under `key`."""
    return json.loads((run.cwd / "wandb/latest-run/files" / row[f"{key}.path"]).read_text())


# --------------------------------------------------------------------------------------- files and records


@pytest.mark.quick
def test_every_file_is_there(small_mnist):
    names = "config.json history.jsonl checkpoint.pt metrics.json predictions.csv confusion_matrix.png mistakes.png"
    names += " curves.png model.onnx model.pt checkpoint.previous.pt test_predictions.csv"
    names += " test_confusion_matrix.png"
    assert {file.name for file in small_mnist.files.iterdir()} == {*names.split()}
    assert Image.open(small_mnist.files / "curves.png").size == (1680, 660)


@pytest.mark.quick
def test_confusion_matrices_are_of_validation_and_test(small_mnist):
    """The test accuracy was reported, but the only picture was of the validation data."""
    for part, prefix in (("valid", ""), ("test", "test_")):
        counts = torch.zeros(10, 10, dtype=torch.int64)
        with (small_mnist.files / f"{prefix}predictions.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                counts[int(row["label"]), int(row["prediction"])] += 1
        expected = viz.confusion_matrix_picture(counts, [str(i) for i in range(10)], part)
        picture = Image.open(small_mnist.files / f"{prefix}confusion_matrix.png")
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_every_key_is_in_wandb(small_mnist):
    steps = {
        f"train/{key}" for key in ("loss_step", "acc_step", "learning_rate", "examples_per_second")
    } | {"epoch"}
    epoch = {"train/loss_epoch", "train/acc_epoch", "train/inputs"} | {
        f"valid/{key}" for key in METRICS | CHARTS
    }
    test = {f"test/{key}" for key in METRICS | CHARTS}
    ends = [row for row in small_mnist.history if "train/loss_epoch" in row]
    assert len(ends) == 3
    for row in small_mnist.history:
        expected = (
            steps
            | (epoch if row in ends else set())
            | (test | {"curves"} if row is ends[-1] else set())
        )
        assert keys(row) == expected
    assert {f"best/{key}" for key in METRICS | {"epoch"}} <= set(small_mnist.summary)


def test_steps_count_training_examples(small_mnist):
    # Every fifth of 16,000 images is 3,200: 25 batches of 128 per epoch, a row every 10 batches and per epoch
    rows = [1280, 2560, 3200, 3840, 5120, 6400, 7680, 8960, 9600]
    assert [row["_step"] for row in small_mnist.history] == rows
    assert [
        row["step"] for row in small_mnist.journal
    ] == rows  # the last row also holds the test metrics


def test_journal_and_wandb_hold_the_same_numbers(small_mnist):
    journal = {}
    for row in small_mnist.journal:
        journal.setdefault(row["step"], {}).update(
            {key: value for key, value in row.items() if key != "step"}
        )
    history = {}
    for row in small_mnist.history:
        numbers = {
            k: v for k, v in row.items() if isinstance(v, (int, float)) and not k.startswith("_")
        }
        history[row["_step"]] = {
            key: value for key, value in numbers.items() if "." not in key
        }  # no media fields
    assert journal == history


def test_watch_logs_every_weight_once_per_epoch(small_mnist):
    weights = [
        f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc") for kind in ("weight", "bias")
    ]
    for row in small_mnist.history:
        expected = {f"{what}/{name}" for what in ("gradients", "parameters") for name in weights}
        found = {
            key.removesuffix("._type")
            for key in row
            if key.startswith(("gr", "par")) and key.endswith("._type")
        }
        assert found == (expected if row["_step"] % 3200 == 0 else set())


@pytest.mark.parametrize("parts", [[], ["--micro_batch_size", 50]])
def test_watch_between_rows_keeps_its_own_step(parts, tmp_path):
    run = finished_run(
        "train_mnist.py",
        tmp_path,
        *QUICK,
        "--watch",
        "gradients",
        "--watch_every",
        4,
        "--max_steps",
        7,
        *parts,
    )
    assert [row["_step"] for row in run.history if "gradients/fc.bias._type" in row] == [4 * 128]
    assert not any(key.startswith("parameters/") for row in run.history for key in row)


@pytest.fixture
def wandb_here():
    """For W&B in this process, which keeps its first directory until it is torn down."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.quick
def test_watch_sees_training_only_and_each_model_by_its_name(tmp_path, wandb_here):
    """W&B counted forward passes, those of an evaluation too, and went on counting models in a second run."""
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    names = ["bias", "graph_1bias", "graph_1weight", "weight"]
    expected = {f"{kind}/{name}" for kind in ("gradients", "parameters") for name in names}
    for number in ("one", "two"):  # runs in a process
        directory = tmp_path / number
        directory.mkdir()
        run = tracking.Run(wandb.init(mode="offline", dir=directory))
        for step in (1, 2):
            run.log({"loss": 1.0}, step=step)
            for model in (first, second):
                if step == 1:
                    run.watch(model, log="all")
                model(torch.ones(1, 1)).backward()
            run.unwatch()
        run.commit()
        run.finish(0)
        wandb.teardown()  # older versions write the file's end only then
        records = wandb_records(directory)
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        kind = "._type"
        found = [{key.removesuffix(kind) for key in row if key.endswith(kind)} for row in rows]
        assert found == [expected, set()]


class WithoutLength(torch.nn.Linear):
    def __len__(self) -> int:  # as of a compiled model
        raise TypeError("no length")


@pytest.mark.quick
def test_watch_of_a_compiled_model_ends_with_the_batch(tmp_path, wandb_here, capsys):
    """W&B asked for the model's length before it removed its hooks."""
    model = WithoutLength(1, 1)
    run = tracking.Run(wandb.init(mode="offline", dir=tmp_path))
    run.log({}, step=1)
    run.watch(model, log="all")
    model(torch.ones(1, 1)).backward()
    run.unwatch()
    assert not model._forward_hooks and not model.weight._backward_hooks
    run.finish(0)
    assert "W&B has failed" not in capsys.readouterr().err


def test_best_is_the_epoch_with_the_lowest_validation_loss(tmp_path):
    # The labels for validation are wrong, so that its loss rises while the model learns, however a processor rounds.
    digits = synthetic_digits(train=2500, test=500)
    digits.train.labels[-1000:] = (digits.train.labels[-1000:] + 1) % 10
    write_mnist(tmp_path, digits)
    data = "--dataset mnist --data_dir . --valid_size 1000 --epochs 3 --log_model best"
    run = finished_run("train_mnist.py", tmp_path, *data.split())
    epochs = [row for row in run.journal if "valid/loss" in row]
    best = min(epochs, key=lambda row: row["valid/loss"])
    assert best is not epochs[-1]
    assert run.metrics["best/epoch"] == run.summary["best/epoch"] == best["epoch"]
    for name in METRICS:
        assert run.metrics[f"valid/{name}"] == run.summary[f"best/{name}"] == best[f"valid/{name}"]
    weights = torch.load(run.files / "model.pt", weights_only=True)
    last = torch.load(run.files / "checkpoint.pt", weights_only=True)["model"]
    assert not torch.equal(weights["fc.weight"], last["fc.weight"])

    # The same model is tested, exported and logged.
    model = train_mnist.ConvNet([16, 32])
    model.load_state_dict(weights)
    images, labels = digits.test.images / 255, digits.test.labels
    with torch.inference_mode():
        logits = model(images)
    assert run.metrics["test/acc"] == pytest.approx(
        float((logits.argmax(1) == labels).float().mean())
    )
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert run.metrics["test/loss"] == pytest.approx(float(expected), abs=1e-5)
    session = onnxruntime.InferenceSession((run.files / "model.onnx").read_bytes())
    (exported,) = session.run(["logits"], {"images": images.numpy()})
    assert np.abs(exported - logits.numpy()).max() < 1e-4
    artifacts = [record["artifact"] for record in run.records if record["type"] == "artifact"]
    (entry,) = (a["manifest"]["contents"][0] for a in artifacts if a["type"] == "model")
    logged = torch.load(entry["local_path"], weights_only=True)
    assert all(torch.equal(logged[name], weights[name]) for name in weights)


def test_metrics_match_the_predictions(small_mnist):
    rows = predictions(small_mnist)
    labels, predicted = ([int(row[name]) for row in rows] for name in ("label", "prediction"))
    probabilities = np.array([[float(row[f"probability_{c}"]) for c in range(10)] for row in rows])
    assert len(rows) == 800 and (probabilities.argmax(1) == predicted).all()
    metrics, sk = small_mnist.metrics, sklearn.metrics
    assert metrics["valid/acc"] == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert metrics["valid/mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-12)
    for name in ("precision", "recall", "f1"):
        score = getattr(sk, f"{name}_score")
        for average in ("macro", "micro"):
            expected = score(labels, predicted, average=average)
            assert metrics[f"valid/{name}_{average}"] == pytest.approx(expected, abs=1e-12)
    assert metrics["valid/loss"] == pytest.approx(sk.log_loss(labels, probabilities), abs=1e-12)
    assert metrics["valid/loss"] == pytest.approx(
        np.mean([float(row["loss"]) for row in rows]), abs=1e-12
    )
    assert metrics["valid/majority_share"] == max(np.bincount(labels)) / 800
    assert (metrics["dataset"], metrics["model"]) == ("synthetic", "ConvNet [16, 32]")


@pytest.mark.parametrize(
    "part, file", [("valid", "predictions.csv"), ("test", "test_predictions.csv")]
)
def test_figures_of_each_class(small_mnist, part, file):
    """Only their averages were kept; predictions of the test images were not kept at all."""
    with (small_mnist.files / file).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == list(predictions(small_mnist)[0]) and len(rows) == 800
    labels, predicted = ([int(row[name]) for row in rows] for name in ("label", "prediction"))
    metrics = small_mnist.metrics
    assert metrics[f"{part}/acc"] == sklearn.metrics.accuracy_score(labels, predicted)
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(10), zero_division=0
    )
    names = ("precision", "recall", "f1", "examples")
    for name, values in zip(names, expected):
        found = [metrics[f"{part}/{name}/{digit}"] for digit in range(10)]
        assert found == pytest.approx(values.tolist(), abs=1e-12)
    table = media(small_mnist, f"{part}/per_class", small_mnist.history[-1])
    assert table["columns"] == ["class", *names]
    assert len(table["data"]) == 10
    if part == "test":  # of the best model
        assert [row[0] for row in table["data"]] == [str(digit) for digit in range(10)]
        assert [row[4] for row in table["data"]] == expected[3].tolist()


def test_table_holds_the_most_confident_mistakes(small_mnist):
    last = small_mnist.history[-1]
    table = media(small_mnist, "valid/mistakes", last)
    assert table["columns"] == [
        "image",
        "label",
        "prediction",
        "probability",
        "loss",
        "step",
        "mistakes",
    ]
    assert small_mnist.metrics["best/epoch"] == 3, (
        "compares the last epoch's table with the best model's predictions"
    )
    rows = predictions(small_mnist)

    def confidence(row: dict[str, str]) -> float:
        return max(float(row[f"probability_{c}"]) for c in range(10))

    wrong = [
        (r["label"], r["prediction"], confidence(r)) for r in rows if r["label"] != r["prediction"]
    ]
    assert len(wrong) > 20
    assert [tuple(row[1:4]) for row in table["data"]] == sorted(wrong, key=lambda row: -row[2])[
        :100
    ]
    assert {tuple(row[5:]) for row in table["data"]} == {(last["_step"], len(wrong))}

    # The table's artifact holds the images; the first is that of the most confident mistake.
    tables = (record["artifact"] for record in small_mnist.records if record["type"] == "artifact")
    contents = [t["manifest"]["contents"] for t in tables if "validmistakes" in t["name"]][-1]
    local = {entry["path"]: Path(entry["local_path"]) for entry in contents}
    first = json.loads(local["valid/mistakes.table.json"].read_text())["data"][0]
    held_out = synthetic_digits().train.images[16_000::5, 0]
    most_confident = max((row for row in rows if row["label"] != row["prediction"]), key=confidence)
    shown = np.array(Image.open(local[first[0]["path"]]))
    assert np.array_equal(shown, held_out[rows.index(most_confident)].numpy())


def test_confusion_chart_matches_the_predictions(small_mnist):
    table = media(small_mnist, "valid/confusion_matrix_table", small_mnist.history[-1])
    counted = {(actual, predicted): n for actual, predicted, n in table["data"] if n}
    expected = {}
    for row in predictions(small_mnist):
        cell = row["label"], row["prediction"]
        expected[cell] = expected.get(cell, 0) + 1
    assert counted == expected


def test_input_images_have_captions(small_mnist):
    captions = small_mnist.history[-1]["train/inputs.captions"]
    assert len(captions) == 16 and all(
        re.fullmatch(r"Pred: \d Truth: \d", caption) for caption in captions
    )
    labels = synthetic_digits().train.labels[:16_000:5]
    last_batch = np.random.default_rng((42, 3)).permutation(3_200)[24 * 128 :]
    assert [int(caption[-1]) for caption in captions] == labels[last_batch[:16]].tolist()


def test_artifacts(small_mnist):
    artifacts = [
        record["artifact"] for record in small_mnist.records if record["type"] == "artifact"
    ]
    models = [artifact for artifact in artifacts if artifact["type"] == "model"]
    losses = [row["valid/loss"] for row in small_mnist.journal if "valid/loss" in row]
    is_best = [loss == min(losses[: i + 1]) for i, loss in enumerate(losses)]
    assert [set(model["aliases"]) for model in models] == [
        {"latest", "best"} if b else {"latest"} for b in is_best
    ]
    (dataset,) = (artifact for artifact in artifacts if artifact["type"] == "dataset")
    assert dataset["name"] == "synthetic"
    (code,) = (artifact for artifact in artifacts if artifact["type"] == "code")
    logged = {entry["path"] for entry in code["manifest"]["contents"]}
    assert {"train_mnist.py", "metrics.py", "harness/session.py", "tasks/digits.py"} <= logged
    others = ("tests/", "benchmarks/", "offline_sweep/", "report")  # not imported, like any YAML
    assert not any(path.startswith(others) or not path.endswith(".py") for path in logged)


def test_tags_config_and_saved_files(small_mnist):
    run = {}
    for record in small_mnist.records:
        if record["type"] == "run":
            run |= record["run"]
    assert (
        run["tags"] == ["one", "two words", "synthetic"]
        and run["notes"] == "a note"
        and run["project"] == "mnist"
    )
    config = run["config"]["update"] | merged(small_mnist.records, "config")
    assert config["dataset"] == small_mnist.config["dataset"] == "synthetic"
    expected = {k: v for k, v in small_mnist.config.items() if k not in (*PROVENANCE, "versions")}
    assert {key: config[key] for key in expected} == expected
    saved = small_mnist.cwd / "wandb/latest-run/files"
    for name in ("model.onnx", "model.pt"):
        assert (saved / name).read_bytes() == (small_mnist.files / name).read_bytes()


def test_onnx_matches_pytorch(small_mnist):
    model = train_mnist.ConvNet([16, 32])
    model.load_state_dict(torch.load(small_mnist.files / "model.pt", weights_only=True))
    session = onnxruntime.InferenceSession((small_mnist.files / "model.onnx").read_bytes())
    for batch in (1, 7):
        images = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        assert logits.shape == (batch, 10)
        assert np.abs(logits - model(images).detach().numpy()).max() < 1e-4


def test_checkpoint_loads_safely(small_mnist):
    checkpoint = torch.load(small_mnist.files / "checkpoint.pt", weights_only=True)
    train_mnist.ConvNet([16, 32]).load_state_dict(checkpoint["model"])
    assert checkpoint["position"] == {
        "epoch": 3,
        "batch": 75,
        "step": 9600,
        "epoch_ends": True,
        "batches_in_epoch": 25,
        "total_batches": 75,
        "patience_from": 0,
    }
    losses = [row["valid/loss"] for row in small_mnist.journal if "valid/loss" in row][
        :2
    ]  # saved before validation
    assert checkpoint["best"]["epoch"] == 1 + losses.index(min(losses))


# -------------------------------------------------------------------------------------- training and metrics


def test_same_command_same_weights(tmp_path):
    weights = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        cwd = tmp_path / name
        cwd.mkdir()
        run = finished_run("train_mnist.py", cwd, *QUICK, "--seed", seed, "--wandb", "disabled")
        weights.append(torch.load(run.files / "model.pt", weights_only=True))
    a, b, c = weights
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_convnet_matches_the_tutorial(small_mnist):
    """Pooling before ReLU gives the same result as the tutorial's order, here with two arbitrary widths."""
    model = train_mnist.ConvNet([3, 5])
    layers = [
        model.conv1,
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        model.conv2,
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
    ]
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(
        model(images), torch.nn.Sequential(*layers, torch.nn.Flatten(), model.fc)(images)
    )
    assert sum(p.numel() for p in train_mnist.ConvNet([16, 32]).parameters()) == 416 + 12832 + 15690


def accuracy(model: torch.nn.Module, digits: Digits, epochs: int) -> float:
    """Test accuracy after training."""
    torch.manual_seed(0)
    images, optimizer = digits.train.images / 255, torch.optim.Adam(model.parameters(), 0.002)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = torch.nn.functional.cross_entropy(
                model(images[batch]), digits.train.labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        hits = model(digits.test.images / 255).argmax(1) == digits.test.labels
    return float(hits.float().mean())


def test_synthetic_digits_need_more_than_a_linear_model():
    digits = synthetic_digits()
    linear = accuracy(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), digits, epochs=3
    )
    convolutional = accuracy(train_mnist.ConvNet([16, 32]), digits, epochs=1)
    assert convolutional > 0.7 and linear < 0.5  # 0.86 and 0.37, or nearly, as a processor rounds


def test_label_smoothing_changes_the_training_loss_only(tmp_path):
    one_batch = "--dataset synthetic --slice 20 --valid_size 2000 --epochs 1 --batch_size 700 --precision fp32"
    fixed = f"{one_batch} --learning_rate 1e-12 --label_smoothing 0.3 --wandb disabled"
    run = finished_run("train_mnist.py", tmp_path, *fixed.split())
    model, digits = (
        train_mnist.ConvNet([16, 32]),
        split_digits(synthetic_digits(), valid_size=2000, every=20),
    )
    model.load_state_dict(torch.load(run.files / "model.pt", weights_only=True))
    losses = {}
    for name in ("train", "valid"):
        images, labels = getattr(digits, name)
        with torch.inference_mode():
            log_probabilities = model(images / 255).log_softmax(1)
        right = log_probabilities.gather(1, labels[:, None]).mean()
        losses[name] = float(-right), float(-0.7 * right - 0.3 * log_probabilities.mean())
    assert run.metrics["valid/loss"] == pytest.approx(losses["valid"][0], abs=1e-5)
    assert run.journal[0]["train/loss_step"] == pytest.approx(losses["train"][1], abs=1e-5)
    assert abs(losses["train"][1] - losses["train"][0]) > 1e-4


def test_patience_stops_and_keeps_the_first_best_epoch(tmp_path):
    fixed = "--learning_rate 1e-12 --schedule constant --patience 2 --monitor valid/acc --wandb disabled"
    run = finished_run("train_mnist.py", tmp_path, *QUICK, *fixed.split(), "--epochs", 9)
    assert [row["epoch"] for row in run.journal if "valid/acc" in row] == [1, 2, 3]
    assert run.metrics["best/epoch"] == 1


def test_without_validation_the_last_model_is_tested(tmp_path):
    arguments = "--valid_size 0 --epochs 2 --schedule constant --log_model best --kernels 4 8"
    run = finished_run("train_mnist.py", tmp_path, *QUICK, *arguments.split())
    assert run.metrics["best/epoch"] == 2 and not any(
        key.startswith("valid/") for key in run.metrics
    )
    assert len(predictions(run)) == 250  # the test images
    rates = {row["train/learning_rate"] for row in run.journal if "train/learning_rate" in row}
    assert rates == {0.005}
    last = torch.load(run.files / "checkpoint.pt", weights_only=True)["model"]
    assert all(
        torch.equal(last[k], v)
        for k, v in torch.load(run.files / "model.pt", weights_only=True).items()
    )
    (model,) = (
        r["artifact"]
        for r in run.records
        if r["type"] == "artifact" and r["artifact"]["type"] == "model"
    )
    assert set(model["aliases"]) == {"latest", "best"}


def test_one_cycle_matches_torch(small_mnist):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.005, 75, pct_start=0.1, cycle_momentum=False
    )
    rates = [schedule.get_last_lr()[0]]
    for _ in range(74):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    logged = [
        row["train/learning_rate"] for row in small_mnist.journal if "train/learning_rate" in row
    ]
    assert logged == pytest.approx(
        [rates[batch - 1] for batch in (10, 20, 25, 30, 40, 50, 60, 70, 75)]
    )


def test_seed_covers_every_generator():
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed, deterministic=False)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    first = draw(1)
    assert draw(1) == first and not set(draw(2)) & set(first)


def test_logits_are_logged_not_probabilities(small_mnist):
    bins = small_mnist.history[-1]["valid/logits.bins"]
    assert min(bins) < -1 and max(bins) > 1


def test_settings_that_a_sweep_puts_only_in_the_config_are_used(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "wandb_version: 1\nkernels:\n  value: [4, 8]\nlearning_rate:\n  value: '2e-3'\n"
    )
    sweep = {"WANDB_SWEEP_ID": "abc", "WANDB_SWEEP_PARAM_PATH": "sweep.yaml"}
    run = finished_run("train_mnist.py", tmp_path, *QUICK, "--schedule", "constant", **sweep)
    assert run.config["kernels"] == [4, 8] and run.metrics["model"] == "ConvNet [4, 8]"
    assert run.journal[0]["train/learning_rate"] == 0.002

    (tmp_path / "sweep.yaml").write_text("wandb_version: 1\nepochs:\n  value: 0\n")
    refused = call("train_mnist.py", *QUICK, "--output_dir", "refused", cwd=tmp_path, **sweep)
    assert (
        refused.status == 2
        and "Traceback" not in refused.err
        and not (tmp_path / "refused").exists()
    )
    assert (
        refused.err.splitlines()[-1]
        == "train_mnist.py: error: config.epochs: must be at least 1, got 0"
    )


def test_main_can_be_imported_and_returns_the_metrics(tmp_path):
    code = f"import train_mnist, json; print(json.dumps(train_mnist.main({[*QUICK, '--output_dir', 'out']})))"
    environment = clean_environment(tmp_path, PYTHONPATH=str(REPO), WANDB_MODE="disabled")
    done = forking.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(
        (tmp_path / "out/metrics.json").read_text()
    )
    assert not (tmp_path / "wandb").exists()


# ------------------------------------------------------------------------------------------------ printed output


def test_output_without_a_terminal_has_a_line_per_epoch(small_mnist):
    lines = small_mnist.out.splitlines()
    assert [line[:8] for line in lines if line.startswith("epoch")] == [
        "epoch 1:",
        "epoch 2:",
        "epoch 3:",
    ]
    assert (
        "\r" not in small_mnist.out
        and "ConvNet(" in small_mnist.out
        and "28,938 parameters on" in small_mnist.out
    )
    assert lines[-2].startswith(
        f"test accuracy {small_mnist.metrics['test/acc']:.2%} of 800 images"
    )
    assert re.search(
        r"out( \| look at it: wandb leet \S+)? \| upload it: wandb sync( --append)? \S+$", lines[-1]
    )
    assert (small_mnist.cwd / lines[-1].split()[-1]).is_dir()


def test_progress_bar_in_a_terminal(tmp_path):
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    termios = pytest.importorskip("termios", reason="Windows has no pseudo-terminals")
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    command = [sys.executable, REPO / "train_mnist.py", *QUICK, "--wandb", "disabled"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(tmp_path), stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(screen, 4096):
            shown += piece
    except OSError:  # how Linux reports that the other end is closed
        pass
    assert process.wait() == 0
    assert re.search(rb"100%\|.*\| 8/8 \[.*loss=\d\.\d+, acc=0\.\d+\]", shown)


def test_loud_fallback_if_mnist_is_unavailable(tmp_path):
    run = finished_run("train_mnist.py", tmp_path, "--slice", 20, "--epochs", 1, "--max_steps", 2)
    assert "!!  This run uses the BUILT-IN synthetic data instead" in run.err
    assert run.config["dataset"] == run.metrics["dataset"] == "synthetic"
    assert merged(run.records, "config")["dataset"] == "synthetic"


def test_environment_variables_apply_if_options_are_not_given(tmp_path):
    environment = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "from-environment", "WANDB_TAGS": "x,y"}
    run = finished_run(
        "train_mnist.py", tmp_path, *QUICK, "--max_steps", 1, "--name", "given", **environment
    )
    fields = {}
    for record in run.records:
        if record["type"] == "run":
            fields |= record["run"]
    assert (fields["project"], fields["display_name"], fields["tags"]) == (
        "theirs",
        "given",
        ["x", "y", "mnist"],
    )
    assert "W&B is offline: no API key is configured" in run.out
