"""The attention-relation loss of MiniLMv2 (Wang et al., arXiv 2012.15828, section 3.1).

A relation is softmax(x x^T / sqrt(d)) over a sequence's positions that are not padding. x [L, d] are the
queries, keys or values of a layer, for one of A relation heads, into which the D numbers of a position are
cut. Teacher and student need the same A; their widths and numbers of attention heads may differ. The loss is
KL(teacher's row || student's row), averaged over rows, relation heads and relations.

Axes: B sequences, L length, D width of the teacher or the student, A relation heads, d = D / A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from student_train.objectives import native_relations
from student_train.objectives.kl_loss import fused

RELATIONS = ("queries", "keys", "values")
"""The relations of a layer, by their x: QQ, KK and VV in the paper."""
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
"""Bytes of a chunk's float32 scores [sequences A, L, L]: they fit a CPU's cache, or fill a GPU."""
_COMPILED = ("cuda",)
"""Devices on which ``scores_kernel`` is compiled by torch; a CPU has `native_relations`."""
_ALIGNED = {"cuda": 8}
"""d is zero-padded to a multiple of this number, for tensor cores; zeros do not change the products."""


def relation_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    token_count: Tensor,
    heads: int,
    tokens: float,
    weights: Mapping[str, float] | None = None,
    no_padding: bool = False,
    compile: bool = False,
) -> Tensor:
    """Returns a micro-batch's share of the mean KL over relations, heads and rows: float32 scalar, in nats.

    Only ``student`` gets gradients. No tensor [B, A, L, L] is made.

    Args:
        student, teacher: relation -> [B, L, D], of any floating dtype; the widths D may differ.
        token_count: int64 [B]; later positions are padding.
        heads: A.
        tokens: number of positions without padding in the whole optimiser step, over ranks and micro-batches,
            so that the shares add up to the mean.
        weights: relation -> weight in the mean, 1 each by default; 0 leaves a relation out.
        no_padding: no sequence has padding, so that no mask is needed.
        compile: use torch.compile on a GPU.
    """
    weights = dict.fromkeys(RELATIONS, 1.0) if weights is None else weights
    used = [name for name in RELATIONS if weights.get(name, 0.0) > 0]
    total = sum(weights[name] for name in used)
    shares = [weights[name] / (total * heads * tokens) for name in used]
    counts = None if no_padding else token_count
    terms = [
        share * _SummedKL.apply(student[name], teacher[name], counts, heads, compile)
        for name, share in zip(used, shares, strict=True)
    ]
    return torch.stack(terms).sum()


class _SummedKL(torch.autograd.Function):
    """KL of one relation, summed over sequences, heads and rows, except padding; with its gradient.

    With s, the student's x, and p, the teacher's relation: S = s s^T / sqrt(d), q = softmax(S), G = dKL/dS =
    q - p, dKL/ds = (G + G^T) s / sqrt(d).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, token_count: Tensor | None, heads: int, compile: bool
    ) -> Tensor:
        student, teacher = student.detach(), teacher.detach()
        with_gradient = ctx.needs_input_grad[0]
        if native_relations.usable(student, teacher):
            total, gradient = native_relations.summed_kl(student, teacher, token_count, heads, with_gradient)
        else:
            total, gradient = _in_chunks(student, teacher, token_count, heads, with_gradient, compile)
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
    """Returns the summed KL (float64 scalar) of B sequences, and its gradient [B, L, D], computed by torch.
    ``token_count``: None if no sequence has padding. The gradient is None unless ``with_gradient``."""
    B, L, _ = student.shape  # noqa: N806 - the field's axis letters
    size = max(1, _CHUNK_BYTES[student.device.type] // (4 * heads * L * L))
    gradient = torch.empty_like(student) if with_gradient else None
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    compile = compile and student.device.type in _COMPILED
    for start in range(0, B, size):
        rows = slice(start, start + size)
        counts = None if token_count is None else token_count[rows]
        # A shorter last chunk runs uncompiled: compiling another shape takes longer.
        compiled = compile and min(size, B) <= B - start
        value, part = _chunk(student[rows], teacher[rows], counts, heads, with_gradient, compiled)
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
    """Returns the summed KL (float64 scalar) of a chunk of b sequences, and its gradient [b, L, D]."""
    x, y = _split_heads(student, heads), _split_heads(teacher, heads)  # [b A, L, d]
    s, t = torch.bmm(x, x.transpose(1, 2)), torch.bmm(y, y.transpose(1, 2))
    scales = _scale(student, heads), _scale(teacher, heads)
    kernel = fused(scores_kernel) if compile else scores_kernel
    kl, gradient = kernel(s, t, *scales, _padding_mask(student, token_count, heads))
    if not with_gradient:
        return kl.sum(dtype=torch.float64), None
    dx = torch.baddbmm(torch.bmm(gradient, x), gradient.transpose(1, 2), x)
    return kl.sum(dtype=torch.float64), _joined_heads(dx, heads, student.shape[-1] // heads)


def scores_kernel(
    s: Tensor, t: Tensor, s_scale: float, t_scale: float, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns KL [n, L], float32, of every row, and the gradient [n, L, L] of the products, in their dtype.

    ``s``, ``t`` [n, L, L]: products x x^T of student and teacher. Scales: 1 / sqrt(d). ``real``: bool [n, L],
    False for padding; None: no padding.
    """
    log_q, log_p = s.float() * s_scale, t.float() * t_scale
    if real is not None:
        lowest = torch.finfo(torch.float32).min
        log_q = torch.where(real[:, None, :], log_q, lowest)
        log_p = torch.where(real[:, None, :], log_p, lowest)
    log_q, log_p = torch.log_softmax(log_q, -1), torch.log_softmax(log_p, -1)
    p = log_p.exp()
    difference = log_p - log_q
    if real is not None:  # at padding, both logarithms are huge negative numbers
        difference = torch.where(real[:, None, :], difference, 0.0)
    kl, gradient = (p * difference).sum(-1), (log_q.exp() - p) * s_scale
    if real is not None:
        kl, gradient = torch.where(real, kl, 0.0), torch.where(real[:, :, None], gradient, 0.0)
    return kl, gradient.to(s.dtype)


def _scale(x: Tensor, heads: int) -> float:
    """Returns 1 / sqrt(d)."""
    return float((x.shape[-1] // heads) ** -0.5)


def _padding_mask(x: Tensor, token_count: Tensor | None, heads: int) -> Tensor | None:
    """Returns a mask for ``x`` [b, L, D]: bool [b A, L], False for padding; None if there is no padding."""
    if token_count is None:
        return None
    real = torch.arange(x.shape[1], device=x.device) < token_count[:, None]
    return real.repeat_interleave(heads, dim=0)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Returns [b, L, D] as [b A, L, d], contiguous, with d zero-padded to a multiple of ``_ALIGNED``."""
    b, length, width = x.shape
    split = x.view(b, length, heads, width // heads).transpose(1, 2)
    extra = -(width // heads) % _ALIGNED.get(x.device.type, 1)
    split = functional.pad(split, (0, extra)) if extra else split
    return split.reshape(b * heads, length, -1)


def _joined_heads(x: Tensor, heads: int, d: int) -> Tensor:
    """Returns [b A, L, d] as [b, L, D], without the padding of d; the inverse of ``_split_heads``."""
    n, length, _ = x.shape
    split = x[..., :d].view(n // heads, heads, length, d)
    return split.transpose(1, 2).reshape(n // heads, length, heads * d)
