"""Tokenise sentences once, then take batches of similar length, which need little padding."""

import math
from array import array
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.text_files import Text


class TokenSet(NamedTuple):
    """Tokenised sentences, stored one after another; a batch is a tensor of their indices."""

    tokens: Tensor  # int32 (1 + all tokens,), on the device; the first is the padding token
    offsets: Tensor  # int64 (sentences + 1,), on the CPU: starts in `tokens`, and the end
    labels: Tensor  # int64 (sentences,), on the device
    cut: int  # number of truncated sentences
    types: Tensor | None = None  # of pairs, like `tokens`: 1 if the token is of the second sentence

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each sentence: int64 (sentences,), on the CPU."""
        return self.offsets.diff()


def tokenise(
    sentences: list[Text],
    labels: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device,
) -> TokenSet:
    """Tokenise `sentences`, truncated to `max_length` tokens, and move them to `device`."""
    tokens = array("i", [tokenizer.pad_token_id])
    types = array("i", [0])
    lengths = []
    cut = 0
    for start in range(0, len(sentences), 1000):  # in chunks: lists take far more memory
        chunk = sentences[start : start + 1000]
        encoded = tokenizer(chunk, truncation=True, max_length=max_length)
        rows = encoded["input_ids"]
        for ids in rows:
            tokens.extend(ids)
            lengths.append(len(ids))
        if isinstance(chunk[0], tuple):
            for ids in encoded.get("token_type_ids", []):  # RoBERTa has none
                types.extend(ids)
        at_limit = [text for text, ids in zip(chunk, rows) if len(ids) == max_length]
        if at_limit:
            untruncated = tokenizer(at_limit)["input_ids"]
            cut += sum(len(ids) > max_length for ids in untruncated)
    has_types = len(types) > 1
    return TokenSet(
        torch.from_numpy(np.array(tokens)).to(device),
        torch.tensor([1, *lengths]).cumsum(0),
        torch.tensor(labels, device=device),
        cut,
        torch.from_numpy(np.array(types)).to(device) if has_types else None,
    )


def by_length(lengths: Tensor, batch_size: int, seed: tuple[int, int]) -> list[Tensor]:
    """One epoch of batches in random order: int64 tensors of indices, each sentence once.

    Sentences in a batch have similar lengths, to keep padding small. The batch with the longest
    sentence comes first, so that later ones fit into the memory that it took. `lengths` is int64
    (sentences,) on the CPU.
    """
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(lengths)))
    batches = []
    for chunk in order.split(50 * batch_size):
        chunk = chunk[lengths[chunk].argsort(stable=True)]
        batches += chunk.split(batch_size)
    random.shuffle(batches)
    longest = [int(lengths[batch].max()) for batch in batches]
    first = longest.index(max(longest))
    batches[0], batches[first] = batches[first], batches[0]
    return batches


def inputs_of(token_set: TokenSet, indices: Tensor) -> dict[str, Tensor]:
    """The model's inputs for a batch: "input_ids" and "attention_mask", int64 (batch, width).

    Pairs also have "token_type_ids", if the tokenizer makes them. The width is the length of the
    longest sentence, in bf16 on a CPU rounded up to a multiple of eight; shorter ones are padded at
    the end.
    """
    starts = token_set.offsets[indices]
    ends = token_set.offsets[indices + 1]
    width = int((ends - starts).max())
    if torch.is_autocast_enabled("cpu"):
        # In bf16, a CPU's kernels are compiled for each width, and take 180 MB for all of CoLA's.
        width = min(8 * math.ceil(width / 8), int(token_set.lengths.max()))
    positions = starts[:, None] + torch.arange(width)
    within_sentence = positions < ends[:, None]
    device = token_set.tokens.device
    positions = positions.where(within_sentence, 0).to(device)  # position 0 has the padding token
    inputs = {
        "input_ids": token_set.tokens[positions].long(),
        "attention_mask": within_sentence.to(device).long(),
    }
    if token_set.types is not None:
        inputs["token_type_ids"] = token_set.types[positions].long()
    return inputs
