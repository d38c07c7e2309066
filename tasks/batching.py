"""Tokenise sentences once, and draw batches of similar length, with little padding, from them."""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class TokenSet(NamedTuple):
    """Tokenised training or validation sentences, one after another; a batch is a set of their indices."""

    tokens: Tensor  # int32 (1 + all tokens,), on the device; the first is the padding token
    offsets: Tensor  # int64 (sentences + 1,), on the CPU: where in `tokens` each sentence begins, and the last ends
    labels: Tensor  # int64 (sentences,), on the device
    longest: int  # number of tokens of the longest sentence
    cut: int  # number of truncated sentences

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each sentence: int64 (sentences,), on the CPU."""
        return self.offsets.diff()


def tokenise(
    sentences: list[str],
    labels: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device,
) -> TokenSet:
    """Tokenise `sentences`, truncate them to `max_length` tokens, and move them to `device` with their labels."""
    parts, lengths, cut = [torch.tensor([tokenizer.pad_token_id], dtype=torch.int32)], [], 0
    for i in range(
        0, len(sentences), 1000
    ):  # in chunks: encodings and lists take far more memory than tensors
        chunk = sentences[i : i + 1000]
        ids = tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]
        at_limit = [sentence for sentence, tokens in zip(chunk, ids) if len(tokens) == max_length]
        cut += (
            sum(len(tokens) > max_length for tokens in tokenizer(at_limit)["input_ids"])
            if at_limit
            else 0
        )
        parts.append(torch.tensor([*itertools.chain(*ids)], dtype=torch.int32))
        lengths += map(len, ids)
    offsets = torch.tensor([1, *lengths]).cumsum(0)
    return TokenSet(
        torch.cat(parts).to(device), offsets, torch.tensor(labels).to(device), max(lengths), cut
    )


def by_length(lengths: Tensor, batch_size: int, seed: tuple[int, int]) -> list[Tensor]:
    """One epoch of batches: int64 index tensors that cover every sentence once, in random order.

    Sentences in a batch have similar lengths, to keep padding small. The batch with the longest one comes first: once
    memory is fragmented, its tensors would take new space. `lengths` is int64 (sentences,) on the CPU.
    """
    random = np.random.default_rng(seed)
    order = torch.from_numpy(random.permutation(len(lengths)))
    chunks = (chunk[lengths[chunk].argsort(stable=True)] for chunk in order.split(50 * batch_size))
    batches = [batch for chunk in chunks for batch in chunk.split(batch_size)]
    batches = [batches[i] for i in random.permutation(len(batches))]
    longest = max(range(len(batches)), key=lambda i: int(lengths[batches[i]].max()))
    batches[0], batches[longest] = batches[longest], batches[0]
    return batches


def tokens_of(token_set: TokenSet, index: int) -> Tensor:
    """The tokens of one sentence: int32 (tokens,), on the device."""
    start, end = token_set.offsets[index : index + 2].tolist()
    return token_set.tokens[start:end]


def inputs_of(token_set: TokenSet, indices: Tensor) -> dict[str, Tensor]:
    """The model's inputs for a batch: "input_ids" and "attention_mask", int64 (batch, longest rounded up)."""
    starts, ends = token_set.offsets.take(indices), token_set.offsets.take(indices + 1)
    # Round up to a multiple of eight: kernels are compiled and cached per shape, and rare shapes cost 60 MB.
    longest = min(-(-int((ends - starts).max()) // 8) * 8, token_set.longest)
    places = starts[:, None] + torch.arange(longest)
    places = (places * (places < ends[:, None])).to(
        token_set.tokens.device, non_blocking=True
    )  # at 0 is padding
    return {"input_ids": token_set.tokens[places].long(), "attention_mask": places.sign()}
