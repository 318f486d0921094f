"""Top-k and logsumexp over the vocabulary in one pass over a chunk of logits, exact and deterministic.

A teacher pass must cost what the bare forward costs, and a naive ``topk`` with one ``logsumexp`` a
temperature adds a tenth to a BERT-base forward on a CPU. Three things keep it small:

* the chunk fits in the cache, and is exponentiated once: exp(x / t) = exp(x / T) ** (T / t), which is a
  square where T = 2t; ``exp2`` is several times faster than ``exp`` on a CPU;
* the largest k entries lie in the k blocks of 32 ids with the largest maxima, so only those are searched;
* entries are compared by one integer key (logit, then lower id first), so that ties, frequent among
  bfloat16 logits, come out the same everywhere, and integer keys can be partitioned without indices.

The maximum of a block is taken over the first axis of [32, blocks], which vectorises; `ColumnOrder` lays
the decoder's rows out so that this axis runs over 32 consecutive ids.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
_POSITION_BITS = 16
_POSITION_MASK = (1 << _POSITION_BITS) - 1


class ColumnOrder:
    """Where id v stands in a row of logits: column (v % 32) * blocks + v // 32, padded to whole blocks."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.blocks = -(-vocab_size // BLOCK)
        assert self.blocks <= _POSITION_MASK
        self.width = self.blocks * BLOCK

    def rows(self, weight: Tensor, fill: float) -> Tensor:
        """[V, ...] -> [width, ...] in column order; rows past V are ``fill``."""
        padded = weight.new_full((self.width, *weight.shape[1:]), fill)
        padded[: self.vocab_size] = weight
        return padded.view(self.blocks, BLOCK, *weight.shape[1:]).transpose(0, 1).reshape(padded.shape)


def reduce_logits(
    logits: Tensor, order: ColumnOrder, top_k: int, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """ids int64 [N, K] and logits float32 [N, K], largest first, lower id first among equals; and
    logsumexp(logits / T) float32 [N, T], accumulated in float32.

    ``logits``: float32 [N, width] in column order, -inf past V; overwritten.
    """
    blocks = logits.view(-1, BLOCK, order.blocks)
    block_max = blocks.amax(1)
    ids, values = _top_k(blocks, block_max, min(top_k, order.blocks), top_k)
    maximum = block_max.amax(-1, keepdim=True)
    return ids, values, _logsumexp_(logits, maximum, temperatures)


def _top_k(blocks: Tensor, block_max: Tensor, wanted_blocks: int, top_k: int) -> tuple[Tensor, Tensor]:
    # Among blocks with equal maxima the lower one holds the lower ids, so the block keys order blocks
    # as their best entries are ordered, and k better blocks mean k better entries.
    chosen = _POSITION_MASK - (_largest(_keys(block_max), wanted_blocks) & _POSITION_MASK)
    chosen = chosen.sort(-1).values
    candidates = blocks.gather(2, chosen[:, None].expand(-1, BLOCK, -1))
    candidates = candidates.transpose(1, 2).reshape(len(blocks), -1)  # ascending ids
    best = _largest(_keys(candidates), top_k).flip(-1)
    position = _POSITION_MASK - (best & _POSITION_MASK)
    ids = chosen.gather(1, position // BLOCK) * BLOCK + position % BLOCK
    return ids, candidates.gather(1, position)


def _keys(values: Tensor) -> Tensor:
    """float32 [N, n] -> int64 keys that order by value, then by lower position; n <= 65,536."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # sign-magnitude to two's complement
    position = torch.arange(values.shape[-1], device=values.device)
    return (bits.to(torch.int64) << _POSITION_BITS) | (_POSITION_MASK - position)


def _largest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` largest keys of each row, ascending."""
    if keys.is_cuda:
        return keys.topk(count, sorted=True).values.flip(-1)
    table = keys.numpy()  # numpy's partition of plain integers is vectorised; torch's topk is not
    if count < table.shape[-1]:
        table = np.partition(table, table.shape[-1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(table, axis=-1))


def _logsumexp_(logits: Tensor, maximum: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """logsumexp(x / t) = max / t + log(sum(exp((x - max) / t))), hottest temperature first."""
    hottest = temperatures[-1]
    powers = logits.sub_(maximum).mul_(1.0 / (hottest * math.log(2.0))).exp2_()
    out = torch.empty(len(logits), len(temperatures), device=logits.device)
    for j in range(len(temperatures) - 1, -1, -1):
        if temperatures[j] != hottest:
            powers.pow_(hottest / temperatures[j])
            hottest = temperatures[j]
        out[:, j] = maximum[:, 0] / temperatures[j] + powers.sum(-1).log()
    return out
