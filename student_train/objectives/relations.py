"""Attention relations of MiniLMv2 (Wang et al., arXiv 2012.15828, section 3.1): value and gradient in chunks.

A relation is softmax(x x^T / sqrt(d_r)) over the real positions of a sequence, where x are the queries,
keys or values of one layer, regrouped into A relation heads of d_r = D / A numbers. Teacher and student
need the same A, so neither width nor number of attention heads has to agree. The loss is the
Kullback-Leibler divergence of every row of the teacher's relation from the student's.

Axes: B sequences, L length, D width of the teacher or the student, A relation heads, d = D / A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError

RELATIONS = ("queries", "keys", "values")
"""The relations of a layer: QQ, KK and VV."""
MAX_RELATION_HEADS = 64
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Of one float32 buffer [heads of a chunk, L, L]: what stays in a core's cache; what fills a GPU."""


def relation_heads(teacher_width: int, student_width: int, wanted: int | None = None) -> int:
    """A: ``wanted``, or the largest common divisor of both widths that is at most 64.

    UserError where ``wanted`` does not divide both widths.
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
) -> Tensor:
    """A micro-batch's share of the mean KL over relations, relation heads and real query positions.

    ``student`` and ``teacher``: relation -> [B, L, D], any floating dtype and any two widths. ``token_count``
    int64 [B]: positions from there on are padding. ``tokens``: real positions of the whole optimiser step,
    over all ranks and micro-batches, so that shares add up to the mean. ``weights``: relation -> weight,
    1 each by default; 0 leaves a relation out. ``full``: no sequence has padding, so no mask is needed.

    float32 scalar in nats. Only ``student`` gets gradients. No tensor [B, A, L, L] exists.
    """
    weights = dict.fromkeys(RELATIONS, 1.0) if weights is None else weights
    used = [name for name in RELATIONS if weights.get(name, 0.0) > 0]
    total = sum(weights[name] for name in used)
    shares = [weights[name] / (total * heads * tokens) for name in used]
    counts = None if full else token_count
    terms = [
        share * _SummedKL.apply(student[name], teacher[name], counts, heads)
        for name, share in zip(used, shares, strict=True)
    ]
    return torch.stack(terms).sum()


class _SummedKL(torch.autograd.Function):
    """Sum over sequences, heads and real rows of KL(teacher's relation || student's), with its gradient.

    With S = s s^T / sqrt(d): dKL/dS = q - p in real rows, and dKL/ds = (dS + dS^T) s / sqrt(d).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, token_count: Tensor | None, heads: int) -> Tensor:
        student, teacher = student.detach(), teacher.detach()
        B, L, _ = student.shape  # noqa: N806 - the field's axis letters
        size = max(1, _CHUNK_BYTES[student.device.type] // (4 * heads * L * L))
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, B, size):
            rows = slice(start, start + size)
            counts = None if token_count is None else token_count[rows]
            value, part = _chunk(student[rows], teacher[rows], counts, heads, gradient is not None)
            total += value
            if gradient is not None and part is not None:
                gradient[rows] = part
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def _chunk(
    student: Tensor, teacher: Tensor, token_count: Tensor | None, heads: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed KL (float64 scalar) and its gradient [b, L, D] for some sequences."""
    x = _regrouped(student, heads)  # [b A, L, d]
    scale = x.shape[-1] ** -0.5
    s = _scores(x, scale)  # [b A, L, L] float32
    t_rows = _regrouped(teacher, heads)
    t = _scores(t_rows, t_rows.shape[-1] ** -0.5)
    real = None
    if token_count is not None:
        real = torch.arange(student.shape[1], device=student.device) < token_count[:, None]  # [b, L]
        real = real.repeat_interleave(heads, dim=0)  # [b A, L]
        hidden = ~real[:, None, :]
        s.masked_fill_(hidden, torch.finfo(s.dtype).min)
        t.masked_fill_(hidden, torch.finfo(t.dtype).min)
    s_sum, t_sum = s.logsumexp(-1), t.logsumexp(-1)  # [b A, L]
    p = torch.exp(t - t_sum[..., None])
    kl = torch.linalg.vecdot(p, t.sub_(s)) - t_sum + s_sum  # [b A, L]; t - s is 0 where both are masked
    if real is not None:
        kl = kl.where(real, 0.0)
    if not with_gradient:
        return kl.sum(dtype=torch.float64), None
    q_minus_p = s.sub_(s_sum[..., None]).exp_().sub_(p)
    if real is not None:
        q_minus_p.mul_(real[..., None])
    both = (q_minus_p + q_minus_p.transpose(1, 2)).to(x.dtype)
    return kl.sum(dtype=torch.float64), _ungrouped(torch.bmm(both, x).mul_(scale), heads)


def _scores(x: Tensor, scale: float) -> Tensor:
    """x x^T * scale in float32: [n, L, d] -> [n, L, L]."""
    return torch.bmm(x, x.transpose(1, 2)).float().mul_(scale)


def _regrouped(x: Tensor, heads: int) -> Tensor:
    """[b, L, D] -> [b A, L, D / A], contiguous."""
    b, length, width = x.shape
    return x.view(b, length, heads, width // heads).transpose(1, 2).reshape(b * heads, length, width // heads)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``_regrouped``."""
    n, length, d = x.shape
    return x.view(n // heads, heads, length, d).transpose(1, 2).reshape(n // heads, length, heads * d)


def dense_relation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_count: Tensor, heads: int
) -> Tensor:
    """The formula as the paper writes it, for tests and benchmarks: keeps every [B, A, L, L] tensor.

    Sequences of [B, L, D]; the mean over relations, heads and real rows.
    """
    real = torch.arange(student[0].shape[1], device=student[0].device) < token_count[:, None]

    def log_relation(x: Tensor) -> Tensor:
        b, length, width = x.shape
        grouped = x.view(b, length, heads, width // heads).transpose(1, 2)
        scores = grouped @ grouped.transpose(2, 3) / (width // heads) ** 0.5
        return scores.masked_fill(~real[:, None, None, :], float("-inf")).log_softmax(-1)

    means = []
    for s, t in zip(student, teacher, strict=True):
        log_p, log_q = log_relation(t), log_relation(s)
        kl = (log_p.exp() * (log_p - log_q)).masked_fill(~real[:, None, None, :], 0.0).sum(-1)  # [B, A, L]
        means.append(kl.transpose(1, 2)[real].mean())
    return torch.stack(means).mean()
