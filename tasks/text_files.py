"""Read a user's files of labelled sentences: tables, JSON lines or Parquet."""

import codecs
import csv
import dataclasses
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
from harness.options import option
from tasks.folds import Folds

# Names of columns that need no option.
TEXTS = (
    "sentence",
    "text",
    "review",
    "comment",
    "content",
    "document",
    "tweet",
    "message",
    "title",
    "v2",
)
LABELS = ("label", "class", "category", "sentiment", "target", "stars", "v1")
PAIRS = {  # as in the tasks of GLUE
    "sentence1": "sentence2",
    "question1": "question2",
    "premise": "hypothesis",
    "question": "sentence",
}
Text = str | tuple[str, str]  # a sentence or a pair of sentences
NO_LABEL = "no label"  # the label of sentences without one
Row = tuple[int, list[str]]  # the line in which it begins, and its cells
csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters


class Sentences(NamedTuple):
    """Labelled sentences, for example one part of a corpus."""

    sentences: list[Text]
    labels: list[str]  # class names
    sources: list[str]  # a publication, a file, or a rule of the built-in grammar, per sentence

    def extend(self, other: "Sentences") -> None:
        """Append the sentences of another part."""
        for column, values in zip(self, other):
            column += values

    def columns(self, name: str = "sentence") -> dict[str, Sequence[str]]:
        """The columns of a table that shows the sentences."""
        columns = {name: self.sentences}
        if isinstance(self.sentences[0], tuple):
            columns[name], columns[f"{name}2"] = zip(*self.sentences)
        columns["source"] = self.sources
        return columns


@dataclasses.dataclass(kw_only=True, frozen=True)
class OwnFiles(Folds):
    """The options for the user's files, and for cross-validation."""

    train_file: str | None = option(
        None, "your training data: TSV, CSV, JSON lines or Parquet", path=True
    )
    valid_file: str | None = option(None, "your validation data", path=True)
    test_file: str | None = option(None, "your test data, for the best model", path=True)
    text_column: str | None = option(None, "column of your data [sentence, text, ...]")
    text_pair_column: str | None = option(None, "column of the second text of pairs [sentence2]")
    label_column: str | None = option(None, "column of your data [label, class, ...]")
    encoding: str | None = option(None, "of your data [UTF-8, or UTF-16 by its mark]")
    drop_missing: bool = option(False, "leave out rows of your data without text or label")


def read_parts(paths: list[Path], own: OwnFiles) -> list[Sentences]:
    """The sentences of a run's files, training data first; all have the columns of the first.

    Raises `UserError`.
    """
    parts = []
    labels = set()
    header = None
    for path in paths:
        names, rows, header = _read_table(path, own, header)
        chosen = _choose_columns(names, own, path)
        columns = list(chosen.values())
        part = _take_columns(rows, names, columns, path, own, labels)
        if not parts:
            labels = set(part.labels)
            rows_with_text = len(part.labels)
            mostly_distinct = rows_with_text >= 20 and len(labels) > rows_with_text / 2
            if mostly_distinct or not 2 <= len(labels) <= 1000:
                raise UserError(
                    f"{path}: column {columns[-1]!r} has {len(labels):,} distinct labels in "
                    f"{rows_with_text:,} rows; does another column hold the classes?"
                )
            if columns != ["sentence", "label"]:
                print(f"{path}: text and label are in the columns {', '.join(columns)}.")
            own = dataclasses.replace(own, **chosen)
        parts.append(part)
    return parts


def read_inputs(path: Path, own: OwnFiles, labelled: bool) -> Sentences:
    """The sentences of a file for a trained model. A .txt file without labels has one per line.

    Raises `UserError`.
    """
    one_per_line = path.suffix.lower() == ".txt" and not labelled
    names, rows, _ = _read_table(path, own, one_per_line=one_per_line)
    if not labelled:
        own = dataclasses.replace(own, label_column=NO_LABEL)
        rows = [(line, [*cells, NO_LABEL]) for line, cells in rows]
        names.append(NO_LABEL)
    columns = list(_choose_columns(names, own, path).values())
    return _take_columns(rows, names, columns, path, own, known_labels=set())


def _read_table(
    path: Path, own: OwnFiles, header: list[str] | None = None, one_per_line: bool = False
) -> tuple[list[str], list[Row], list[str]]:
    """The names of a file's columns, its rows, and the header that was added, or [].

    `header` is the one to add; None: add one if the file seems to have none.
    """
    rows = _read_rows(path, own, one_per_line)
    if header is None:
        header = _missing_header(rows)
    if header:
        print(f"{path} has no header: its columns are taken as {' and '.join(header)}.")
        rows.insert(0, (0, header))
    if len(rows) < 2:
        raise UserError(f"{path} contains no sentences")
    names = [name.strip().casefold() for name in rows[0][1]]
    return names, rows[1:], header


def _read_rows(path: Path, own: OwnFiles, one_per_line: bool) -> list[Row]:
    """A file's header, if there is one, and its other rows. Blank lines are skipped.

    If `one_per_line`, a line is a sentence, unless the first one has a tab or is a header.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {path}: {reason}") from None
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"BZh", b"\xfd7zXZ")):
        raise UserError(f"{path} is an Excel workbook or an archive: save the table as CSV")
    if content.startswith(b"PAR1"):
        return _parse_parquet(content, path)
    text = _decode(content, path, own.encoding)
    if re.match(r'\s*\[?\s*\{\s*"', text):
        return _parse_json_lines(text, path)
    column = own.text_column or "sentence"
    first_line = text.lstrip("\r\n").partition("\n")[0].casefold()
    if one_per_line and "\t" not in first_line:
        names = {name.strip('" \r') for name in re.split("[,;|]", first_line)}
        known = {*TEXTS, column.casefold()}
        if not names & known or not all(name.isidentifier() for name in names - known):
            texts = re.split("\r?\n", f"{column}\n{text}")
            return [(0, [line]) for line in texts if line.strip()]
        print(f"{path} is read as a table: its first line names a column of sentences.")
    return _split_columns(text, path)


def _decode(content: bytes, path: Path, encoding: str | None) -> str:
    """A file's text: in UTF-8, or UTF-16 with a mark, unless its encoding is given."""
    if encoding is None:
        encoding = "utf-8"
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        elif b"\0" in content[:100]:
            raise UserError(
                f"{path} is UTF-16 without a byte order mark, or not text: "
                "pass --encoding utf-16-le or utf-16-be"
            )
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        row = len(content[: error.start + 1].splitlines())
        raise UserError(
            f"{path}, row {row}: invalid {encoding.upper()}; pass the file's --encoding, "
            "such as cp949, cp932, gb18030, latin-1"
        ) from None
    except (LookupError, UnicodeError):
        raise UserError(f"--encoding {encoding}: Python has no such text encoding") from None


def _split_columns(text: str, path: Path) -> list[Row]:
    """The rows, read with the separator and the quoting that get furthest without a problem."""
    content = io.BytesIO(text.encode("utf-8", "replace"))  # takes less memory than StringIO
    lines = io.TextIOWrapper(content, encoding="utf-8")
    readings = [_parse(lines, "\t", csv.QUOTE_MINIMAL)]
    if '"' in text:  # CoLA has sentences that begin with a quote
        readings.append(_parse(lines, "\t", csv.QUOTE_NONE))
    readings += [_parse(lines, separator, csv.QUOTE_MINIMAL) for separator in (",", ";", "|")]
    rows, problem = max(readings, key=_quality)
    if problem:
        raise UserError(f"{path}, {problem}")
    return rows


def _quality(reading: tuple[list[Row], str]) -> tuple[bool, int]:
    """A sort key: whether there are several columns, and the number of rows."""
    rows, _ = reading
    return bool(rows) and len(rows[0][1]) > 1, len(rows)


def _parse(lines: io.TextIOWrapper, separator: str, quoting: int) -> tuple[list[Row], str]:
    """The rows before the first problem, and that problem or ""."""
    rows = []
    width = 0
    line = 1
    lines.seek(0)
    reader = csv.reader(
        lines,
        delimiter=separator,
        quoting=quoting,
        skipinitialspace=separator != "\t",
        strict=True,
    )
    try:
        for cells in reader:
            if "".join(cells).strip():
                width = width or len(cells)
                if len(cells) != width:
                    return rows, f"row {line}: expected {width} columns, got {len(cells)}"
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        problem = f"a quote is never closed, or not doubled within quotes ({error})"
        return rows, f"row {line}: {problem}"
    return rows, ""


def _parse_json_lines(text: str, path: Path) -> list[Row]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path}, row {number}: expected a JSON object in each line")
            records.append((number, record))
    return _as_rows(records)


def _parse_parquet(content: bytes, path: Path) -> list[Row]:
    try:
        from pyarrow import parquet

        records = parquet.read_table(io.BytesIO(content)).to_pylist()
    except ImportError:
        raise UserError(f"{path} is a Parquet file: pip install pyarrow to read it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {error}") from None
    return _as_rows(list(enumerate(records, start=1)))


def _as_rows(records: list[tuple[int, dict[str, Any]]]) -> list[Row]:
    """A header, and the values of all records as text: "" for NaN, lists and the like."""
    header = {}
    for _, record in records:
        header.update(record)
    rows = [(0, list(header))]
    for number, record in records:
        cells = []
        for name in header:
            value = record.get(name)
            text = ""
            if isinstance(value, (str, int, float)) and value == value:
                # JSON can hold halves of characters, which are no text.
                text = str(value).encode("utf-8", "replace").decode()
            cells.append(text)
        rows.append((number, cells))
    return rows


def _missing_header(rows: list[Row]) -> list[str]:
    """The header of a file that seems to have none, or [].

    Such a file has two columns, and in one of them the first value is repeated, as labels are.
    """
    header = []
    for values in zip(*(cells for _, cells in rows[:1000])):
        if values[0].strip().casefold() in (*TEXTS, *LABELS):
            return []
        is_label = values[0] in values[1:] and 2 * len(set(values)) <= len(values)
        header.append("label" if is_label else "sentence")
    return header if sorted(header) == ["label", "sentence"] else []


def _choose_columns(names: list[str], own: OwnFiles, path: Path) -> dict[str, str]:
    """The names of the columns of text, second text if there is one, and label, by option."""
    known = {"text_column": TEXTS, "text_pair_column": (), "label_column": LABELS}
    if own.text_column is None:
        for first, second in PAIRS.items():
            if first in names and second in names:
                known["text_column"] = (first,)
                known["text_pair_column"] = (second,)
    chosen = {}
    for option_name, candidates in known.items():
        given = getattr(own, option_name)
        if given:
            candidates = (given.strip().casefold(),)
        found = [name for name in names if name in candidates]
        if len(found) == 1:
            chosen[option_name] = found[0]
        elif candidates:
            listed = ", ".join(map(repr, found or names))[:300]
            problem = f"several columns could be it: {listed}"
            if not found:
                problem = f"the header must name one column {candidates[0]!r}, not {listed}"
            raise UserError(f"{path}, row 1: {problem}; choose one with --{option_name}")
    if len(set(chosen.values())) < len(chosen):
        raise UserError(f"{path}: text and label must be different columns, not {chosen}")
    return chosen


def _take_columns(
    rows: list[Row],
    names: list[str],
    chosen: list[str],
    path: Path,
    own: OwnFiles,
    known_labels: set[str],
) -> Sentences:
    """The sentences of a file. Their source is its name, unless it has a column "source"."""
    part = Sentences([], [], [])
    indices = [names.index(name) for name in chosen]
    source = names.index("source") if "source" in names else None
    missing = []
    for line, cells in rows:
        *texts, label = [cells[index] for index in indices]
        label = label.strip()
        if not label or not all(map(str.strip, texts)):
            missing.append(line)
            continue
        if [cell.strip().casefold() for cell in cells] == names:
            raise UserError(f"{path}, row {line}: repeats the header")
        if known_labels and label not in known_labels:
            raise UserError(
                f"{path}, row {line}: the label {label!r} does not occur in {own.train_file}"
            )
        part.sentences.append(tuple(texts) if len(texts) == 2 else texts[0])
        part.labels.append(label)
        part.sources.append(path.name if source is None else cells[source])
    if missing:
        first = ", ".join(map(str, missing[:3]))
        problem = (
            f"text or label missing in {len(missing)} of {len(rows)} rows, first in row {first}"
        )
        if not own.drop_missing or not part.labels:
            raise UserError(f"{path}: {problem}; --drop_missing leaves them out")
        print(f"{path}: {problem}; left out")
    return part
