"""Tokenized rows of a task, and what a loss needs of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Targets = dict[str, "torch.Tensor"]
"""Name -> labels or soft labels of a batch, [B, ...]."""


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows of different lengths, with the targets of a loss."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    targets: dict[str, np.ndarray] = field(default_factory=dict)
    """Name -> labels or soft labels of all rows, [n, ...]."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self) -> np.ndarray:
        return np.asarray([len(row) for row in self.input_ids])
