"""The examples: copies of train_mnist.py that keep what it promises."""

import csv
import difflib
import importlib
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import options
from tests import forking, killing
from tests.conftest import REPO, call, clean_environment, finished_run, made_once

EXAMPLES = ("examples/train_lm.py", "examples/train_tabular.py")
LM, TABULAR = "examples/train_lm.py", "examples/train_tabular.py"
UNINSTALLED = """
import importlib.metadata, sys

class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}")

def version(library, installed=importlib.metadata.version):
    if library in ("transformers", "torchvision"):
        raise importlib.metadata.PackageNotFoundError(library)
    return installed(library)

sys.meta_path.insert(0, Uninstalled())
importlib.metadata.version = version
"""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """For each example, an uninterrupted run of `killing`'s and what it logged."""

    def make(script: str, cwd: Path) -> SimpleNamespace:
        arguments = f"{killing.EXAMPLES[script]} --id same".split()
        return finished_run(script, cwd, *arguments)

    return {
        script: made_once(tmp_path_factory, Path(script).stem, lambda cwd, s=script: make(s, cwd))
        for script in EXAMPLES
    }


def losses(out: Path) -> list[tuple[str, float]]:
    """The losses of a run, by name and in order."""
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [(name, row[name]) for row in rows for name in sorted(row) if "loss" in name]


def assert_close(a: list[tuple[str, float]], b: list[tuple[str, float]]) -> None:
    """The same losses up to rounding, which a few hundred steps amplify: more on some processors than on others."""
    assert [name for name, _ in a] == [name for name, _ in b] and len(a) > 10
    one, other = ([value for _, value in pairs] for pairs in (a, b))
    assert one[:4] == pytest.approx(other[:4], rel=2e-3)
    assert one == pytest.approx(other, rel=0.1, abs=0.01)


@pytest.mark.parametrize("script", EXAMPLES)
def test_is_short(script):
    assert len((REPO / script).read_text().splitlines()) < 350


@pytest.mark.parametrize("script", EXAMPLES)
def test_differs_from_its_template_in_few_lines(script):
    """From the section on training on, whose named parts belong to the task as well."""

    def rest(file: Path) -> list[str]:
        lines = file.read_text().splitlines()
        heading = next(line for line in lines if line.startswith("# ---") and "training" in line)
        return lines[lines.index(heading) :]

    pair = rest(REPO / "train_mnist.py"), rest(REPO / script)
    codes = difflib.SequenceMatcher(None, *pair, autojunk=False).get_opcodes()
    assert sum(max(b - a, d - c) for tag, a, b, c, d in codes if tag != "equal") <= 62


@pytest.mark.parametrize("script", EXAMPLES)
def test_run_leaves_its_files(script, references):
    run = references[script]
    names = {path.name for path in run.files.iterdir()}
    expected = "config.json history.jsonl metrics.json predictions.csv curves.png model.pt model.onnx checkpoint.pt"
    assert names >= set(expected.split())
    assert run.config["metrics"]["loss"] == "min"
    monitored = {row["epoch"]: row for row in run.journal if run.config["monitor"] in row}
    best = min(monitored, key=lambda epoch: monitored[epoch][run.config["monitor"]])
    assert run.metrics["best/epoch"] == run.summary["best/epoch"] == best
    name = run.config["monitor"]
    assert run.metrics[name] == monitored[best][name]  # recomputed from what is exported
    assert run.history[-1]["test/loss"] == run.metrics["test/loss"]


@pytest.mark.parametrize("script", EXAMPLES)
def test_exported_model_is_the_best_one(script, references):
    """The ONNX file with the weights of model.pt, in float32."""
    onnxruntime = pytest.importorskip("onnxruntime")
    files = references[script].files
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    device = torch.device("cpu")
    settings = options.parse(module.Settings, killing.EXAMPLES[script].split())
    model = module.make_model(settings, module.load(settings, device), device)
    model.load_state_dict(torch.load(files / "model.pt", weights_only=True))
    session = onnxruntime.InferenceSession(files / "model.onnx")
    (inputs,) = session.get_inputs()
    dtype = torch.int64 if "int64" in inputs.type else torch.float32
    batch = torch.arange(3 * inputs.shape[1]).view(3, -1).remainder(5).to(dtype)
    (outputs,) = session.run(None, {inputs.name: batch.numpy()})
    assert torch.allclose(torch.from_numpy(outputs), model.eval()(batch), atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("script", EXAMPLES)
def test_killed_and_resumed_is_identical(script, seed, references, tmp_path):
    """Weights, their average, history, metrics, predictions and the sample."""
    environment = clean_environment(tmp_path)
    killed = killing.killed_and_resumed(script, tmp_path, environment, 3, random.Random(seed))
    assert killed and killing.differences(references[script].files, tmp_path / "out") == []


@pytest.mark.parametrize("script", EXAMPLES)
def test_two_processes_train_like_one(script, references, tmp_path):
    command = [sys.executable, *forking.TORCHRUN, "--nproc-per-node", "2", REPO / script]
    arguments = [*killing.EXAMPLES[script].split(), "--output_dir", "out"]
    environment = clean_environment(tmp_path, OMP_NUM_THREADS="1")
    done = forking.run([*command, *arguments], cwd=tmp_path, env=environment, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(losses(tmp_path / "out"), losses(references[script].files))


@pytest.mark.parametrize("script", EXAMPLES)
def test_micro_batches_add_up(script, references, tmp_path):
    arguments = [*killing.EXAMPLES[script].split(), "--micro_batch_size", "20"]
    run = finished_run(script, tmp_path, *arguments, "--wandb", "disabled")
    assert_close(losses(run.files), losses(references[script].files))


@pytest.mark.parametrize("script", [*EXAMPLES, "train_mnist.py"])
def test_copy_needs_only_what_it_imports(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(UNINSTALLED)
    arguments = "--max_steps 2 --batch_size 16".split()
    if script == "train_mnist.py":
        arguments += "--dataset synthetic --slice 100".split()
    run = finished_run(script, tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    assert run.config["versions"].keys() == {"python", "torch", "wandb", "numpy"}
    (dataset,) = (
        r["artifact"]
        for r in run.records
        if r["type"] == "artifact" and r["artifact"]["type"] == "dataset"
    )
    if script in EXAMPLES:
        (file,) = dataset["manifest"]["contents"]
        assert file["path"] == run.metrics["dataset"]
    else:
        assert dataset["name"] == run.metrics["dataset"]


@pytest.mark.parametrize("script", EXAMPLES)
def test_answers_options_at_once(script, tmp_path):
    done = call(script, "--epoch", "8", cwd=tmp_path)
    problem = "unknown option --epoch; did you mean --epochs? (--help lists the options)"
    assert (done.status, done.err) == (2, f"{Path(script).name}: error: {problem}\n")


# ------------------------------------------------------------------------------------ the language model


def test_language_model_learns(references):
    metrics = references[LM].metrics
    assert metrics["test/perplexity"] < 9 < len(metrics["characters"]) / 2
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]))


def test_sample_is_written_and_logged_as_text(references):
    run = references[LM]
    sample = (run.files / "sample.txt").read_text()
    assert len(sample) == 201 and set(sample) <= set(run.metrics["characters"])
    logged = [row["sample.path"] for row in run.history if "sample.path" in row]
    assert len(logged) == 3
    page = (run.cwd / "wandb/latest-run/files" / logged[-1]).read_text()
    assert f"<pre>{sample}</pre>" in page


def test_markup_in_a_sample_is_escaped(tmp_path):
    (tmp_path / "markup.txt").write_text("<b>&</b>\n" * 100)
    arguments = "--file markup.txt --context 4 --layers 1 --heads 1 --epochs 1 --batch_size 8"
    run = finished_run(LM, tmp_path, *arguments.split())
    (path,) = [row["sample.path"] for row in run.history if "sample.path" in row]
    page = (run.cwd / "wandb/latest-run/files" / path).read_text()
    assert "&lt;" in page and "<b>" not in page


def test_sampling_leaves_random_numbers_alone():
    import examples.train_lm as lm

    settings = lm.Settings(context=4, layers=1, heads=1)
    text = lm.load(settings, torch.device("cpu"))
    model = lm.make_model(settings, text, torch.device("cpu")).eval()
    before = torch.get_rng_state()
    assert lm.generate(model, text, settings) == lm.generate(model, text, settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_byte_order_mark_is_no_character(tmp_path):
    """Before, a text that Windows had saved had one more in its vocabulary."""
    import examples.train_lm as lm

    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + 100 * b"ab\r\n")
    text = lm.load(lm.Settings(file=str(file), context=4), torch.device("cpu"))
    assert text.characters == "\nab"


def test_average_and_clipped_gradients(references):
    run = references[LM]
    state = torch.load(run.files / "checkpoint.pt", weights_only=True)
    average = {k.removeprefix("module."): v for k, v in state["average"].items()}
    assert average.pop("n_averaged") == state["position"]["batch"]
    assert not killing.same(average, state["model"])
    best = torch.load(run.files / "model.pt", weights_only=True)
    assert killing.same(average, best)  # of the last epoch, which is the best
    norms = [row["train/grad_norm"] for row in run.journal if "train/grad_norm" in row]
    assert len(norms) > 10 and all(norm > 0 for norm in norms)


def test_character_that_training_lacks_counts(tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 200 + "abz" * 17, encoding="utf-8")
    arguments = "--file text.txt --context 4 --layers 1 --heads 1 --epochs 1 --batch_size 8"
    run = finished_run(LM, tmp_path, *arguments.split(), "--wandb", "disabled")
    assert (
        run.metrics["characters"] == "abz" and run.metrics["test/loss"] > run.metrics["valid/loss"]
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "text.txt can't be read: [Errno 2] No such file or directory: 'text.txt'"),
        (..., "text.txt can't be read: [Errno 21] Is a directory: 'text.txt'"),
        (b"", "text.txt has 0 characters; --context needs 330"),
        (b"ab" * 164, "text.txt has 328 characters; --context needs 330"),
        (b"ab\xff" * 200, "text.txt can't be read: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_wrong_text_is_one_line(content, problem, tmp_path):
    path = tmp_path / "text.txt"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert_one_line(call(LM, "--file", "text.txt", cwd=tmp_path), f"train_lm.py: error: {problem}")


def assert_one_line(done: SimpleNamespace, beginning: str) -> None:
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith(beginning), done.err


# ------------------------------------------------------------------------------------------- the table

ROWS = [[f"{i}", f"{i % 7}", "xyz"[i % 3], f"{2.5 * i}"] for i in range(60)]
HEADER = ["size", "age", "kind", "price"]


def write_table(directory: Path, rows: list[list[str]], header: list[str] = HEADER) -> None:
    with (directory / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *rows])


def test_numbers_are_predicted_in_their_unit(references):
    run = references[TABULAR]
    assert run.config["metrics"] == {"loss": "min", "mae": "min", "r2": "max"}
    with (run.files / "predictions.csv").open() as file:
        rows = [(float(row["target"]), float(row["prediction"])) for row in csv.DictReader(file)]
    mae = sum(abs(target - prediction) for target, prediction in rows) / len(rows)
    assert run.metrics["valid/mae"] == pytest.approx(mae)
    assert run.metrics["test/r2"] > 0.9


def test_classes_are_predicted(tmp_path):
    arguments = "--task classification --target district --monitor valid/acc --epochs 10"
    run = finished_run(TABULAR, tmp_path, *arguments.split(), "--wandb", "disabled")
    assert run.metrics["class_names"] == ["Hafen", "Mitte", "Nord"]
    assert run.metrics["test/acc"] > 0.9 and "test/r2" not in run.metrics
    best = max(row["valid/acc"] for row in run.journal if "valid/acc" in row)
    assert run.metrics["valid/acc"] == best
    with (run.files / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    hits = sum(row["label"] == row["prediction"] for row in rows)
    assert run.metrics["valid/acc"] == pytest.approx(hits / len(rows))


def test_columns_of_a_table(tmp_path):
    """Numbers are normalised on the training part; a word that it lacks has no feature."""
    import examples.train_tabular as tabular

    words = tabular.np.array(["8", "1", "3"])
    assert tabular.encode("size", words, 1).flatten().tolist() == [6, -1, 1]
    words = tabular.np.array(["new", "a", "b"])
    assert tabular.encode("size", words, 1).tolist() == [[0, 0], [1, 0], [0, 1]]
    write_table(tmp_path, [[*row[:2], f'"{row[2]}", said,\nhe', row[3]] for row in ROWS])
    settings = tabular.Settings(file=str(tmp_path / "table.csv"))
    table = tabular.load(settings, torch.device("cpu"))
    assert [len(part) for part in (table.train, table.valid, table.test)] == [40, 10, 10]
    assert table.features[table.train].shape == (40, 5)


def test_odd_cells_of_a_table(tmp_path, capsys, recwarn):
    """Spaces made other classes and other columns, numpy warned of blank lines in two lines, and nothing said
    that 1,059 is no number."""
    import examples.train_tabular as tabular

    rows = [[f"1,{i:03}", " x"[i % 2] + "y ", f" {i}"] for i in range(60)]
    write_table(tmp_path, [*rows[:9], [], [" "], *rows[9:]], ["size", " kind", "price "])
    table = tabular.load(tabular.Settings(file=str(tmp_path / "table.csv")), torch.device("cpu"))
    assert capsys.readouterr().out == (
        "size, such as 1,059: 40 number(s)\nkind, such as y: 2 number(s)\n"
        "price, such as 9: 1 number(s)\n"
    )
    assert table.features[table.train].shape == (40, 42) and not recwarn.list


@pytest.mark.parametrize(
    ("change", "arguments", "problem"),
    [
        (lambda rows: rows[:19], "", "needs a header and 20 rows; it has 20 lines"),
        (
            lambda rows: rows,
            "--target cost",
            "needs 'cost' and others, no name twice: size, age, kind",
        ),
        (lambda rows: [*rows, ["1", "2"]], "", "can't be read as CSV: the number of columns"),
        (lambda rows: [*rows, ["1", "", "x", "2"]], "", "column 'age' lacks values"),
        (lambda rows: [*rows, ["1", "nan", "x", "2"]], "", "column 'age' lacks values"),
        (lambda rows: [*rows, ["1", " N/A", "x", "2"]], "", "column 'age' lacks values"),
        (lambda rows: [*rows, ["1", "-inf", "x", "2"]], "", "column 'age' is infinite, or"),
        # Before, all of the column became 0: the standard deviation overflows.
        (lambda rows: [*rows, ["1", "1e200", "x", "2"]], "", "column 'age' is infinite, or"),
        (
            lambda rows: [["1", *row[1:]] for row in rows] + [["1.0", "1", "x", "2"]] * 9,
            "",
            "'size' is",
        ),
        (
            lambda rows: [[*row[:3], "7"] for row in rows],
            "",
            "column 'price' is infinite, or training has only one",
        ),
        (
            lambda rows: [["7", *row[1:]] for row in rows],
            "",
            "column 'size' is infinite, or training has only one",
        ),
        (
            lambda rows: [[*row[:2], "x", row[3]] for row in rows],
            "--target kind --task classification",
            "column 'kind' is infinite, or training has only one",
        ),
        (lambda rows: rows, "--target kind", "'kind' is text: write its numbers as 1234.5, or use"),
        (lambda rows: rows, "--task classification", "no training row has the price '"),
    ],
)
def test_wrong_table_is_one_line(change, arguments, problem, tmp_path):
    write_table(tmp_path, change(ROWS))
    done = call(TABULAR, "--file", "table.csv", *arguments.split(), cwd=tmp_path)
    assert problem in done.err
    assert_one_line(done, "train_tabular.py: error: ")


def test_other_tables_are_one_line(tmp_path):
    write_table(tmp_path, ROWS, ["size", "size", "kind", "price"])
    assert_one_line(call(TABULAR, "--file", "table.csv", cwd=tmp_path), "train_tabular.py: error: ")
    assert "table.csv" not in call(TABULAR, "--file", "none.csv", cwd=tmp_path).err
    done = call(TABULAR, "--file", "none.csv", cwd=tmp_path)
    assert_one_line(
        done, "train_tabular.py: error: none.csv can't be read as CSV: [Errno 2] No such"
    )
    (tmp_path / "empty.csv").touch()  # numpy warned in two more lines
    done = call(TABULAR, "--file", "empty.csv", cwd=tmp_path)
    assert_one_line(done, "train_tabular.py: error: empty.csv needs a header and 20 rows; it has 0")
    (tmp_path / "latin.csv").write_bytes("a,price\n\u00e9,1\n".encode("latin-1"))
    done = call(TABULAR, "--file", "latin.csv", cwd=tmp_path)
    assert_one_line(done, "train_tabular.py: error: latin.csv can't be read as CSV: 'utf-8' codec")


def test_metric_of_the_other_task_is_refused_at_once(tmp_path):
    done = call(TABULAR, *"--task classification --monitor valid/mae".split(), cwd=tmp_path)
    problem = "--monitor: must be one of valid/loss, valid/acc; got 'valid/mae'"
    assert (done.status, done.err) == (2, f"train_tabular.py: error: {problem}\n")
    assert not list(tmp_path.iterdir())


def test_target_in_another_unit_on_resuming_is_refused(tmp_path):
    """Normalised, it is the same to the last bit."""
    arguments = "--file table.csv --batch_size 8 --epochs 1 --output_dir out --resume --wandb disabled".split()
    write_table(tmp_path, ROWS)
    assert call(TABULAR, *arguments, cwd=tmp_path).status == 0
    (tmp_path / "out/metrics.json").unlink()
    write_table(tmp_path, [[*row[:3], str(1024 * float(row[3]))] for row in ROWS])
    done = call(TABULAR, *arguments, cwd=tmp_path)
    assert_one_line(done, "train_tabular.py: error: --resume: the data are not those")


@pytest.mark.parametrize("script", [LM, TABULAR])
def test_a_file_name_that_wandb_does_not_take(script, tmp_path):
    file = tmp_path / "\u00e4 (1).csv"
    write_table(tmp_path, ROWS * 20)
    (tmp_path / "table.csv").rename(file)
    done = call(script, "--file", file.name, *"--batch_size 8 --max_steps 1".split(), cwd=tmp_path)
    assert done.status == 0 and "W&B has failed" not in done.out + done.err
