"""Load a corpus for sentence classification: CoLA, the user's files, or synthetic sentences."""

import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from harness.errors import UserError
from tasks.downloads import has_files
from tasks.grammar import minimal_pairs
from tasks.text_files import OwnFiles, Sentences, read_parts


class Corpus(NamedTuple):
    """A corpus for sentence classification."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # subsets of `valid` that are also evaluated separately
    class_names: list[str]
    files: list[Path]  # what was read; empty for the built-in sentences
    test: Sentences | None = None  # if the user has a file for it


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

    CoLA is downloaded to `data_dir` if it is missing. "auto" means the user's files if there are
    any, otherwise CoLA, otherwise, with a loud warning, "synthetic". With `own.folds`, training and
    validation data are joined, and one fold becomes the validation data. Raises `UserError` if the
    options contradict each other, or if files are missing or damaged.
    """
    files = (own.train_file, own.valid_file, own.test_file)
    path = Path(data_dir) / "cola_public_1.1.zip"
    if own.train_file and (own.valid_file or own.folds):
        if name not in ("auto", "files"):
            raise UserError(
                f"--dataset {name} and --train_file exclude each other: drop one of them"
            )
        corpus = _read_user_files([Path(file) for file in files if file], own)
    elif any(files) or name == "files":
        raise UserError("--train_file and --valid_file go together: name both, or make --folds")
    elif name != "synthetic" and has_files(
        "cola",
        [path],
        data_dir,
        lambda: [(path, COLA_URL, COLA_SHA256)],
        optional=name == "auto",
    ):
        corpus = _read_cola(path)
    else:
        corpus = synthetic_sentences()
    if own.folds:
        whole = corpus.train
        whole.extend(corpus.valid)
        train, valid = own.split(whole.labels)
        corpus = corpus._replace(
            train=_take(whole, train),
            valid=_take(whole, valid),
            domains={},
        )
    if corpus.name == "files":
        _report_repeated(corpus)
    return corpus


def _take(part: Sentences, indices: Sequence[int]) -> Sentences:
    return Sentences(*([column[i] for i in indices] for column in part))


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
    train, valid, out_of_domain = parts
    boundary = len(valid.labels)
    domains = {"in_domain": slice(boundary), "out_of_domain": slice(boundary, None)}
    valid.extend(out_of_domain)
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
    keys = sorted(map(_sort_key, set(train.labels)))
    class_names = [label for _, _, label in keys]
    spellings = set()
    for is_word, number, label in keys:
        spellings.add(normalize("NFKC", label).casefold() if is_word else number)
    if len(spellings) < len(keys):
        print("Labels differ only in spelling, as Yes and yes or 1 and 1.0: each is a class.")
    has_words, _, last = keys[-1]  # words come last
    if not has_words and any(number % 1 for _, number, _ in keys):
        print(f"The labels, {class_names[0]} to {last}, look like regression: each is a class.")
    return Corpus("files", train, valid, {}, class_names, files, *others)


def _report_repeated(corpus: Corpus) -> None:
    """Print how many validation and test sentences also occur in an earlier part."""
    seen = set(corpus.train.sentences)
    for name, part in (("validation", corpus.valid), ("test", corpus.test)):
        sentences = part.sentences if part else []
        if count := sum(sentence in seen for sentence in sentences):
            print(
                f"{count:,} of {len(sentences):,} {name} sentences are in other parts too: "
                "results on them mean little."
            )
        seen.update(sentences)


def _sort_key(label: str) -> tuple[bool, float, str]:
    """Whether a label is a word, its value if it is a number, and itself; 01 comes before 1."""
    number = label.replace("−", "-")  # a minus sign
    if re.fullmatch(r"[-+]?\d*\.?\d+", number):
        return False, float(number), label
    return True, 0.0, label


def synthetic_sentences(train: int = 12_000, valid: int = 1_000) -> Corpus:
    """Minimal pairs of the built-in grammar; no sentence is in both parts."""
    whole = Sentences([], [], [])
    for acceptable, unacceptable, rule in minimal_pairs((train + valid) // 2):
        labels = ["acceptable", "unacceptable"]
        whole.extend(Sentences([acceptable, unacceptable], labels, [rule, rule]))
    train_part = _take(whole, range(train))
    valid_part = _take(whole, range(train, len(whole.labels)))
    return Corpus("synthetic", train_part, valid_part, {}, ACCEPTABILITY, [])
