"""tasks/sentences.py and its grammar: CoLA's format, its download, the user's files, synthetic sentences, bad data."""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import socketserver
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.feature_extraction.text
import sklearn.linear_model
import sklearn.metrics
import torch
from conftest import finished_run

from harness.errors import UserError
from tasks import batching, encoders, grammar
from tasks.sentences import Corpus, load_corpus, parse_cola, synthetic_sentences
from tasks.text_files import OwnFiles

TRAIN = "gj04\t1\t\tThe boat sank.\nks08\t0\t*\tThe boat sanked.\n"
IN_DOMAIN, OUT_OF_DOMAIN = (
    "c_13\t1\t\tWe left.\n",
    "rhl07\t0\t*\tLeft we have has.\nrhl07\t1\t\tIt rained.\n",
)
pytestmark = pytest.mark.quick


def cola_zip(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a small archive in CoLA's layout, and expect its checksum instead of the published one."""
    content = io.BytesIO()
    parts = {
        "in_domain_train": TRAIN,
        "in_domain_dev": IN_DOMAIN,
        "out_of_domain_dev": OUT_OF_DOMAIN,
    }
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in parts.items():
            archive.writestr(f"cola_public/raw/{name}.tsv", text)
            archive.writestr(f"cola_public/tokenized/{name}.tsv", "must not be read")
    path.write_bytes(content.getvalue())
    monkeypatch.setattr(
        "tasks.sentences.COLA_SHA256", hashlib.sha256(content.getvalue()).hexdigest()
    )


# ------------------------------------------------------------------------------------------------ CoLA


def test_cola_is_parsed_verbatim():
    content = 'a1\t1\t\t"Quoted, he said.\r\nb2\t0\t??*\tÉ  double  space "\nc3\t1\t\t last line, no newline '.encode()
    assert parse_cola(content) == (
        ['"Quoted, he said.', 'É  double  space "', " last line, no newline "],
        ["acceptable", "unacceptable", "acceptable"],
        ["a1", "b2", "c3"],
    )
    assert parse_cola(content + b"\n") == parse_cola(content)


def test_validation_joins_both_dev_sets(tmp_path, monkeypatch):
    cola_zip(tmp_path / "cola_public_1.1.zip", monkeypatch)
    for name in ("cola", "auto"):
        corpus = load_corpus(name, str(tmp_path))
        assert corpus.name == "cola" and corpus.class_names == ["unacceptable", "acceptable"]
        assert corpus.train == (
            ["The boat sank.", "The boat sanked."],
            ["acceptable", "unacceptable"],
            ["gj04", "ks08"],
        )
        sentences = ["We left.", "Left we have has.", "It rained."]
        assert corpus.valid == (
            sentences,
            ["acceptable", "unacceptable", "acceptable"],
            ["c_13", "rhl07", "rhl07"],
        )
        assert {name: sentences[part] for name, part in corpus.domains.items()} == {
            "in_domain": sentences[:1],
            "out_of_domain": sentences[1:],
        }
        assert corpus.files == [tmp_path / "cola_public_1.1.zip"]


def test_a_wrong_checksum_is_always_an_error(tmp_path, monkeypatch):
    path = tmp_path / "cola_public_1.1.zip"
    cola_zip(path, monkeypatch)
    path.write_bytes(path.read_bytes() + b"!")
    for name in ("cola", "auto"):
        with pytest.raises(
            UserError, match=r"cola_public_1\.1\.zip is damaged: it differs from the published file"
        ):
            load_corpus(name, str(tmp_path))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Path]:
    """The file served by a loopback server that stands in for CoLA's."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(served))
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            "tasks.sentences.COLA_URL", f"http://127.0.0.1:{running.server_address[1]}/cola.zip"
        )
        yield served / "cola.zip"
        running.shutdown()


def test_cola_is_downloaded_once_and_checked(tmp_path, server, monkeypatch, capsys):
    cola_zip(server, monkeypatch)
    content, new = server.read_bytes(), tmp_path / "new/directory"
    server.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"cola\.zip is not the published file \(sha256 checksum\)"):
        load_corpus("cola", str(new))
    assert (
        load_corpus("auto", str(new)).name == "synthetic" and "BUILT-IN" in capsys.readouterr().err
    )
    assert not new.exists() or not list(new.iterdir())
    server.write_bytes(content)
    assert len(load_corpus("auto", str(new)).valid.labels) == 3
    server.unlink()
    assert load_corpus("cola", str(new)).name == "cola"
    assert [(file.name, file.read_bytes()) for file in new.iterdir()] == [
        ("cola_public_1.1.zip", content)
    ]


# --------------------------------------------------------------------------------------- the user's files


def read(
    tmp_path: Path, train: str | bytes, valid: str | bytes, suffix: str = "tsv", **options: object
) -> Corpus:
    files = [tmp_path / f"{name}.{suffix}" for name in ("train", "valid")]
    for file, content in zip(files, (train, valid)):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    train_file, valid_file = map(str, files)
    own = OwnFiles(train_file=train_file, valid_file=valid_file, **options)
    return load_corpus("auto", str(tmp_path), own)


def test_csv_is_parsed_with_quoting(tmp_path):
    train = 'label,sentence\r\nno,"A comma, and ""quotes"""\r\nyes,"two\nlines"\r\nno,plain'
    corpus = read(tmp_path, train, "sentence,id,label\nx,7, yes \n", "csv")
    assert corpus.train.sentences == ['A comma, and "quotes"', "two\nlines", "plain"]
    assert (corpus.class_names, corpus.train.labels, corpus.valid.labels) == (
        ["no", "yes"],
        ["no", "yes", "no"],
        ["yes"],
    )
    assert (corpus.train.sources, corpus.valid.sources) == (["train.csv"] * 3, ["valid.csv"])
    assert (corpus.name, corpus.domains) == ("files", {})
    assert corpus.files == [tmp_path / "train.csv", tmp_path / "valid.csv"]


def test_tsv_is_parsed_without_quoting(tmp_path):
    train = '\ufeffsource\tsentence\tlabel\na\t"Left open, he\t10\nb\tx\t9\nc\ty\t2\n'
    corpus = read(tmp_path, train, 'label\tsentence\tsource\n2\tz"\tq\n')
    assert corpus.train == (['"Left open, he', "x", "y"], ["10", "9", "2"], ["a", "b", "c"])
    assert corpus.class_names == ["2", "9", "10"]  # in numeric order
    assert corpus.valid == (['z"'], ["2"], ["q"])


GOOD = "sentence\tlabel\na\t0\nb\t1\n"


@pytest.mark.parametrize(
    "train, valid, problem",
    [
        (
            "sentence\tlabels\na\t0\n",
            GOOD,
            "train.tsv, row 1: the header must name one column 'label', not 'sentence', ",
        ),
        (
            "texts\tlabel\na\t0\n",
            GOOD,
            "train.tsv, row 1: the header must name one column 'sentence', not 'texts', ",
        ),
        ("", GOOD, "train.tsv contains no sentences"),
        ("sentence\tlabel\n", GOOD, "train.tsv contains no sentences"),
        (GOOD + "c\t1\tmore\n", GOOD, "train.tsv, row 4: expected 2 columns, got 3"),
        (GOOD, GOOD + "c\n", "valid.tsv, row 4: expected 2 columns, got 1"),
        (
            "sentence\tlabel\na\t1\nb\t1\n",
            GOOD,
            "train.tsv: column 'label' has 1 distinct labels in 2 rows; does another ",
        ),
        (
            GOOD + "  \t1\n",
            GOOD,
            "train.tsv: text or label missing in 1 of 3 rows, first in row 4; ",
        ),
        (GOOD, GOOD + "c\t\n", "valid.tsv: text or label missing in 1 of 3 rows, first in row 4; "),
        (GOOD, GOOD + "c\t2\n", "valid.tsv, row 4: the label '2' does not occur in {}/train.tsv"),
        (GOOD, GOOD.encode() + b"\xe9\t1\n", "valid.tsv, row 4: invalid UTF-8"),
    ],
)
def test_errors_name_file_and_row(tmp_path, train, valid, problem):
    with pytest.raises(UserError) as error:
        read(tmp_path, train, valid)
    assert str(error.value).startswith(
        f"{tmp_path}/{problem.format(tmp_path)}"
    ) and "\n" not in str(error.value)


def table(*rows: tuple[object, ...], **dialect: object) -> str:
    """What csv.writer, and so pandas, writes."""
    file = io.StringIO()
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


def json_lines(*records: dict[str, object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


TWO = [('It is "good", they say;', "good"), ("Bad\tor worse", "bad")]
PLAIN = [("Bad, or worse", "bad"), ("good|fine", "good")]
FLIPPED = [("good", "One"), ("bad", "Two"), ("bad", 'Five "six'), ("good", '"Three" or four')]
GLUE = [("A cat.", "A dog.", 0), ("A, b", "B\tc", 1)]
KOREAN = [("시간이 아깝다", 0), ("정말 재미있다", 1)]
JAPANESE = [("この映画は本当に面白い、", 0), ("つまらない", 1)]
FORMS = {  # the content, the first two sentences, what is printed, the options needed
    "text": (table(("text", "label"), *TWO), TWO, "the columns text, label", {}),
    "capitals": (table((" Review", "Sentiment "), *TWO), TWO, "columns review, sentiment", {}),
    "v1": (table(("v1", "v2", "", ""), *((b, a, "", "") for a, b in TWO)), TWO, "v2, v1", {}),
    "index": (table(("", "tweet", "target"), *((7, *row) for row in TWO)), TWO, "tweet, tar", {}),
    "tab": (table(("sentence", "label"), *TWO, delimiter="\t"), TWO, "", {}),
    "semicolon": (table(("sentence", "label"), *TWO, delimiter=";"), TWO, "", {}),
    "pipe": (table(("sentence", "label"), *PLAIN, delimiter="|"), PLAIN, "", {}),
    "all quoted": (table(("sentence", "label"), *TWO, quoting=csv.QUOTE_ALL), TWO, "", {}),
    "lines": (
        table(("sentence", "label"), ('a "b"\nc', 0), ("d", 1), delimiter="\t"),
        [('a "b"\nc', 0), ("d", 1)],
        "",
        {},
    ),
    "stray quotes": ('sentence\tlabel\n"a\t0\n"b" c\t1\n', [('"a', 0), ('"b" c', 1)], "", {}),
    "swallowed": ('sentence\tlabel\n"a\t0\nb"\t1\n', [('"a', 0), ('b"', 1)], "", {}),
    "no header": (
        "".join(f"{label}\t{text}\n" for label, text in FLIPPED),
        [("One", "good"), ("Two", "bad")],
        "train.x has no header: its columns are taken as label and sentence",
        {},
    ),
    "blank lines": ("\nsentence\tlabel\n\na\t0\n \nb\t1\n\n", [("a", 0), ("b", 1)], "", {}),
    "JSON": (
        json_lines(*({"x": 1, "text": a, "label": b} for a, b in TWO)),
        TWO,
        "text, label",
        {},
    ),
    "gz": (gzip.compress(table(("sentence", "label"), *TWO).encode()), TWO, "", {}),
    "BOM": (table(("sentence", "label"), *TWO).encode("utf-8-sig"), TWO, "", {}),
    "UTF-16": (
        table(("sentence", "label"), *KOREAN, delimiter="\t").encode("utf-16"),
        KOREAN,
        "",
        {},
    ),
    "UTF-16 without mark": (
        table(("sentence", "label"), *KOREAN).encode("utf-16-le"),
        KOREAN,
        "is UTF-16 without a byte order mark, or not text: pass --encoding utf-16-le",
        {"encoding": "utf-16-le"},
    ),
    "cp949": (
        table(("sentence", "label"), *KOREAN).encode("cp949"),
        KOREAN,
        "row 2: invalid UTF-8; pass the file's --encoding, such as cp949, cp932, gb18030, latin-1",
        {"encoding": "cp949"},
    ),
    "cp932": (
        table(("sentence", "label"), *JAPANESE).encode("cp932"),
        JAPANESE,
        "row 2: invalid UTF-8; pass the file's --encoding, such as cp949, cp932",
        {"encoding": "cp932"},
    ),
    "two texts": (
        table(("title", "text", "label"), *(("x", *row) for row in TWO)),
        TWO,
        "row 1: several columns could be it: 'title', 'text'; choose one with --text_column",
        {"text_column": "Text"},
    ),
    "other label": (
        table(("sentence", "id", "Quality"), *((a, 3, b) for a, b in TWO)),
        TWO,
        "row 1: the header must name one column 'label', not 'sentence', 'id', 'quality'; choose "
        "one with --label_column",
        {"label_column": "Quality"},
    ),
    "missing": (
        table(("sentence", "label"), *TWO, ("", "bad"), (" ", "bad"), ("x", "")),
        TWO,
        "text or label missing in 3 of 5 rows, first in row 4, 5, 6; --drop_missing leaves",
        {"drop_missing": True},
    ),
    "null": (
        json_lines(
            *({"sentence": a, "label": b} for a, b in TWO),
            {"sentence": None, "label": "bad"},
            {"sentence": ["a"], "label": "bad"},
            {"label": float("nan")},
        ),
        TWO,
        "text or label missing in 3 of 5 rows, first in row 3, 4, 5; --drop_missing leaves",
        {"drop_missing": True},
    ),
    "sentence1": (table(("sentence1", "sentence2", "label"), *GLUE), GLUE, "sentence2, label", {}),
    "QNLI": (
        table(
            ("index", "question", "sentence", "label"), *((1, *row) for row in GLUE), delimiter="\t"
        ),
        GLUE,
        "the columns question, sentence, label",
        {},
    ),
    "MNLI": (
        json_lines(*({"premise": a, "hypothesis": b, "label": c} for a, b, c in GLUE)),
        GLUE,
        "the columns premise, hypothesis, label",
        {},
    ),
    "other pairs": (
        table(
            ("Quality", "#1 String", "#2 String"), *((c, a, b) for a, b, c in GLUE), delimiter="\t"
        ),
        GLUE,
        "; choose one with --text_column",
        {
            "text_column": "#1 String",
            "text_pair_column": "#2 string",
            "label_column": "quality",
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_are_read_as_they_are(tmp_path, form, capsys):
    """Only the tables with sentence and label, in UTF-8 and separated as their suffix says, were accepted."""
    content, expected, said, options = FORMS[form]
    if options:
        with pytest.raises(UserError) as error:
            read(tmp_path, content, content, "x")
        assert said in str(error.value) and "\n" not in str(error.value)
    corpus = read(tmp_path, content, content, "x", **options)
    sentences = [row[0] if len(row) == 2 else row[:2] for row in expected]
    assert corpus.train.sentences[:2] == sentences == corpus.valid.sentences[:2]
    assert corpus.train.labels[:2] == [str(row[-1]) for row in expected]
    assert corpus.class_names == sorted({str(row[-1]) for row in expected})
    printed = capsys.readouterr().out
    if not options:
        assert said in printed and bool(said) == ("train.x" in printed)
    assert "validation sentences are in other parts too" in printed


@pytest.mark.parametrize(
    "content, problem",
    {
        b"PK\x03\x04...": "train.x is an Excel workbook or an archive: save the table as CSV",
        b"\x1f\x8b\x08": "train.x: Compressed file ended before the end-of-stream marker",
        b"PAR1...PAR1": "train.x is a Parquet file: pip install pyarrow to read it",
        b'[{"text": "a", "label": 0}]': "train.x, row 1: expected a JSON object in each line",
        b'{"text": "a", "label": 0}\n\n{"text"': "row 3: expected a JSON object in each line",
        b"just\ntext\n": "train.x, row 1: the header must name one column 'sentence', not 'just'",
        b"a\t0\nb\t1\n": "must name one column 'sentence', not 'a', '0'",  # no label twice
        b'sentence,label\n"a\nb",0\nc,1,2': "train.x, row 4: expected 2 columns, got 3",
    }.items(),
)
def test_files_that_can_not_be_read(tmp_path, content, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as error:
        read(tmp_path, content, GOOD, "x")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_half_a_character_of_json_is_replaced(tmp_path):
    content = json_lines({"text": "a\ud83d", "label": 0}, {"text": "b", "label": 1})
    assert read(tmp_path, content, content).train.sentences == ["a?", "b"]


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "undefined"])
def test_encodings_that_are_none(tmp_path, encoding):
    content = "sentence\tlabel\nä\t0\n"
    with pytest.raises(UserError, match=f"--encoding {encoding}: Python has no such text encoding"):
        read(tmp_path, content, GOOD, encoding=encoding)


def test_parquet_is_read_by_pyarrow(tmp_path, monkeypatch):
    """pyarrow is no dependency: its one function that is used is replaced."""

    def read_table(file: io.BytesIO) -> SimpleNamespace:
        assert file.read() == b"PAR1..."
        records = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
        return SimpleNamespace(to_pylist=lambda: records)

    parquet = SimpleNamespace(read_table=read_table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    corpus = read(tmp_path, b"PAR1...", b"PAR1...", "parquet")
    assert corpus.train[:2] == (["a", "b"], ["0", "1"])


def test_all_files_have_the_columns_of_the_first(tmp_path):
    train = "text,label\na,0\nb,1\n"
    corpus = read(tmp_path, train, "title,Label,Text\nx,1,y\n", "csv")
    assert corpus.valid == (["y"], ["1"], ["valid.csv"])
    with pytest.raises(UserError, match=r"valid.csv, row 1: .* one column 'text', not 'review', "):
        read(tmp_path, train, "review,label\nx,1\n", "csv")
    headless = "a,0\nb,1\nc,0\nd,1\n"
    assert read(tmp_path, headless, "x,1\n", "csv").valid.sentences == ["x"]
    with pytest.raises(UserError, match=r"valid.csv, row 1: repeats the header"):
        read(tmp_path, headless, "sentence,label\nx,1\n", "csv")


def test_files_put_together_have_their_header_twice(tmp_path):
    """The second header was a sentence of a class `label`, or taken for the sign that there is none."""
    for header, row in (("text,label", "b,1"), ("id,text,label", "7,b,1")):
        content = f"{header}\n{row}\n" * 2
        with pytest.raises(UserError, match=r"train.csv, row 3: repeats the header"):
            read(tmp_path, content, content, "csv")


def test_a_class_may_have_the_name_of_its_column(tmp_path):
    content = "text,spam\na,spam\nb,ham\n"
    corpus = read(tmp_path, content, content, "csv", label_column="spam")
    assert corpus.class_names == ["ham", "spam"]


def test_one_column_can_not_be_text_and_label(tmp_path):
    content = "text,label\na,0\nb,1\n"
    for options in ({"text_column": "label"}, {"text_column": "text", "text_pair_column": "Text"}):
        with pytest.raises(UserError, match="text and label must be different columns"):
            read(tmp_path, content, content, "csv", **options)


# The last is one word, as Linux and as macOS write it.
@pytest.mark.parametrize(
    "labels", [("Pos", "pos"), ("1", "1.0"), ("TRUE", "true"), ("\u00e9", "e\u0301")]
)
def test_labels_that_differ_in_spelling_are_said(labels, tmp_path, capsys):
    content = "text,label\n" + "".join(f"a,{label}\n" for label in labels)
    assert set(read(tmp_path, content, content, "csv").class_names) == set(labels)
    assert "Labels differ only in spelling" in capsys.readouterr().out
    content = "text,label\na,yes\nb,no\nc,1\nd,2\n"
    read(tmp_path, content, content, "csv")
    assert "spelling" not in capsys.readouterr().out


def test_sentences_that_were_seen_before_are_said(tmp_path, capsys):
    """They were not if only some are, nor if a fold has copies of what the others train on."""
    paths = {}
    for name, texts in (("train", "aabb"), ("valid", "cdba"), ("test", "adx")):
        paths[f"{name}_file"] = str(tmp_path / name)
        rows = [f"{text}\t{text in 'ad'}\n" for text in texts]
        (tmp_path / name).write_text("sentence\tlabel\n" + "".join(rows))
    load_corpus("auto", "", OwnFiles(**paths))
    end = "sentences are in other parts too: results on them mean little."
    lines = [f"2 of 4 validation {end}", f"2 of 3 test {end}"]
    assert capsys.readouterr().out.splitlines() == lines
    own = OwnFiles(train_file=paths["train_file"], fold=1, folds=2)
    load_corpus("auto", "", own)
    assert capsys.readouterr().out.splitlines() == [f"2 of 2 validation {end}"]


def test_json_lines_may_begin_with_a_blank_line_and_lack_a_key(tmp_path):
    """They were read as a table without a header, with classes like `"label": "pos"}`."""
    lines = '\n {"text": "a"}\n{"text": "b", "label": "pos"}\n{"text": "c", "label": "neg"}\n'
    corpus = read(tmp_path, lines, lines, "jsonl", drop_missing=True)
    assert corpus.class_names == ["neg", "pos"] and corpus.train.sentences == ["b", "c"]
    verse = "text\tlabel\n[Verse 1] a\t0\n{b}\t1\n"
    assert read(tmp_path, verse, verse).train.sentences == ["[Verse 1] a", "{b}"]
    headless = "[Verse 1] a\t0\n{b}\t1\n[c\t0\nd\t1\n"
    assert read(tmp_path, headless, headless).train.sentences == ["[Verse 1] a", "{b}", "[c", "d"]


def test_a_space_after_the_comma(tmp_path):
    content = 'label, text\npos, "a, b"\nneg, "c"\n'
    assert read(tmp_path, content, content, "csv").train.sentences == ["a, b", "c"]


def test_negative_and_broken_numbers_are_numbers(tmp_path, capsys):
    """They were in the order of their letters, and the positive class of -1 and 1 was -1."""
    labels = ["10.0", "2.0", "-1", "a", "+3", "1_0", "nan"]
    content = "sentence\tlabel\n" + "".join(f"s\t{label}\n" for label in labels)
    names = read(tmp_path, content, content).class_names
    assert names == ["-1", "2.0", "+3", "10.0", "1_0", "a", "nan"]
    assert "regression" not in capsys.readouterr().out
    content = "sentence\tlabel\n" + "".join(f"s\t{n / 5}\n" for n in range(11, -1, -1))
    read(tmp_path, content, content)
    warning = "The labels, 0.0 to 2.2, look like regression: each is a class."
    assert warning in capsys.readouterr().out


def test_incompatible_options_and_unreadable_files(tmp_path):
    (tmp_path / "a.tsv").write_text(GOOD)
    a = str(tmp_path / "a.tsv")
    for arguments, problem in {
        ("auto", "x", a, None): "go together: name both",
        ("auto", "x", None, a): "go together: name both",
        ("cola", "x", a, a): "--dataset cola and --train_file exclude each other",
        ("files", "x", None, None): "go together: name both",
        ("files", "x", a, "no.tsv"): "can't read no.tsv: No such file or directory",
        ("files", "x", str(tmp_path), a): "Is a directory",
    }.items():
        with pytest.raises(UserError, match=problem):
            name, directory, train_file, valid_file = arguments
            load_corpus(name, directory, OwnFiles(train_file=train_file, valid_file=valid_file))


# ------------------------------------------------------------------------------ pairs of sentences

PAIRS = [
    ("The boy sleeps.", "Is the boy asleep?"),
    ("The old girl sees a cat, she says.", "A cat!"),
    ("A boy.", "The boy sleeps and the girl sees the cat in the old garden."),
]


def test_pairs_are_tokenised_as_transformers_does():
    words = encoders.learn_wordpieces(PAIRS)
    tokenizer = encoders.bert_tokenizer(words)
    for max_length in (128, 12):
        tokenised = batching.tokenise(PAIRS, [0, 1, 0], tokenizer, max_length, torch.device("cpu"))
        inputs = batching.inputs_of(tokenised, torch.arange(3))
        expected = tokenizer(
            *map(list, zip(*PAIRS)), truncation=True, max_length=max_length, padding=True
        )
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert inputs[name].tolist() == expected[name]
            assert inputs[name].dtype == torch.int64
        longer = [len(ids) > max_length for ids in tokenizer(PAIRS)["input_ids"]]
        assert tokenised.cut == sum(longer)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # like RoBERTa's
    tokenised = batching.tokenise(PAIRS, [0, 1, 0], tokenizer, 32, torch.device("cpu"))
    assert "token_type_ids" not in batching.inputs_of(tokenised, torch.arange(3))


def test_run_on_pairs(tmp_path):
    """Two text columns were refused."""
    rows = [(a, b, ("no", "yes")[i % 2]) for i, (a, b) in enumerate(PAIRS * 4)]
    header = ("sentence1", "sentence2", "label")
    (tmp_path / "pairs").write_text(table(header, *rows))
    arguments = "--train_file pairs --valid_file pairs --model scratch --epochs 1 --batch_size 4"
    run = finished_run("train_cola.py", tmp_path, *arguments.split())
    assert "pairs: text and label are in the columns sentence1, sentence2, label." in run.out
    with (run.files / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [(row["sentence"], row["sentence2"]) for row in predictions] == PAIRS * 4
    wrong = [row for row in predictions if row["label"] != row["prediction"]]
    page = (run.files / "attributions.html").read_text()
    assert page.count(">asleep</span>") == sum(row["sentence2"] == PAIRS[0][1] for row in wrong)
    ends = [row for row in run.history if "valid/mistakes.path" in row]
    mistakes = json.loads(
        (tmp_path / "wandb/latest-run/files" / ends[-1]["valid/mistakes.path"]).read_text()
    )
    assert mistakes["columns"][:3] == ["sentence", "sentence2", "source"]
    assert all((row[0], row[1]) in PAIRS for row in mistakes["data"])


# ------------------------------------------------------------------------------- synthetic sentences


def test_pairs_are_reproducible_and_unique():
    pairs = grammar.minimal_pairs(4_000, seed=3)
    assert pairs == grammar.minimal_pairs(4_000, seed=3) != grammar.minimal_pairs(4_000, seed=4)
    assert pairs[:50] == grammar.minimal_pairs(50, seed=3)
    sentences = [sentence for good, bad, _ in pairs for sentence in (good, bad)]
    # Compared by words only: differences in case or final punctuation do not count.
    assert len({sentence.lower().rstrip(".?") for sentence in sentences}) == len(sentences) == 8_000
    assert all(
        sentence[0].isupper() and sentence[-1] in ".?" and "  " not in sentence
        for sentence in sentences
    )
    assert all(
        good[-1] == bad[-1] for good, bad, _ in pairs
    )  # the punctuation does not give the label away


def test_both_parts_share_rules_but_no_sentences():
    corpus = load_corpus("synthetic", "")
    assert corpus == synthetic_sentences() and corpus.files == []
    assert (len(corpus.train.labels), len(corpus.valid.labels)) == (12_000, 1_000)
    assert not set(corpus.train.sentences) & set(corpus.valid.sentences)
    rules = {rule.__name__ for rule in grammar.RULES}
    for part in corpus.train, corpus.valid:
        half = len(part.labels) // 2
        assert Counter(part.labels) == {"acceptable": half, "unacceptable": half}
        counts = Counter(zip(part.sources, part.labels))
        assert set(counts) == {
            (rule, label) for rule in rules for label in ("acceptable", "unacceptable")
        }
        assert max(counts.values()) - min(counts.values()) <= 1


def test_labels_of_any_length_are_in_numeric_order(tmp_path):
    labels = ["b", "1" + "0" * 305, "9" * 300, "10", "9", "01", "1", "a", "2" * 5000]
    for part in "tv":
        (tmp_path / part).write_text(
            "sentence\tlabel\n" + "".join(f"s\t{label}\n" for label in labels)
        )
    corpus = load_corpus(
        "files", ".", OwnFiles(train_file=str(tmp_path / "t"), valid_file=str(tmp_path / "v"))
    )
    assert corpus.class_names == [
        *("01", "1", "9", "10", "9" * 300, "1" + "0" * 305, "2" * 5000, "a", "b")
    ]


def test_pairs_break_the_rule_they_are_labelled_with():
    """Check each rule independently, by a property that holds for every acceptable sentence and no unacceptable one."""
    plural = {f"{noun}s" for noun in grammar.NOUNS}
    objects = {thing.split()[1] for thing in grammar.OBJECTS}

    def number_agrees(words: list[str]) -> bool:
        verb = next(word for word in words if word.removesuffix("s") in grammar.INTRANSITIVE)
        subject = next(word for word in words if word.removesuffix("s") in grammar.NOUNS)
        return (subject in plural) != verb.endswith("s")

    def is_in_order(words: list[str]) -> bool:
        start, noun, verb = words[:2], words[2], words[3]
        is_subject = start[0] == "the" and start[1] in grammar.ADJECTIVES and noun in grammar.NOUNS
        return is_subject and verb in grammar.TRANSITIVE and words[5] in objects

    def has_object_if_needed(words: list[str]) -> bool:
        has_object = any(word in objects for word in words)
        return has_object == any(word in grammar.TRANSITIVE for word in words)

    holds = {
        "agreement": number_agrees,
        "word_order": is_in_order,
        "argument_structure": has_object_if_needed,
    }
    seen = Counter()
    for good, bad, rule in grammar.minimal_pairs(1_500, seed=5):
        seen[rule] += 1
        assert holds[rule](good.lower()[:-1].split()), good
        assert not holds[rule](bad.lower()[:-1].split()), bad
    assert seen == dict.fromkeys(holds, 500)


def test_a_bag_of_words_does_not_solve_it():
    _, train, valid, *_ = synthetic_sentences()
    words = sklearn.feature_extraction.text.CountVectorizer(token_pattern=r"\w+")
    model = sklearn.linear_model.LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform(train.sentences), train.labels)
    predictions = model.predict(words.transform(valid.sentences))
    assert abs(sklearn.metrics.matthews_corrcoef(valid.labels, predictions)) < 0.2


# ------------------------------------------------------------------------------------- the vocabulary


def test_wordpieces_match_their_definition():
    pieces = encoders.learn_wordpieces(["Aa bb, bb", "aa, once"])
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted(",abceno")
    assert pieces == [*special, *characters, *(f"##{c}" for c in characters), "aa", "bb"]
