"""The attention-relation loss of MiniLMv2 (Wang et al., arXiv 2012.15828, section 3.1), in parts.

A relation is softmax(x x^T / sqrt(d_r)) over the real positions of a sequence, where x are the queries,
keys or values of one layer, regrouped into A relation heads of d_r = D / A numbers. Teacher and student
need the same A; their widths and numbers of attention heads may differ. The loss is
KL(teacher's row || student's row), averaged over the rows of the relations.

Axes: B sequences, L length, D width of the teacher or the student, A relation heads, d = D / A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from infra.errors import UserError
from student_train.objectives import native_relations
from student_train.objectives.vocabulary_kernels import fused

RELATIONS = ("queries", "keys", "values")
"""The relations of a layer: QQ, KK and VV."""
MAX_RELATION_HEADS = 64
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Bytes of a chunk's float32 buffer [heads, L, L]: it fits a CPU core's cache, or fills a GPU."""
_COMPILED = ("cuda",)
"""Devices on which torch compiles one kernel for the scores; a CPU has `native_relations`."""
_ALIGNED = {"cuda": 8}
"""Vectors are zero-padded to a multiple of this for tensor cores, which does not change their products."""


def relation_heads(teacher_width: int, student_width: int, wanted: int | None = None) -> int:
    """A: ``wanted``, or the largest common divisor of both widths that is at most 64.

    Raises UserError if ``wanted`` does not divide both widths.
    """
    common = math.gcd(teacher_width, student_width)
    if wanted is None:
        return max(n for n in range(1, MAX_RELATION_HEADS + 1) if common % n == 0)
    if wanted < 1 or common % wanted:
        raise UserError(
            f"train.relation_heads: {wanted} does not divide both the teacher's width {teacher_width} and the"
            f" student's {student_width}; choose a divisor of {common}, or leave it out"
        )
    return wanted


def relation_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    token_count: Tensor,
    heads: int,
    tokens: float,
    weights: Mapping[str, float] | None = None,
    full: bool = False,
    compile: bool = False,
) -> Tensor:
    """A micro-batch's share of the mean KL over relations, relation heads and real query positions.

    ``student`` and ``teacher``: relation -> [B, L, D], any floating dtype and any two widths. ``token_count``
    int64 [B]: positions from there on are padding. ``tokens``: real positions of the whole optimiser step,
    over all ranks and micro-batches, so that shares add up to the mean. ``weights``: relation -> weight,
    1 each by default; 0 leaves a relation out. ``full``: no sequence has padding, so no mask is needed.
    ``compile``: use torch.compile on devices that benefit.

    Returns a float32 scalar in nats. Only ``student`` gets gradients. No tensor [B, A, L, L] exists.
    """
    weights = dict.fromkeys(RELATIONS, 1.0) if weights is None else weights
    used = [name for name in RELATIONS if weights.get(name, 0.0) > 0]
    total = sum(weights[name] for name in used)
    shares = [weights[name] / (total * heads * tokens) for name in used]
    counts = None if full else token_count
    terms = [
        share * _SummedKL.apply(student[name], teacher[name], counts, heads, compile)
        for name, share in zip(used, shares, strict=True)
    ]
    return torch.stack(terms).sum()


class _SummedKL(torch.autograd.Function):
    """Sum over sequences, heads and real rows of KL(teacher's relation || student's), with its gradient.

    With S = s s^T / sqrt(d): dKL/dS = q - p in real rows, and dKL/ds = (dS + dS^T) s / sqrt(d).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, token_count: Tensor | None, heads: int, compile: bool
    ) -> Tensor:
        student, teacher = student.detach(), teacher.detach()
        wanted = ctx.needs_input_grad[0]
        if native_relations.usable(student, teacher):
            total, gradient = native_relations.summed_kl(student, teacher, token_count, heads, wanted)
        else:
            total, gradient = _in_chunks(student, teacher, token_count, heads, wanted, compile)
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def _in_chunks(
    student: Tensor,
    teacher: Tensor,
    token_count: Tensor | None,
    heads: int,
    with_gradient: bool,
    compile: bool,
) -> tuple[Tensor, Tensor | None]:
    """Summed KL (float64 scalar) of B sequences, and its gradient [B, L, D]; torch's operations on chunks."""
    B, L, _ = student.shape  # noqa: N806 - the field's axis letters
    size = max(1, _CHUNK_BYTES[student.device.type] // (4 * heads * L * L))
    gradient = torch.empty_like(student) if with_gradient else None
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    compile = compile and student.device.type in _COMPILED
    for start in range(0, B, size):
        rows = slice(start, start + size)
        counts = None if token_count is None else token_count[rows]
        # A smaller last chunk is not compiled, so that there are few shapes.
        whole = min(size, B) <= B - start
        value, part = _chunk(student[rows], teacher[rows], counts, heads, with_gradient, compile and whole)
        total += value
        if gradient is not None and part is not None:
            gradient[rows] = part
    return total, gradient


def _chunk(
    student: Tensor,
    teacher: Tensor,
    token_count: Tensor | None,
    heads: int,
    with_gradient: bool,
    compile: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Summed KL (float64 scalar) of a chunk of b sequences, and its gradient [b, L, D]."""
    x, t_rows = _regrouped(student, heads), _regrouped(teacher, heads)  # [b A, L, d]
    s, t = torch.bmm(x, x.transpose(1, 2)), torch.bmm(t_rows, t_rows.transpose(1, 2))
    scales = _scale(student, heads), _scale(teacher, heads)
    kernel = fused(scores_kernel) if compile else scores_kernel
    kl, gradient = kernel(s, t, *scales, _real_rows(student, token_count, heads))
    if not with_gradient:
        return kl.sum(dtype=torch.float64), None
    both = torch.baddbmm(torch.bmm(gradient, x), gradient.transpose(1, 2), x)
    return kl.sum(dtype=torch.float64), _ungrouped(both, heads, student.shape[-1] // heads)


def scores_kernel(
    s: Tensor, t: Tensor, s_scale: float, t_scale: float, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL [n, L] float32 of each row of the products s, t [n, L, L], and scale * dKL/dS in the dtype of s.

    ``real``: bool [n, L], False for padding; None: no padding.
    """
    log_q, log_p = s.float() * s_scale, t.float() * t_scale
    if real is not None:
        lowest = torch.finfo(torch.float32).min
        log_q = torch.where(real[:, None, :], log_q, lowest)
        log_p = torch.where(real[:, None, :], log_p, lowest)
    log_q, log_p = torch.log_softmax(log_q, -1), torch.log_softmax(log_p, -1)
    p = log_p.exp()
    difference = log_p - log_q
    if real is not None:  # masked: both are the lowest number less their sums
        difference = torch.where(real[:, None, :], difference, 0.0)
    kl, gradient = (p * difference).sum(-1), (log_q.exp() - p) * s_scale
    if real is not None:
        kl, gradient = torch.where(real, kl, 0.0), torch.where(real[:, :, None], gradient, 0.0)
    return kl, gradient.to(s.dtype)


def _scale(x: Tensor, heads: int) -> float:
    """1 / sqrt(d)"""
    return float((x.shape[-1] // heads) ** -0.5)


def _real_rows(x: Tensor, token_count: Tensor | None, heads: int) -> Tensor | None:
    """bool [b A, L], False for padding; None if there is no padding. ``x``: [b, L, D]."""
    if token_count is None:
        return None
    real = torch.arange(x.shape[1], device=x.device) < token_count[:, None]
    return real.repeat_interleave(heads, dim=0)


def _regrouped(x: Tensor, heads: int) -> Tensor:
    """[b, L, D] -> [b A, L, d], contiguous; d = D / A, zero-padded to a multiple of ``_ALIGNED``."""
    b, length, width = x.shape
    grouped = x.view(b, length, heads, width // heads).transpose(1, 2)
    extra = -(width // heads) % _ALIGNED.get(x.device.type, 1)
    grouped = functional.pad(grouped, (0, extra)) if extra else grouped
    return grouped.reshape(b * heads, length, -1)


def _ungrouped(x: Tensor, heads: int, d: int) -> Tensor:
    """The inverse of ``_regrouped``."""
    n, length, _ = x.shape
    grouped = x[..., :d].view(n // heads, heads, length, d)
    return grouped.transpose(1, 2).reshape(n // heads, length, heads * d)
