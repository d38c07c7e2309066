"""Odd data files and broken downloads: the run works, or one line says what is wrong."""

import http.server
import json
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import finished_run

import viz
from harness import script
from harness.errors import UserError
from metrics import evaluation
from tasks.digits import load_digits, synthetic_digits
from tasks.downloads import why_unreachable
from tasks.sentences import Corpus, load_corpus
from tasks.text_files import OwnFiles

GOOD = "sentence\tlabel\na\t0\nb\t1\n"
pytestmark = pytest.mark.quick


def read(tmp_path: Path, train: str, valid: str = GOOD, suffix: str = "tsv") -> Corpus:
    for name, content in (("train", train), ("valid", valid)):
        (tmp_path / f"{name}.{suffix}").write_bytes(content.encode())
    train_file, valid_file = (str(tmp_path / f"{name}.{suffix}") for name in ("train", "valid"))
    return load_corpus("files", "", OwnFiles(train_file=train_file, valid_file=valid_file))


def problem_of(tmp_path: Path, train: str, suffix: str = "tsv") -> str:
    """What is wrong with the training file, without its directory."""
    with pytest.raises(UserError) as error:
        read(tmp_path, train, suffix=suffix)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{tmp_path}/")


# ------------------------------------------------------------------------------------- the user's files


@pytest.mark.parametrize("labels, names", [([0, 0, 0], "ab"), ([2], "abc")])
def test_charts_of_one_class_have_no_lines(labels, names):
    result = evaluation(torch.eye(3, len(names))[: len(labels)], torch.tensor(labels))
    for chart in (viz.roc_chart, viz.precision_recall_chart):
        assert chart(result, list(names)).table.data == []


def test_charts_show_the_most_frequent_classes():
    labels = torch.tensor([*range(30), *range(10, 30)])
    result = evaluation(torch.randn(50, 30, generator=torch.Generator().manual_seed(0)), labels)
    for chart in (viz.roc_chart, viz.precision_recall_chart):
        assert {row[1] for row in chart(result, [str(c) for c in range(30)]).table.data} == {
            *map(str, range(10, 30))
        }


def test_run_with_one_validation_sentence(tmp_path):
    (tmp_path / "t.tsv").write_text(
        "sentence\tlabel\n" + "The boy sleeps.\t1\nBoy sleeps the.\t0\n" * 4
    )
    (tmp_path / "v.tsv").write_text("sentence\tlabel\nThe boy sleeps.\t1\n")
    arguments = "--train_file t.tsv --valid_file v.tsv --model scratch --epochs 1 --batch_size 8 --max_length 16"
    run = finished_run("train_cola.py", tmp_path, *arguments.split(), "--monitor", "valid/loss")
    assert "W&B has failed" not in run.err and run.metrics["valid/acc"] in (0, 1)
    row = next(row for row in run.history if "valid/roc_table.path" in row)
    assert "valid/per_source.path" in row and "valid/attributions.path" in row
    assert (
        json.loads((tmp_path / "wandb/latest-run/files" / row["valid/roc_table.path"]).read_text())[
            "data"
        ]
        == []
    )


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_line_ends(tmp_path, end):
    corpus = read(tmp_path, GOOD.replace("\n", end))
    assert corpus.train == (["a", "b"], ["0", "1"], ["train.tsv"] * 2)
    corpus = read(
        tmp_path, 'sentence,label\n"a, b",0\nc,1\n'.replace("\n", end), "sentence,label\nx,0", "csv"
    )
    assert corpus.train.sentences == ["a, b", "c"]
    assert problem_of(tmp_path, (GOOD + "c\n").replace("\n", end)).startswith(
        "train.tsv, row 4: expected 2 columns"
    )


def test_control_characters_do_not_split_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_cola.py"])
    odd = tmp_path / "a\n\r\u2028b"
    odd.mkdir()
    headers = [
        '"sen\n\u2028\x1btence",label\n',
        'sentence,label\nx,0\ny,"1\x0b\x1b\u2028"\n',
        'sentence,label\n"x\n',
    ]
    for content in ("", *headers):
        assert (
            script.status_of(
                lambda content=content: read(odd, content, "sentence,label\nx,2\n", "csv")
            )
            == 2
        )
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "\x1b" not in error


def test_blank_lines(tmp_path):
    for suffix, good in (("tsv", GOOD), ("csv", GOOD.replace("\t", ","))):
        for blank in (good + "\n\r\n\n", good.replace("\n", "\n\n"), "\n" + good, good + " \n"):
            assert read(tmp_path, blank, good, suffix) == read(tmp_path, good, good, suffix)
        assert problem_of(tmp_path, good + "\nc\n", suffix) == (
            f"train.{suffix}, row 5: expected 2 columns, got 1"
        )
        assert problem_of(tmp_path, "\n\n", suffix) == f"train.{suffix} contains no sentences"


@pytest.mark.parametrize(
    "suffix, content, problem",
    [
        ("tsv", "label\tsentence\tlabel\n0\ta\t1\n", "row 1: several columns could be it: "
         "'label', 'label'; choose one with --label_column"),
        ("csv", "sentence,label,sentence\na,0,b\n", "row 1: several columns could be it: "
         "'sentence', 'sentence'; choose one with --text_column"),
        ("csv", 'sentence,label\n"a\nb",0\n"c,1\nd,0\n', "row 4: a quote is never closed, or not doubled within "
         "quotes (unexpected end of data)"),
        ("csv", 'sentence,label\n"a,0\nb "c", d,1\n', "row 2: a quote is never closed, or not doubled within "
         "quotes (',' expected after '\"')"),
    ],
)  # fmt: skip
def test_plain_messages(tmp_path, suffix, content, problem):
    assert problem_of(tmp_path, content, suffix) == f"train.{suffix}, {problem}"


def test_too_many_labels(tmp_path):
    def table(labels: list[object]) -> str:
        return "sentence\tlabel\n" + "".join(f"s{i}\t{label}\n" for i, label in enumerate(labels))

    for labels in (range(19), [*range(10)] * 2, [*range(1000)] * 2):
        assert read(tmp_path, table(labels), table([1])).class_names == [
            str(n) for n in sorted({*labels})
        ]
    for labels in ([i / 7 for i in range(20)], [*range(11), *[0] * 9], [*range(1001)] * 3):
        counts = f"train.tsv: column 'label' has {len({*labels}):,} distinct labels in {len(labels):,} rows; "
        assert (
            problem_of(tmp_path, table(labels)) == counts + "does another column hold the classes?"
        )


def test_classes_have_a_total_order(tmp_path):
    labels = [
        "b",
        "10",
        *("0" * n + "1" for n in range(9)),
        "2",
        "a",
        "1a",
    ]  # a set has another order in each process
    train = "sentence\tlabel\n" + "".join(f"s\t{label}\n" for label in labels)
    expected = [*("0" * n + "1" for n in reversed(range(9))), "2", "10", "1a", "a", "b"]
    assert read(tmp_path, train, "sentence\tlabel\nx\ta").class_names == expected


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "f").touch()
    for load, name in (
        (load_digits, "mnist"),
        (load_digits, "auto"),
        (load_corpus, "cola"),
        (load_corpus, "auto"),
    ):
        with pytest.raises(UserError, match=r"^--data_dir .*/f is a file: pass a directory$"):
            load(name, str(tmp_path / "f"))


# ------------------------------------------------------------------------------------------ image files


@pytest.mark.parametrize(
    "header, size",
    [
        ((0x803, 76_530_612, 28, 28), 16 + 784),
        ((0x803, 1, 28, 28), 16 + 784 + 1),
        ((0x803, -1, 28, 28), 800),
        ((0x803, 1, -28, -28), 800),
        ((0x801, 1, 28, 28), 800),
    ],
)
def test_image_file_of_a_false_size(tmp_path, header, size):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        with (raw / f"{name}-ubyte").open("wb") as file:
            file.write(struct.pack(">4i", *header))
            file.truncate(size)  # the rest is a hole, which takes no space
    problem = "it is not an IDX file of 28×28 images"
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte is damaged: {problem}"):
        load_digits("mnist", str(tmp_path))


# -------------------------------------------------------------------------------------------- downloads

BROKEN = {
    "cut off": b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nPK",
    "no HTTP": b"\x1b[31mgarbage\r\nmore\r\n",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "redirected to no URL": b"HTTP/1.0 302 Found\r\nLocation: http://[\r\n\r\n",
    "another file": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nPK",
}


@pytest.fixture
def broken_server(monkeypatch, request) -> Iterator[None]:
    """A loopback server that answers HEAD well and GET with `request.param`; CoLA and MNIST are fetched from it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.wfile.write(request.param)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(
        "urllib.request._opener", None
    )  # a cached opener would keep the old proxies
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr("tasks.sentences.COLA_URL", f"{url}cola.zip")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("broken_server", BROKEN.values(), ids=BROKEN, indirect=True)
@pytest.mark.parametrize("load, name", [(load_corpus, "cola"), (load_digits, "mnist")])
def test_broken_download(tmp_path, broken_server, monkeypatch, capfd, load, name):
    monkeypatch.setattr(
        "tasks.digits.synthetic_digits", lambda: synthetic_digits(2, 2)
    )  # fewer, for speed
    with pytest.raises(UserError, match=r"missing, and can't be downloaded: [^\n\x1b]*$"):
        load(name, str(tmp_path / "d"))
    assert load("auto", str(tmp_path / "d")).name == "synthetic"
    assert "BUILT-IN" in capfd.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name != "d"]


@pytest.mark.filterwarnings("error")  # also for an exception in the thread
@pytest.mark.parametrize(
    "proxy", ["", "http:///", "http:x", "not a URL", "http://h:port", "http://[", "x://y", "\n"]
)
@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://127.0.0.1:9/",
            "http://127.0.0.1:x",
            "http://a b\n/",
            f"http://{'a' * 70}.b/",
            "x://y",
        ),
        *("huggingface.co", "http://", "https://[", ""),  # these name no host
    ],
)
def test_no_url(url, proxy, monkeypatch):
    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.setenv("no_proxy", "")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, proxy)
    problem = why_unreachable(url)
    assert problem and len(problem.splitlines()) == 1
    assert "no answer" not in problem
