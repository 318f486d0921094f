"""Attention masks from the number of real tokens of each row, built without synchronising with the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offline_teacher.families import family_of


def visible_positions(token_count: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    """bool [B, L] on ``device``, true below token_count [B]; None where nothing is padded.

    Nothing is padded if ``token_count`` is None, or a CPU tensor whose values are all L.
    """
    if token_count is None or (token_count.device.type == "cpu" and bool((token_count >= length).all())):
        return None
    return torch.arange(length, device=device) < token_count.to(device, non_blocking=True)[:, None]


def encoder_mask(
    config: Any, token_count: Tensor | None, length: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """The ``attention_mask`` for an encoder of any family, teacher or student.

    Args:
        config: the encoder's.
        token_count: int [B]; see `visible_positions`.
        dtype: that the encoder computes in.
    """
    visible = visible_positions(token_count, length, device)
    return family_of(config).attention_mask(config, visible, length, device, dtype)
