"""What comes in for CoLA: its own format, the user's files, the download, the built-in grammar, and bad data."""

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

import data
import grammar
import models
from options import UserError

TRAIN = "gj04\t1\t\tThe boat sank.\nks08\t0\t*\tThe boat sanked.\n"
IN_DOMAIN, OUT_OF_DOMAIN = "c_13\t1\t\tWe left.\n", "rhl07\t0\t*\tLeft we have has.\nrhl07\t1\t\tIt rained.\n"


def cola_zip(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small archive in CoLA's form, whose checksum is made the published one."""
    content = io.BytesIO()
    parts = {"in_domain_train": TRAIN, "in_domain_dev": IN_DOMAIN, "out_of_domain_dev": OUT_OF_DOMAIN}
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in parts.items():
            archive.writestr(f"cola_public/raw/{name}.tsv", text)
            archive.writestr(f"cola_public/tokenized/{name}.tsv", "not to be read")
    path.write_bytes(content.getvalue())
    monkeypatch.setattr(data, "COLA_SHA256", hashlib.sha256(content.getvalue()).hexdigest())


# ------------------------------------------------------------------------------------------------ CoLA


def test_cola_is_read_as_it_is_written():
    content = 'a1\t1\t\t"Quoted, he said.\r\nb2\t0\t??*\tÉ  double  space "\nc3\t1\t\t last line, no end '.encode()
    assert data.parse_cola(content, "x") == (
        ['"Quoted, he said.', 'É  double  space "', " last line, no end "],
        [1, 0, 1],
        ["a1", "b2", "c3"],
    )
    assert data.parse_cola(content + b"\n", "x") == data.parse_cola(content, "x")


@pytest.mark.parametrize(
    "line, problem",
    {
        b"a\t1\tThree columns.": "3 columns where 4 belong",
        b"a\t1\t\tFive\tcolumns.": "5 columns where 4 belong",
        b"": "1 columns where 4 belong",
        b"a\t2\t\tLabel two.": "the label is '2', not 0 or 1",
        b"a\t\t\tNo label.": "the label is '', not 0 or 1",
        b"a\t1\t\t \xc2\xa0": "the sentence is empty",
        b"a\t1\t\tLatin \xe9t\xe9.": "the bytes are not UTF-8",
    }.items(),
)
def test_a_malformed_line_is_named(line, problem):
    with pytest.raises(UserError) as error:
        data.parse_cola(b"ok\t1\t\tFine.\n" + line + b"\nok\t1\t\tFine.\n", "cola.zip: dev.tsv")
    assert str(error.value) == f"cola.zip: dev.tsv, line 2: {problem}"


def test_validation_is_both_dev_sets(tmp_path, monkeypatch):
    cola_zip(tmp_path / "cola_public_1.1.zip", monkeypatch)
    for name in ("cola", "auto"):
        corpus = data.load_corpus(name, str(tmp_path))
        assert corpus.name == "cola" and corpus.class_names == ["unacceptable", "acceptable"]
        assert corpus.train == (["The boat sank.", "The boat sanked."], [1, 0], ["gj04", "ks08"])
        sentences = ["We left.", "Left we have has.", "It rained."]
        assert corpus.valid == (sentences, [1, 0, 1], ["c_13", "rhl07", "rhl07"])
        assert {name: sentences[part] for name, part in corpus.domains.items()} == {
            "in_domain": sentences[:1],
            "out_of_domain": sentences[1:],
        }
        assert corpus.files == [tmp_path / "cola_public_1.1.zip"]


def test_another_checksum_is_an_error_whatever_was_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "cola_public_1.1.zip"
    cola_zip(path, monkeypatch)
    path.write_bytes(path.read_bytes() + b"!")
    for name in ("cola", "auto"):
        with pytest.raises(UserError, match=r"cola_public_1\.1\.zip is damaged: it differs from the published file"):
            data.load_corpus(name, str(tmp_path))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Path]:
    """A loopback server in the place of CoLA's; the file that it serves."""
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
        monkeypatch.setattr(data, "COLA_URL", f"http://127.0.0.1:{running.server_address[1]}/cola.zip")
        yield served / "cola.zip"
        running.shutdown()


def test_cola_is_downloaded_once_and_checked(tmp_path, server, monkeypatch, capsys):
    cola_zip(server, monkeypatch)
    whole, new = server.read_bytes(), tmp_path / "new/place"
    server.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="what the server sent is not the published file"):
        data.load_corpus("cola", str(new))
    assert data.load_corpus("auto", str(new)).name == "synthetic" and "BUILT-IN" in capsys.readouterr().err
    assert not new.exists() or not list(new.iterdir())
    server.write_bytes(whole)
    assert len(data.load_corpus("auto", str(new)).valid.labels) == 3
    server.unlink()
    assert data.load_corpus("cola", str(new)).name == "cola"
    assert [(file.name, file.read_bytes()) for file in new.iterdir()] == [("cola_public_1.1.zip", whole)]


# --------------------------------------------------------------------------------------- the user's files


def read(tmp_path: Path, train: str | bytes, valid: str | bytes, suffix: str = "tsv") -> data.Corpus:
    files = [tmp_path / f"{name}.{suffix}" for name in ("train", "valid")]
    for file, content in zip(files, (train, valid)):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.load_corpus("auto", str(tmp_path), *map(str, files))


def test_csv_has_quotes(tmp_path):
    train = 'label,sentence\r\nno,"A comma, and ""quotes"""\r\nyes,"two\nlines"\r\nno,plain'
    corpus = read(tmp_path, train, "sentence,id,label\nx,7, yes \n", "csv")
    assert corpus.train.sentences == ['A comma, and "quotes"', "two\nlines", "plain"]
    assert (corpus.class_names, corpus.train.labels, corpus.valid.labels) == (["no", "yes"], [0, 1, 0], [1])
    assert (corpus.train.sources, corpus.valid.sources) == (["train.csv"] * 3, ["valid.csv"])
    assert (corpus.name, corpus.domains) == ("files", {})
    assert corpus.files == [tmp_path / "train.csv", tmp_path / "valid.csv"]


def test_tsv_has_none(tmp_path):
    train = '\ufeffsource\tsentence\tlabel\na\t"Left open, he\t10\nb\tx\t9\nc\ty\t2\n'
    corpus = read(tmp_path, train, 'label\tsentence\tsource\n2\tz"\tq\n')
    assert corpus.train == (['"Left open, he', "x", "y"], [2, 1, 0], ["a", "b", "c"])
    assert corpus.class_names == ["2", "9", "10"]  # numbers in the order of numbers
    assert corpus.valid == (['z"'], [0], ["q"])


GOOD = "sentence\tlabel\na\t0\nb\t1\n"


@pytest.mark.parametrize(
    "train, valid, problem",
    [
        ("sentence\tlabels\na\t0\n", GOOD, "train.tsv, row 1: the header has no column 'label', only sentence, labels"),
        ("text\tlabel\na\t0\n", GOOD, "train.tsv, row 1: the header has no column 'sentence'"),
        ("", GOOD, "train.tsv, row 1: the header has no column 'sentence'"),
        ("sentence\tlabel\n", GOOD, "train.tsv holds no sentence"),
        (GOOD + "c\t1\tmore\n", GOOD, "train.tsv, row 4: 3 columns where the header has 2"),
        (GOOD, GOOD + "c\n", "valid.tsv, row 4: 1 columns where the header has 2"),
        ("sentence\tlabel\na\t1\nb\t1\n", GOOD, "train.tsv: every label is '1'; training needs two classes or more"),
        (GOOD + "  \t1\n", GOOD, "train.tsv, row 4: the sentence is empty"),
        (GOOD, GOOD + "c\t\n", "valid.tsv, row 4: the label is empty"),
        (GOOD, GOOD + "c\t2\n", "valid.tsv, row 4: the label '2' does not occur in {}/train.tsv"),
        (GOOD, GOOD.encode() + b"\xe9\t1\n", "valid.tsv, line 4: the bytes are not UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_row(tmp_path, train, valid, problem):
    with pytest.raises(UserError) as error:
        read(tmp_path, train, valid)
    assert str(error.value).startswith(f"{tmp_path}/{problem.format(tmp_path)}") and "\n" not in str(error.value)


def test_files_that_do_not_go_together(tmp_path):
    (tmp_path / "a.tsv").write_text(GOOD)
    a = str(tmp_path / "a.tsv")
    for arguments, problem in {
        ("auto", "x", a, None): "go together: name both",
        ("auto", "x", None, a): "go together: name both",
        ("cola", "x", a, a): "--dataset cola and --train_file exclude each other",
        ("files", "x", None, None): "--dataset files needs --train_file and --valid_file",
        ("files", "x", a, "no.tsv"): "can't read no.tsv: No such file or directory",
        ("files", "x", str(tmp_path), a): "Is a directory",
    }.items():
        with pytest.raises(UserError, match=problem):
            data.load_corpus(*arguments)


# ------------------------------------------------------------------------------- the built-in sentences


def test_pairs_are_the_same_every_time_and_never_repeat():
    pairs = grammar.minimal_pairs(4_000, seed=3)
    assert pairs == grammar.minimal_pairs(4_000, seed=3) != grammar.minimal_pairs(4_000, seed=4)
    assert pairs[:50] == grammar.minimal_pairs(50, seed=3)
    sentences = [sentence for good, bad, _ in pairs for sentence in (good, bad)]
    # Set apart by the words alone: a capital or a final mark is no second sentence.
    assert len({sentence.lower().rstrip(".?") for sentence in sentences}) == len(sentences) == 8_000
    assert all(sentence[0].isupper() and sentence[-1] in ".?" and "  " not in sentence for sentence in sentences)
    assert all(good[-1] == bad[-1] for good, bad, _ in pairs)  # the mark does not give the answer away


def test_the_two_parts_share_rules_but_no_sentence():
    corpus = data.load_corpus("synthetic", "")
    assert corpus == data.synthetic_sentences() and corpus.files == []
    assert (len(corpus.train.labels), len(corpus.valid.labels)) == (12_000, 1_000)
    assert not set(corpus.train.sentences) & set(corpus.valid.sentences)
    rules = {rule.__name__ for rule in grammar.RULES}
    for part in corpus.train, corpus.valid:
        assert Counter(part.labels) == {0: len(part.labels) // 2, 1: len(part.labels) // 2}
        counts = Counter(zip(part.sources, part.labels))
        assert set(counts) == {(rule, label) for rule in rules for label in (0, 1)}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_known_pairs_break_the_rule_they_are_named_for():
    """Each rule checked from outside: by a property that holds of every acceptable sentence and of no broken one."""
    plural = {*grammar.NOUNS.values()}
    holds = {
        "agreement": lambda words: any(w in plural for w in words) != any(w.endswith("s") for w in verbs(words)),
        "determiner": lambda words: (words[-2] in ("these", "those", "many")) == words[-1].endswith("s"),
        "reflexive": lambda words: (
            next(w for w in words if w.endswith(("self", "selves")))
            == next(
                {"boy": "himself", "girl": "herself"}.get(w, "themselves") for w in words if w[:3] in ("boy", "gir")
            )
        ),
        "auxiliary": lambda words: words in perfects_and_futures(words),
    }

    def verbs(words: list[str]) -> list[str]:
        return [w for w in words if w in {form for verb in grammar.INTRANSITIVE for form in verb[:2]}]

    def perfects_and_futures(words: list[str]) -> list[list[str]]:
        i = next(i for i, w in enumerate(words) if w in ("will", "must", "has", "have"))
        right = 0 if words[i] in ("will", "must") else 2
        return [[*words[: i + 1], verb[right], *words[i + 2 :]] for verb in grammar.TRANSITIVE]

    seen = Counter()
    for good, bad, rule in grammar.minimal_pairs(2_000, seed=5):
        if rule in holds:
            seen[rule] += 1
            assert holds[rule](good.lower()[:-1].split()), good
            assert not holds[rule](bad.lower()[:-1].split()), bad
    assert seen == dict.fromkeys(holds, 250)


def test_a_bag_of_words_does_not_solve_it():
    train, valid = data.synthetic_sentences()[1:3]
    words = sklearn.feature_extraction.text.CountVectorizer(token_pattern=r"\w+")
    model = sklearn.linear_model.LogisticRegression(max_iter=1000)
    model.fit(words.fit_transform(train.sentences), train.labels)
    predictions = model.predict(words.transform(valid.sentences))
    assert 0.0 < sklearn.metrics.matthews_corrcoef(valid.labels, predictions) < 0.6


# ------------------------------------------------------------------------------------- the vocabulary


def test_wordpieces_are_those_of_the_definition():
    pieces = models.learn_wordpieces(["Aa bb, bb", "aa.", *(f"{c}zing" for c in "klmnopqrst")])
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted(",.abgiklmnopqrstz")
    assert pieces[:5] == special and pieces[5:22] == characters and pieces[22:39] == [f"##{c}" for c in characters]
    # words that occur twice; endings that ten words share, and whole words are no endings of themselves
    assert pieces[39:] == ["aa", "bb", "##ing", "##ng", "##zing"]
