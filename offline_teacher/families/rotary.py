"""Rotary positions that keep their precision.

transformers keeps the frequencies in a buffer. ``model.to(torch.bfloat16)`` rounds it with everything else to
8 bits, and an angle, which is position times frequency, is then wrong by up to half a radian at position 256.
"""

from __future__ import annotations

from typing import Any

from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding


class Float32Rotary(ModernBertRotaryEmbedding):
    """ModernBERT's rotary embedding; its buffers follow the model to other devices, not to other dtypes."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Rotary:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self
