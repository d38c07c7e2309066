"""Where an encoder and its tokenizer come from: a directory, the hub, or random weights; and what of it is trained."""

import os
import time
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError
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

from data import why_unreachable
from options import UserError, warn_loudly

BERT_TINY = "google/bert_uncased_L-2_H-128_A-2"

transformers.logging.set_verbosity_error()  # what it would say of a new head is said by `load_pretrained`
transformers.logging.disable_progress_bar()


def find_model(name: str | None) -> str:
    """The model to use: `name`, which must be to be had, or by default BERT-tiny, else "scratch" with a warning.

    Raises `UserError` where a named model is not a directory, not in the hub's cache, and the hub is out of reach.
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
            f"--model {name} is no directory, not in the hub's cache, and can't be downloaded: {problem}; "
            "name a directory that holds a model, or use --model scratch"
        )
    warn_loudly(
        f"{wanted} is not in the hub's cache, and can't be downloaded: {problem}.",
        "This run trains the same architecture from RANDOM weights instead (--model scratch).",
        f"Finding that out took {time.perf_counter() - started:.1f} s.",
        "To use a pretrained model, name a directory that holds one: --model DIR.",
    )
    return "scratch"


def _is_cached(name: str) -> bool:
    try:
        AutoConfig.from_pretrained(name, local_files_only=True)
        AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return True


def load_model(
    name: str, sentences: list[str], class_names: list[str], max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with a head for `class_names`, and its tokenizer, which cuts at `max_length` tokens.

    `sentences` are what a tokenizer for "scratch" learns its vocabulary from. Raises `UserError`.
    """
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {c: i for i, c in enumerate(class_names)}}
    if name == "scratch":
        model, tokenizer = _from_scratch(sentences, labels)
    else:
        model, tokenizer = _load_pretrained(name, labels)
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model {name} has a tokenizer without a padding token: name an encoder such as BERT")
    limit = _positions(model)
    if max_length > limit:
        raise UserError(f"--max_length {max_length} is more than the model's limit, {limit}")
    tokenizer.model_max_length = max_length
    return model, tokenizer


def _positions(model: PreTrainedModel) -> int:
    """How many tokens the model has places for; RoBERTa and its kin keep the first ones for themselves."""
    config = model.config
    places = getattr(config, "max_position_embeddings", None) or 10**9
    return places - (config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)


def _from_scratch(sentences: list[str], labels: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """BERT-tiny's architecture (Turc et al., 2019) with random weights, and a WordPiece vocabulary of its own."""
    pieces = learn_wordpieces(sentences)
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=512)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        # With BERT's own 0.02 and 0.1, which suit long pretraining, ten epochs teach agreement to some seeds only.
        initializer_range=128**-0.5,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **labels,
    )
    return BertForSequenceClassification(config), tokenizer


def learn_wordpieces(sentences: list[str]) -> list[str]:
    """A WordPiece vocabulary: every character, words that occur twice, and endings that ten words share.

    The same sentences give the same pieces in the same order, which the trainers of the tokenizers library do
    not: their ties are broken by chance.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words = Counter(w for s in sentences for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(s)))
    characters = sorted(set("".join(words)))
    endings = Counter(word[-n:] for word in words for n in range(2, 7) if len(word) > n)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    pieces += sorted(word for word, count in words.items() if count >= 2 and len(word) > 1)
    return pieces + sorted(f"##{ending}" for ending, count in endings.items() if count >= 10)


def _load_pretrained(name: str, labels: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    local = Path(name).is_dir() or _is_cached(name)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, local_files_only=local, ignore_mismatched_sizes=True, **labels
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"--model {name} can't be loaded: {' '.join(str(error).split())[:300]}") from None
    # Where a directory has no tokenizer, AutoTokenizer makes one that knows nothing but its special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(f"--model {name} has no tokenizer: save it there too (tokenizer.save_pretrained)")
    has_head = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if has_head and config.num_labels != len(labels["id2label"]):
        print(
            f"The head of {name} has {config.num_labels} labels: a new one with {len(labels['id2label'])} replaces it."
        )
    return model, tokenizer


class UsedRows(nn.Embedding):
    """A word embedding that trains only the rows that occur in the data; its state dict holds all rows.

    The others get no gradient, so that without weight decay an optimizer would carry them along unchanged.
    """

    def __init__(self, whole: nn.Embedding, used: Tensor):
        super().__init__(len(used), whole.embedding_dim, _weight=whole.weight.detach()[used])
        row = torch.full((whole.num_embeddings,), -1, device=used.device)  # -1 is an error
        row[used] = torch.arange(len(used), device=used.device)
        self.padding_idx = None if whole.padding_idx is None else int(row[whole.padding_idx])
        for name, tensor in {"used": used, "row": row, "whole": whole.weight.detach()}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.row[tokens])

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.whole[self.used] = self.weight.detach()
        destination[f"{prefix}weight"] = self.whole  # no copy, as with any other weight

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        self.whole.copy_(state_dict[f"{prefix}weight"])
        state_dict[f"{prefix}weight"] = self.whole[self.used]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def train_used_rows(model: PreTrainedModel, tokens: list[Tensor]) -> None:
    """Let `model` train only the rows of its word embedding that `tokens` (int64) need, where they are less than half.

    BERT-tiny's embedding is nine tenths of its weights, and CoLA uses a fifth of the rows.
    """
    whole = model.get_input_embeddings()
    places = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is whole.weight]
    occurs = torch.zeros(whole.num_embeddings, dtype=torch.bool, device=tokens[0].device)
    for part in tokens:
        occurs[part] = True
    if whole.padding_idx is not None:
        occurs[whole.padding_idx] = True
    used = occurs.nonzero().flatten()
    if type(whole) is nn.Embedding and len(places) == 1 and 2 * len(used) < whole.num_embeddings:
        model.set_input_embeddings(UsedRows(whole, used))
