"""Tokenise sentences once, and draw batches of similar length, with little padding, from them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


class TokenSet(NamedTuple):
    """Tokenised training or validation sentences, kept on the device; a batch is a set of row indices."""

    tokens: Tensor  # int64 (sentences, longest), padded
    lengths: Tensor  # int64 (sentences,), on the CPU
    labels: Tensor  # int64 (sentences,)
    cut: int  # number of truncated sentences


def tokenise(
    sentences: list[str],
    labels: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device,
) -> TokenSet:
    """Tokenise `sentences`, truncate them to `max_length` tokens, and move them to `device` with their labels."""
    tokens = []
    for i in range(0, len(sentences), 1000):  # in chunks, since the tokenizer's encodings take far more memory than ids
        tokens += tokenizer(sentences[i : i + 1000], truncation=True, max_length=max_length)["input_ids"]
    at_limit = [sentence for sentence, ids in zip(sentences, tokens) if len(ids) == max_length]
    cut = sum(len(ids) > max_length for ids in tokenizer(at_limit)["input_ids"]) if at_limit else 0
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in tokens], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    lengths = torch.tensor([len(ids) for ids in tokens])
    return TokenSet(padded.to(device), lengths, torch.tensor(labels).to(device), cut)


def by_length(lengths: Tensor, batch_size: int, seed: tuple[int, int]) -> list[Tensor]:
    """One epoch of batches: int64 index tensors that cover every sentence once, in random order.

    Sentences are shuffled, then sorted by length within chunks of fifty batches: there is little padding, and the
    batches still differ between epochs. `lengths` is int64 (sentences,) on the CPU.
    """
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(lengths)))
    batches = [
        batch
        for chunk in order.split(50 * batch_size)
        for batch in chunk[lengths[chunk].argsort(stable=True)].split(batch_size)
    ]
    return [batches[i] for i in random.permutation(len(batches))]


def inputs_of(token_set: TokenSet, indices: Tensor) -> dict[str, Tensor]:
    """The model's inputs for a batch: "input_ids" and "attention_mask", int64 (batch, longest in the batch)."""
    lengths = token_set.lengths[indices]
    # Round up to a multiple of four: kernels are compiled and cached per shape, and rare shapes cost 60 MB.
    longest = min(-(-int(lengths.max()) // 4) * 4, token_set.tokens.shape[1])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    device = token_set.tokens.device
    tokens = token_set.tokens[indices.to(device, non_blocking=True), :longest]
    return {"input_ids": tokens, "attention_mask": mask.to(device, non_blocking=True)}
