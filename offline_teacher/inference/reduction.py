"""Top-k and logsumexp over the vocabulary of a chunk of logits, exact and deterministic.

A naive ``topk`` with one ``logsumexp`` per temperature costs as much as a small teacher's whole forward. So a
CPU uses a compiled kernel (`reduction_kernel`) that reads each row twice. A GPU uses a Triton kernel
(`reduction_triton`) that keeps a row in registers. Without a C++ compiler or Triton, or with a vocabulary too
large for Triton, tensor operations do the same:

* a row is exponentiated once: exp(x / t) = exp(x / T) ** (T / t), which is a square if T = 2t;
* the k largest entries lie in the k blocks of 32 ids with the largest maxima, so only those are searched;
* entries are compared by one integer key (logit, then lower id first), so that ties, frequent among
  bfloat16 logits, have the same result everywhere.

Axes: N positions, V vocabulary, K top-k, T temperatures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infra.cpu.native import has_triton
from offline_teacher.inference import reduction_kernel

BLOCK = 32
REDUCE_POSITIONS = {"cpu": 32}
"""Positions that the tensor operations process at once; on a CPU their float32 logits fit the cache."""
TRITON_VOCABULARY = 1 << 16
"""Largest vocabulary for Triton: longer rows do not fit into the registers of a program."""
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_POSITION_BITS = 16
_POSITION_MASK = (1 << _POSITION_BITS) - 1

Reduced = tuple[Tensor, Tensor, Tensor]


def reduce_logits(logits: Tensor, top_k: int, temperatures: tuple[float, ...]) -> Reduced:
    """ids int64 [N, K] and logits float32 [N, K], largest first, lower id first among equals; and
    logsumexp(logits / T) float32 [N, T], accumulated in float32.

    ``logits``: [N, V] of any float dtype, rows contiguous; ``temperatures`` ascending.
    """
    if logits.device.type == "cpu" and reduction_kernel.available():
        return reduction_kernel.reduce_logits(logits, top_k, temperatures)
    if logits.device.type == "cuda" and _triton_takes(logits):
        from offline_teacher.inference import reduction_triton

        return reduction_triton.reduce_logits(logits, top_k, temperatures)
    rows = logits.split(REDUCE_POSITIONS.get(logits.device.type, max(1, len(logits))))
    pieces = [_reduce(part, top_k, temperatures) for part in rows]
    ids, values, logsumexp = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return ids, values, logsumexp


def _triton_takes(logits: Tensor) -> bool:
    return has_triton() and logits.shape[1] <= TRITON_VOCABULARY and logits.dtype in TRITON_DTYPES


def _reduce(logits: Tensor, top_k: int, temperatures: tuple[float, ...]) -> Reduced:
    count, vocab_size = logits.shape
    blocks = -(-vocab_size // BLOCK)
    assert blocks <= _POSITION_MASK
    wide = logits.new_full((count, blocks * BLOCK), float("-inf"), dtype=torch.float32)
    wide[:, :vocab_size] = logits
    blocked = wide.view(count, blocks, BLOCK)
    block_max = blocked.amax(2)
    ids, values = _top_k(blocked, block_max, min(top_k, blocks), top_k)
    return ids, values, _logsumexp_(wide, block_max.amax(1, keepdim=True), temperatures)


def _top_k(blocked: Tensor, block_max: Tensor, wanted_blocks: int, top_k: int) -> tuple[Tensor, Tensor]:
    # Block keys order blocks as their best entries are ordered: of equal maxima, the lower block has the
    # lower ids. So if k blocks rank above a block, k entries rank above all of its entries.
    chosen = _POSITION_MASK - (_largest(_keys(block_max), wanted_blocks) & _POSITION_MASK)
    chosen = chosen.sort(-1).values
    candidates = blocked.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)  # ascending ids
    best = _largest(_keys(candidates), top_k)
    position = _POSITION_MASK - (best & _POSITION_MASK)
    ids = chosen.gather(1, position // BLOCK) * BLOCK + position % BLOCK
    return ids, candidates.gather(1, position)


def _keys(values: Tensor) -> Tensor:
    """float32 [N, n] -> int64 keys: a larger value has a larger key, then a lower position; n <= 65,536."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # sign-magnitude to two's complement
    position = torch.arange(values.shape[-1], device=values.device)
    return (bits.to(torch.int64) << _POSITION_BITS) | (_POSITION_MASK - position)


def _largest(keys: Tensor, count: int) -> Tensor:
    """The ``count`` largest keys of each row, the largest first."""
    return keys.topk(count, sorted=True).values


def _logsumexp_(logits: Tensor, maximum: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """logsumexp(x / t) = max / t + log(sum(exp((x - max) / t))), highest temperature first; overwrites x."""
    out = torch.empty(len(logits), len(temperatures), device=logits.device)
    if not temperatures:
        return out
    hottest = temperatures[-1]
    powers = logits.sub_(maximum).mul_(1.0 / (hottest * math.log(2.0))).exp2_()
    for j in range(len(temperatures) - 1, -1, -1):
        if temperatures[j] != hottest:
            powers.pow_(hottest / temperatures[j])
            hottest = temperatures[j]
        out[:, j] = maximum[:, 0] / temperatures[j] + powers.sum(-1).log()
    return out
