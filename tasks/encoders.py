"""Find and load an encoder and its tokenizer: from a directory, from the Hugging Face Hub, or with random weights."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness.errors import Stopped, UserError, warn_loudly
from tasks.batching import TokenSet, inputs_of, tokenise, tokens_of
from tasks.downloads import one_line, why_unreachable

BERT_TINY = "google/bert_uncased_L-2_H-128_A-2"
Pretrained = tuple[PreTrainedModel, PreTrainedTokenizerBase]

transformers.logging.set_verbosity_error()  # `_load_pretrained` itself reports a replaced head
transformers.logging.disable_progress_bar()


def find_model(name: str | None) -> str:
    """The model to use: `name` if given, else BERT-tiny, or "scratch" with a loud warning if that is not available.

    A model of the hub is downloaded unless it is cached whole. Raises `UserError` if a named model is not available.
    """
    if name == "scratch" or (name and (Path(name).is_dir() or name.startswith("wandb:"))):
        return name
    wanted = name or BERT_TINY
    problem = _why_not_loaded(wanted, local_files_only=True)
    if problem and os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        problem = "HF_HUB_OFFLINE is set"
    elif problem:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        problem = why_unreachable(hub) or _why_not_loaded(wanted)
    if problem is None:
        return wanted
    problem = f"not in the hub's cache, and can't be downloaded: {problem}"
    advice = "pass a directory that contains one: --model DIR"
    if name:
        raise UserError(
            f"--model {one_line(name)} is not a directory, {problem}; {advice}, or --model scratch"
        )
    warn_loudly(
        f"{wanted} is {problem}.",
        "This run trains the same architecture from RANDOM weights instead (--model scratch).",
        f"To use a pretrained model, {advice}.",
    )
    return "scratch"


def _why_not_loaded(name: str, local_files_only: bool = False) -> str | None:
    """Load a model and its tokenizer, with all their files, from the hub or its cache; returns what went wrong."""
    try:
        AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        AutoModelForSequenceClassification.from_pretrained(name, local_files_only=local_files_only)
    except Exception as error:
        return one_line(error)[:200]
    return None


def load_model(
    name: str, sentences: list[str], class_names: list[str], max_length: int
) -> Pretrained:
    """Load a classifier with a head for `class_names`, and its tokenizer, which truncates at `max_length` tokens.

    With "scratch", its vocabulary is learned from `sentences`. Raises `UserError` if the model is of no use.
    """
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {c: i for i, c in enumerate(class_names)},
    }
    try:
        model, tokenizer = (
            _from_scratch(sentences, labels)
            if name == "scratch"
            else _load_pretrained(name, labels)
        )
        _prepare(model, tokenizer, max_length)
    except (KeyboardInterrupt, SystemExit, Stopped):
        raise
    except (
        BaseException
    ) as error:  # there is no end to what the libraries raise, Rust's panics included
        reason = one_line(error)
        small = [
            file for file in Path(name).glob("*") if file.is_file() and file.stat().st_size < 1000
        ]
        if pointers := [
            file.name for file in small if file.read_bytes().startswith(b"version https://git-lfs")
        ]:
            reason = (
                f"{min(pointers)} is a git LFS pointer, not the file itself: run `git lfs pull`"
            )
        elif (
            isinstance(error, SafetensorError) or "Weights only load failed" in reason
        ):  # whose advice is unsafe
            reason = "the file of its weights is damaged"
        elif " " not in reason:  # KeyError: 'vocab'
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--model {one_line(name)} can't be used: {reason[:200]}") from None
    return model, tokenizer


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Pad on the right, check the model's limits, and classify two sentences of different length."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2
    if tokenizer.pad_token_id is None:
        raise ValueError("it has a tokenizer without a padding token: pass an encoder such as BERT")
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = (
        "right"  # as in training: some models give other answers if padded on the left
    )
    tokenizer.model_max_length = max_length
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            limit -= table.padding_idx + 1  # RoBERTa and its like reserve the first ones
    if 0 < limit < max_length:
        raise ValueError(f"--max_length {max_length} is more than the model's limit, {limit}")
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"its tokenizer has ids up to {largest}, but the model has {rows} embeddings"
        )
    sentences = ["The cat sleeps.", "The cat that the boys saw in the garden sleeps."]
    token_set = tokenise(sentences, [0, 1], tokenizer, max_length, model.device)
    with torch.no_grad():
        type(model).forward(model.eval(), **inputs_of(token_set, torch.arange(2)))
    if attribute(model, token_set, 0, answer=1, label=0) is None:
        print("The model does not accept embeddings: there will be no attributions.")


def _from_scratch(sentences: list[str], labels: dict) -> Pretrained:
    """BERT-tiny's architecture (Turc et al., 2019) with random weights, and a WordPiece tokenizer for `sentences`."""
    pieces = learn_wordpieces(sentences)
    tokenizer = transformers.BertTokenizerFast(
        vocab={p: i for i, p in enumerate(pieces)}, model_max_length=512
    )
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    }
    # BERT's own 0.02 and 0.1 suit long pretraining: with them, only some seeds learn agreement in ten epochs.
    changes = {
        "initializer_range": 128**-0.5,
        "hidden_dropout_prob": 0.05,
        "attention_probs_dropout_prob": 0.0,
    }
    config = transformers.BertConfig(vocab_size=len(pieces), **sizes, **changes, **labels)
    return transformers.BertForSequenceClassification(config), tokenizer


def learn_wordpieces(sentences: list[str]) -> list[str]:
    """A WordPiece vocabulary: all characters, words that occur at least twice, and suffixes of at least ten words."""
    # The trainers of the tokenizers library would break ties at random.
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words = Counter(
        w for s in sentences for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(s))
    )
    characters = sorted(set("".join(words)))
    suffixes = Counter(word[-n:] for word in words for n in range(2, 7) if len(word) > n)
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{c}" for c in characters),
    ]
    pieces += sorted(word for word, count in words.items() if count >= 2 and len(word) > 1)
    return pieces + sorted(f"##{suffix}" for suffix, count in suffixes.items() if count >= 10)


def _load_pretrained(name: str, labels: dict) -> Pretrained:
    """Load from a directory or the hub's cache, with a new head unless there is one for as many labels."""
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    changes = {**labels, "problem_type": "single_label_classification", "dtype": torch.float32}
    if (
        getattr(config, "summary_type", None) == "last"
    ):  # XLNet: in a batch, the last token may be padding
        changes["summary_type"] = "first"
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **changes,
    )
    # Outside the base model is the head. Encoders saved from a masked-LM have no pooler either.
    fresh = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    if wrong := sorted(
        key
        for key in fresh
        if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key
    ):
        raise ValueError(
            f"weights missing or not of the size in config.json: {len(wrong)}, first {wrong[0]}"
        )
    if wrong := [key for key, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"weights with NaN or infinity: {len(wrong)}, first {wrong[0]}")
    # If a directory has no tokenizer, AutoTokenizer creates one with nothing but special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError("it has no tokenizer: save it there too (tokenizer.save_pretrained)")
    old, new = config.num_labels, model.config.num_labels
    if old != new and any(
        "ForSequenceClassification" in kind for kind in config.architectures or ()
    ):
        print(f"The head of {name} has {old} labels: a new one with {new} replaces it.")
    return model, tokenizer


def attribute(
    model: PreTrainedModel, token_set: TokenSet, index: int, answer: int, label: int
) -> Tensor | None:
    """How much each token of a sentence moved the decision towards `answer`, away from `label`: float32 (tokens,).

    Gradient × input (Shrikumar et al., 2016): the derivative of the difference of the two logits by a token's
    embedding, times that embedding, summed over its dimensions. None if the model doesn't accept embeddings.
    """
    tokens = tokens_of(token_set, index)[
        None
    ].long()  # without padding: GPT-2 would take it for the last token
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    try:
        with torch.enable_grad():
            output = type(model).forward(
                model, inputs_embeds=embedded, attention_mask=torch.ones_like(tokens)
            )
            (gradient,) = torch.autograd.grad(
                output.logits[0, answer] - output.logits[0, label], embedded
            )
    except (NotImplementedError, TypeError, ValueError):  # T5 and BART, Longformer, others
        return None
    return (gradient * embedded).sum(-1)[0].detach().cpu()


def words_of(
    tokenizer: PreTrainedTokenizerBase, sentence: str, length: int
) -> list[tuple[str, list[int]]]:
    """The words of a sentence as written, each with the places of its pieces among the first `length` tokens.

    Special tokens belong to no word, and a word that was truncated has no pieces.
    """
    if not tokenizer.is_fast:  # it doesn't tell which characters a token stands for
        tokens = tokenizer.tokenize(
            sentence, add_special_tokens=True, truncation=True, max_length=length
        )
        return [
            (token, [i])
            for i, token in enumerate(tokens)
            if token not in tokenizer.all_special_tokens
        ]
    encoded = tokenizer(sentence, truncation=True, max_length=length, return_offsets_mapping=True)
    spans = list(enumerate(encoded["offset_mapping"]))
    return [
        (
            word.group(),
            [i for i, (start, end) in spans if start < word.end() and end > word.start()],
        )
        for word in re.finditer(r"\S+", sentence)
    ]


class UsedRowsEmbedding(nn.Embedding):
    """A word embedding that trains only the rows that occur in the data; its state dict contains the full matrix."""

    def __init__(self, full: nn.Embedding, used: Tensor):
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
    """Train only the rows of the word embedding that occur in `tokens` (integers, any shape), if less than half do.

    The others get no gradient. BERT-tiny's embedding is nine tenths of its weights; CoLA uses a fifth of the rows.
    """
    full = model.get_input_embeddings()
    tied = (
        sum(weight is full.weight for _, weight in model.named_parameters(remove_duplicate=False))
        > 1
    )
    occurs = torch.zeros(full.num_embeddings, dtype=torch.bool, device=tokens[0].device)
    for part in tokens:
        occurs[part] = True
    if full.padding_idx is not None:
        occurs[full.padding_idx] = True
    used = occurs.nonzero().flatten()
    if type(full) is nn.Embedding and not tied and 2 * len(used) < full.num_embeddings:
        model.set_input_embeddings(UsedRowsEmbedding(full, used))
