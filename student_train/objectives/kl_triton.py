"""`kl_loss.exact_kernel` on a GPU: KL with temperature and CE in one Triton kernel, one program per row.

A program reads its row of both logits once for all sums, with running maxima (Milakov and Gimelshein, arXiv
1805.02867), and once more, from the cache, for the gradient. Compiled tensor operations read the rows four
times. Import this module only if Triton is installed. Axes: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Number of logits that a program loads at once."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of the logits that the kernel takes."""


def exact_kernel(
    s: Tensor, t: Tensor, label: Tensor, kl_scale: Tensor, mlm_scale: Tensor, temperature: float, mlm: bool
) -> tuple[Tensor, Tensor]:
    """See `kl_loss.exact_kernel`. ``s`` and ``t`` [C, V] have one of ``DTYPES``; sums are float32. Every
    row must be contiguous in memory; the stride between rows is free."""
    count, vocab_size = s.shape
    assert s.stride(1) == t.stride(1) == 1
    kl, ce = torch.empty_like(kl_scale), torch.zeros_like(kl_scale)
    if count:
        _exact_row[(count,)](
            s, s.stride(0), t, t.stride(0), label, kl_scale, mlm_scale, kl, ce, 1 / temperature,
            V=vocab_size, MLM=mlm, TEMPERATURE=temperature if temperature in (1.0, 2.0) else 0.0,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)), num_warps=8,
        )  # fmt: skip
    return kl, ce


@triton.jit
def _exact_row(  # type: ignore[no-untyped-def]
    s,
    s_stride,
    t,
    t_stride,
    labels,
    kl_scales,
    mlm_scales,
    kl,
    ce,
    inverse,  # 1 / temperature
    V: tl.constexpr,
    MLM: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row = s + row * s_stride, t + row * t_stride
    label = tl.load(labels + row)
    lowest = float("-inf")
    m, n = tl.full((), lowest, tl.float32), tl.full((), lowest, tl.float32)  # running maxima of s and t
    z_q, z_1, z_p = tl.zeros((), tl.float32), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    cross, at_label = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        x = tl.load(s_row + column, mask=inside, other=lowest).to(tl.float32)
        y = tl.load(t_row + column, mask=inside, other=lowest).to(tl.float32)
        higher_m, higher_n = tl.maximum(m, tl.max(x, 0)), tl.maximum(n, tl.max(y, 0))
        # cross = sum_v exp((y_v - n) / T) ((y_v - n) - (x_v - m)) / T; then rescaled to new maxima
        moved = tl.where(z_p > 0, ((n - higher_n) - (m - higher_m)) * inverse, 0.0)
        shrunk = tl.exp((n - higher_n) * inverse)
        cross, z_p = shrunk * (cross + z_p * moved), z_p * shrunk
        z_q *= tl.exp((m - higher_m) * inverse)
        z_1 *= tl.exp(m - higher_m)
        m, n = higher_m, higher_n
        x, y = x - m, (y - n) * inverse
        e_q, e_p = tl.exp(x * inverse), tl.exp(y)
        z_q += tl.sum(e_q, 0)
        z_p += tl.sum(e_p, 0)
        cross += tl.sum(tl.where(e_p > 0, e_p * (y - x * inverse), 0.0), 0)
        if MLM:
            z_1 += tl.sum(_exponential(x, e_q, TEMPERATURE), 0)
            at_label += tl.sum(tl.where(column == label, x + m, 0.0), 0)

    kl_scale, mlm_scale = tl.load(kl_scales + row), tl.load(mlm_scales + row)
    tl.store(kl + row, cross / z_p - tl.log(z_p) + tl.log(z_q))
    if MLM:
        tl.store(ce + row, tl.where(label >= 0, tl.log(z_1) - (at_label - m), 0.0))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        x = tl.load(s_row + column, mask=inside, other=lowest).to(tl.float32) - m
        y = (tl.load(t_row + column, mask=inside, other=lowest).to(tl.float32) - n) * inverse
        e_q = tl.exp(x * inverse)
        gradient = kl_scale / z_q * e_q - kl_scale / z_p * tl.exp(y)
        if MLM:
            gradient += mlm_scale / z_1 * _exponential(x, e_q, TEMPERATURE)
            gradient -= tl.where(column == label, mlm_scale, 0.0)
        tl.store(s_row + column, gradient.to(s.dtype.element_ty), mask=inside)


@triton.jit
def _exponential(x, e_q, TEMPERATURE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """exp(x), computed from ``e_q`` = exp(x / T) if T is 1 or 2."""
    if TEMPERATURE == 1.0:
        return e_q
    if TEMPERATURE == 2.0:
        return e_q * e_q
    return tl.exp(x)
