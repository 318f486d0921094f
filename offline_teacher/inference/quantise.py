"""Symmetric int8 with one scale per position: value = int8 * scale, scale = max|value| / 127.

``store.hidden_states`` (infra/settings/sections/store.py) chooses float16 or int8.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 [..., D] and scale float32 [...]. Rounds half to even; the scale of zeros is 0."""
    hidden = hidden.float()
    scale = hidden.abs().amax(dim=-1) / 127
    divisor = torch.where(scale > 0, scale, 1.0)
    steps = (hidden / divisor[..., None]).round_().clamp_(-127, 127)  # a subnormal scale may give more
    return steps.to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """Returns float32 [..., D] from int8 [..., D] and scale [...]."""
    return values.float() * scale[..., None]
