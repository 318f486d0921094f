"""Dropout that costs little on a CPU, where torch draws a random number for every element, on one thread.

Here one draw of 64 bits serves four elements: a probability is rounded to a multiple of 2^-16, and what is
kept is scaled for the rounded one. torch's global generator is drawn from: ``torch.manual_seed`` decides, as
before. On other devices, and in evaluation, everything is torch's own.

Axes: B batch, H heads, L length, E size of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_cpu_dropout"
_LEVELS = 1 << 16


def use_cheap_dropout(model: PreTrainedModel) -> None:
    """Replaces the dropout of ``model``, in attention (where it is torch's) and elsewhere; the model is saved
    as it was."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, CheapDropout(module.p))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def kept(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """bool of ``shape``, false with probability ``p``, and the factor that keeps the mean."""
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    draws = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64).random_(-(1 << 63), None)
    levels = draws.view(torch.int16)[: math.prod(shape)].view(shape)
    return levels >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)


class CheapDropout(nn.Dropout):
    """``nn.Dropout`` for tensors of any shape."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        keep, scale = kept(input.shape, self.p)
        return torch.where(keep, input * scale, 0.0)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """[B, L, H, E] of query, key, value [B, H, L, E] and a bool mask of what may be looked at.

    torch's fused attention has no dropout on a CPU: it falls back to these operations, and a few more.
    """
    if not dropout or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(2, 3))
    if attention_mask is not None:
        assert attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    keep, scale = kept(scores.shape, dropout)
    weights = torch.where(keep, torch.softmax(scores, dim=-1), 0.0)
    return (torch.matmul(weights, value) * scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
