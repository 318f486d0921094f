"""Top-k and logsumexp over the vocabulary of a chunk of logits, exact and deterministic.

A naive ``topk`` with one ``logsumexp`` per temperature costs as much as a small teacher's whole forward. So a
CPU uses a compiled kernel (`reduction_kernel`) that reads each row twice. A GPU uses a Triton kernel
(`reduction_triton`) that keeps a row in registers. Without a C++ compiler or Triton, or with a vocabulary too
large for Triton, tensor operations do the same, more slowly.

Axes: N positions, V vocabulary, K top-k, T temperatures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from infra.cpu.native import has_triton
from offline_teacher.inference import reduction_kernel

BLOCK = 32
ROWS = {"cpu": 32, "cuda": 256}
"""Positions that the tensor operations process at once: on a CPU their float32 logits fit the cache."""
TRITON_VOCABULARY = 1 << 16
"""Largest vocabulary for Triton: longer rows do not fit into the registers of a program."""
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLACE_BITS = 24
_LARGEST_PLACE = (1 << _PLACE_BITS) - 1

Reduced = tuple[Tensor, Tensor, Tensor]


def reduce_logits(logits: Tensor, top_k: int, temperatures: tuple[float, ...]) -> Reduced:
    """ids int64 [N, K] and logits float32 [N, K], largest first, lower id first among equals; and
    logsumexp(logits / T) float32 [N, T], accumulated in float32.

    ``logits``: [N, V] of any float dtype, rows contiguous; ``temperatures`` ascending.
    """
    if logits.device.type == "cpu" and reduction_kernel.available():
        return reduction_kernel.reduce_logits(logits, top_k, temperatures)
    if logits.device.type == "cuda" and _triton_supports(logits):
        from offline_teacher.inference import reduction_triton

        return reduction_triton.reduce_logits(logits, top_k, temperatures)
    rows = logits.split(ROWS[logits.device.type])
    pieces = [_reduce(part, top_k, temperatures) for part in rows]
    ids, values, logsumexp = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return ids, values, logsumexp


def _triton_supports(logits: Tensor) -> bool:
    return has_triton() and logits.shape[1] <= TRITON_VOCABULARY and logits.dtype in TRITON_DTYPES


def _reduce(logits: Tensor, top_k: int, temperatures: tuple[float, ...]) -> Reduced:
    """The k largest entries lie in the k blocks with the largest maxima, so only those are searched."""
    values = logits.float()
    blocked = functional.pad(values, (0, -values.shape[1] % BLOCK), value=-math.inf).unflatten(1, (-1, BLOCK))
    chosen = _largest(blocked.amax(2), min(top_k, blocked.shape[1])).sort(1).values
    candidates = blocked.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)  # ascending ids
    place = _largest(candidates, top_k)
    ids = chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK
    sums = [torch.logsumexp(values / temperature, 1) for temperature in temperatures]
    return ids, candidates.gather(1, place), torch.stack(sums, 1)


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the largest of float32 [N, n], the largest first and the lower place first among equals.

    So ties, which are frequent among bfloat16 logits, have the same result everywhere. They are compared by
    integers whose high bits order like the numbers.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # sign-magnitude to two's complement
    places = torch.arange(values.shape[1], device=values.device)
    keys = (bits.to(torch.int64) << _PLACE_BITS) | (_LARGEST_PLACE - places)
    return _LARGEST_PLACE - (keys.topk(count).values & _LARGEST_PLACE)
