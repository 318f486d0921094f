"""Cuts a shard's text into batches in pinned memory, and copies them to the device without waiting.

The thread of a task makes its batches while the computing thread runs those of another task.

Axes: n samples of a shard, B batch, L length; recorded positions: P of a sequence, N of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offline_teacher.store.schema import Layout


@dataclass(frozen=True)
class Batch:
    """Some samples of a shard, the longest first. All tensors are int64."""

    input_ids: Tensor
    """[B, L]; L is the length of the longest sample, rounded up."""
    token_count: Tensor
    """[B]"""
    padded: bool
    """Whether a sample is shorter than L."""
    source: Tensor | None
    """[N]: flat indices in [B, L] of the recorded positions; None if they are all B * L, or pooled."""
    target: Tensor
    """[N]: flat indices of the same positions in the shard's [n, P]. Pooled: [B], the samples' numbers."""


@dataclass(frozen=True)
class Loader:
    """Makes the batches of shards for one layout and device."""

    layout: Layout
    device: torch.device
    step: int
    """The length of a batch is a multiple of this, so that few CUDA graphs are needed."""

    def batches(self, text: Mapping[str, np.ndarray], batch_size: int) -> list[Batch]:
        """Returns the batches of a shard from its text columns. A batch has sequences of similar lengths. The
        same samples always give the same batches."""
        counts = text["token_count"].astype(np.int64)
        order = np.argsort(-counts, kind="stable")
        chunks = (order[start : start + batch_size] for start in range(0, len(counts), batch_size))
        return [self._batch(text, counts, rows) for rows in chunks]

    def _batch(self, text: Mapping[str, np.ndarray], counts: np.ndarray, rows: np.ndarray) -> Batch:
        length = min(-(-int(counts[rows[0]]) // self.step) * self.step, self.layout.length)
        source, target = self._recorded_positions(text, counts, rows, length)
        return Batch(
            input_ids=self._pinned(text["input_ids"][rows, :length].astype(np.int64)),
            token_count=self._pinned(counts[rows]),
            padded=bool(counts[rows[-1]] < length),
            source=None if source is None else self._pinned(source),
            target=self._pinned(target),
        )

    def _recorded_positions(
        self, text: Mapping[str, np.ndarray], counts: np.ndarray, rows: np.ndarray, length: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Returns ``source`` and ``target`` of a `Batch`."""
        if self.layout.positions == "pooled":
            return None, rows
        if self.layout.positions == "masked":
            masked = text["masked_positions"][rows]
            row, slot = np.nonzero(masked >= 0)
            return row * length + masked[row, slot], rows[row] * self.layout.recorded + slot
        row, position = np.nonzero(np.arange(length) < counts[rows][:, None])
        source = row * length + position
        target = rows[row] * self.layout.recorded + position
        return None if len(source) == len(rows) * length else source, target

    def _pinned(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Starts a copy to the device and does not wait for its end. The tensor must be pinned, unless the device
    is a CPU."""
    if device.type == "cpu":
        return tensor
    assert tensor.is_pinned()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Starts a copy on the current stream; returns its target, in pinned memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
