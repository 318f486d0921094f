"""Builds a micro-batch from the columns of its samples, together with all indices that the loss needs.

The indices depend on the text alone, so they are computed on the host: on a GPU, each of them would force a
synchronisation.

Axes: n samples, L length, M masked positions, P recorded positions (L or M), K top-k, T temperatures, D
hidden size. N positions are those that the loss uses: the masked ones if the store recorded only these,
otherwise every position that is not padding.
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
TEXT_COLUMNS = ("token_count", "input_ids", "masked_positions", "masked_labels")
"""Text columns of a batch. A store of unmasked text lacks the masked ones."""
TEACHER_COLUMNS = ("hidden_states", "hidden_scale", "embedding", "topk_ids", "topk_logits", "logsumexp")
"""Columns of the teacher's outputs. A batch has those that the loss reads; `Batch` states their dtypes."""
UNCONVERTED = frozenset(TEACHER_COLUMNS) - {"topk_ids"}
"""Columns that a batch keeps as read, so that the reader may write them directly into pinned memory."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. A column of the teacher that the loss does not read is None."""

    input_ids: Tensor  # int64 [n, L], masked
    token_count: Tensor  # int64 [n]; all later positions are padding
    # int64 [N], ascending indices into the flattened [n * L]; None: every position, N = n * L
    positions: Tensor | None
    # int64 [N], indices into the store's flattened [n * M]; None if the store recorded all positions
    store_slots: Tensor | None
    labels: Tensor  # int64 [N], NO_LABEL where not masked
    masked_in_positions: Tensor  # int64 [masked tokens], indices into the N positions
    no_padding: bool
    """Whether no sequence has padding, so that attention needs no mask."""
    tokens: int
    """Number of tokens without padding; 0 in a dummy (see ``weight``)."""
    masked: int
    """Number of masked tokens; 0 in a dummy."""
    hidden_states: Tensor | None = None  # float16, bfloat16 or int8 [n, P, D]
    hidden_scale: Tensor | None = None  # float32 [n, P]; int8 only
    embedding: Tensor | None = None  # float16 [n, D]
    topk_ids: Tensor | None = None  # int64 [n, P, K]
    topk_logits: Tensor | None = None  # float16 [n, P, K]
    logsumexp: Tensor | None = None  # float32 [n, P, T]
    weight: float = 1.0
    """Factor of the batch's loss: 1.0, or 0.0 for a dummy. All ranks must run the same number of
    micro-batches. So a rank that has no samples computes a dummy: one sample of another rank, weight 0."""
    copy_event: Any = None
    """CUDA event at the end of the copy to the device; None if there is no copy to wait for."""

    def __len__(self) -> int:
        return len(self.token_count)

    @property
    def recorded_positions(self) -> Tensor | None:
        """Indices of the N positions into the store's flattened [n * P], int64 [N]; None: all positions."""
        return self.positions if self.store_slots is None else self.store_slots

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on ``device``. If the copy to the device is under way, the device's next kernels
        wait for it; the host does not."""
        if self.copy_event is None:
            return self.with_tensors({name: x.to(device) for name, x in self.tensors().items()}, None)
        stream = torch.get_device_module(device).current_stream()
        stream.wait_event(self.copy_event)
        for tensor in self.tensors().values():
            if tensor.is_cuda:
                tensor.record_stream(stream)  # its memory is not reused before the stream has used it
        return replace(self, copy_event=None)

    def tensors(self) -> dict[str, Tensor]:
        """Returns field name -> tensor, for all fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor], copy_event: Any) -> Batch:
        """Returns the batch with other tensors, given by field name, and this ``copy_event``."""
        fields: dict[str, Any] = dict(tensors)
        return replace(self, copy_event=copy_event, **fields)


def collate(columns: Mapping[str, np.ndarray], masked_only: bool, bfloat16: bool, weight: float) -> Batch:
    """Builds a batch from columns [n, ...]. ``masked_only``: the store recorded masked positions only.
    ``bfloat16``: the uint16 numbers of ``hidden_states`` are bfloat16 bits. ``weight``: see `Batch`."""
    count = columns["token_count"].astype(np.int64)
    n, length = columns["input_ids"].shape
    masked, masked_labels = _masked(columns, n, length)
    slots = None
    if masked_only:
        slots = torch.from_numpy(np.flatnonzero(columns["masked_positions"] >= 0))
        positions, labels, masked_in_positions = masked, masked_labels, np.arange(len(masked))
    else:
        positions = np.flatnonzero(np.arange(length) < count[:, None])
        all_labels = np.full(n * length, NO_LABEL, np.int64)
        all_labels[masked] = masked_labels
        labels, masked_in_positions = all_labels[positions], np.searchsorted(positions, masked)
    all_positions = len(positions) == n * length
    dummy = weight == 0.0
    return Batch(
        input_ids=torch.from_numpy(columns["input_ids"].astype(np.int64)),
        token_count=torch.from_numpy(count),
        positions=None if all_positions else torch.from_numpy(positions),
        store_slots=slots,
        labels=torch.from_numpy(labels),
        masked_in_positions=torch.from_numpy(masked_in_positions),
        no_padding=bool((count == length).all()),
        tokens=0 if dummy else int(count.sum()),
        masked=0 if dummy else len(masked),
        weight=weight,
        **{x: _teacher_column(x, columns[x], bfloat16) for x in TEACHER_COLUMNS if x in columns},
    )


def _masked(columns: Mapping[str, np.ndarray], n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the masked tokens' ascending indices into the flattened [n * L], and labels: int64 [masked]."""
    if "masked_positions" not in columns:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    used = columns["masked_positions"] >= 0  # unused slots hold -1
    indices = np.arange(n)[:, None] * length + columns["masked_positions"]
    return indices[used], columns["masked_labels"][used].astype(np.int64)


def _teacher_column(name: str, values: np.ndarray, bfloat16: bool) -> Tensor:
    """Returns the column as a tensor in the dtype that `Batch` states."""
    if name == "topk_ids":
        return torch.from_numpy(values.astype(np.int64))
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if name == "hidden_states" and bfloat16 else tensor
