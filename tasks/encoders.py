"""Find and load an encoder and its tokenizer: from a directory, from the Hugging Face Hub, or with random weights."""

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

from harness.errors import UserError, warn_loudly
from tasks.batching import TokenSet, inputs_of
from tasks.downloads import why_unreachable

BERT_TINY = "google/bert_uncased_L-2_H-128_A-2"

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
            f"--model {name} is not a directory, not in the hub's cache, and can't be downloaded: {problem}; "
            "pass a directory that contains a model, or use --model scratch"
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
    except (OSError, ValueError):
        return False
    return True


def load_model(
    name: str, sentences: list[str], class_names: list[str], max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier with a head for `class_names`, and its tokenizer, which truncates at `max_length` tokens.

    With "scratch", the tokenizer learns its vocabulary from `sentences`. Raises `UserError` if the model can't be
    loaded, has no usable tokenizer, or has fewer than `max_length` positions.
    """
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {c: i for i, c in enumerate(class_names)}}
    if name == "scratch":
        model, tokenizer = _from_scratch(sentences, labels)
    else:
        model, tokenizer = _load_pretrained(name, labels)
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model {name} has a tokenizer without a padding token: pass an encoder such as BERT")
    limit = _max_positions(model)
    if max_length > limit:
        raise UserError(f"--max_length {max_length} is more than the model's limit, {limit}")
    tokenizer.model_max_length = max_length
    return model, tokenizer


def _max_positions(model: PreTrainedModel) -> int:
    """The model's maximum sequence length; RoBERTa-like models reserve the first position embeddings."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    return positions - (config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)


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
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, local_files_only=local, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"--model {name} can't be loaded: {' '.join(str(error).split())[:300]}") from None
    # If a directory has no tokenizer, AutoTokenizer creates one with nothing but special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(f"--model {name} has no tokenizer: save it there too (tokenizer.save_pretrained)")
    has_head = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if has_head and config.num_labels != len(labels["id2label"]):
        print(
            f"The head of {name} has {config.num_labels} labels: a new one with {len(labels['id2label'])} replaces it."
        )
    return model, tokenizer


def attribute(model: PreTrainedModel, token_set: TokenSet, index: int, answer: int, label: int) -> Tensor:
    """How much each token of a sentence moved the decision towards `answer`, away from `label`: float (tokens,).

    Gradient × input (Shrikumar et al., 2016): the derivative of the difference of the two logits by a token's
    embedding, times that embedding, summed over its dimensions.
    """
    inputs = inputs_of(token_set, torch.tensor([index]))
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    with torch.enable_grad():
        logits = type(model).forward(model, inputs_embeds=embedded, **inputs).logits[0]
        (gradient,) = torch.autograd.grad(logits[answer] - logits[label], embedded)
    return (gradient * embedded).sum(-1)[0, : token_set.lengths[index]].detach().cpu()


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
