"""report.py --metric, --csv, --json and --latex; runs of other programs, and copies of runs."""

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

import report
from harness.errors import UserError
from tests.conftest import REPO, call
from tests.test_report import change, make_regression, make_run, page_of

HOSTILE = 'a "b", & 50 % of_x\n\\end{tabular} #1 {$~^<|>}'


def output_of(*arguments: object, capsys: pytest.CaptureFixture) -> tuple[str, list[str]]:
    """Standard output, and the lines of standard error."""
    report.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return captured.out, captured.err.splitlines()


def table_of(*arguments: object, capsys: pytest.CaptureFixture) -> list[dict[str, str]]:
    """The rows of `--csv`."""
    out, _ = output_of(*arguments, "--csv", capsys=capsys)
    return list(csv.DictReader(io.StringIO(out, newline="")))


def make_journal(path: Path, *rows: dict[str, Any]) -> Path:
    """What a program that is not ours leaves: a journal and nothing else."""
    path.mkdir(parents=True)
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_logged(path: Path, best_epoch: int | None = 2, **settings: Any) -> Path:
    """A run of three epochs of two rows each, whose best one is the second."""
    rows = [
        {"step": 10 * i, "epoch": (i + 1) // 2, "train/acc": i / 10, "speed": 7 - i}
        for i in range(1, 7)
    ]
    for row, loss in zip(rows[1::2], (0.5, 0.25, 0.75)):
        row["valid/loss"] = loss
    make_journal(path, *rows)
    config = {"monitor": "valid/loss", "metrics": {"loss": "min", "acc": "max"}}
    (path / "config.json").write_text(json.dumps(config | settings))
    if best_epoch is not None:
        figures = {"best/epoch": best_epoch, "valid/loss": 0.25, "test/acc": 0.5}
        (path / "metrics.json").write_text(json.dumps(figures))
    return path


# ---------------------------------------------------------------------------------------- CSV and JSON


@pytest.mark.quick
def test_each_run_at_full_precision(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rate in (0.1, 1 / 3):
        make_run(Path(f"runs/{rate:.1f}"), learning_rate=rate, name=HOSTILE, layers=[1, rate])
    make_run(Path("runs/died"), finished=False, learning_rate=1e-9)
    (tmp_path / "runs/died/metrics.json").write_text("{")
    rows = table_of("runs", capsys=capsys)
    out, err = output_of("runs", "--json", capsys=capsys)
    content = json.loads(out)
    assert [row["directory"] for row in rows] == [run["directory"] for run in content["runs"]]
    for row, run in zip(rows, content["runs"]):
        config = json.loads(Path(run["directory"], "config.json").read_text())
        assert run["name"] == config["name"] and row["name"] == (config["name"] or "")
        assert run["learning_rate"] == config["learning_rate"] == float(row["learning_rate"])
        if run["directory"] != "runs/died":
            figures = json.loads(Path(run["directory"], "metrics.json").read_text())
            assert (run["state"], run["best epoch"], run["seconds"]) == ("finished", 4, 12.5)
            for name in ("valid/loss", "valid/acc", "test/acc"):
                assert run[name] == figures[name] == float(row[name])
            assert row["layers"] == str(run["layers"]) == str(config["layers"])
    assert [run["valid/loss"] for run in content["runs"]] == sorted(
        run["valid/loss"] for run in content["runs"]
    )
    (died,) = (run for run in content["runs"] if run["directory"] == "runs/died")
    assert died["state"] == "died at step 4,000" and died["seconds"] is None
    assert err == ["died: no readable metrics.json"]
    assert not Path("report.html").exists()


def test_groups_in_json(tmp_path, capsys):
    for seed in range(3):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", seed=seed, learning_rate=0.1)
    out, _ = output_of(tmp_path, "--json", capsys=capsys)
    groups = json.loads(out)["groups"]
    assert [group["name"] for group in groups] == ["learning_rate 0.01", "learning_rate 0.1"]
    for letter, group in zip("ab", groups):
        paths = [str(tmp_path / f"{letter}{seed}") for seed in range(3)]
        assert group["n"] == 3 and sorted(group["members"]) == paths
        values = [json.loads(Path(p, "metrics.json").read_text())["valid/loss"] for p in paths]
        error = scipy.stats.sem(values)
        low, high = scipy.stats.t.interval(0.95, 2, sum(values) / 3, error)
        expected = {"mean": sum(values) / 3, "sd": error * math.sqrt(3), "low": low, "high": high}
        assert group["valid/loss"] == pytest.approx(expected, abs=1e-4)
    change(tmp_path / "a0/metrics.json", {"valid/loss": math.nan})
    out, _ = output_of(tmp_path, "--json", capsys=capsys)
    content = json.loads(out, parse_constant=pytest.fail)  # NaN is not JSON
    assert content["groups"][0]["valid/loss"] is None
    assert content["runs"][-1]["valid/loss"] == "NaN"


def test_nothing_else_on_standard_output(tmp_path):
    """As a whole process, with warnings and without plotly."""
    make_journal(tmp_path / "ab", {"step": 1, "x": 1})
    make_journal(tmp_path / "cd", {"step": 1, "x": 2})
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['plotly'] = None\n")
    done = call("report.py", "ab", "cd", "--csv", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.status == 0
    assert done.out.splitlines() == [
        '"directory","name","state","best epoch","seconds"',
        '"ab","","at step 1","",""',
        '"cd","","at step 1","",""',
    ]
    (line,) = done.err.splitlines()
    assert line.startswith("Not ranked: ab, cd: ")


@pytest.mark.parametrize(
    "arguments", [["--csv", "--json"], ["--watch", "--latex"], ["--output", "x", "--csv"]]
)
def test_one_output(arguments, tmp_path):
    make_run(tmp_path / "a")
    with pytest.raises(UserError, match="not allowed with argument"):
        report.main([str(tmp_path / "a"), *arguments])


@pytest.mark.quick
@pytest.mark.parametrize("arguments", [["--port", "8000"], ["--host", "0.0.0.0", "--csv"]])
def test_an_address_without_watch(arguments, tmp_path):
    """It was ignored."""
    with pytest.raises(UserError, match="--host and --port are for --watch"):
        report.main([str(tmp_path / "a"), *arguments])
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- LaTeX


def cells_of(latex: str) -> list[list[str]]:
    """The cells of a table, which has the form of booktabs."""
    assert not re.search(r"(?<!\\)[%#]", latex.split("\n", 1)[1])
    lines = latex.splitlines()
    assert lines[1].startswith(r"\begin{tabular}{lll") and lines[2] == r"\toprule"
    assert lines[4] == r"\midrule" and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [lines[3], *lines[5:-2]]
    assert all(row.startswith("{}") and row.endswith(r" \\") for row in rows)
    cells = [re.split(r"(?<!\\) ?& ", row[2:-3]) for row in rows]
    assert {len(row) for row in cells} == {len(cells[0])}
    for row in cells:
        for cell in row:
            assert not re.search(r"(?<!\\)[&_^~<>|\n]", cell)
            plain = re.sub(r"\\[{}]", "", cell)
            assert plain.count("{") == plain.count("}")
    return cells


def test_latex_of_groups(tmp_path, capsys):
    for seed, (a, b) in enumerate([(0.5, 0.25), (0.75, 0.5)]):
        for rate, figure in ((0.01, a), (0.1, b)):
            path = make_run(tmp_path / f"{rate} {seed}", seed=seed, learning_rate=rate)
            figures = {"valid/loss": figure, "valid/acc": figure, "test/acc": None}
            change(path / "metrics.json", figures)
    change(make_run(tmp_path / "alone", learning_rate=7) / "metrics.json", {"test/acc": None})
    out, problems = output_of(tmp_path, "--latex", capsys=capsys)
    assert "because they are in no group: 1" in str(problems)
    header, first, second = cells_of(out)
    assert header == ["runs that differ in seed or fold only", "n", "valid/loss", "valid/acc"]
    # The quantile of Student's t with one degree of freedom is 12.7062; the error is 0.125.
    low = r"0.3750 $\pm$ 0.1768 (95\%: $-$1.2133 to 1.9633)"
    high = r"0.6250 $\pm$ 0.1768 (95\%: $-$0.9633 to 2.2133)"
    assert first == [r"learning\_rate 0.01", "2", high, rf"\textbf{{{high}}}"]
    assert second == [r"learning\_rate 0.1", "2", rf"\textbf{{{low}}}", low]


def test_latex_of_runs_of_several_tasks(tmp_path, capsys):
    make_regression(tmp_path / "a", 1.0)
    make_run(tmp_path / "b")
    out, _ = output_of(tmp_path, "--latex", capsys=capsys)
    header, *rows = cells_of(out)
    for name in (
        "valid/mae",
        "valid/acc",
    ):  # which the other run does not have: it is the best of one
        cells = sorted(row[header.index(name)] for row in rows)
        assert not cells[0].startswith(r"\textbf{") and cells[1] == "–"


def test_latex_of_runs(tmp_path, capsys):
    make_regression(tmp_path / "good", 1.0, name=HOSTILE, width=12)
    make_regression(tmp_path / "bad", 2.0, name="[0pt]", width=-3)
    for path in (tmp_path / "good", tmp_path / "bad"):
        change(path / "config.json", {"metrics": {"mae": "min", "loss": "up"}})
    out, _ = output_of(tmp_path, "--latex", capsys=capsys)
    header, good, bad = cells_of(out)
    assert header[2:] == ["best epoch", "valid/mae", "test/mae", "test/loss", "seconds", "width"]
    assert good[3:-1] == [r"\textbf{1}", r"\textbf{2}", "12346", "–"]
    assert bad[3:-1] == ["2", "4", "12346", "–"]
    assert good[0] == (
        r'a "b", \& 50 \% of\_x\textbackslash{}n\textbackslash{}end\{tabular\} \#1 '
        r"\{\$\textasciitilde{}\textasciicircum{}\textless{}\textbar{}\textgreater{}\} (good)"
    )
    assert bad[0] == "[0pt] (bad)" and good[-1] == "12" and bad[-1] == "$-$3"


# ------------------------------------------------------------------------------------------- --metric


@pytest.mark.quick
def test_a_logged_metric_is_that_of_the_best_epoch(tmp_path, capsys):
    """Rows 3 and 4 are of epoch 2, 5 and 6 of epoch 3."""
    make_logged(tmp_path / "finished")
    make_logged(tmp_path / "died", best_epoch=None)
    foreign = make_logged(tmp_path / "foreign")
    change(foreign / "metrics.json", {"best/epoch": None})
    rows = table_of(tmp_path, "--metric", "train/acc", capsys=capsys)
    # Without a best epoch, the last value counts.
    assert [(Path(row["directory"]).name, row["train/acc"]) for row in rows] == [
        ("foreign", "0.6"),
        ("died", "0.4"),
        ("finished", "0.4"),
    ]
    assert [row["best epoch"] for row in rows] == ["", "2.0", "2"]
    rows = table_of(tmp_path, "--metric", "test/acc", capsys=capsys)
    assert [row["test/acc"] for row in rows] == ["0.5", "0.5", ""]


def test_a_metric_ranks_the_runs(tmp_path, capsys):
    for name, loss, acc in (("a", 0.1, 0.3), ("b", 0.2, 0.9), ("c", 0.3, 0.6)):
        make_run(tmp_path / name, learning_rate=loss)
        change(tmp_path / f"{name}/metrics.json", {"valid/loss": loss, "test/acc": acc})
    for metric, order in (("valid/loss", "abc"), ("test/acc", "bca")):
        out, _ = output_of(
            tmp_path, "--metric", metric, "--output", tmp_path / "r.html", capsys=capsys
        )
        assert "".join(line[0] for line in out.splitlines()[1:4]) == order
    out, _ = output_of(
        tmp_path, "--metric", "train/loss_step", "--output", tmp_path / "r.html", capsys=capsys
    )
    lines = out.splitlines()
    assert "train/loss_step" in lines[0] and [line[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert lines[4] == (
        "Not ranked: a, b, c: config.json does not say whether lower or higher is better in "
        "train/loss_step"
    )


def test_a_metric_that_no_run_has(tmp_path):
    make_run(tmp_path / "a")
    done = call("report.py", "a", "--metric", "valid/los", cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "--metric valid/los: no run has it; the nearest names: valid/loss, " in line


def test_predictions_are_compared_by_the_metric_of_their_data(tmp_path):
    paths = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    page = page_of(*paths, "--metric", "test/acc", output=tmp_path / "r.html")
    assert "Not compared: a, b (test/acc is not computed from predictions.csv)." in page
    assert "best minus this" not in page and "McNemar" not in page
    for path in paths:
        shutil.copy(path / "predictions.csv", path / "test_predictions.csv")
        figures = json.loads((path / "metrics.json").read_text())
        change(path / "metrics.json", {"test/acc": figures["valid/acc"]})
    page = page_of(*paths, "--metric", "test/acc", output=tmp_path / "r.html")
    before, test = page.split("(test_predictions.csv)</h2>")
    assert "best minus this" not in before and "test/acc, best minus this" in test
    page = page_of(*paths, "--metric", "valid/f1_macro", output=tmp_path / "r.html")
    assert "valid/f1_macro, best minus this" in page
    for path in paths:
        change(path / "config.json", {"metrics": {"acc_step": "max"}})
    page = page_of(*paths, "--metric", "train/acc_step", output=tmp_path / "r.html")
    assert page.count("Not compared: ") == 1 and "best minus this" not in page
    assert "(train/acc_step is not computed from predictions.csv)" in page


def test_groups_are_compared_by_the_metric(tmp_path):
    for seed in range(4):
        for rate in (0.01, 0.1):
            path = make_run(tmp_path / f"{rate} {seed}", seed=seed, learning_rate=rate)
            change(path / "metrics.json", {"test/acc": seed / 100 + rate})
            shutil.copy(path / "predictions.csv", path / "test_predictions.csv")
    page = page_of(tmp_path, "--metric", "test/acc", output=tmp_path / "r.html")
    assert page.count("Over seeds or folds, ") == 1
    assert "learning_rate 0.1 is better in test/acc than learning_rate 0.01" in page


# ------------------------------------------------------------------------------------------- figures


@pytest.mark.quick
@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.8941, 0.9507], "0.9224 ± 0.0400"),
        ([0.3129, 0.3357], "0.3243 ± 0.0161"),
        ([0.92235, 0.92245], "0.922400 ± 0.000071"),
        ([1000.0, 3000.0], "2000 ± 1414"),
        ([99.9999, 99.9999], "100.0 ± 0.0"),
        ([0.0, 0.0], "0.000 ± 0.000"),
        ([-0.5, -0.25], "-0.3750 ± 0.1768"),
    ],
)
def test_decimals_of_mean_and_deviation_match(values, expected, tmp_path, capsys):
    """It was 0.3243 ± 0.01615."""
    for seed, value in enumerate(values):
        path = make_run(tmp_path / str(seed), seed=seed)
        change(path / "metrics.json", {"valid/loss": value})
    out, _ = output_of(tmp_path, "--output", tmp_path / "r.html", capsys=capsys)
    (low, high) = re.search(rf"  {expected} \(95%: (\S+) to (\S+)\)  ", out).groups()
    decimals = len(expected.partition(" ")[0].partition(".")[2])
    assert [len(number.partition(".")[2]) for number in (low, high)] == [decimals, decimals]


# ------------------------------------------------------------------------- names, places and copies


def test_a_name_does_not_hide_the_directory(tmp_path, capsys):
    """Two runs of a name were called by their paths, one run of a name by that alone."""
    for directory in ("a", "b"):
        make_run(tmp_path / directory, name="same\n", seed=len(directory))
    make_run(tmp_path / "c")
    out, _ = output_of(tmp_path, "--output", tmp_path / "r.html", capsys=capsys)
    labels = {line.split("  ")[0] for line in out.splitlines()[1:4]}
    assert labels == {r"same\n (a)", r"same\n (b)", "c"}


def test_copies_in_a_folder_per_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        make_run(Path(f"runs/host1/{seed}"), seed=seed)
    shutil.copytree("runs/host1/2", "runs/host2/2")
    make_run(Path("runs/host1/1/inside"), seed=7)  # of a run that is one already
    make_run(Path("runs/wandb/offline"), seed=8)
    make_run(Path("runs/host2/a/too_deep"), seed=9)
    make_run(Path("runs/beside"), seed=3)
    out, _ = output_of("runs", "--json", capsys=capsys)
    content = json.loads(out)
    assert {run["directory"] for run in content["runs"]} == {
        "runs/beside",
        "runs/host1/1",
        "runs/host1/2",
        "runs/host2/2",
    }
    (group,) = content["groups"]
    assert group["n"] == 3 and "runs/host1/2" not in group["members"]
    out, _ = output_of("runs", "--output", "r.html", capsys=capsys)
    labels = {line.split("  ")[0] for line in out.splitlines()[1:5]}
    assert labels == {"beside", "1", "2 (runs/host1/2)", "2 (runs/host2/2)"}


def test_a_repository_of_ones_own(tmp_path):
    for name in ("report.py", "metrics.py", "viz.py"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("harness", "reporting"):
        shutil.copytree(REPO / name, tmp_path / name)
    make_journal(tmp_path / "runs/host/a", {"step": 1, "perplexity": 3.5})
    done = call(
        tmp_path / "report.py", "runs", "--json", "--metric", "perplexity", cwd=tmp_path, real=True
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["runs"][0]["perplexity"] == 3.5


# ------------------------------------------------------------------------------ journals of other programs


@pytest.mark.parametrize("config", [None, {"lr": 0.1, "loss": "mse"}, {"monitor": "g_loss"}])
def test_a_journal_is_enough(config, tmp_path, capsys):
    """The page missed a predictions.csv, and the program was said to have died."""
    paths = []
    for name in "ab":
        rows = [{"step": i, "g_loss": 1 / i, "d_loss": 0.5} for i in (1, 2)]
        paths.append(make_journal(tmp_path / name, *rows))
        if config:
            (tmp_path / f"{name}/config.json").write_text(json.dumps(config))
    for chosen in (paths, paths[:1]):
        page = page_of(*chosen, output=tmp_path / "r.html")
        out = capsys.readouterr().out
        assert "at step 2" in out and "died" not in out and "command" not in out
        said = len(chosen) == 2 or config == {"monitor": "g_loss"}
        assert ("Not ranked: a" in out) == said
        text = page[page.index('<div id="tables">') : page.index("<script nonce")]
        assert "predictions" not in text.replace("g_loss", "") and "Not compared" not in text


def test_a_setting_may_have_the_name_of_a_metric(tmp_path, capsys):
    for name, loss in (("a", "mse"), ("b", "mae")):
        make_journal(tmp_path / name, {"step": 1, "loss": 0.5})
        (tmp_path / f"{name}/config.json").write_text(json.dumps({"loss": loss}))
    out, _ = output_of(tmp_path, "--metric", "loss", "--json", capsys=capsys)
    found = [(run["loss (setting)"], run["loss"]) for run in json.loads(out)["runs"]]
    assert found == [("mse", 0.5), ("mae", 0.5)]


def test_odd_values_in_a_journal(tmp_path, capsys):
    rows = [
        {"step": 1, "a": math.nan, "b": math.inf, "c": "x", "d": {"e": [1]}, "g": True},
        {"step": 2, "a": 1.5, "b": None, "c": 2, "d": -math.inf, "g": False},
        {"step": 3, "a": math.nan},
    ]
    make_journal(tmp_path / "a", *rows)
    for metric, expected in (("a", "nan"), ("b", "inf"), ("c", "2.0"), ("d", "-inf")):
        (row,) = table_of(tmp_path, "--metric", metric, capsys=capsys)
        assert row[metric] == expected
    with pytest.raises(UserError, match="--metric g: no run has it"):
        report.main([str(tmp_path), "--metric", "g"])


@pytest.mark.quick
def test_settings_named_like_columns_keep_a_column_of_their_own(tmp_path, capsys):
    """A setting called directory replaced the run's own."""
    for name in "ab":
        make_run(tmp_path / name, directory=f"D{name}", state=name, seconds=name)
    out, _ = output_of(tmp_path, "--json", capsys=capsys)
    for run in json.loads(out)["runs"]:
        name = Path(run["directory"]).name
        assert run["directory (setting)"] == f"D{name}" and run["state"] == "finished"
        assert run["state (setting)"] == name and run["seconds (setting)"] == name
