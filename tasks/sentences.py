"""Load a corpus for sentence classification: CoLA, the user's files, or synthetic sentences."""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from harness.errors import UserError
from tasks.downloads import has_files
from tasks.grammar import minimal_pairs
from tasks.text_files import OwnFiles, Sentences, read_parts


class Corpus(NamedTuple):
    """A corpus for classifying sentences."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # subsets of `valid` that are also reported separately
    class_names: list[str]
    files: list[Path]  # what was read; empty for the built-in sentences
    test: Sentences | None = None  # only of the user's files


COLA_URL = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip"
COLA_SHA256 = "2cf856f46df11c143d38e0cf2f9f34ff2fdb088c521cd859f5c4b9581683278b"
NO_FILES = OwnFiles()
ACCEPTABILITY = ["unacceptable", "acceptable"]  # CoLA's 0 and 1


def load_corpus(
    name: str,
    data_dir: str,
    own: OwnFiles = NO_FILES,
) -> Corpus:
    """Load "cola" from `data_dir`, the user's "files", or "synthetic" sentences.

    CoLA is downloaded to `data_dir` if it is missing. "auto" means the user's files if they are
    named, otherwise CoLA, otherwise, with a loud warning, "synthetic". With `own.folds`, training
    and validation data are put together, and one fold becomes the validation data. Raises
    `UserError` if the options contradict each other, or if files are missing or damaged.
    """
    files = (own.train_file, own.valid_file, own.test_file)
    path = Path(data_dir) / "cola_public_1.1.zip"
    source = (path, COLA_URL, COLA_SHA256)
    if own.train_file and (own.valid_file or own.folds):
        if name not in ("auto", "files"):
            raise UserError(
                f"--dataset {name} and --train_file exclude each other: drop one of them"
            )
        corpus = _read_user_files([Path(file) for file in files if file], own)
    elif any(files) or name == "files":
        raise UserError("--train_file and --valid_file go together: name both, or make --folds")
    elif name != "synthetic" and has_files(
        "cola", [path], data_dir, lambda: [source], optional=name == "auto"
    ):
        corpus = _read_cola(path)
    else:
        corpus = synthetic_sentences()
    if own.folds:
        everything = [a + b for a, b in zip(corpus.train, corpus.valid)]
        parts = []
        for indices in own.split(everything[1]):  # by label
            parts.append(Sentences(*([column[i] for i in indices] for column in everything)))
        train, valid = parts
        corpus = corpus._replace(train=train, valid=valid, domains={})
    if corpus.name == "files":
        _report_repeated(corpus)
    return corpus


def _read_cola(path: Path) -> Corpus:
    if hashlib.sha256(path.read_bytes()).hexdigest() != COLA_SHA256:
        raise UserError(
            f"{path} is damaged: it differs from the published file (SHA-256); "
            "delete it to replace it"
        )
    parts = []
    with zipfile.ZipFile(path) as archive:
        for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
            parts.append(parse_cola(archive.read(f"cola_public/raw/{part}.tsv")))
    train, in_domain, out_of_domain = parts
    valid = Sentences(*(first + second for first, second in zip(in_domain, out_of_domain)))
    boundary = len(in_domain.labels)
    domains = {"in_domain": slice(boundary), "out_of_domain": slice(boundary, None)}
    return Corpus("cola", train, valid, domains, ACCEPTABILITY, [path])


def parse_cola(content: bytes) -> Sentences:
    """Parse CoLA's rows of source, label (0 or 1), original annotation and sentence."""
    part = Sentences([], [], [])
    for line in content.splitlines():
        source, label, _, sentence = line.decode().split("\t")
        part.sentences.append(sentence)
        part.labels.append(ACCEPTABILITY[int(label)])
        part.sources.append(source)
    return part


def _read_user_files(files: list[Path], own: OwnFiles) -> Corpus:
    train, *others = read_parts(files, own)
    valid = others.pop(0) if own.valid_file else Sentences([], [], [])
    order = sorted(_label_order(label) for label in set(train.labels))
    class_names = [label for _, _, label in order]
    has_words, _, last = order[-1]
    spellings = {
        (number, is_word and normalize("NFKC", label).casefold())
        for is_word, number, label in order
    }
    if len(spellings) < len(order):
        print("Labels differ only in spelling, as Yes and yes or 1 and 1.0: each is a class.")
    if not has_words and any(number % 1 for _, number, _ in order):
        print(f"The labels, {class_names[0]} to {last}, look like regression: each is a class.")
    return Corpus("files", train, valid, {}, class_names, files, *others)


def _report_repeated(corpus: Corpus) -> None:
    seen = set(corpus.train.sentences)
    for name, part in (("validation", corpus.valid), ("test", corpus.test)):
        sentences = part.sentences if part else []
        if count := sum(sentence in seen for sentence in sentences):
            share = f"{count:,} of {len(sentences):,} {name} sentences"
            print(f"{share} are in other parts too: results on them mean little.")
        seen.update(sentences)


def _label_order(label: str) -> tuple[bool, float, str]:
    """A sort key: numbers first, by value, then other labels; 01 comes before 1."""
    number = label.replace("−", "-")  # a minus sign
    is_number = re.fullmatch(r"[-+]?\d*\.?\d+", number)
    return not is_number, float(number) if is_number else 0.0, label


def synthetic_sentences(train: int = 12_000, valid: int = 1_000) -> Corpus:
    """Minimal pairs of the built-in grammar; the parts have no sentence in common."""
    rows = []
    for acceptable, unacceptable, rule in minimal_pairs((train + valid) // 2):
        rows.append((acceptable, "acceptable", rule))
        rows.append((unacceptable, "unacceptable", rule))
    columns = [list(column) for column in zip(*rows)]
    train_part = Sentences(*(column[:train] for column in columns))
    valid_part = Sentences(*(column[train:] for column in columns))
    return Corpus("synthetic", train_part, valid_part, {}, ACCEPTABILITY, [])
