"""The gradient of MiniLMv2's relations (arXiv 2012.15828), written plainly for a handful of sequences.

Axes: B sequences, L length, D width, A relation heads, d = D / A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relation_gradient(
    student: Sequence[Tensor], teacher: Sequence[Tensor], token_count: Tensor, heads: int
) -> Tensor:
    """float64, flat: of the sum over relations, heads and real query positions of KL(teacher || student).

    ``student`` and ``teacher``: queries, keys and values [B, L, D]. The gradient is with respect to the
    student's.
    """
    gradients = []
    for own, other in zip(student, teacher, strict=True):
        own = own.detach().double().requires_grad_()
        p, q = (_log_relation(x.double(), token_count, heads) for x in (other.detach(), own))
        real = torch.arange(own.shape[1]) < token_count[:, None]  # [B, L]
        rows = (p.exp() * (p - q)).sum(-1)  # [B, A, L]
        (gradient,) = torch.autograd.grad((rows * real[:, None]).sum(), own)
        gradients.append(gradient.flatten())
    return torch.cat(gradients)


def _log_relation(x: Tensor, token_count: Tensor, heads: int) -> Tensor:
    """log softmax(x x^T / sqrt(d)) [B, A, L, L] over real positions; very low behind them."""
    count, length, width = x.shape
    x = x.view(count, length, heads, width // heads).transpose(1, 2)  # [B, A, L, d]
    scores = x @ x.transpose(-1, -2) * (width // heads) ** -0.5
    hidden = torch.arange(length) >= token_count[:, None]
    return torch.log_softmax(scores.masked_fill(hidden[:, None, None, :], -1e30), -1)
