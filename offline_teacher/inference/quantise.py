"""Symmetric int8 with one scale per position: value = int8 * scale, scale = max|x| / 127; on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [..., D] -> int8 [..., D], float32 scale [...]. Rounds half to even; all zeros have scale 0."""
    hidden = hidden.float()
    scale = hidden.abs().amax(dim=-1) / 127
    safe = torch.where(scale > 0, scale, 1.0)
    steps = (hidden / safe[..., None]).round_().clamp_(-127, 127)  # a subnormal scale may round past 127
    return steps.to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., D] and scale [...] -> float32 [..., D]."""
    return values.float() * scale[..., None]
