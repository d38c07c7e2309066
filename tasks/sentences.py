"""Load a corpus for sentence classification: CoLA, the user's files, or synthetic sentences."""

import csv
import hashlib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from tasks.downloads import has_files
from tasks.grammar import minimal_pairs


class Sentences(NamedTuple):
    """Labelled sentences of one part of a corpus."""

    sentences: list[str]
    labels: list[str]  # class names
    sources: list[str]  # a publication, a file, or a rule of the built-in grammar, per sentence

    def columns(self) -> dict[str, list[str]]:
        """What tells which sentence a row of predictions is about."""
        return {"sentence": self.sentences, "source": self.sources}


class Corpus(NamedTuple):
    """A corpus for classifying sentences."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # subsets of `valid` that are also reported separately
    class_names: list[str]
    files: list[Path]  # what was read; empty for the built-in sentences
    test: Sentences | None = None  # only of the user's files


csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
TAB_SEPARATED = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
COMMA_SEPARATED = {}  # the defaults of the csv module
COLA_URL = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip"
COLA_SHA256 = "2cf856f46df11c143d38e0cf2f9f34ff2fdb088c521cd859f5c4b9581683278b"
ACCEPTABILITY = ["unacceptable", "acceptable"]  # CoLA's 0 and 1


def load_corpus(
    name: str,
    data_dir: str,
    train_file: str | None = None,
    valid_file: str | None = None,
    test_file: str | None = None,
) -> Corpus:
    """Load "cola" from `data_dir`, the user's "files", or "synthetic" sentences.

    CoLA is downloaded to `data_dir` if it is missing. "auto" means the user's files if they are
    named, otherwise CoLA, otherwise, with a loud warning, "synthetic". Raises `UserError` if
    the options contradict each other, or if files are missing or damaged.
    """
    files = (train_file, valid_file, test_file)
    if train_file and valid_file:
        if name not in ("auto", "files"):
            raise UserError(
                f"--dataset {name} and --train_file exclude each other: drop one of them"
            )
        return _read_user_files([Path(file) for file in files if file])
    if any(files) or name == "files":
        raise UserError("--train_file and --valid_file go together: name both")
    if name != "synthetic":
        path = Path(data_dir) / "cola_public_1.1.zip"
        source = (path, COLA_URL, COLA_SHA256)
        if has_files("cola", [path], data_dir, lambda: [source], optional=name == "auto"):
            return _read_cola(path)
    return synthetic_sentences()


def _read_cola(path: Path) -> Corpus:
    if hashlib.sha256(path.read_bytes()).hexdigest() != COLA_SHA256:
        raise UserError(
            f"{path} is damaged: it differs from the published file (SHA-256); "
            "delete it to replace it"
        )
    parts = []
    with zipfile.ZipFile(path) as archive:
        for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
            content = archive.read(f"cola_public/raw/{part}.tsv")
            parts.append(parse_cola(content, f"{path}: {part}.tsv"))
    train, in_domain, out_of_domain = parts
    valid = Sentences(*(first + second for first, second in zip(in_domain, out_of_domain)))
    boundary = len(in_domain.labels)
    domains = {"in_domain": slice(boundary), "out_of_domain": slice(boundary, None)}
    return Corpus("cola", train, valid, domains, ACCEPTABILITY, [path])


def parse_cola(content: bytes, name: str) -> Sentences:
    """Parse CoLA's rows of source, label (0 or 1), original annotation and sentence."""
    table = _split_columns(content, name, TAB_SEPARATED)
    header = ["source", "label", "annotation", "sentence"]
    part = _select_columns(table, header, name, first_row=1)
    return part._replace(labels=[ACCEPTABILITY[int(label)] for label in part.labels])


def _read_user_files(files: list[Path]) -> Corpus:
    train_file = files[0]
    train, *held_out = map(_read_file, files)
    labels = set(train.labels)
    rows = len(train.labels)
    mostly_distinct = rows >= 20 and len(labels) > rows / 2
    if mostly_distinct or not 2 <= len(labels) <= 1000:
        raise UserError(
            f"{train_file}: column 'label' has {len(labels):,} distinct labels in "
            f"{rows:,} rows; does another column hold the classes?"
        )
    for file, part in zip(files[1:], held_out):
        for row, label in enumerate(part.labels, start=2):
            if label not in labels:
                problem = f"the label {label!r} does not occur in {train_file}"
                raise UserError(f"{file}, row {row}: {problem}")
    class_names = sorted(labels, key=_label_order)
    valid, *test = held_out
    return Corpus("files", train, valid, {}, class_names, files, *test)


def _label_order(label: str) -> tuple[bool, float, str]:
    """A sort key: numbers first, by value, then other labels; 01 comes before 1."""
    is_number = label.isdecimal()
    return not is_number, float(label) if is_number else 0.0, label


def _read_file(path: Path) -> Sentences:
    """The sentences of a file whose header names `sentence`, `label` and optionally `source`."""
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    dialect = COMMA_SEPARATED if path.suffix.lower() == ".csv" else TAB_SEPARATED
    table = _split_columns(content, str(path), dialect)
    if len(table) < 2:
        raise UserError(f"{path} contains no sentences")
    header = table[0]
    for column in ("sentence", "label"):
        if header.count(column) != 1:
            names = ", ".join(map(repr, header))[:300]
            raise UserError(
                f"{path}, row 1: the header must name one column {column!r}, not {names}; "
                "columns are separated by commas in a .csv file, by tabs in any other"
            )
    return _select_columns(table[1:], header, str(path), first_row=2)


def _split_columns(content: bytes, name: str, dialect: dict[str, Any]) -> list[list[str]]:
    """The columns of each row in a UTF-8 file whose lines end in CR, LF or CRLF."""
    lines = (line.decode() + "\n" for line in content.splitlines())
    table = []
    try:
        for columns in csv.reader(lines, strict=True, **dialect):
            table.append(columns)
        return table
    except UnicodeDecodeError:
        problem = "invalid UTF-8"
    except csv.Error as error:
        problem = f"a quote is never closed, or not doubled within quotes ({error})"
    raise UserError(f"{name}, row {len(table) + 1}: {problem}")


def _select_columns(
    table: list[list[str]], header: list[str], name: str, first_row: int
) -> Sentences:
    """The columns for sentences, labels and sources; a file's name is the source if it has none."""
    part = Sentences([], [], [])
    for number, columns in enumerate(table, first_row):
        position = f"{name}, row {number}"
        if len(columns) != len(header):
            raise UserError(f"{position}: expected {len(header)} columns, got {len(columns)}")
        fields = dict(zip(header, columns))
        for column in ("sentence", "label"):
            if not fields[column].strip():
                raise UserError(f"{position}: the {column} is empty")
        part.sentences.append(fields["sentence"])
        part.labels.append(fields["label"].strip())
        part.sources.append(fields.get("source", Path(name).name))
    return part


def synthetic_sentences(train: int = 12_000, valid: int = 1_000) -> Corpus:
    """Minimal pairs of the built-in grammar; the parts have no sentence in common."""
    sentences = []
    rules = []
    for acceptable, unacceptable, rule in minimal_pairs((train + valid) // 2):
        sentences += [acceptable, unacceptable]
        rules += [rule, rule]
    labels = ["acceptable", "unacceptable"] * (len(rules) // 2)
    train_part = Sentences(sentences[:train], labels[:train], rules[:train])
    valid_part = Sentences(sentences[train:], labels[train:], rules[train:])
    return Corpus("synthetic", train_part, valid_part, {}, ACCEPTABILITY, [])
