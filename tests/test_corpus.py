"""tasks/sentences.py and its grammar: CoLA's format, its download, the user's files, synthetic sentences, bad data."""

import functools
import hashlib
import http.server
import io
import socketserver
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sklearn.feature_extraction.text
import sklearn.linear_model
import sklearn.metrics

from harness.errors import UserError
from tasks import encoders, grammar
from tasks.sentences import Corpus, load_corpus, parse_cola, synthetic_sentences

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
    assert parse_cola(content, "x") == (
        ['"Quoted, he said.', 'É  double  space "', " last line, no newline "],
        ["acceptable", "unacceptable", "acceptable"],
        ["a1", "b2", "c3"],
    )
    assert parse_cola(content + b"\n", "x") == parse_cola(content, "x")


@pytest.mark.parametrize(
    "line, problem",
    {
        b"a\t1\tThree columns.": "expected 4 columns, got 3",
        b"a\t1\t\tFive\tcolumns.": "expected 4 columns, got 5",
        b"": "expected 4 columns, got 0",
        b"a\t\t\tNo label.": "the label is empty",
        b"a\t1\t\t \xc2\xa0": "the sentence is empty",
        b"a\t1\t\tLatin \xe9t\xe9.": "invalid UTF-8",
    }.items(),
)
def test_error_names_the_malformed_line(line, problem):
    with pytest.raises(UserError) as error:
        parse_cola(b"ok\t1\t\tFine.\n" + line + b"\nok\t1\t\tFine.\n", "cola.zip: dev.tsv")
    assert str(error.value) == f"cola.zip: dev.tsv, row 2: {problem}"


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


def read(tmp_path: Path, train: str | bytes, valid: str | bytes, suffix: str = "tsv") -> Corpus:
    files = [tmp_path / f"{name}.{suffix}" for name in ("train", "valid")]
    for file, content in zip(files, (train, valid)):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_corpus("auto", str(tmp_path), *map(str, files))


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
            "text\tlabel\na\t0\n",
            GOOD,
            "train.tsv, row 1: the header must name one column 'sentence', not 'text', ",
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
        (GOOD + "  \t1\n", GOOD, "train.tsv, row 4: the sentence is empty"),
        (GOOD, GOOD + "c\t\n", "valid.tsv, row 4: the label is empty"),
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
            load_corpus(*arguments)


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
    corpus = load_corpus("files", ".", str(tmp_path / "t"), str(tmp_path / "v"))
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
