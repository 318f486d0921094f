"""Hidden states as a store keeps them. int8 is symmetric, with one scale a position: scale = max|x| / 127."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from offline_teacher.store.schema import Layout


def quantise(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., D] and float32 scale [...] of hidden [..., D]; half rounds to even, zeros keep scale 0."""
    hidden = np.asarray(hidden, np.float32)
    scale = np.abs(hidden).max(axis=-1) / np.float32(127)
    safe = np.where(scale > 0, scale, np.float32(1))
    steps = np.clip(np.rint(hidden / safe[..., None]), -127, 127)  # a subnormal scale may round past 127
    return steps.astype(np.int8), scale


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [..., D] of int8 [..., D] and scale [...]."""
    hidden: np.ndarray = values.astype(np.float32) * scale[..., None]
    return hidden


def hidden_values(layout: Layout, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [n, P, D] of the columns ``hidden_states`` and, for int8, ``hidden_scale``."""
    stored = columns["hidden_states"]
    if layout.hidden_states == "int8":
        return dequantise(stored, columns["hidden_scale"])
    if layout.hidden_states == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
