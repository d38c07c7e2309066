"""report.py: the statistics, the table in the terminal, and the page in a browser."""

import csv
import html
import itertools
import json
import math
import os
import random
import shutil
import statistics
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.stats
import torch
from PIL import Image

import metrics
import report
from harness import system
from harness.errors import UserError
from reporting import collection, comparison, runs
from reporting.journal import Journal
from reporting.predictions import read_predictions
from reporting.wandb_log import WandbLog
from tests.conftest import REPO, call, finished_run, made_once
from tests.pages import EVIL, charts, choose, opened, shown, wait_until

DIRECTIONS = {"loss": "min", "acc": "max", "mcc": "max", "f1_macro": "max", "recall_micro": "max"}


def make_run(
    path: Path,
    finished: bool = True,
    rows: int = 4,
    examples: int = 60,
    sentence: str = "",
    **settings: Any,
):
    """Write the files of a run by hand; with `sentence`, those of train_cola.py."""
    path.mkdir(parents=True)
    config = {
        "learning_rate": 0.01,
        "seed": 1,
        "monitor": "valid/loss",
        "dataset": "nothing",
        "name": None,
    }
    config |= {"id": path.name, "output_dir": str(path), "run_token": "0"}
    config["versions"] = {"torch": "2.9"}
    config |= {"metrics": DIRECTIONS} | settings
    rng = random.Random(f"{config['seed']} {config['learning_rate']}")
    journal = []
    for i in range(1, rows + 1):
        row = {
            "step": 1000 * i,
            "epoch": i,
            "train/loss_step": 1 / i + rng.random() / 9,
            "train/acc_step": 0.9,
        }
        journal.append(
            row | {"valid/loss": 1 / i + rng.random() / 9, "valid/acc": 0.9 + rng.random() / 20}
        )
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal))
    (path / "config.json").write_text(json.dumps(config))
    if not finished:
        return path
    labels = random.Random(0)
    log_probabilities = []
    with (path / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        header = ["label", "prediction", "probability_0", "probability_1", "loss"]
        table.writerow([*header, "sentence", "source"] if sentence else header)
        for i in range(examples):
            label = labels.randrange(2)
            p = min(0.99, max(0.01, rng.gauss(0.3 + 0.4 * label, 0.25)))
            row = [label, int(p > 0.5), 1 - p, p, -math.log(p if label else 1 - p)]
            table.writerow([*row, f"{sentence} {i}", "source"] if sentence else row)
            log_probabilities.append([label, math.log(1 - p), math.log(p)])
    table = torch.tensor(log_probabilities, dtype=torch.float64)
    figures = metrics.evaluation(table[:, 1:], table[:, 0].long()).named("valid")
    (path / "metrics.json").write_text(
        json.dumps({"best/epoch": rows, "seconds": 12.5, "test/acc": 0.5} | figures)
    )
    return path


def page_of(*directories: Path, output: Path) -> str:
    """The text of the page that report.py writes."""
    report.main([*map(str, directories), "--output", str(output)])
    return output.read_text()


# ------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    "only_a, only_b", [(0, 0), (1, 0), (5, 5), (0, 9), (12, 3), (700, 801), (2, 4000)]
)
def test_mcnemar_agrees_with_scipy(only_a, only_b):
    a = torch.tensor([True] * only_a + [False] * only_b + [True, False])
    b = torch.tensor([False] * only_a + [True] * only_b + [True, False])
    result = metrics.mcnemar_exact(a, b)
    expected = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert result == (only_a, only_b, pytest.approx(expected, abs=1e-12))


@pytest.mark.parametrize("n, k", [(10, 3), (40, 11), (200, 20)])
def test_paired_bootstrap_agrees_with_the_binomial_distribution(n, k):
    """If A alone is right on k of n examples and B alone on none, n times the difference is Binomial(n, k / n)."""
    low, high = scipy.stats.binom.ppf([0.025, 0.975], n, k / n) / n
    labels = torch.zeros(n, dtype=torch.int64)
    wrong = (torch.arange(n) < k).long()
    by_mean = metrics.paired_bootstrap(torch.ones(n), 1.0 - wrong, resamples=20_000)
    by_counts = metrics.paired_bootstrap_counts(
        (labels, wrong), labels, metrics.ConfusionMatrix.accuracy, resamples=20_000
    )
    assert by_mean == pytest.approx((low, high), abs=1e-12)
    assert by_counts == pytest.approx((low, high), abs=1e-12)


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.exponential(size=(2, 300))
    a += 0.5 * b
    expected = scipy.stats.bootstrap(
        (a - b,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1)
    ).confidence_interval
    mine = metrics.paired_bootstrap(torch.tensor(a), torch.tensor(b), resamples=9999)
    assert mine == pytest.approx(tuple(expected), abs=0.01)
    with_statistic = metrics.paired_bootstrap(
        torch.tensor(a), torch.tensor(b), lambda rows: float(rows.mean())
    )
    assert with_statistic == pytest.approx(
        metrics.paired_bootstrap(torch.tensor(a), torch.tensor(b)), abs=1e-12
    )


@pytest.mark.parametrize("name", ["acc", "mcc", "f1_macro", "recall_micro", "balanced_acc"])
def test_counts_give_the_interval_of_resampled_examples(name):
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(3, size=400))
    a, b = (torch.where(torch.from_numpy(rng.random(400) < p), labels, 0) for p in (0.8, 0.7))
    statistic = metrics.COUNT_METRICS[name]

    def of_rows(rows: torch.Tensor) -> float:
        matrix = metrics.ConfusionMatrix(3)
        matrix.update(rows[:, 0].long(), rows[:, 1].long())
        return statistic(matrix)

    slow = metrics.paired_bootstrap(
        torch.stack([a, labels], 1), torch.stack([b, labels], 1), of_rows
    )
    assert metrics.paired_bootstrap_counts((a, b), labels, statistic) == pytest.approx(
        slow, abs=0.015
    )


@pytest.mark.quick
@pytest.mark.parametrize("positive", [0, 1])
def test_average_precision_is_that_of_the_positive_class(tmp_path, positive):
    """Before, class 1 was always the positive one: of others it "can't be computed from predictions.csv"."""
    names = ["no", "yes"]
    pair = []
    for rate in (0.01, 0.1):
        settings = {"monitor": "valid/average_precision", "learning_rate": rate}
        path = make_run(tmp_path / str(rate), **settings)
        predictions = read_predictions(runs.read_run(path))
        shares = predictions.probabilities.log()
        result = metrics.evaluation(shares, predictions.labels, positive=positive)
        figures = {"best/epoch": 4, **result.named("valid")}
        about = {"class_names": names, "positive_label": names[positive]}
        (path / "metrics.json").write_text(json.dumps(figures | about))
        pair.append(read_predictions(runs.read_run(path)))
    gap, low, high = comparison.difference(*pair)
    a, b = (run.run.metrics["valid/average_precision"] for run in pair)
    assert gap == pytest.approx(a - b) and low <= gap <= high


@pytest.mark.quick
def test_unfinished_run_of_equal_epochs_shows_the_one_with_the_lowest_loss(tmp_path):
    path = make_run(tmp_path / "run", finished=False, monitor="valid/mcc")
    rows = [
        {"step": i, "epoch": i, "valid/mcc": 0.0, "valid/loss": abs(i - 3)} for i in range(1, 5)
    ]
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.read_run(path).best["epoch"] == 3


def test_interval_covers_the_true_difference():
    """1,000 pairs of classifiers whose true accuracies, 0.8 and 0.75, differ by 0.05 and whose errors go together."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(1000):
        difficulty, own, which = torch.rand(3, 200, generator=generator)
        other = torch.where(which < 0.5, difficulty, own)
        low, high = metrics.paired_bootstrap(
            difficulty < 0.8, other < 0.75, resamples=300, seed=seed
        )
        covered += low <= 0.05 <= high
    assert 930 <= covered <= 970


def test_permutation_test_agrees_with_scipy():
    a, b = [0.91, 0.93, 0.9, 0.95], [0.89, 0.9, 0.91, 0.92]
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True
    )
    assert metrics.permutation_test(a, b) == pytest.approx(expected.pvalue, abs=1e-12)
    assert metrics.permutation_test([1.0] * 30, [0.0] * 30) < 0.001
    assert metrics.permutation_test([0.1, 0.2], [0.1, 0.2]) == 1
    split = [
        sum(c) for c in itertools.combinations([1, 2, 3, 4, 5, 9], 3)
    ]  # worked out: 24 in all, half of it 12
    assert (
        metrics.permutation_test([4, 5, 9], [1, 2, 3]) == sum(abs(s - 12) >= 6 for s in split) / 20
    )


def test_statistics_reject_bad_arguments():
    with pytest.raises(ValueError, match="two tensors"):
        metrics.paired_bootstrap(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="two tensors"):
        metrics.paired_bootstrap(torch.ones(0), torch.ones(0))
    labels = torch.tensor([0, 1])
    for predictions in ((labels, labels[:1]), (labels[:1], labels), (labels, labels - 1)):
        with pytest.raises(ValueError, match="expected labels"):
            metrics.paired_bootstrap_counts(predictions, labels, metrics.ConfusionMatrix.accuracy)
    with pytest.raises(ValueError, match="bool"):
        metrics.mcnemar_exact(labels, labels)
    with pytest.raises(ValueError, match="group"):
        metrics.permutation_test([], [1.0])
    for bad in (math.nan, math.inf):  # the p-value was 0
        with pytest.raises(ValueError, match="finite"):
            metrics.permutation_test([bad, 1.0], [2.0, 3.0])


def test_interval_of_a_thousand_classes():
    """10,000 kinds of example: a matrix of a million cells was made for each resample."""
    labels = torch.arange(1000).repeat(10)
    right_a, right_b = torch.rand(2, 10_000, generator=torch.Generator().manual_seed(0)) < 0.7
    a = torch.where(right_a, labels, (labels + torch.arange(10_000) // 1000 + 1) % 1000)
    b = torch.where(right_b, labels, (labels + 500) % 1000)
    low, high = metrics.paired_bootstrap_counts((a, b), labels, metrics.ConfusionMatrix.accuracy)
    difference = right_a.double() - right_b.double()
    error = float(difference.std()) / 100
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(float(difference.mean()), abs=0.1 * error)


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03], 3) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.5, 0.002], 15) == pytest.approx([1, 0.03])  # the others' count as 1
    assert metrics.holm([], 0) == []


def seed_groups(means: list[float], rng: random.Random) -> runs.SeedGroups:
    """Groups of six runs whose accuracy has a standard deviation of 1 about a mean."""
    named = {}
    config = {"monitor": "valid/acc", "metrics": {"acc": "max"}}
    for number, mean in enumerate(means):
        figures = [{"valid/acc": rng.gauss(mean, 1)} for _ in range(6)]
        named[f"rate {number}"] = [
            runs.RunFiles(
                Path("x"), "x", config, Journal(Path("x")), WandbLog(Path("x")), figure, []
            )
            for figure in figures
        ]
    return named


@pytest.mark.quick
def test_of_six_equal_groups_few_reports_name_a_winner():
    """34% did: the best of six was compared with each other one as if it had not been chosen."""
    rng = random.Random(0)
    reports = [comparison.compare_seeds(seed_groups([0.0] * 6, rng)) for _ in range(200)]
    assert all(report.count("Over seeds or folds, ") == 5 for report in reports)
    assert sum("is better in" in report for report in reports) <= 0.05 * 200
    assert "all pairs of groups (15)" in reports[0]
    clear = comparison.compare_seeds(seed_groups([0, 9, 0, 0, 0, 0], rng))
    assert clear.count("rate 1 is better in valid/acc than") == 5


def test_the_table_of_runs_is_corrected_for_the_choice_of_the_best(tmp_path):
    paths = []
    for seed in (2, 3, 6):
        path = make_run(tmp_path / str(seed), seed=seed, monitor="valid/acc", examples=200)
        paths.append(path)
    best, *others = map(comparison.read_predictions, runs.sort_runs(runs.find_runs(paths)))
    page = comparison.compare_with_best(best, others)
    assert "correction is for all 3 pairs" in page
    gap, low, high = comparison.difference(best, others[1])
    widening = scipy.stats.norm.isf(0.025 / 3) / scipy.stats.norm.isf(0.025)
    p = metrics.mcnemar_exact(best.correct, others[1].correct).p_value
    assert p < 1 / 3
    for value in (gap - widening * (gap - low), gap + widening * (high - gap), 3 * p):
        assert runs.format_value(value) in page
    alone = comparison.compare_with_best(best, others[:1])
    assert "correction" not in alone


# --------------------------------------------------------------------------------------- in the terminal


def test_table_shows_what_differs(tmp_path, capsys):
    for seed, rate in itertools.product((1, 2, 3), (0.01, 0.1)):
        make_run(tmp_path / f"runs/r{rate}-{seed}", seed=seed, learning_rate=rate)
    page = page_of(tmp_path / "runs", output=tmp_path / "report.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "best", "epoch", "valid/loss", "valid/acc", "test/acc",
                                "seconds", "learning_rate", "seed"]  # fmt: skip
    losses = [float(line.split()[3]) for line in lines[1:7]]
    assert losses == sorted(losses)
    values = [
        json.loads((tmp_path / f"runs/r0.1-{i}/metrics.json").read_text())["valid/loss"]
        for i in (1, 2, 3)
    ]
    expected = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    (group,) = (line for line in lines[7:] if line.startswith("learning_rate 0.1 "))
    assert expected in group and expected in page
    assert "permutation test of the means, p = " in page


def test_long_names_keep_both_ends(tmp_path, capsys):
    """Only the first 50 characters of a name were shown: the same of each of these runs."""
    for run in "ab":
        make_run(tmp_path / "runs" / f"{'long ' * 20}{run}")
    page_of(tmp_path / "runs", output=tmp_path / "report.html")
    cells = {line[:80] for line in capsys.readouterr().out.splitlines()[1:3]}
    assert cells == {f"{'long ' * 8}…{('long ' * 20)[-38:]}{run}" for run in "ab"}


def test_seeds_count_once_and_unfinished_runs_not_at_all(tmp_path, capsys):
    runs_of_a_seed = {"a1": (1, True), "a2": (2, True), "again": (2, True), "died": (3, False)}
    for name, (seed, finished) in runs_of_a_seed.items():
        make_run(tmp_path / "runs" / name, seed=seed, finished=finished)
    for seed in range(4, 8):
        make_run(tmp_path / f"runs/b{seed}", seed=seed, learning_rate=0.1)
    page = page_of(tmp_path / "runs", output=tmp_path / "report.html")
    values = [
        json.loads((tmp_path / f"runs/{n}/metrics.json").read_text())["valid/loss"]
        for n in ("a1", "a2")
    ]
    expected = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    lines = capsys.readouterr().out.splitlines()
    (group,) = (line for line in lines if line.startswith("learning_rate 0.01  "))
    assert group.split()[2] == "2" and expected in group and f"{expected} (n = 2)" in page
    assert "(n = 4)" in page


def test_versions_that_differ_are_settings_that_differ(tmp_path):
    paths = [
        make_run(tmp_path / f"{v}", versions={"torch": v}, seed=i)
        for i, v in enumerate(("2.9", "2.10"))
    ]
    found = runs.find_runs(paths)
    assert "version of torch" in runs.differing(found)
    assert not runs.groups(found)


@pytest.mark.quick
def test_runs_of_other_code_are_no_seeds_of_one_thing(tmp_path, capsys):
    """They were averaged. A module that only one process had imported, such as the report, tells nothing apart."""
    codes = [{"t.py": "1"}, {"t.py": "1", "report.py": "7"}, {"t.py": "2"}, {"t.py": "2"}]
    for seed, code in enumerate(codes):
        make_run(tmp_path / f"{seed}", seed=seed, code=code)
    report.main([str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert len({row["code of t.py"] for row in rows}) == 2
    grouped = runs.groups(runs.find_runs([tmp_path])).values()
    assert sorted(sorted(run.path.name for run in members) for members in grouped) == [
        ["0", "1"],
        ["2", "3"],
    ]
    assert "code of" not in str(runs.differing(runs.find_runs([tmp_path / "0", tmp_path / "1"])))
    one = {"t-1.py": "1", "viz.py": "3"}
    make_run(tmp_path / "x", seed=8, code=one, command="python '/a b/t-1.py' --seed 8")
    other = {"wide.py": "2", "viz.py": "4"}
    make_run(tmp_path / "y", seed=9, code=other, command="wide.main(['--seed', '9'])")
    found = runs.find_runs([tmp_path / "x", tmp_path / "y"])
    assert runs.differing(found) == ["seed", "code of 2 files"] and not runs.groups(found)


def test_without_plotly_the_table_is_printed(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['plotly'] = None\n")
    done = call("report.py", "a", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.status == 2
    assert done.out.startswith("run  state") and "finished" in done.out
    (line,) = done.err.splitlines()
    assert "pip install -r requirements-report.txt" in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["empty"], "empty holds no run"),
        (["absent"], "absent: No such file or directory"),
        (["a/config.json"], "a/config.json: Not a directory"),
        (["a", "--output", "empty"], "can't write"),
        (["a", "--output", "a/config.json"], "is not a report"),
        (["a", "--output", "a/config.json/b.html"], "can't write"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_run(Path("a"))
    with pytest.raises(UserError) as caught:
        report.main(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.status == 2
    assert json.loads(Path("a/config.json").read_text())


def test_mistakes_end_with_status_2(tmp_path):
    done = call("report.py", ".", cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines() == [
        "report.py: error: . holds no run: no directory with config.json or history.jsonl"
    ]


def test_a_page_replaces_a_page(tmp_path):
    make_run(tmp_path / "a")
    first = page_of(tmp_path / "a", output=tmp_path / "new/report.html")
    assert first != page_of(tmp_path / "a", output=tmp_path / "new/report.html")  # a new nonce
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]


# ----------------------------------------------------------------------------------------- runs as they are


def test_runs_that_have_not_finished(tmp_path, capsys):
    crashed, running = (
        make_run(tmp_path / name, finished=False) for name in ("crashed", "running")
    )
    with (crashed / "history.jsonl").open("a") as journal:
        journal.write('{"step": 5000, "valid/lo')
    begun = make_run(tmp_path / "begun", finished=False, rows=0)
    lock = system.lock(running)
    page = page_of(
        crashed, running, begun, make_run(tmp_path / "done"), output=tmp_path / "report.html"
    )
    system.unlock(running, lock)
    out = capsys.readouterr().out
    states = {line.split("  ")[0]: line for line in out.splitlines()}
    assert (
        "died at step 4,000" in states["crashed"] and "under way at step 4,000" in states["running"]
    )
    assert "died at step 0" in states["begun"] and "finished" in states["done"]
    assert "crashed: 1 of 5 rows of history.jsonl can't be read" in out
    assert "(not finished)" in page


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", "[1]"),
        (
            "config.json",
            '{"seed": [1], "name": 7, "monitor": 3, "versions": "x", "learning_rate": null}',
        ),
        ("config.json", "{"),
        (
            "metrics.json",
            '{"valid/loss": NaN, "valid/acc": Infinity, "seconds": "x", "best/epoch": null}',
        ),
        ("metrics.json", "{"),
        ("metrics.json", '{"class_names": ["only one"]}'),
        ("history.jsonl", ""),
        ("config.json", "[" * 200_000),
        ("metrics.json", '{"seconds": ' + "9" * 400 + ', "valid/loss": ' + "9" * 400 + "}"),
        (
            "history.jsonl",
            '[]\n{"step": "x"}\n{"no": 1}\n{"step": NaN}\n\x00\xff\n{"step": 1, "valid/loss": 1e999}\n',
        ),
        ("history.jsonl", '{"step": 1, "valid/loss": null, "a": ' + "9" * 400 + "}\n"),
        ("predictions.csv", ""),
        ("predictions.csv", "label,prediction,probability_0,probability_1,loss\n"),
        (
            "predictions.csv",
            "label,prediction,probability_0,probability_1,loss\n0,1,0.5,0.5,0.7\n0,1,0.",
        ),
        ("predictions.csv", "label,prediction,probability_0,probability_1,loss\n0,1,nan,0.5,0.7\n"),
        ("predictions.csv", "label,prediction,probability_0,probability_1,loss\n0,7,0.5,0.5,0.7\n"),
        ("predictions.csv", "label,prediction,probability_0,probability_1,loss\n0,1,0.5,0.5,inf\n"),
    ],
)
def test_odd_files_are_shown_as_they_are(file, content, tmp_path):
    odd, fine = make_run(tmp_path / "odd"), make_run(tmp_path / "fine", seed=2)
    (odd / file).write_text(content)
    for directories in ([odd], [odd, fine]):
        page = page_of(*directories, output=tmp_path / "report.html")
        assert "NaN" not in page[page.index("<body") : page.index('<script nonce="')].replace(
            'data-value="NaN"', ""
        )


@pytest.mark.parametrize(
    "file", ["config.json", "metrics.json", "history.jsonl", "predictions.csv"]
)
def test_missing_files(file, tmp_path):
    odd, fine = make_run(tmp_path / "odd"), make_run(tmp_path / "fine", seed=2)
    (odd / file).unlink()
    for directories in ([odd], [odd, fine]):
        page_of(*directories, output=tmp_path / "report.html")


@pytest.mark.parametrize(
    "file", ["config.json", "metrics.json", "history.jsonl", "predictions.csv"]
)
def test_pipes_are_not_waited_for(file, tmp_path):
    odd = make_run(tmp_path / "odd")
    (odd / file).unlink()
    os.mkfifo(odd / file)
    page_of(odd, make_run(tmp_path / "fine", seed=2), output=tmp_path / "report.html")


def test_long_sentences_are_read(tmp_path):
    run = make_run(tmp_path / "a", sentence="x" * 200_000)
    assert "can't be read" not in page_of(run, output=tmp_path / "report.html")


@pytest.mark.parametrize("directions", [["minimize"], ["minimize", "maximize"]])
def test_a_foreign_study_is_said_to_be_one(directions, tmp_path, capsys):
    make_run(tmp_path / "sweep/a")
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/sweep/study.db", study_name="s", directions=directions
    )
    study.set_user_attr("sweep", "text")
    page_of(tmp_path / "sweep", output=tmp_path / "report.html")
    assert "it is not of sweep_offline.py" in capsys.readouterr().out
    assert call("report.py", "sweep", cwd=tmp_path).err == ""  # nor a line of Optuna's


def test_only_the_same_examples_are_compared(tmp_path):
    a, b = (make_run(tmp_path / name, seed=seed, sentence="Same") for seed, name in enumerate("ab"))
    page = page_of(a, b, output=tmp_path / "report.html")
    assert "McNemar" in page and "a right, b wrong: " in page and "b right, a wrong: " in page
    assert page.count(">Same ") > 5
    c = make_run(tmp_path / "c", seed=2, sentence="Other")
    page = page_of(a, c, output=tmp_path / "report.html")
    assert "right, " not in page and "no other run has predicted the same examples" in page


def test_classes_are_compared_by_name(tmp_path):
    """Two models with the same classes in another order were "not compared"."""
    paths = [make_run(tmp_path / name, seed=1) for name in "ab"]
    for path, names in zip(paths, (["good", "bad"], ["bad", "good"])):
        file = path / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": names}))
    rows = list(csv.reader((paths[1] / "predictions.csv").open()))
    turned = [[1 - int(a), 1 - int(b), q, p, loss] for a, b, p, q, loss in rows[1:]]
    with (paths[1] / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *turned])
    a, b = (comparison.read_predictions(run) for run in runs.find_runs(paths))
    assert a.examples == b.examples and a.class_names == ["bad", "good"]
    assert torch.equal(a.predictions, b.predictions)
    assert torch.equal(a.probabilities, b.probabilities)


@pytest.mark.quick
def test_test_metrics_are_compared_where_their_predictions_are_kept(tmp_path):
    """Only validation metrics were; the best by validation need not be the best on test data."""
    paths = []
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        path = make_run(tmp_path / name, seed=seed, monitor="valid/acc", examples=90)
        other = make_run(tmp_path / f"other {name}", seed=seed + 10, examples=50)
        (other / "predictions.csv").rename(path / "test_predictions.csv")
        figures = json.loads((other / "metrics.json").read_text())
        change(path / "metrics.json", {"test/acc": figures["valid/acc"]})
        paths.append(path)
    (paths[2] / "test_predictions.csv").unlink()
    best, other, without = runs.sort_runs(runs.find_runs(paths))
    if without.label != "c":
        best, other = [run for run in (best, other, without) if run.label != "c"]
    page = page_of(*paths, output=tmp_path / "report.html")
    valid, test = page.split("<h2>Is one better than another? (test_predictions.csv)</h2>")
    assert "on the same 90 examples" in valid and "valid/acc, best minus this" in valid
    assert "on the same 50 examples" in test and "test/acc, best minus this" in test
    assert "Not compared: c (no test_predictions.csv)" in test
    pair = [read_predictions(run, "test_predictions.csv") for run in (best, other)]
    gap, low, high = comparison.difference(*pair)
    assert gap == pytest.approx(best.metrics["test/acc"] - other.metrics["test/acc"])
    assert low <= gap <= high
    for value in (gap, low, high, metrics.mcnemar_exact(*(p.correct for p in pair)).p_value):
        assert runs.format_value(value) in test


@pytest.mark.quick
def test_runs_of_folds_are_a_group_and_those_of_seeds_and_folds_too(tmp_path):
    """Only runs of several seeds were a group."""
    for seed, fold in itertools.product((1, 2), (1, 2, 3)):
        make_run(tmp_path / f"{seed}{fold}", seed=seed, fold=fold, folds=3)
    make_run(tmp_path / "again", seed=1, fold=1, folds=3)
    make_run(tmp_path / "other", seed=1, fold=1, folds=2)
    found = runs.find_runs([tmp_path])
    (members,) = runs.groups(found).values()
    assert len(members) == 6
    header, row = runs.seed_table(runs.Collection(found, runs.groups(found), [], []))
    values = [run.metrics["valid/loss"] for run in members]
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(values), scipy.stats.sem(values))
    expected = (
        f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} (95%: {low:.4f} to {high:.4f})"
    )
    assert row[1] == 6 and runs.format_value(row[header.index("valid/loss")]) == expected


def test_seeds_on_other_examples_are_not_compared(tmp_path):
    """Runs on two validation files were ranked against each other: both are called "files"."""
    paths = [
        make_run(tmp_path / f"{name}{seed}", seed=seed, sentence=name, valid_file=name)
        for name in ("easy", "hard")
        for seed in range(4)
    ]
    assert "permutation test" not in page_of(*paths, output=tmp_path / "report.html")


@pytest.mark.parametrize(
    "monitor", ["valid/loss", "valid/acc", "valid/mcc", "valid/f1_macro", "valid/recall_micro"]
)
def test_the_difference_is_that_of_the_figures(monitor, tmp_path):
    paths = [
        make_run(tmp_path / str(seed), seed=seed, monitor=monitor, examples=300) for seed in (1, 2)
    ]
    a, b = (comparison.read_predictions(run) for run in runs.find_runs(paths))
    name = monitor.removeprefix("valid/")
    gap, low, high = comparison.difference(a, b)
    expected = [
        metrics.evaluation(of.probabilities.log(), of.labels).metrics[name] for of in (a, b)
    ]
    assert gap == pytest.approx(expected[0] - expected[1], abs=1e-6)
    assert low <= gap <= high and low < high


def test_without_validation_the_predictions_are_of_the_test_data(tmp_path):
    """As train_mnist.py --valid_size 0 leaves them; the report called them validation examples."""
    a, b = (make_run(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    assert "Predictions of the validation data" in page_of(a, output=tmp_path / "report.html")
    for path in (a, b):
        metrics_file = path / "metrics.json"
        metrics_file.write_text(metrics_file.read_text().replace("valid/", "test/"))
    assert "Predictions of the test data" in page_of(a, output=tmp_path / "report.html")
    page = page_of(a, b, output=tmp_path / "report.html")
    assert "validation examples" not in page and "not ranked by valid/loss" in page


def test_predictions_of_a_thousand_classes_are_read_row_by_row(tmp_path):
    """All cells as text took ten times the memory."""
    path = make_run(tmp_path / "a")
    rows = np.full((300, 1000), 0.25 / 999)
    rows[:, 7] += 0.75 - 0.25 / 999
    with (path / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", *(f"probability_{i}" for i in range(1000)), "prediction", "text"])
        table.writerows([5, *row, 7, "7"] for row in rows.tolist())
    (run,) = runs.find_runs([path])
    tracemalloc.start()
    predictions = comparison.read_predictions(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert predictions.probabilities.shape == (300, 1000)
    assert float(predictions.losses[0]) == pytest.approx(-math.log(0.25 / 999))
    assert peak < 4 * rows.nbytes


def test_class_names(tmp_path):
    make_run(tmp_path / "a", sentence="Some sentence")
    figures = json.loads((tmp_path / "a/metrics.json").read_text())
    (tmp_path / "a/metrics.json").write_text(
        json.dumps(figures | {"class_names": ["bad & wrong", "good"]})
    )
    page = page_of(tmp_path / "a", output=tmp_path / "report.html")
    assert "<td>bad &amp; wrong</td>" in page


def test_verdicts():
    def verdict(sign: int, low: float, high: float) -> str:
        return comparison.verdict("valid/score", sign, low, high)

    assert verdict(1, -0.1, 0.1) == "No evidence of a difference in valid/score"
    assert verdict(-1, 0.1, 0.2) == "The best is better in valid/score"
    assert verdict(1, 0.1, 0.2) == "This one is better in valid/score"
    assert verdict(1, -0.2, -0.1) == "The best is better in valid/score"
    assert "can't be computed" in verdict(1, math.nan, math.nan)


def test_a_figure_that_does_not_follow_from_the_predictions_is_not_compared(tmp_path):
    """Somebody's own loss may be another one than cross-entropy."""
    a, b = (make_run(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    change(a / "metrics.json", {"valid/loss": 0.01})
    page = page_of(a, b, output=tmp_path / "report.html")
    assert html.escape("valid/loss can't be computed from the predictions") in page


def change(path: Path, values: dict[str, Any]) -> None:
    """Set values in a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def declare(run: Path, **directions: str) -> None:
    """Declare the metrics of a run."""
    change(run / "config.json", {"metrics": directions})


# ------------------------------------------------------------------------------------------ any other task


def make_regression(path: Path, error: float, **settings: Any) -> Path:
    """Write the files of a run that predicts numbers, without classes, data set or accuracy."""
    path.mkdir(parents=True)
    config = {"seed": 1, "monitor": "valid/mae"}
    config["metrics"] = {"loss": "min", "mae": "min", "r2": "max"}
    (path / "config.json").write_text(json.dumps(config | settings))
    rows = [{"step": i, "valid/mae": error / i, "valid/r2": 0.1, "lr": 1 / i} for i in (1, 2, 3)]
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"valid/mae": error, "test/mae": 2 * error, "test/loss": 12345.6, "test/r2": 0.25}
    (path / "metrics.json").write_text(json.dumps({"best/epoch": 3} | figures))
    rng = random.Random(error)
    with (path / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["target", "prediction", "street"])
        for i in range(80):
            table.writerow([100 * i, 100 * i + rng.gauss(0, error), f"Street {i}"])
    return path


def test_numbers_are_compared_by_their_absolute_errors(tmp_path, capsys):
    good, bad = (make_regression(tmp_path / f"{e:g}", error=e, seed=e) for e in (1.0, 30.0))
    page = page_of(bad, good, output=tmp_path / "report.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[3:8] == ["epoch", "valid/mae", "test/mae", "test/loss", "seconds"]
    assert lines[1].startswith("1 ") and lines[2].startswith("30 ") and "12346" in lines[1]
    assert "The best is better in mean absolute error" in page
    assert "1 is closer than 30: " in page and "30 is closer than 1: " in page
    assert "Street 7" in page and "McNemar" not in page and "can&#x27;t be read" not in page
    curves = json.loads(html.unescape(page.split('data-curves="')[1].split('"')[0]))
    assert curves["metrics"] == ["lr", "valid/mae", "valid/r2"]
    assert curves["important"] == ["valid/mae", "mae", "loss"]  # the charts that are shown at first

    a, b = (comparison.read_predictions(run) for run in runs.find_runs([good, bad]))
    gap, low, high = comparison.difference(a, b)
    assert gap == pytest.approx(float(a.losses.mean() - b.losses.mean())) and low < gap < high < 0
    alone = page_of(good, output=tmp_path / "report.html")
    assert "Largest errors" in alone and "Street 7" in alone


def test_the_direction_is_the_scripts(tmp_path, capsys):
    """No name is better known here than in the script: a loss may be maximized."""
    for direction in ("min", "max"):
        for error in (1.0, 30.0):
            metrics_of_run = {"mae": direction}
            path = tmp_path / direction / f"{error:g}"
            make_regression(path, error, seed=error, metrics=metrics_of_run)
    for direction, best in (("min", "1"), ("max", "30")):
        page_of(tmp_path / direction, output=tmp_path / "report.html")
        assert capsys.readouterr().out.splitlines()[1].split()[0] == best


@pytest.mark.parametrize("declared", [None, {}, {"mae": "down"}, {"mae": [1]}, ["mae"], "mae"])
def test_runs_without_a_direction_are_not_ranked(declared, tmp_path, capsys):
    a, b = (make_regression(tmp_path / f"{e:g}", error=e, seed=e) for e in (1.0, 30.0))
    change(a / "config.json", {"metrics": declared})
    page = page_of(a, b, output=tmp_path / "report.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("30 ")
    assert lines[2].split()[:5] == ["1", "finished", "3", "1", "2"]  # its best is shown
    (line,) = (line for line in lines if line.startswith("Not ranked: 1: "))
    assert line in page and "Not compared: 1 (not ranked by valid/mae)." in page
    assert "The best is" not in page and "Over seeds or folds, " not in page
    (a / "metrics.json").unlink()  # what its best epoch was is unknown
    page_of(a, b, output=tmp_path / "report.html")


def test_predictions_in_other_columns(tmp_path):
    a, b = (make_regression(tmp_path / f"{e:g}", error=e, seed=e) for e in (1.0, 30.0))
    for run in (a, b):
        (run / "predictions.csv").write_text("image,dice\nx.png,0.5\n")
    page = page_of(a, b, output=tmp_path / "report.html")
    assert "Not compared: 1 and" not in page
    assert "Not compared: 1, 30 (the predictions have neither label, prediction and" in page
    alone = page_of(a, output=tmp_path / "report.html")
    assert "No predictions to show: the predictions have neither" in alone


def test_numbers_that_diverged(tmp_path):
    a, b = (make_regression(tmp_path / f"{e:g}", error=e, seed=e) for e in (1.0, 30.0))
    (a / "predictions.csv").write_text("target,prediction\n1,nan\n2,inf\n")
    (b / "predictions.csv").write_text("target,prediction\n1,1\n2,inf\n")
    page = page_of(a, b, output=tmp_path / "report.html")
    assert html.escape("mean absolute error can't be computed") in page
    alone = page_of(a, output=tmp_path / "report.html")
    assert "NaN" not in alone[alone.index("<body") : alone.index('<script nonce="')]


def test_report_needs_nothing_of_the_tasks(tmp_path):
    for name in ("report.py", "metrics.py"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("harness", "reporting"):
        shutil.copytree(REPO / name, tmp_path / name)
    make_regression(tmp_path / "a", 1.0)
    make_run(tmp_path / "b")
    done = call(tmp_path / "report.py", "a", "b", cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "report.html").stat().st_size > 1e6


def test_two_tabular_runs(tmp_path):
    for seed in (1, 2):
        run = finished_run(
            "examples/train_tabular.py",
            tmp_path,
            *f"--seed {seed} --epochs 2 --watch off --wandb disabled".split(),
        )
        declare(run.files.rename(tmp_path / f"run{seed}"), loss="min", mae="min", r2="max")
    page = page_of(tmp_path / "run1", tmp_path / "run2", output=tmp_path / "report.html")
    assert "in mean absolute error" in page and " is closer than " in page
    assert "<th tabindex=0>test/mae</th>" in page


def test_both_scripts_together(tmp_path, capsys):
    mnist = finished_run(
        "train_mnist.py",
        tmp_path,
        *"--dataset synthetic --slice 40 --epochs 1 --watch off --wandb disabled".split(),
    )
    declare(mnist.files.rename(tmp_path / "mnist"), loss="min", acc="max")
    cola = finished_run(
        "train_cola.py",
        tmp_path,
        *"--dataset synthetic --max_steps 3 --watch off --wandb disabled".split(),
    )
    declare(cola.files, loss="min", mcc="max")
    page = page_of(tmp_path / "mnist", tmp_path / "out", output=tmp_path / "report.html")
    out = capsys.readouterr().out
    assert "valid/loss" in out and "valid/mcc" in out and out.count("finished") == 2
    assert page.count("no other run has predicted the same") == 2  # the second: MNIST's test data
    alone = page_of(tmp_path / "mnist", output=tmp_path / "report.html")
    assert "Worst of " in alone and alone.count("<img alt=") == 4
    assert 'title="mistakes.png"' in alone
    alone = page_of(tmp_path / "out", output=tmp_path / "report.html")
    sentences = [
        row["sentence"] for row in csv.DictReader((tmp_path / "out/predictions.csv").open())
    ]
    assert sum(sentence in alone for sentence in sentences) >= 10


def test_two_hundred_runs(tmp_path):
    for i in range(200):
        make_run(
            tmp_path / f"runs/{i}",
            seed=i % 5,
            learning_rate=0.001 * (i // 5),
            rows=1000,
            examples=100,
        )
    page = page_of(tmp_path / "runs", output=tmp_path / "report.html")
    assert len(page) < 30e6


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep over the stand-in objective, with pruned and failed trials."""
    return made_once(tmp_path_factory, "sweep", run_sweep)


def run_sweep(cwd: Path) -> Path:
    shutil.copy(REPO / "tests/objective.py", cwd)
    (cwd / "sweep.yaml").write_text(
        """{program: objective.py, name: s, method: grid, metric: {name: score, goal: maximize},
        early_terminate: {type: hyperband, min_iter: 1, eta: 2}, parameters: {x: {values: [2.5, 5.5, 1.5, 3.5]},
        y: {values: [-1, 0]}, epochs: {value: 4}, seconds: {value: 0.4}}}"""
    )
    done = call("sweep_offline.py", "sweep.yaml", "--jobs", 2, cwd=cwd)
    assert done.status == 0, done.err
    return cwd / "runs/sweep-s"


def test_sweep(sweep, tmp_path, capsys):
    page = page_of(sweep, output=tmp_path / "report.html")
    rows = list(csv.DictReader((sweep / "trials.csv").open()))
    out = capsys.readouterr().out
    for row in rows:
        (line,) = (line for line in out.splitlines() if line.startswith(f"trial {row['trial']} "))
        assert ("pruned" in line) == (row["state"] == "pruned")
        assert f"{float(row['x']):.4g}" in line and f"{float(row['score']):.4g}" in line
    assert "Sweep s" in page and '"parcoords"' in page


def test_trials_are_ranked_by_the_metric_of_the_sweep(sweep, tmp_path):
    """They were ranked by what each run monitored, so that another one came first than in the search."""
    directory = tmp_path / "sweep-s"
    shutil.copytree(sweep, directory)
    own = {"monitor": "valid/loss", "metrics": {"loss": "min"}, "run_token": "0"}
    for file in directory.glob("*/metrics.json"):
        file.with_name("config.json").write_text(json.dumps(own))
    found = collection.collect([directory]).runs
    scores = [run.best["score"] for run in found if run.metrics]
    assert len(scores) > 2 and scores == sorted(scores, reverse=True)
    assert {run.monitor for run in found} == {"score"} and found[0].sign_of("loss") == 1


def test_the_best_trial_is_that_of_the_search(sweep, tmp_path):
    """Of equal ones, any was; and if the sweep's goal was not what the script declares, the worst."""
    directory = tmp_path / "sweep-s"
    shutil.copytree(sweep, directory)
    for file in directory.glob("*/metrics.json"):
        file.write_text('{"score": 1.0}')
        file.with_name("config.json").write_text('{"metrics": {"score": "min"}}')
    found = collection.collect([directory]).runs
    assert {run.sign for run in found} == {-1}  # the sweep maximizes it
    equal = [run.label for run in found if run.score == -1]
    assert len(equal) > 2 and equal == sorted(equal)


def test_a_sweep_in_a_directory_of_runs(sweep, tmp_path):
    """Its pruned trials had died, under the names of their directories."""
    make_run(tmp_path / "runs/alone")
    shutil.copytree(sweep, tmp_path / "runs/sweep-s")
    found = collection.collect([tmp_path / "runs"])
    states = {run.label: run.state for run in found.runs}
    alone = collection.collect([tmp_path / "runs/sweep-s"])
    both = collection.collect([tmp_path / "runs", tmp_path / "runs/sweep-s"])
    assert len(both.studies) == 1  # was shown twice
    assert states == {"alone": "finished"} | {run.label: run.state for run in alone.runs}
    assert [study.study_name for study in found.studies] == ["s"] and "trial 0" in states


def test_importances_need_twenty_complete_trials(sweep, tmp_path, monkeypatch):
    directory = tmp_path / "sweep-s"
    shutil.copytree(sweep, directory)
    assert "Hyperparameter Importances" not in page_of(directory, output=tmp_path / "report.html")
    monkeypatch.setattr("reporting.sweep.ENOUGH_TRIALS", 1)
    assert "Hyperparameter Importances" in page_of(directory, output=tmp_path / "report.html")


def test_sweep_without_optuna_or_study(sweep, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "sweep-s"
    shutil.copytree(sweep, directory)
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "optuna", None)
        page_of(directory, output=tmp_path / "report.html")
    assert "Optuna is not installed" in capsys.readouterr().out
    (directory / "study.db").write_bytes(b"no database" * 1000)
    assert "study.db can&#x27;t be read" in page_of(directory, output=tmp_path / "report.html")


# -------------------------------------------------------------------------------------------- in a browser


def test_page_in_a_browser(browser, tmp_path):
    for seed in (1, 2, 3):
        make_run(
            tmp_path / f"runs/r{seed}",
            seed=seed,
            learning_rate=seed,
            name=f"{EVIL} {seed}",
            sentence=EVIL,
        )
    page_of(tmp_path / "runs", output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert browser.title == "3 runs"
    assert EVIL in browser.find_element("tag name", "body").text
    assert browser.find_elements("css selector", "img[src=x]") == []
    names = shown(browser)
    assert (
        len(names) == 12 and len(set(names)) == 3
    )  # three runs, in training and validation, in two panels

    browser.find_element("css selector", "#legend input").click()
    wait_until(lambda: len(shown(browser)) == 8)
    choose(browser, charts="valid/acc")
    wait_until(lambda: len(shown(browser)) == 2)  # what was hidden stays hidden
    browser.find_element("css selector", "#legend input").click()
    wait_until(lambda: len(shown(browser)) == 3)

    for direction in (1, -1):
        browser.find_element("xpath", "//th[text()='valid/loss']").click()
        rows = browser.find_elements("css selector", "table:first-of-type tbody")[
            0
        ].text.splitlines()
        losses = [float(row.split()[-6]) for row in rows]
        assert losses == sorted(losses, reverse=direction < 0)
    assert browser.get_log("browser") == []


def test_defaults_of_the_charts(browser, tmp_path):
    """Without a metric that is declared there were no charts; minutes were empty beside groups."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "history.jsonl").write_text('{"step": 1, "mse": 3}\n{"step": 2, "mse": 2}\n')
    page_of(bare, output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert list(charts(browser)) == ["mse"]
    for seed in range(6):
        make_run(tmp_path / f"runs/{seed}", seed=seed)
    page_of(tmp_path / "runs", output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert set(shown(browser)) == {"all but seed and fold alike (n = 6)"}
    browser.get(f"{(tmp_path / 'report.html').as_uri()}#x=minutes")
    browser.refresh()
    wait_until(lambda: "minutes are not known of" in browser.find_element("id", "remark").text)


@pytest.mark.quick
def test_settings_of_other_programs_count(tmp_path, capsys):
    """Names that this project's scripts use for other things were ignored: the runs were averaged."""
    for seed, code in itertools.product((1, 2), ("a", "b")):
        path = tmp_path / f"{seed}{code}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"seed": seed, "code": code, "watch": code}))
        (path / "metrics.json").write_text('{"valid/loss": 1.0}')
    found = runs.find_runs([tmp_path])
    assert runs.differing(found) == ["seed", "code", "watch"]
    assert sorted(len(members) for members in runs.groups(found).values()) == [2, 2]


def test_seeds_in_a_browser(browser, tmp_path):
    for seed, rate in itertools.product((1, 2, 3), (0.01, 0.1)):
        make_run(tmp_path / f"runs/r{rate}-{seed}", seed=seed, learning_rate=rate)
    page_of(tmp_path / "runs", output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert set(shown(browser)) == {"learning_rate 0.01 (n = 3)", "learning_rate 0.1 (n = 3)"}
    browser.find_element("id", "each").click()
    wait_until(lambda: len(set(shown(browser))) == 8)
    (table,) = (t for t in browser.find_elements("tag name", "table") if "±" in t.text)
    for direction in (1, -1):
        table.find_element("xpath", ".//th[text()='valid/loss']").click()
        means = [float(row.split()[3]) for row in table.text.splitlines()[1:]]
        assert means == sorted(means, reverse=direction < 0) and len(means) == 2


def test_one_run_in_a_browser(browser, tmp_path):
    make_run(tmp_path / "a", sentence=EVIL)
    Image.new("RGB", (8, 8)).save(tmp_path / "a/some & picture.png")
    page_of(tmp_path / "a", output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert browser.title == "a"
    (picture,) = browser.find_elements("tag name", "img")
    assert picture.get_attribute("alt") == "some & picture.png"
    assert picture.get_property("naturalWidth") == 8


def test_regression_in_a_browser(browser, tmp_path):
    a, b = (make_regression(tmp_path / f"{e:g}", error=e, seed=e) for e in (1.0, 30.0))
    page_of(a, b, output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert set(shown(browser)) == {"1", "30", "all but seed and fold alike (n = 2)"}
    page_of(a, output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    (a / "predictions.csv").write_text("target,prediction\n1,nan\n2,inf\n3,4\n")
    page_of(a, output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")


def test_sweep_in_a_browser(browser, sweep, tmp_path):
    page_of(sweep, output=tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert len(browser.find_elements("css selector", "[data-figure] .main-svg")) >= 3
    # plotly.js also has a button that uploads the data.
    buttons = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)"
    )
    assert set(buttons) == {"Download as PNG", "Download as SVG"}
