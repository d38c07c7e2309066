"""Find and load an encoder and its tokenizer: from a directory, from the Hugging Face Hub, or with random weights."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness.errors import UserError, warn_loudly
from tasks.batching import TokenSet, inputs_of, tokenise
from tasks.downloads import why_unreachable

BERT_TINY = "google/bert_uncased_L-2_H-128_A-2"
NO_ATTRIBUTIONS = "<p>No attributions: this model does not accept embeddings.</p>"

transformers.logging.set_verbosity_error()  # `_load_pretrained` itself reports a replaced head
transformers.logging.disable_progress_bar()


def find_model(name: str | None) -> str:
    """The model to use: `name` if given, else BERT-tiny, or "scratch" with a loud warning if that is not available.

    Raises `UserError` if a named model is not a directory, is not in the hub's cache, and the hub is unreachable.
    """
    if name == "scratch" or (name and (Path(name).is_dir() or name.startswith("wandb:"))):
        return name
    wanted, started = name or BERT_TINY, time.perf_counter()
    if _is_cached(wanted):
        return wanted
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    problem = "HF_HUB_OFFLINE is set" if offline else why_unreachable(hub)
    if problem is None:
        return wanted
    if name:
        raise UserError(
            f"--model {_one_line(name)} is not a directory, not in the hub's cache, and can't be downloaded: "
            f"{problem}; pass a directory that contains a model, or use --model scratch"
        )
    warn_loudly(
        f"{wanted} is not in the hub's cache, and can't be downloaded: {problem}.",
        "This run trains the same architecture from RANDOM weights instead (--model scratch).",
        f"Finding that out took {time.perf_counter() - started:.1f} s.",
        "To use a pretrained model, pass a directory that contains one: --model DIR.",
    )
    return "scratch"


def _is_cached(name: str) -> bool:
    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:
        return False
    return True


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


@contextmanager
def _blaming(name: str, failure: str) -> Iterator[None]:
    """Turn any error into a `UserError`: there is no end to what the libraries raise when they read a broken model."""
    try:
        yield
    except UserError as error:
        raise UserError(_one_line(error)) from None
    except Exception as error:
        reason = _one_line(error)
        if " " not in reason:  # KeyError: 'vocab'
            reason = f"{type(error).__name__}: {reason}"
        files = [file for file in Path(name).glob("*") if file.is_file() and os.access(file, os.R_OK)]
        small = [file for file in files if file.stat().st_size < 1000]
        pointers = [file.name for file in small if file.read_bytes().startswith(b"version https://git-lfs")]
        if pointers:
            reason = f"{min(pointers)} is a git LFS pointer, not the file itself: run `git lfs pull`"
        elif "Weights only load failed" in reason:  # the advice that follows is unsafe
            reason = "the file of its weights is damaged"
        elif isinstance(error, SafetensorError):
            reason = f"the file of its weights is damaged: {reason}"
        raise UserError(f"--model {_one_line(name)} {failure}: {reason[:200]}") from None


def load_model(
    name: str, sentences: list[str], class_names: list[str], max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier with a head for `class_names`, and its tokenizer, which truncates at `max_length` tokens.

    With "scratch", the tokenizer learns its vocabulary from `sentences`. Raises `UserError` if the model can't be
    loaded, has no usable tokenizer, has fewer than `max_length` positions, or fails a trial.
    """
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {c: i for i, c in enumerate(class_names)}}
    with _blaming(name, "can't be loaded"):
        model, tokenizer = _from_scratch(sentences, labels) if name == "scratch" else _load_pretrained(name, labels)
    with _blaming(name, "can't classify sentences"):
        if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:  # GPT-2
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"--model {name} has a tokenizer without a padding token: pass an encoder such as BERT")
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        limit = _max_positions(model)
        if max_length > limit:
            raise UserError(f"--max_length {max_length} is more than the model's limit, {limit}")
        tokenizer.model_max_length = max_length
        tokenizer.padding_side = "right"  # as in training: some models give other answers if padded on the left
        _try_out(name, model, tokenizer, max_length)
    return model, tokenizer


def _max_positions(model: PreTrainedModel) -> int:
    """The model's maximum sequence length; RoBERTa-like models reserve the first position embeddings."""
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    reserved = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return positions - max(reserved, default=0) if positions > 0 else 10**9


def _try_out(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Classify two sentences of different length; raises whatever a model raises that can't."""
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(f"its tokenizer has ids up to {largest}, but the model has {rows} embeddings")
    sentences = ["The cat sleeps.", "The cat that the boys saw in the garden sleeps."]
    token_set = tokenise(sentences, [0, 1], tokenizer, max_length, model.device)
    model.eval()
    with torch.no_grad():
        type(model).forward(model, **inputs_of(token_set, torch.arange(2)))
    if attribute(model, token_set, 0, answer=1, label=0) is None:
        print(f"{_one_line(name)} does not accept embeddings: valid/attributions will show no tokens.")


def _from_scratch(sentences: list[str], labels: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """BERT-tiny's architecture (Turc et al., 2019) with random weights, and a WordPiece tokenizer for `sentences`."""
    pieces = learn_wordpieces(sentences)
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=512)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        # BERT's own 0.02 and 0.1 suit long pretraining: with them, only some seeds learn agreement in ten epochs.
        initializer_range=128**-0.5,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **labels,
    )
    return BertForSequenceClassification(config), tokenizer


def learn_wordpieces(sentences: list[str]) -> list[str]:
    """A WordPiece vocabulary: all characters, words that occur at least twice, and suffixes of at least ten words.

    It is deterministic, unlike the trainers of the tokenizers library, which break ties at random.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words = Counter(w for s in sentences for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(s)))
    characters = sorted(set("".join(words)))
    suffixes = Counter(word[-n:] for word in words for n in range(2, 7) if len(word) > n)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    pieces += sorted(word for word, count in words.items() if count >= 2 and len(word) > 1)
    return pieces + sorted(f"##{suffix}" for suffix, count in suffixes.items() if count >= 10)


def _load_pretrained(name: str, labels: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = Path(name).is_dir() or _is_cached(name)
    config = AutoConfig.from_pretrained(name, local_files_only=local)
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    changes = {**labels, "problem_type": "single_label_classification", "dtype": torch.float32}
    if getattr(config, "summary_type", None) == "last":  # XLNet: in a batch, the last token may be padding
        changes["summary_type"] = "first"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name, local_files_only=local, ignore_mismatched_sizes=True, output_loading_info=True, **changes
    )
    # Outside the base model is the head. Encoders saved from a masked-LM have no pooler either.
    new = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    wrong = sorted(key for key in new if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key)
    if wrong:
        raise ValueError(f"weights missing or not of the size in config.json: {len(wrong)}, first {wrong[0]}")
    if wrong := [key for key, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"weights with NaN or infinity: {len(wrong)}, first {wrong[0]}")
    # If a directory has no tokenizer, AutoTokenizer creates one with nothing but special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(f"--model {name} has no tokenizer: save it there too (tokenizer.save_pretrained)")
    has_head = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if has_head and config.num_labels != len(labels["id2label"]):
        replaced = f"has {config.num_labels} labels: a new one with {len(labels['id2label'])} replaces it."
        print(f"The head of {_one_line(name)} {replaced}")
    return model, tokenizer


def attribute(model: PreTrainedModel, token_set: TokenSet, index: int, answer: int, label: int) -> Tensor | None:
    """How much each token of a sentence moved the decision towards `answer`, away from `label`: float (tokens,).

    Gradient × input (Shrikumar et al., 2016): the derivative of the difference of the two logits by a token's
    embedding, times that embedding, summed over its dimensions. None if the model doesn't accept embeddings.
    """
    # Without padding: given embeddings, models that classify by the last token can't tell which it is.
    inputs = {k: v[:, : token_set.lengths[index]] for k, v in inputs_of(token_set, torch.tensor([index])).items()}
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    try:
        with torch.enable_grad():
            logits = type(model).forward(model, inputs_embeds=embedded, **inputs).logits[0]
            (gradient,) = torch.autograd.grad(logits[answer] - logits[label], embedded)
    except (NotImplementedError, TypeError, ValueError):  # T5 and BART, Longformer, others
        return None
    return (gradient * embedded).sum(-1)[0].detach().cpu()


class UsedRowsEmbedding(nn.Embedding):
    """A word embedding that trains only the rows that occur in the data; its state dict contains the full matrix.

    The other rows get no gradient, so without weight decay the optimizer would leave them unchanged anyway.
    """

    def __init__(self, full: nn.Embedding, used: Tensor):
        """Wrap the rows `used`, int64 (rows,), of `full`."""
        super().__init__(len(used), full.embedding_dim, _weight=full.weight.detach()[used])
        row = torch.full((full.num_embeddings,), -1, device=used.device)  # looking up -1 raises
        row[used] = torch.arange(len(used), device=used.device)
        self.padding_idx = None if full.padding_idx is None else int(row[full.padding_idx])
        for name, tensor in {"used": used, "row": row, "full_weight": full.weight.detach()}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.row[tokens])

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.full_weight[self.used] = self.weight.detach()
        destination[f"{prefix}weight"] = self.full_weight  # not a copy, like any other weight

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        self.full_weight.copy_(state_dict[f"{prefix}weight"])
        state_dict[f"{prefix}weight"] = self.full_weight[self.used]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def train_used_rows(model: PreTrainedModel, tokens: list[Tensor]) -> None:
    """Train only the rows of the word embedding that occur in `tokens` (int64, any shape), if they are less than half.

    An embedding whose weights are tied stays as it is. BERT-tiny's embedding is nine tenths of its weights, and CoLA
    uses a fifth of the rows.
    """
    full = model.get_input_embeddings()
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is full.weight]
    occurs = torch.zeros(full.num_embeddings, dtype=torch.bool, device=tokens[0].device)
    for part in tokens:
        occurs[part] = True
    if full.padding_idx is not None:
        occurs[full.padding_idx] = True
    used = occurs.nonzero().flatten()
    if type(full) is nn.Embedding and len(names) == 1 and 2 * len(used) < full.num_embeddings:
        model.set_input_embeddings(UsedRowsEmbedding(full, used))
