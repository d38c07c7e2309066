"""Corpora for sentence classification: CoLA from disk or downloaded, the user's files, or synthetic sentences."""

import csv
import hashlib
import io
import time
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError, warn_loudly
from harness.files import replacing
from tasks.downloads import DOWNLOAD_ERRORS, reason, why_unreachable
from tasks.grammar import minimal_pairs


class Sentences(NamedTuple):
    """Labelled sentences of one part of a corpus."""

    sentences: list[str]
    labels: list[int]  # indices into the corpus's class names
    sources: list[str]  # for each sentence a publication, a file, or the rule of the built-in grammar


class Corpus(NamedTuple):
    """A corpus for classifying sentences."""

    name: str  # "cola", "synthetic" or "files"
    train: Sentences
    valid: Sentences
    domains: dict[str, slice]  # subsets of `valid` that are also reported separately
    class_names: list[str]
    files: list[Path]  # what was read; empty for the built-in sentences


COLA_URL = "https://nyu-mll.github.io/CoLA/cola_public_1.1.zip"
COLA_SHA256 = "2cf856f46df11c143d38e0cf2f9f34ff2fdb088c521cd859f5c4b9581683278b"
ACCEPTABILITY = ["unacceptable", "acceptable"]


def load_corpus(name: str, data_dir: str, train_file: str | None = None, valid_file: str | None = None) -> Corpus:
    """Load "cola" from `data_dir`, downloading it there if needed, or the user's "files", or "synthetic".

    "auto" gives the user's files if they are named, else CoLA, else the built-in sentences with a loud warning.
    Raises `UserError` if a named corpus is not available, or if a file is damaged or malformed.
    """
    if (train_file is None) != (valid_file is None):
        raise UserError("--train_file and --valid_file go together: name both")
    if train_file and valid_file:
        if name not in ("auto", "files"):
            raise UserError(f"--dataset {name} and --train_file exclude each other: drop one of them")
        return _read_user_files(Path(train_file), Path(valid_file))
    if name == "files":
        raise UserError("--dataset files needs --train_file and --valid_file")
    if name == "synthetic":
        return synthetic_sentences()
    if Path(data_dir).is_file():
        raise UserError(f"--data_dir {data_dir} is a file: pass a directory")
    path, started = Path(data_dir) / "cola_public_1.1.zip", time.perf_counter()
    problem = None if path.exists() else _download_cola(path)
    if problem is None:
        return _read_cola(path)
    problem = f"{path} is missing, and can't be downloaded: {problem}"
    if name == "auto":
        warn_loudly(
            f"{problem}.",
            "This run uses the BUILT-IN synthetic sentences instead: its metrics are not comparable to CoLA's.",
            f"Finding that out took {time.perf_counter() - started:.1f} s.",
            f"To use CoLA, save {COLA_URL} into a directory and pass that: --data_dir DIR.",
        )
        return synthetic_sentences()
    raise UserError(f"{problem}. Save {COLA_URL} there, pass another --data_dir, or use --dataset synthetic")


def _download_cola(path: Path) -> str | None:
    """Download CoLA to `path` atomically. Returns what went wrong, or None on success."""
    problem = why_unreachable(COLA_URL)
    if problem:
        return problem
    try:
        with urllib.request.urlopen(COLA_URL, timeout=20) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != COLA_SHA256:
            return "what the server sent is not the published file (SHA-256)"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except DOWNLOAD_ERRORS as error:
        return reason(error)
    return None


def _read_cola(path: Path) -> Corpus:
    content = _read_bytes(path)
    if hashlib.sha256(content).hexdigest() != COLA_SHA256:
        raise UserError(
            f"{path} is damaged: it differs from the published file (SHA-256); delete it to download it again"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        train, in_domain, out_of_domain = (
            parse_cola(archive.read(f"cola_public/raw/{part}.tsv"), f"{path}: {part}.tsv")
            for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev")
        )
    valid = Sentences(*(a + b for a, b in zip(in_domain, out_of_domain)))
    boundary = len(in_domain.labels)
    domains = {"in_domain": slice(0, boundary), "out_of_domain": slice(boundary, len(valid.labels))}
    return Corpus("cola", train, valid, domains, ACCEPTABILITY, [path])


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None


def _lines(content: bytes, name: str) -> list[str]:
    """The lines of a UTF-8 file, which end in CR, LF or CRLF. Raises `UserError` naming file and line."""
    if not content:
        raise UserError(f"{name} is empty")
    lines = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{name}, line {number}: invalid UTF-8") from None
    return lines


def _from_rows(rows: Iterable[tuple[str, int, str]]) -> Sentences:
    """Sentences from rows of (sentence, label, source)."""
    return Sentences(*map(list, zip(*rows)))


def parse_cola(content: bytes, name: str) -> Sentences:
    """Parse CoLA's format: tab-separated source, label, original annotation and sentence, without quoting.

    Raises `UserError` naming file and line if one is malformed.
    """
    rows = []
    for number, line in enumerate(_lines(content, name), start=1):
        columns = line.split("\t")
        if len(columns) != 4:
            raise UserError(f"{name}, line {number}: expected 4 columns, got {len(columns)}")
        source, label, _, sentence = columns
        if label not in ("0", "1"):
            raise UserError(f"{name}, line {number}: the label is {label!r}, not 0 or 1")
        if not sentence.strip():
            raise UserError(f"{name}, line {number}: the sentence is empty")
        rows.append((sentence, int(label), source))
    return _from_rows(rows)


def _read_user_files(train_file: Path, valid_file: Path) -> Corpus:
    """A corpus of the user's files; its classes are the labels of the training file."""
    train, valid = _read_table(train_file), _read_table(valid_file)
    labels = {label for _, label, _ in train}
    # Numbers come first, in numeric order. The label itself orders 1 and 01.
    class_names = sorted(labels, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
    if len(class_names) < 2:
        raise UserError(f"{train_file}: every label is {class_names[0]!r}; training needs two or more classes")
    if len(class_names) > 1000 or (len(train) >= 20 and 2 * len(class_names) > len(train)):
        counts = f"{len(class_names):,} distinct labels in {len(train):,} rows"
        raise UserError(f"{train_file}: column 'label' has {counts}; does another column hold the labels?")
    index = {label: i for i, label in enumerate(class_names)}
    for number, (_, label, _) in enumerate(valid, start=2):
        if label not in index:
            raise UserError(f"{valid_file}, row {number}: the label {label!r} does not occur in {train_file}")
    parts = (
        _from_rows((sentence, index[label], source) for sentence, label, source in rows) for rows in (train, valid)
    )
    return Corpus("files", *parts, {}, class_names, [train_file, valid_file])


def _read_table(path: Path) -> list[tuple[str, str, str]]:
    """Rows of (sentence, label, source) from a file whose header names `sentence`, `label` and optionally `source`.

    A .csv file is comma-separated with quoting, any other file is tab-separated without.
    """
    lines = _lines(_read_bytes(path).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"), str(path))
    table = _parse_csv(lines, path) if path.suffix.lower() == ".csv" else [line.split("\t") for line in lines]
    if blank := [number for number, row in enumerate(table, start=1) if not "".join(row).strip()]:
        raise UserError(f"{path}, row {blank[0]}: the line is blank")
    header, *rows = table
    for column in ("sentence", "label"):
        if column not in header:
            hint = "; the file is comma-separated: name it .csv" if len(header) == 1 and "," in header[0] else ""
            raise UserError(f"{path}, row 1: the header has no column {column!r}, only {str(header)[1:-1][:300]}{hint}")
        if header.count(column) > 1:
            raise UserError(f"{path}, row 1: the header has more than one column {column!r}")
    if not rows:
        raise UserError(f"{path} contains no sentences")
    parsed = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"{path}, row {number}: expected {len(header)} columns as in the header, got {len(row)}")
        fields = dict(zip(header, row))
        for column in ("sentence", "label"):
            if not fields[column].strip():
                raise UserError(f"{path}, row {number}: the {column} is empty")
        parsed.append((fields["sentence"], fields["label"].strip(), fields.get("source", path.name)))
    return parsed


def _parse_csv(lines: list[str], path: Path) -> list[list[str]]:
    """Rows of columns; raises `UserError` naming the line where a malformed row begins."""
    rows, begin = [], 1
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        for row in reader:
            rows.append(row)
            begin = reader.line_num + 1
    except csv.Error as error:
        problem = "a quote is never closed, or not doubled within quotes"
        raise UserError(f"{path}, line {begin}: {problem} ({error})") from None
    return rows


def synthetic_sentences(train: int = 12_000, valid: int = 1_000, seed: int = 0) -> Corpus:
    """Sentences of the built-in grammar, half of them acceptable; no sentence is in both parts.

    Minimal pairs are kept together. The same arguments give the same sentences.
    """
    pairs = minimal_pairs((train + valid) // 2, seed)
    rows = [(sentence, label, rule) for good, bad, rule in pairs for sentence, label in ((good, 1), (bad, 0))]
    return Corpus("synthetic", _from_rows(rows[:train]), _from_rows(rows[train:]), {}, ACCEPTABILITY, [])
