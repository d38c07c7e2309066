"""Models that are not BERT, or not whole: each one trains, or ends in one line that says why."""

import hashlib
import http.server
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import train_cola
from harness.errors import UserError
from tasks import batching, encoders
from tests import forking, killing
from tests.conftest import REPO, call, clean_environment

SENTENCES = ["The cat sleeps.", "A dog that the boys saw in the garden sleeps on it."]
PIECES = encoders.learn_wordpieces(killing.SENTENCES.read_text().splitlines())
BERT = {
    "vocab_size": len(PIECES),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
SEQ2SEQ = {
    "vocab_size": len(PIECES),
    "d_model": 16,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "decoder_start_token_id": 0,
}
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 440449768\n"
)


def make_tokenizer(
    template: str = "[CLS] $A [SEP]", **special: str
) -> transformers.PreTrainedTokenizerFast:
    """The words of the built-in sentences, with special tokens as in `template`; without padding by default."""
    backend = encoders.bert_tokenizer(PIECES).backend_tokenizer
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]", sep_token="[SEP]", **special
    )


def save(
    directory: Path,
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load(
    directory: Path | str,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    return encoders.load_model(str(directory), SENTENCES, ["no", "yes"], 32)


def refusal(directory: Path | str) -> str:
    """The line with which a model is refused, from its problem on."""
    with pytest.raises(UserError) as caught:
        load(directory)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    start, _, problem = str(caught.value).partition(" can't ")
    assert start == f"--model {' '.join(str(directory).split())}" and len(problem) < 250
    return problem


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT saved from a masked-LM: it has neither a head nor a pooler."""
    torch.manual_seed(0)
    tokenizer = encoders.bert_tokenizer(PIECES)
    return save(
        tmp_path / "bert", transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), tokenizer
    )


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(
    directory: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = directory / "model.safetensors"
    safetensors.torch.save_file(
        edit(safetensors.torch.load_file(file)), file, metadata={"format": "pt"}
    )


# --------------------------------------------------------------------------------- weights that are not there


@pytest.mark.quick  # benchmarks.versions runs the quick ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("old_names", [[], ["one", "two", "three"]], ids=len)
def test_weights_are_float32_in_every_version(dtype, old_names, tmp_path):
    """transformers before 4.56 took `dtype` for an argument of the model: no trained model could be used."""
    config = transformers.BertConfig(**BERT, id2label=dict(enumerate(old_names)))
    model = transformers.BertForSequenceClassification(config).to(dtype)
    stored = model.base_model.state_dict()
    model, _ = load(save(tmp_path, model, encoders.bert_tokenizer(PIECES)))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    loaded = model.base_model.state_dict()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in stored.items())


@pytest.mark.quick
@pytest.mark.parametrize("old_names", [[], ["one", "two", "three"]], ids=len)
def test_config_does_not_say_how_exact_weights_are(old_names, tmp_path):
    """transformers 5 rounded float32 weights to the type that config.json names."""
    config = transformers.BertConfig(**BERT, id2label=dict(enumerate(old_names)))
    model = transformers.BertForSequenceClassification(config)
    directory = save(tmp_path, model, encoders.bert_tokenizer(PIECES))
    content = json.loads((directory / "config.json").read_text())
    content |= {"dtype": "float16", "torch_dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(content))
    loaded = load(directory)[0].base_model.state_dict()
    for name, weight in model.base_model.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_model_without_head_and_pooler_is_loaded(bert, capsys):
    stored = safetensors.torch.load_file(bert / "model.safetensors")
    model, _ = load(bert)
    base = {name: weight for name, weight in model.state_dict().items() if name in stored}
    assert len(base) == 37 and all(
        torch.equal(weight, stored[name]) for name, weight in base.items()
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "count", "first"),
    [
        ({"hidden_size": 32}, 35, "bert.embeddings.LayerNorm.bias"),
        ({"num_hidden_layers": 3}, 16, "bert.encoder.layer.2.attention.output.LayerNorm.bias"),
        ({"vocab_size": 5000}, 1, "bert.embeddings.word_embeddings.weight"),
        ({"model_type": "roberta"}, 37, "roberta.embeddings.LayerNorm.bias"),
    ],
    ids=str,
)
def test_weights_other_than_config_says(changes, count, first, bert):
    change(bert / "config.json", **changes)
    assert refusal(bert) == (
        f"be used: weights missing or not of the size in config.json: {count}, first {first}"
    )


def test_weights_of_other_names(bert):
    change_weights(
        bert, lambda weights: {f"other.{name}": weight for name, weight in weights.items()}
    )
    assert "weights missing or not of the size in config.json: 37, first bert." in refusal(bert)


# ----------------------------------------------------------------------------------------------- trained heads


def save_classifier(directory: Path, *class_names: str) -> Path:
    """A BERT whose config names its classes so."""
    torch.manual_seed(0)
    names = dict(enumerate(class_names))
    config = transformers.BertConfig(
        **BERT, id2label=names, label2id={name: label for label, name in names.items()}
    )
    model = transformers.BertForSequenceClassification(config)
    tokenizer = encoders.bert_tokenizer(PIECES)
    return save(directory, model, tokenizer)


@pytest.mark.parametrize("names", [("no", "yes"), ("yes", "no"), ("YES", "No")])
def test_trained_head_keeps_its_order_of_classes(names, tmp_path, capsys):
    directory = save_classifier(tmp_path / "bert", *names)
    model, _ = load(directory)
    assert model.config.id2label == {0: names[0].lower(), 1: names[1].lower()}
    assert model.config.label2id == {names[0].lower(): 0, names[1].lower(): 1}
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    assert killing.same(dict(model.state_dict()), stored)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "names", [("LABEL_0", "LABEL_1"), ("no", "maybe"), ("no", "no"), ("no", "yes", "maybe")]
)
def test_head_for_other_classes_is_replaced(names, tmp_path, capsys):
    directory = save_classifier(tmp_path / "bert", *names)
    model, _ = load(directory)
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.num_labels == 2
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name != "classifier.bias":  # zero in both
            assert torch.equal(weight, stored[name]) == (name != "classifier.weight"), name
    assert capsys.readouterr().out.startswith(f"The head of {directory} has other labels, ")


def test_classes_that_differ_in_case_only(tmp_path, capsys):
    directory = save_classifier(tmp_path / "bert", "a", "A")
    model, _ = encoders.load_model(str(directory), SENTENCES, ["A", "a"], 32)
    assert model.config.id2label == {0: "A", 1: "a"}
    assert "has other labels, A, a: a new one with 2 replaces it." in capsys.readouterr().out


def test_classes_in_another_order_give_the_same_results(tmp_path, monkeypatch):
    """The same classifier, the rows of its head and its labels turned round."""
    monkeypatch.chdir(tmp_path)
    rows = "Cat\tthe boys sleep\ndog\tthe boy sleeps\ndog\tboys the sleep\ndog\ta garden\n"
    Path("t.tsv").write_text(f"label\tsentence\n{rows}")
    save_classifier(tmp_path / "one", "cat", "dog")
    other = save_classifier(tmp_path / "other", "dog", "cat")

    def turn_round(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name].flip(0).contiguous()
        return weights

    change_weights(other, turn_round)
    arguments = (
        "--train_file t.tsv --valid_file t.tsv --wandb disabled --max_length 32 --batch_size 2"
    )
    more = "--learning_rate 1e-12 --epochs 1 --precision fp32"
    one, other = (
        train_cola.main([*f"{arguments} {more} --model {name} --output_dir out-{name}".split()])
        for name in ("one", "other")
    )
    assert (one["class_names"], other["class_names"]) == (["Cat", "dog"], ["dog", "Cat"])
    for metric in ("loss", "acc", "mcc"):
        assert one[f"valid/{metric}"] == pytest.approx(other[f"valid/{metric}"], abs=1e-6)


# ----------------------------------------------------------------------------------------------- broken files

USED = "be used: "
DAMAGED = (
    "be used: the file of its weights is damaged, or only a git LFS pointer: try `git lfs pull`"
)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", b"", USED),
        ("tokenizer.json", b"{}", USED + "KeyError: 'added_tokens'"),
        ("tokenizer_config.json", b"[]", USED),
        ("config.json", b"[]", USED),
        ("config.json", b'{"model_type": "bert", "id2label": ["a", "b"]}', USED),
        ("config.json", b'{"model_type": "bert", "hidden_dropout_prob": "high"}', USED),
        ("config.json", b'{"model_type": "bert", "hidden_act": "none"}', USED + "KeyError: 'none'"),
        ("config.json", b'{"model_type": "bert", "num_attention_heads": 0}', USED),
        ("model.safetensors", b"", DAMAGED),
        ("model.safetensors", b"no weights at all", DAMAGED),
        ("pytorch_model.bin", pickle.dumps(Path(), protocol=2), DAMAGED),
        ("pytorch_model.bin", b"", USED + "EOFError"),
    ],
    ids=str,
)
def test_broken_files(file, content, problem, bert):
    if file == "pytorch_model.bin":
        (bert / "model.safetensors").unlink()
    (bert / file).write_bytes(content)
    refused = refusal(bert)
    assert refused.startswith(problem) and "weights_only" not in refused


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointers(file, bert):
    if file == "pytorch_model.bin":
        (bert / "model.safetensors").unlink()
    (bert / file).write_bytes(POINTER)
    assert refusal(bert) == DAMAGED


def test_newline_in_the_name_of_a_model(bert, tmp_path, monkeypatch):
    directory = bert.rename(tmp_path / "two\nlines")
    load(directory)
    (directory / "model.safetensors").write_bytes(POINTER)
    assert "git lfs pull" in refusal(directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"^--model no such model is not a directory, .+$"):
        encoders.find_model("no such\nmodel")


def test_fewer_embeddings_than_pieces(tmp_path):
    config = transformers.BertConfig(**{**BERT, "vocab_size": len(PIECES) - 1})
    save(tmp_path / "bert", transformers.BertModel(config), make_tokenizer(pad_token="[PAD]"))
    largest = len(PIECES) - 1
    problem = f"its tokenizer has ids up to {largest}, but the model has {largest} embeddings"
    assert refusal(tmp_path / "bert") == f"be used: {problem}"


def test_model_that_fails_in_its_forward_pass(bert, monkeypatch):
    def fail(*arguments: object, **inputs: object) -> None:
        raise RuntimeError("not\nthese sentences")

    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", fail)
    assert refusal(bert) == "be used: not these sentences"


def test_script_ends_in_one_line(bert, tmp_path):
    (bert / "tokenizer_config.json").write_text("[]")
    done = call(
        "train_cola.py", *"--dataset synthetic --model bert --wandb disabled".split(), cwd=tmp_path
    )
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("train_cola.py: error: --model bert can't be used: ")


# ----------------------------------------------------------------------------------------- other architectures


def make_gpt2() -> tuple:
    config = transformers.GPT2Config(
        vocab_size=len(PIECES),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=3,
        eos_token_id=3,
    )
    return transformers.GPT2LMHeadModel(config), make_tokenizer("$A")


def make_xlnet() -> tuple:
    config = transformers.XLNetConfig(
        vocab_size=len(PIECES), d_model=16, n_layer=1, n_head=2, d_inner=32
    )
    return transformers.XLNetLMHeadModel(config), make_tokenizer(
        "$A [SEP] [CLS]", pad_token="[PAD]", padding_side="left"
    )


def make_t5() -> tuple:
    config = transformers.T5Config(**SEQ2SEQ, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config), make_tokenizer(
        "$A [SEP]", pad_token="[PAD]"
    )


def make_bart() -> tuple:
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = transformers.BartConfig(
        **SEQ2SEQ, **sizes, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64
    )
    return transformers.BartForConditionalGeneration(config), make_tokenizer(pad_token="[PAD]")


def make_longformer() -> tuple:
    config = transformers.LongformerConfig(
        **BERT, attention_window=8, pad_token_id=0, sep_token_id=3, initializer_range=0.3
    )
    return transformers.LongformerForMaskedLM(config), make_tokenizer(pad_token="[PAD]")


@pytest.mark.parametrize("make", [make_gpt2, make_xlnet, make_t5, make_bart, make_longformer])
def test_other_architectures(make, tmp_path, capsys):
    """Padding changes no answer, and tokens are attributed to where the model accepts embeddings."""
    torch.manual_seed(0)
    directory = save(tmp_path / "model", *make())
    model, tokenizer = load(directory)
    assert tokenizer.padding_side == "right" and model.config.pad_token_id is not None
    assert tokenizer.pad_token == ("[SEP]" if make is make_gpt2 else "[PAD]")

    whole = batching.tokenise(SENTENCES, [0, 1], tokenizer, 32, torch.device("cpu"))
    first = batching.tokenise(SENTENCES[:1], [0], tokenizer, 32, torch.device("cpu"))
    with torch.no_grad():
        padded, alone = (
            type(model)
            .forward(model, **batching.inputs_of(part, torch.arange(len(part.lengths))))
            .logits
            for part in (whole, first)
        )
    assert torch.allclose(padded[:1], alone, atol=1e-6) and not torch.allclose(
        padded[0], padded[1], atol=1e-4
    )

    scores = encoders.attribute(model, whole, 0, answer=1, label=0)
    said = capsys.readouterr().out
    if make in (make_gpt2, make_xlnet):
        assert scores.shape == (whole.lengths[0],) and scores.abs().max() > 0 and said == ""
        assert torch.equal(scores, encoders.attribute(model, first, 0, answer=1, label=0))
    else:
        assert scores is None
        assert said == "The model does not accept embeddings: there will be no attributions.\n"


def test_attribution_of_gpt2_is_that_of_its_last_token(tmp_path):
    """Moving the embedding of the last token moves the logits, which GPT-2 takes from that token."""
    torch.manual_seed(0)
    model, tokenizer = load(save(tmp_path / "model", *make_gpt2()))
    part = batching.tokenise(SENTENCES, [0, 1], tokenizer, 32, torch.device("cpu"))
    model, (index, length) = model.double(), (0, int(part.lengths[0]))
    scores = encoders.attribute(model, part, index, answer=1, label=0)
    embedding, token = model.get_input_embeddings(), int(part.tokens[length])
    ends = []
    for scale in (1 + 1e-4, 1 / (1 + 1e-4) ** 2):
        with torch.no_grad():
            embedding.weight[token] *= scale
            logits = model(**batching.inputs_of(part, torch.tensor([index]))).logits[0]
        ends.append(float(logits[1] - logits[0]))
    assert float(scores[-1]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)


def test_page_without_attributions_says_so_once(tmp_path, monkeypatch):
    model, tokenizer = load(save(tmp_path / "model", *make_t5()))
    part = batching.tokenise(SENTENCES, [0, 1], tokenizer, 32, torch.device("cpu"))
    task = SimpleNamespace(
        corpus=SimpleNamespace(class_names=["no", "yes"]),
        model=model,
        tokenizer=tokenizer,
        valid=part,
    )
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # two mistakes
    page = train_cola.attributions(task, train_cola.evaluation(logits, part.labels))
    assert page.count("No attributions") == 1


def test_tokenizer_with_neither_padding_nor_end(tmp_path):
    model, tokenizer = make_gpt2()
    tokenizer.eos_token = None
    with pytest.raises(
        UserError, match="has a tokenizer without a padding token: pass an encoder such as BERT"
    ):
        load(save(tmp_path / "model", model, tokenizer))


def test_positions_that_a_model_reserves(tmp_path):
    config = transformers.MPNetConfig(**BERT)
    directory = save(
        tmp_path / "mpnet", transformers.MPNetModel(config), make_tokenizer(pad_token="[PAD]")
    )
    with pytest.raises(UserError, match="--max_length 63 is more than the model's limit, 62"):
        encoders.load_model(str(directory), SENTENCES, ["no", "yes"], 63)
    encoders.load_model(str(directory), SENTENCES, ["no", "yes"], 62)


def test_multi_label_model_becomes_single_label(bert, tmp_path):
    """Otherwise the pipeline takes sigmoids, and the scores of a sentence don't add up to 1."""
    change(bert / "config.json", problem_type="multi_label_classification")
    model, tokenizer = load(bert)
    save(tmp_path / "saved", model, tokenizer)
    pipeline = transformers.pipeline(
        "text-classification", str(tmp_path / "saved"), device="cpu", top_k=None
    )
    for scores in pipeline(SENTENCES):
        assert sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("make", [make_t5, make_longformer])
def test_training_without_attributions(make, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save(tmp_path / "model", *make())
    monkeypatch.chdir(tmp_path)
    data = f"--train_file {killing.SENTENCES} --valid_file {killing.SENTENCES} --epochs 1 --max_length 32"
    result = train_cola.main(
        [*data.split(), *"--model model --wandb disabled --output_dir out".split()]
    )
    assert math.isfinite(result["valid/loss"])
    assert capsys.readouterr().out.count("does not accept embeddings") == 1
    load("out/model")


# -------------------------------------------------------------------------------------------- the hub

FIND = "import sys; from tasks import encoders; name = sys.argv[1] if sys.argv[1:] else None; "
FIND += "found = encoders.find_model(name); print(found); encoders.load_model(found, ['a b', 'c'], ['no', 'yes'], 32)"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files in `directory` as any model; breaks off within the weights unless `healthy`."""

    directory: Path
    healthy: bool

    def do_HEAD(self) -> None:
        file = self.directory / self.path.rpartition("/")[2]
        found = "/resolve/" in self.path and file.is_file()
        self.send_response(200 if found or self.path == "/" else 404)
        self.content = file.read_bytes() if found else b""
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        elif "/resolve/" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        cut = self.path.endswith(".safetensors") and not self.healthy
        self.wfile.write(self.content[: len(self.content) // 2] if cut else self.content)

    def log_message(self, *_: object) -> None:
        pass


def test_interrupted_download_is_not_a_cached_model(bert, tmp_path, monkeypatch):
    """The server breaks off within the weights, at first."""
    Hub.directory, Hub.healthy = bert, False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    # They are read on import: the processes are forked from one that was started with them.
    monkeypatch.setitem(
        forking.SERVERS, os.environ.get("OMP_NUM_THREADS"), forking.Server(os.environ | hub)
    )

    def find(name: str | None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", FIND, *([name] if name else [])]
        environment = clean_environment(tmp_path, PYTHONPATH=str(REPO), **hub)
        return forking.run(command, cwd=tmp_path, env=environment, text=True)

    named, default = find("some/model"), find(None)
    assert (
        named.returncode
        and "UserError: --model some/model is not a directory, not in the hub" in named.stderr
    )
    assert default.stdout.endswith("scratch\n") and "RANDOM weights" in default.stderr
    assert len([*(tmp_path / "cache").rglob("tokenizer.json")]) == 2, (
        "what came before the weights is cached"
    )
    Hub.healthy = True
    downloaded = find("some/model"), find(None)
    server.shutdown()
    server.server_close()
    for done, name in zip(
        (*downloaded, find("some/model"), find(None)), ("some/model", encoders.BERT_TINY) * 2
    ):
        assert done.returncode == 0 and done.stdout == f"{name}\n", (
            done.stderr
        )  # the last two from the cache
