"""Corpora for sentence classification: CoLA from disk or downloaded, the user's files, or synthetic sentences."""

import csv
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from tasks.downloads import has_files
from tasks.grammar import minimal_pairs


class Sentences(NamedTuple):
    """Labelled sentences of one part of a corpus."""

    sentences: list[str]
    labels: list[int]  # indices into the corpus's class names
    sources: list[
        str
    ]  # for each sentence a publication, a file, or the rule of the built-in grammar


class Corpus(NamedTuple):
    """A corpus for classifying sentences."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # subsets of `valid` that are also reported separately
    class_names: list[str]
    files: list[Path]  # what was read; empty for the built-in sentences


TAB_SEPARATED = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
Row = tuple[str, str, str, str]  # where it stands in a file, sentence, label, source
COLA_URL = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip"
COLA_SHA256 = "2cf856f46df11c143d38e0cf2f9f34ff2fdb088c521cd859f5c4b9581683278b"
ACCEPTABILITY = ["unacceptable", "acceptable"]


def load_corpus(
    name: str, data_dir: str, train_file: str | None = None, valid_file: str | None = None
) -> Corpus:
    """Load "cola" from `data_dir`, downloading it there if needed, or the user's "files", or "synthetic".

    "auto" is the user's files if named, else CoLA, else, with a loud warning, "synthetic". Raises `UserError`.
    """
    if (train_file is None) != (valid_file is None) or (name == "files" and train_file is None):
        raise UserError("--train_file and --valid_file go together: name both")
    if train_file and valid_file:
        if name not in ("auto", "files"):
            raise UserError(
                f"--dataset {name} and --train_file exclude each other: drop one of them"
            )
        return _read_user_files(Path(train_file), Path(valid_file))
    if name != "synthetic":
        path = Path(data_dir) / "cola_public_1.1.zip"
        if has_files(
            "cola",
            [path],
            data_dir,
            lambda: {path: (COLA_URL, COLA_SHA256)},
            optional=name == "auto",
        ):
            return _read_cola(path)
    return synthetic_sentences()


def _read_cola(path: Path) -> Corpus:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != COLA_SHA256:
        raise UserError(
            f"{path} is damaged: it differs from the published file (SHA-256); delete it to replace it"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        train, in_domain, out_of_domain = (
            parse_cola(archive.read(f"cola_public/raw/{part}.tsv"), f"{path}: {part}.tsv")
            for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev")
        )
    valid = Sentences(*(a + b for a, b in zip(in_domain, out_of_domain)))
    inside = len(in_domain.labels)
    domains = {"in_domain": slice(inside), "out_of_domain": slice(inside, None)}
    return Corpus("cola", train, valid, domains, ACCEPTABILITY, [path])


def parse_cola(content: bytes, name: str) -> Sentences:
    """Parse CoLA's rows of source, label, original annotation and sentence; raises `UserError` naming file and row."""
    table = _table(content, name, TAB_SEPARATED)
    rows = _rows(table, ["source", "label", "annotation", "sentence"], name, first=1)
    return _numbered(rows, ["0", "1"], "CoLA")


def _read_user_files(train_file: Path, valid_file: Path) -> Corpus:
    train, valid = _read_table(train_file), _read_table(valid_file)
    labels = {label for _, _, label, _ in train}
    if not 2 <= len(labels) <= 1000 or (len(train) >= 20 and 2 * len(labels) > len(train)):
        counts = f"{len(labels):,} distinct labels in {len(train):,} rows"
        raise UserError(
            f"{train_file}: column 'label' has {counts}; does another column hold the classes?"
        )
    classes = sorted(labels, key=_order)
    parts = (_numbered(rows, classes, str(train_file)) for rows in (train, valid))
    return Corpus("files", *parts, {}, classes, [train_file, valid_file])


def _order(label: str) -> tuple[bool, int, str, str]:
    """Numbers come first, in numeric order, however long they are; the label itself orders 1 and 01."""
    digits = label.lstrip("0") if label.isdecimal() else ""
    return not label.isdecimal(), len(digits), digits, label


def _read_table(path: Path) -> list[Row]:
    """The rows of a file whose header names `sentence`, `label` and optionally `source`."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    table = _table(content, str(path), {} if path.suffix.lower() == ".csv" else TAB_SEPARATED)
    if len(table) < 2:
        raise UserError(f"{path} contains no sentences")
    header, *rows = table
    for column in ("sentence", "label"):
        if header.count(column) != 1:
            hint = (
                "; the file is comma-separated: name it .csv"
                if len(header) == 1 and "," in header[0]
                else ""
            )
            names = str(header)[1:-1][:300]
            raise UserError(
                f"{path}, row 1: the header must name one column {column!r}, not {names}{hint}"
            )
    return _rows(rows, header, str(path), first=2)


def _table(content: bytes, name: str, dialect: dict[str, Any]) -> list[list[str]]:
    """Rows of columns in a UTF-8 file whose lines end in CR, LF or CRLF."""
    table = []
    try:
        for row in csv.reader(
            (f"{line.decode()}\n" for line in content.splitlines()), strict=True, **dialect
        ):
            table.append(row)
        return table
    except UnicodeDecodeError:
        problem = "invalid UTF-8"
    except csv.Error as error:
        problem = f"a quote is never closed, or not doubled within quotes ({error})"
    raise UserError(f"{name}, row {len(table) + 1}: {problem}")


def _rows(table: list[list[str]], header: list[str], name: str, first: int) -> list[Row]:
    """The rows of the file `name`, from number `first` on."""
    rows = []
    for number, columns in enumerate(table, start=first):
        place = f"{name}, row {number}"
        if len(columns) != len(header):
            raise UserError(f"{place}: expected {len(header)} columns, got {len(columns)}")
        fields = {"source": Path(name).name, **dict(zip(header, columns))}
        for column in ("sentence", "label"):
            if not fields[column].strip():
                raise UserError(f"{place}: the {column} is empty")
        rows.append((place, fields["sentence"], fields["label"].strip(), fields["source"]))
    return rows


def _numbered(rows: list[Row], classes: list[str], origin: str) -> Sentences:
    """Sentences whose labels are indices into `classes`, the labels that occur in `origin`."""
    index = {label: i for i, label in enumerate(classes)}
    for place, _, label, _ in rows:
        if label not in index:
            raise UserError(f"{place}: the label {label!r} does not occur in {origin}")
    _, sentences, labels, sources = map(list, zip(*rows))
    return Sentences(sentences, [index[label] for label in labels], sources)


def synthetic_sentences(train: int = 12_000, valid: int = 1_000, seed: int = 0) -> Corpus:
    """Minimal pairs of the built-in grammar, each in one part only; the same arguments give the same sentences."""
    pairs = minimal_pairs((train + valid) // 2, seed)
    rows = [
        (sentence, label, rule)
        for good, bad, rule in pairs
        for sentence, label in ((good, 1), (bad, 0))
    ]
    parts = (Sentences(*map(list, zip(*part))) for part in (rows[:train], rows[train:]))
    return Corpus("synthetic", *parts, {}, ACCEPTABILITY, [])
