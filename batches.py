"""Sentences as the model takes them: tokenised once, drawn in batches of nearly equal length, hardly padded."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


class Part(NamedTuple):
    """Tokenised training or validation sentences; they stay on the device, and a batch is an index into them."""

    tokens: Tensor  # int64 (sentences, longest), padded
    lengths: Tensor  # int64 (sentences,), on the CPU
    labels: Tensor  # int64 (sentences,)
    cut: int  # how many sentences were longer than --max_length


def tokenise(
    sentences: list[str],
    labels: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    device: torch.device,
) -> Part:
    """Sentences as tokens on `device`; what is beyond `max_length` tokens is cut."""
    tokens = []
    for i in range(0, len(sentences), 1000):  # what the tokenizer knows of each beside its tokens takes memory
        tokens += tokenizer(sentences[i : i + 1000], truncation=True, max_length=max_length)["input_ids"]
    at_limit = [sentence for sentence, ids in zip(sentences, tokens) if len(ids) == max_length]
    cut = sum(len(ids) > max_length for ids in tokenizer(at_limit)["input_ids"]) if at_limit else 0
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in tokens], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    lengths = torch.tensor([len(ids) for ids in tokens])
    return Part(padded.to(device), lengths, torch.tensor(labels).to(device), cut)


def by_length(lengths: Tensor, batch_size: int, random: np.random.Generator) -> list[Tensor]:
    """Indices of every sentence, in batches of nearly equal length that come in random order.

    Shuffled, then sorted by length within stretches of fifty batches, so that hardly anything is padding and
    yet each epoch's batches differ.
    """
    order = torch.from_numpy(random.permutation(len(lengths)))
    batches = [
        batch
        for stretch in order.split(50 * batch_size)
        for batch in stretch[lengths[stretch].argsort(stable=True)].split(batch_size)
    ]
    return [batches[i] for i in random.permutation(len(batches))]


def inputs_of(part: Part, indices: Tensor) -> dict[str, Tensor]:
    """What the model takes of a batch, padded to its own longest sentence."""
    lengths = part.lengths[indices]
    # To a multiple of four: kernels are prepared, and kept, for each shape, and rare shapes cost 60 MB.
    longest = min(-(-int(lengths.max()) // 4) * 4, part.tokens.shape[1])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    device = part.tokens.device
    tokens = part.tokens[indices.to(device, non_blocking=True), :longest]
    return {"input_ids": tokens, "attention_mask": mask.to(device, non_blocking=True)}
