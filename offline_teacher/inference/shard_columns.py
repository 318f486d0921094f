"""The columns of a shard on the device, checked while they are filled, and their one copy to the host.

All columns lie in one buffer, after two flags by which the host learns of impossible values.

Axes: n samples of a shard; recorded positions: P of a sequence, N of a batch; K top-k, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infra.errors import UserError
from offline_teacher.inference.batches import to_host
from offline_teacher.store.schema import Column

LARGEST_FLOAT16 = 65504.0
DTYPES = {"u2": torch.int16, "u4": torch.int32, "f2": torch.float16, "f4": torch.float32, "i1": torch.int8}
"""Dtype without its byte order -> dtype on the device; signed integers replace unsigned ones of that size."""
ALIGNMENT = 16
"""Each column starts at a multiple of this many bytes. The two flags are in the first ALIGNMENT bytes."""


@dataclass(frozen=True)
class Pending:
    """Columns that are being copied to the host."""

    buffer: Tensor
    columns: Mapping[str, Column]
    count: int
    copy_done: torch.cuda.Event | None
    """Event at the end of the copy; None on a CPU."""
    source: object = None
    """The columns on the device. This reference keeps them alive during the copy."""

    def wait(self) -> dict[str, np.ndarray]:
        """Returns arrays [n, ...] in the store's dtypes. Raises UserError if a number exceeds float16."""
        if self.copy_done is not None:
            self.copy_done.synchronize()
        largest = float(_flags(self.buffer)[0])
        if LARGEST_FLOAT16 < largest < math.inf:  # of infinity and NaN, `values_possible` is False
            what, remedy = "hidden states", "store.hidden_states: bfloat16, or int8"
            if "embedding" in self.columns:
                what, remedy = "embeddings", "store.positions: all and store.hidden_states: bfloat16"
            raise UserError(
                f"store.hidden_states: float16 cannot hold this teacher's {what}, the largest of which is"
                f" {largest:.3g}; set {remedy}"
            )
        tensors = _views(self.buffer, self.columns, self.count)
        return {name: tensor.numpy().view(self.columns[name].dtype) for name, tensor in tensors.items()}

    def values_possible(self) -> bool:
        """Returns whether the device found all values finite, in order and in range; call ``wait`` first."""
        largest, impossible = _flags(self.buffer)
        return math.isfinite(float(largest)) and not float(impossible)


class ShardColumns:
    """The columns of a shard on the device, which are filled batch by batch. Unused slots are 0."""

    def __init__(self, columns: Mapping[str, Column], count: int, device: torch.device) -> None:
        self._columns, self._count = columns, count
        size = sum(_padded_bytes(column, count) for column in columns.values())
        self._buffer = torch.zeros(ALIGNMENT + size, dtype=torch.uint8, device=device)
        self._tensors = _views(self._buffer, columns, count)
        self._largest, self._impossible = _flags(self._buffer)

    def put(self, values: Mapping[str, Tensor], target: Tensor) -> None:
        """Writes values [N, ...] to the flat indices ``target`` [N] of the columns [n, P, ...]."""
        for name, value in values.items():
            column = self._tensors[name]
            column.flatten(0, 1).index_copy_(0, target, value.to(column.dtype))

    def put_embeddings(self, embeddings: Tensor, rows: Tensor) -> None:
        """Writes embeddings [B, D] to the samples ``rows`` [B]."""
        self._tensors["embedding"].index_copy_(0, rows, self.to_float16(embeddings))

    def to_float16(self, states: Tensor) -> Tensor:
        """Converts to float16, and keeps the largest magnitude, by which `Pending` detects an overflow or
        NaN."""
        if states.numel():
            torch.maximum(self._largest, states.abs().amax().float(), out=self._largest)
        return states.to(torch.float16)

    def record_impossible(self, wrong: Tensor) -> None:
        """Records whether any of these bools, of any shape, is true."""
        self._impossible.add_(wrong.any())

    def copy(self, stream: torch.cuda.Stream | None) -> Pending:
        """Starts the copy to the host on ``stream``, which is None on a CPU, where nothing is copied."""
        if stream is None:
            return Pending(self._buffer, self._columns, self._count, None)
        stream.wait_stream(torch.cuda.current_stream(self._buffer.device))
        with torch.cuda.stream(stream):
            buffer, copy_done = to_host(self._buffer), torch.cuda.Event(blocking=True)
            copy_done.record(stream)
        return Pending(buffer, self._columns, self._count, copy_done, self)


def impossible_top_k(
    ids: Tensor, logits: Tensor, logsumexp: Tensor, temperatures: Tensor, vocab_size: int
) -> Tensor:
    """Returns bool [N]: whether a position's values are impossible. That is: ids int64 [N, K] out of range or
    twice, logits float16 [N, K] not finite or not descending, logsumexp float32 [N, T] not finite or not in
    max/T <= logsumexp <= max/T + log V. `store.value_checks` has the same rules for the host."""
    ascending = ids.sort(1).values
    scaled = logits[:, :1].float() / temperatures
    above = logsumexp - scaled
    tolerance = scaled.abs() * 2**-10 + 1e-4  # of the rounding of the largest logit to float16
    return (
        ((ids < 0) | (ids >= vocab_size)).any(1)
        | (ascending[:, 1:] == ascending[:, :-1]).any(1)
        | ~torch.isfinite(logits).all(1)
        | (logits[:, 1:] > logits[:, :-1]).any(1)
        | ~((above >= -tolerance) & (above <= tolerance + math.log(vocab_size))).all(1)  # also true for NaN
    )


def _padded_bytes(column: Column, count: int) -> int:
    """Returns the number of bytes that a column of ``count`` samples takes up, with what aligns the next."""
    return -(-count * column.bytes // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, columns: Mapping[str, Column], count: int) -> dict[str, Tensor]:
    views, start = {}, ALIGNMENT
    for name, column in columns.items():
        raw = buffer[start : start + count * column.bytes].view(DTYPES[column.dtype.str[1:]])
        views[name] = raw.view(count, *column.shape)
        start += _padded_bytes(column, count)
    return views


def _flags(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two float32 scalars of a buffer: the largest magnitude among the values that were converted to
    float16, and a number that is not 0 if an impossible value was found."""
    largest, impossible = buffer[:8].view(torch.float32).unbind()
    return largest, impossible
