"""Cross-validation: --fold and --folds, seeds.yaml, and what the report makes of such runs. There was none of it."""

import csv
import json
import random
import statistics
from collections import Counter

import pytest
import scipy.stats
import torch
import yaml

import report
import train_cola
import train_mnist
from harness.errors import UserError
from offline_sweep import file as sweep_file
from tasks.digits import split_digits, synthetic_digits
from tasks.folds import Folds
from tasks.sentences import load_corpus
from tasks.text_files import OwnFiles
from tests import killing
from tests.conftest import REPO, call, finished_run
from tests.test_corpus import cola_zip
from tests.test_sweep_files import engine_accepts


@pytest.mark.quick
@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_cover_every_example_once_and_are_stratified(folds):
    labels = [*"a" * 50, *"b" * 7, *"c" * 23]
    covered = []
    for fold in range(1, folds + 1):
        train, valid = Folds(fold=fold, folds=folds).split(labels)
        assert sorted([*train, *valid]) == list(range(80))
        assert valid == sorted(valid) and train == sorted(train)
        assert len(valid) in (80 // folds, 80 // folds + 1)
        counts = Counter(labels[i] for i in valid)
        for label, total in Counter(labels).items():
            assert counts[label] in (total // folds, total // folds + 1)
        assert valid != list(range(valid[0], valid[0] + len(valid)))  # not in the order of the data
        covered += valid
    assert sorted(covered) == list(range(80))


@pytest.mark.quick
def test_folds_follow_from_labels_and_their_number_alone():
    """Worked out by hand from the seeded order of Python's generator, which is the same in all versions."""
    order = list(range(6))
    random.Random(0).shuffle(order)
    order = [i for i in order if i < 4] + [i for i in order if i >= 4]  # class 0, then class 1
    expected = [sorted(order[0::2]), sorted(order[1::2])]
    random.seed(5)
    for fold, valid in enumerate(expected, start=1):
        assert Folds(fold=fold, folds=2).split([0, 0, 0, 0, 1, 1])[1] == valid


OPTIONS = {
    "--fold 1": "--fold and --folds go together: name both",
    "--folds 3": "--fold and --folds go together: name both",
    "--fold 4 --folds 3": "--fold 4: there are only 3 --folds",
    "--fold 0 --folds 3": "--fold: must be at least 1, got '0'",
    "--fold 1 --folds 1": "--folds: must be at least 2, got '1'",
}


@pytest.mark.quick
@pytest.mark.parametrize("main", [train_mnist.main, train_cola.main])
@pytest.mark.parametrize("arguments", OPTIONS)
def test_options_that_contradict_each_other(main, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments.split())
    assert str(caught.value) == OPTIONS[arguments]
    assert not list(tmp_path.iterdir())


@pytest.mark.quick
def test_folds_of_digits():
    digits = synthetic_digits(train=300, test=40)
    seen = []
    for fold in (1, 2, 3):
        split = split_digits(digits, 5000, 1, folds=Folds(fold=fold, folds=3))
        assert len(split.train.labels) == 200 and len(split.test.labels) == 40
        both = torch.cat([split.train.images, split.valid.images]).flatten(1)
        assert len(both.unique(dim=0)) == len(digits.train.images.flatten(1).unique(dim=0))
        seen.append(split.valid.images)
    assert torch.equal(
        torch.cat(seen).flatten(1).unique(dim=0), digits.train.images.flatten(1).unique(dim=0)
    )
    thinned = split_digits(digits, 5000, 7, folds=Folds(fold=3, folds=3))
    assert torch.equal(thinned.valid.images, split.valid.images[::7])
    assert torch.equal(thinned.train.labels, split.train.labels[::7])
    with pytest.raises(UserError, match="--valid_size and --folds exclude each other"):
        split_digits(digits, 40, 1, folds=Folds(fold=1, folds=3))
    with pytest.raises(UserError, match=r"--folds 60: the class \d has \d+ examples"):
        split_digits(digits, 5000, 1, folds=Folds(fold=1, folds=60))


@pytest.mark.quick
def test_folds_of_cola_pool_training_and_validation_sentences(tmp_path, monkeypatch):
    cola_zip(tmp_path / "cola_public_1.1.zip", monkeypatch)
    whole = load_corpus("cola", str(tmp_path))
    valid = []
    for fold in (1, 2):
        corpus = load_corpus("cola", str(tmp_path), OwnFiles(fold=fold, folds=2))
        assert corpus.domains == {}  # the domains are mixed
        rows = [*zip(*corpus.train), *zip(*corpus.valid)]
        assert sorted(rows) == sorted([*zip(*whole.train), *zip(*whole.valid)])
        valid += corpus.valid.sentences
    assert sorted(valid) == sorted(whole.train.sentences + whole.valid.sentences)


@pytest.mark.quick
def test_folds_of_own_files(tmp_path, capsys):
    for name, count in (("a", 12), ("b", 4), ("c", 3)):
        rows = [f"{name} {i}\t{'yes' if i % 2 else 'no'}" for i in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    train_file, valid_file, test_file = (str(tmp_path / f"{name}.tsv") for name in "abc")
    valid = []
    for fold in (1, 2, 3):
        own = OwnFiles(train_file=train_file, test_file=test_file, fold=fold, folds=3)
        corpus = load_corpus("auto", "", own)
        assert len(corpus.train.labels) == 8 and corpus.valid.labels.count("yes") == 2
        assert corpus.test.sentences == ["c 0", "c 1", "c 2"]
        valid += corpus.valid.sentences
    assert sorted(valid) == sorted(f"a {i}" for i in range(12))
    assert "mean little" not in capsys.readouterr().out
    both = OwnFiles(train_file=train_file, valid_file=valid_file, fold=1, folds=2)
    corpus = load_corpus("auto", "", both)
    assert len(corpus.train.labels) == len(corpus.valid.labels) == 8 and corpus.test is None
    with pytest.raises(UserError, match=r"--folds 7: the class (yes|no) has 6 examples"):
        load_corpus("auto", "", OwnFiles(train_file=train_file, fold=1, folds=7))
    with pytest.raises(UserError, match="name both, or make --folds"):
        load_corpus("auto", "", OwnFiles(valid_file=valid_file, fold=1, folds=2))


def test_a_fold_is_resumed(tmp_path):
    folds = f"--train_file {killing.SHORT} --fold 2 --folds 4 --model scratch --wandb disabled"
    run = finished_run(
        "train_cola.py", tmp_path, *folds.split(), *"--max_steps 2 --watch off".split()
    )
    assert "files: 75 + 25 sentences" in run.out
    with (run.files / "predictions.csv").open(newline="") as file:
        sentences = [row["sentence"] for row in csv.DictReader(file)]
    own = OwnFiles(train_file=str(killing.SHORT), fold=2, folds=4)
    assert sentences == load_corpus("auto", "", own).valid.sentences
    assert (run.config["fold"], run.config["folds"]) == (2, 4)
    for name in ("metrics.json", "predictions.csv"):
        (run.files / name).unlink()
    again = call("train_cola.py", "--output_dir", "out", "--resume", cwd=tmp_path)
    assert again.status == 0 and (run.files / "predictions.csv").exists(), again.err
    other = call("train_cola.py", *"--output_dir out --resume --fold 3".split(), cwd=tmp_path)
    assert (other.status, other.err.count("\n")) == (2, 1) and "--fold was 2, is 3" in other.err


def seeds_file(*changes: tuple[str, str]) -> str:
    """The project's file with a cheap setting and other changes."""
    content = (REPO / "seeds.yaml").read_text()
    for old, new in (("program: train_mnist.py", f"program: {REPO / 'train_mnist.py'}"), *changes):
        assert old in content
        content = content.replace(old, new)
    cheap = {
        "dataset": "synthetic",
        "slice": 40,
        "wandb": "disabled",
        "max_steps": 2,
        "watch": "'off'",
    }
    for name, value in cheap.items():
        content += f"  {name}: {{value: {value}}}\n"
    return content


def test_seeds_yaml_over_folds_offline_and_its_report(tmp_path, capsys):
    """Runs of several seeds were a group, folds were not; there was no interval, and test data were not compared."""
    uncommented = [("#  f", "  f"), ("#    v", "    v"), ("[1, 2, 3, 4, 5]", "[1, 2]")]
    content = seeds_file(("  seed:\n    values: [1, 2, 3, 4, 5]\n", ""), *uncommented)
    (tmp_path / "copy.yaml").write_text(content)
    done = call("sweep_offline.py", "copy.yaml", "--jobs", 2, cwd=tmp_path)
    assert done.status == 0 and "2 complete" in done.out, done.err
    directory = tmp_path / "runs/sweep-seeds"
    paths = [path.parent for path in directory.glob("*/metrics.json")]
    configs = [json.loads((path / "config.json").read_text()) for path in paths]
    assert sorted((config["fold"], config["folds"]) for config in configs) == [(1, 5), (2, 5)]
    capsys.readouterr()
    report.main([str(directory), "--output", str(tmp_path / "report.html")])
    out = capsys.readouterr().out
    values = [json.loads((path / "metrics.json").read_text())["valid/loss"] for path in paths]
    low, high = scipy.stats.t.interval(0.95, 1, statistics.mean(values), scipy.stats.sem(values))
    (group,) = (line for line in out.splitlines() if line.startswith("all but seed and fold alike"))
    shown = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert f"  2  {shown} (95%: {low:.3f} to {high:.3f})  " in group
    page = (tmp_path / "report.html").read_text()
    assert shown in page and "Over seeds or folds" in page
    # The folds have no example in common, but the same test images.
    assert "beside each other run on the same 100 examples" in page
    assert "test/loss, best minus this" in page and "valid/loss, best minus this" not in page
    report.main([str(paths[0]), "--output", str(tmp_path / "report.html")])
    command = configs[0]["command"]
    assert f"command: {command}\n" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert f"<td>{command}</td>" in page
    assert "Per class" in page and page.count("<th tabindex=0>precision</th>") == 1


@pytest.mark.quick
def test_seeds_yaml_is_a_grid_over_five_seeds(tmp_path):
    path = tmp_path / "seeds.yaml"
    path.write_text(seeds_file())
    sweep = sweep_file.read_sweep(path)
    assert (sweep.method, sweep.name) == ("grid", "seeds")
    assert list(sweep.searched()) == ["seed"]
    assert sweep.searched()["seed"].values == [1, 2, 3, 4, 5]
    assert engine_accepts(yaml.safe_load((REPO / "seeds.yaml").read_text()))
