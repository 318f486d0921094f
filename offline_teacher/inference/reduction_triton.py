"""The reduction of logits on a GPU as a Triton kernel, with one program per row.

A row stays in registers as integer keys that are ordered like its logits. The K-th largest key (threshold) is
built bit by bit: a bit is set if at least K keys are no smaller than the result. The kernel keeps entries
above the threshold and, of the entries equal to it, those with the lowest ids. Torch sorts the K entries.

Import this module only if Triton is installed. Axes: N positions, V vocabulary, K top-k, T temperatures.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Dtype -> number of last bits that are 0 in a float32 that was converted from this dtype."""


def reduce_logits(
    logits: Tensor, top_k: int, temperatures: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `reduction.reduce_logits` describes, for V <= ``reduction.TRITON_VOCABULARY``."""
    count, vocab_size = logits.shape
    assert logits.stride(1) == 1
    assert 0 < top_k <= vocab_size
    block = triton.next_power_of_2(vocab_size)
    ids = torch.empty(count, top_k, dtype=torch.int64, device=logits.device)
    values = torch.empty(count, top_k, device=logits.device)
    sums = torch.empty(count, len(temperatures), device=logits.device)
    if count:
        _reduce_row[(count,)](
            logits, logits.stride(0), vocab_size, _on_device(temperatures, logits.device), ids, values, sums,
            K=top_k, T=len(temperatures), SHIFT=UNUSED_BITS[logits.dtype], BLOCK=block, TILE=min(block, 4096),
            num_warps=max(1, min(32, block // 2048)),
        )  # fmt: skip
    values, order = values.sort(dim=1, descending=True, stable=True)  # equal logits stay in the order of ids
    return ids.gather(1, order), values, sums


@cache
def _on_device(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(temperatures, dtype=torch.float32, device=device)


@triton.jit
def _reduce_row(  # type: ignore[no-untyped-def]
    logits,
    stride,
    vocab_size,
    temperatures,
    ids,
    values,
    sums,
    K: tl.constexpr,
    T: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < vocab_size
    x = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, 0)
    for j in tl.static_range(T):
        temperature = tl.load(temperatures + j)
        total = tl.sum(tl.exp((x - maximum) / temperature), 0)
        tl.store(sums + row * T + j, maximum / temperature + tl.log(total))

    key = _ordered(x, SHIFT)
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= K, 0, -(2 ** (31 - SHIFT)))
    step = tl.full((), 2 ** (30 - SHIFT), tl.int32)
    for _ in range(31 - SHIFT):
        higher = threshold + step
        threshold = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= K, higher, threshold)
        step = step >> 1

    larger_so_far = tl.full((), 0, tl.int32)
    equal_so_far = tl.sum((key > threshold).to(tl.int32), 0)  # slots of equal entries follow all larger ones
    for tile in range(BLOCK // TILE):
        at = tile * TILE + tl.arange(0, TILE)
        again = tl.load(logits + row * stride + at, mask=at < vocab_size, other=float("-inf")).to(tl.float32)
        tile_key = _ordered(again, SHIFT)
        larger, equal = (tile_key > threshold).to(tl.int32), (tile_key == threshold).to(tl.int32)
        slot_larger = larger_so_far + tl.cumsum(larger, 0) - 1
        slot = tl.where(larger != 0, slot_larger, equal_so_far + tl.cumsum(equal, 0) - 1)
        kept = (larger + equal != 0) & (slot < K)
        tl.store(ids + row * K + slot, at.to(tl.int64), mask=kept)
        tl.store(values + row * K + slot, again, mask=kept)
        larger_so_far += tl.sum(larger, 0)
        equal_so_far += tl.sum(equal, 0)


@triton.jit
def _ordered(x, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Returns int32 keys that are ordered like float32 ``x``, whose last SHIFT bits are 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # a negative zero equals zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT  # sign and magnitude to two's complement
