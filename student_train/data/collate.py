"""Collates one micro-batch. All indices that the loss needs are computed here, on the host.

Positions, labels and "no padding" depend on the text alone. On a device, computing each of them would force a
synchronisation. Axes: n samples, L length, M masked positions, P recorded positions (L or M), N positions
that count, K top-k, T temperatures, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100
"""The label of a position that is not masked."""
TEXT = ("token_count", "input_ids", "masked_positions", "masked_labels")
"""Columns that every batch is made from, as far as the store has them."""
TEACHER = ("hidden_states", "hidden_scale", "embedding", "topk_ids", "topk_logits", "logsumexp")
"""Columns that a loss may ask for, in the store's dtypes but for int64 ids and bfloat16 hidden states."""
UNCHANGED = frozenset(TEACHER) - {"topk_ids"}
"""Columns whose bytes a batch keeps as they are in the store."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. A column that was not asked for is None."""

    input_ids: Tensor  # int64 [n, L], masked
    token_count: Tensor  # int64 [n]; position i is real where i < token_count
    positions: Tensor | None  # int64 [N], ascending indices into [n L]; None: every position, N = n L
    slots: Tensor | None  # int64 [N], indices into [n M], where the store recorded masked positions only
    labels: Tensor  # int64 [N], NO_LABEL where not masked
    masked_at: Tensor  # int64 [masked tokens], indices into [N]
    full: bool
    """No sequence has padding: attention needs no mask."""
    tokens: int
    """Real tokens of this micro-batch; 0 in a dummy."""
    masked: int
    """Masked tokens of this micro-batch; 0 in a dummy."""
    hidden_states: Tensor | None = None  # float16, bfloat16 or int8 [n, P, D]
    hidden_scale: Tensor | None = None  # float32 [n, P]; int8 only
    embedding: Tensor | None = None  # float16 [n, D]
    topk_ids: Tensor | None = None  # int64 [n, P, K]
    topk_logits: Tensor | None = None  # float16 [n, P, K]
    logsumexp: Tensor | None = None  # float32 [n, P, T]
    weight: float = 1.0
    """0.0 marks a dummy that only keeps this rank in step: one sample of the global batch, computed by
    another rank, whose loss must be multiplied by 0."""
    copied: Any = None
    """Event after the copy of the tensors to their device; None if there is no copy to wait for."""

    def __len__(self) -> int:
        return len(self.token_count)

    @property
    def recorded(self) -> Tensor | None:
        """int64 [N], indices into the store's [n P] of the positions that count; None: every one of them."""
        return self.positions if self.slots is None else self.slots

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``. If its copy is under way, what the device does next waits for it; the
        host does not."""
        if self.copied is None:
            return self.moved({name: tensor.to(device) for name, tensor in self.tensors().items()}, None)
        stream = torch.get_device_module(device).current_stream()
        stream.wait_event(self.copied)
        for tensor in self.tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory is not reused before that stream is done with it
        return replace(self, copied=None)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def moved(self, tensors: Mapping[str, Tensor], copied: Any) -> Batch:
        """The same batch with these tensors in place of its own; ``copied``: the field of that name."""
        fields: dict[str, Any] = dict(tensors)
        return replace(self, copied=copied, **fields)


def collate(columns: Mapping[str, np.ndarray], masked_only: bool, bfloat16: bool, weight: float) -> Batch:
    """A batch of the columns [n, ...] of some samples.

    ``masked_only``: the store recorded masked positions only, so nothing else counts. ``bfloat16``: the
    uint16 numbers of ``hidden_states`` are its bits. ``weight``: 0.0 makes a dummy.
    """
    count = columns["token_count"].astype(np.int64)
    n, length = columns["input_ids"].shape
    masked, labels_of = _masked(columns, n, length)
    full = bool((count == length).all())
    if masked_only:
        positions = masked
        labels, masked_at = labels_of, np.arange(len(masked))
    else:
        real = np.flatnonzero(np.arange(length) < count[:, None])
        dense = np.full(n * length, NO_LABEL, np.int64)
        dense[masked] = labels_of
        positions, labels, masked_at = real, dense[real], np.searchsorted(real, masked)
    every = len(positions) == n * length
    dummy = weight == 0.0
    return Batch(
        input_ids=torch.from_numpy(columns["input_ids"].astype(np.int64)),
        token_count=torch.from_numpy(count),
        positions=None if every else torch.from_numpy(positions),
        slots=torch.from_numpy(np.flatnonzero(columns["masked_positions"] >= 0)) if masked_only else None,
        labels=torch.from_numpy(labels),
        masked_at=torch.from_numpy(masked_at),
        full=full,
        tokens=0 if dummy else int(count.sum()),
        masked=0 if dummy else len(masked),
        weight=weight,
        **{name: _teacher_column(name, columns[name], bfloat16) for name in TEACHER if name in columns},
    )


def _masked(columns: Mapping[str, np.ndarray], n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices into [n L] of the masked tokens, ascending, and their labels; both int64."""
    if "masked_positions" not in columns:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    slots = columns["masked_positions"] >= 0
    at = np.arange(n)[:, None] * length + columns["masked_positions"]
    return at[slots], columns["masked_labels"][slots].astype(np.int64)


def _teacher_column(name: str, values: np.ndarray, bfloat16: bool) -> Tensor:
    if name == "topk_ids":
        return torch.from_numpy(values.astype(np.int64))
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if name == "hidden_states" and bfloat16 else tensor
