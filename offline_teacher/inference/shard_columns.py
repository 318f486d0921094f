"""The columns of a shard on the device, checked while they are filled, and their one copy to the host.

All columns lie in one block of memory, after two numbers by which the host learns of impossible values.

Axes: n samples of a shard, P recorded positions of a sequence, N of a batch, K top-k, T temperatures.
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
"""Column dtype -> dtype on the device; signed integers of the same size replace unsigned ones."""
ALIGNMENT = 16
"""Each column starts at a multiple of this many bytes. The two numbers are in the first ALIGNMENT bytes."""


@dataclass(frozen=True)
class Pending:
    """Columns that are being copied to the host."""

    block: Tensor
    specs: Mapping[str, Column]
    count: int
    copy_done: torch.cuda.Event | None
    """Event at the end of the copy; None on a CPU."""
    source: object = None
    """The columns on the device. This reference keeps them alive during the copy."""

    def wait(self) -> dict[str, np.ndarray]:
        """Returns arrays [n, ...] in the store's dtypes. Raises UserError if a number exceeds float16."""
        if self.copy_done is not None:
            self.copy_done.synchronize()
        largest = float(_numbers(self.block)[0])
        if largest > LARGEST_FLOAT16:  # NaN passes; `possible` tells of it
            raise UserError(
                "store.hidden_states: float16 cannot hold this teacher's hidden states, the largest of which"
                f" is {largest:.3g}; set store.hidden_states: bfloat16, or int8"
            )
        tensors = _views(self.block, self.specs, self.count)
        return {name: tensor.numpy().view(self.specs[name].dtype) for name, tensor in tensors.items()}

    def possible(self) -> bool:
        """Returns whether the device found all values finite, in order and in range; call ``wait`` first."""
        largest, impossible = _numbers(self.block)
        return not math.isnan(float(largest)) and not float(impossible)


class ShardColumns:
    """The columns of a shard on the device, which are filled batch by batch. Unused slots are 0."""

    def __init__(self, specs: Mapping[str, Column], count: int, device: torch.device) -> None:
        self._specs, self._count = specs, count
        size = sum(_place(spec, count) for spec in specs.values())
        self._block = torch.zeros(ALIGNMENT + size, dtype=torch.uint8, device=device)
        self._tensors = _views(self._block, specs, count)
        self._largest, self._impossible = _numbers(self._block)

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

    def check(self, wrong: Tensor) -> None:
        """Records whether any of these bools, of any shape, is true."""
        self._impossible.add_(wrong.any())

    def copy(self, stream: torch.cuda.Stream | None) -> Pending:
        """Starts the copy to the host on this stream; None on a CPU, where nothing is copied."""
        if stream is None:
            return Pending(self._block, self._specs, self._count, None)
        stream.wait_stream(torch.cuda.current_stream(self._block.device))
        with torch.cuda.stream(stream):
            block, copy_done = to_host(self._block), torch.cuda.Event(blocking=True)
            copy_done.record(stream)
        return Pending(block, self._specs, self._count, copy_done, self)


def impossible_top_k(
    ids: Tensor, logits: Tensor, logsumexp: Tensor, temperatures: Tensor, vocab_size: int
) -> Tensor:
    """Returns, for each position, whether its values cannot be a teacher's, bool [N]: ids int64 [N, K] out of
    range or twice, logits float16 [N, K] not finite or not descending, logsumexp float32 [N, T] not finite or
    not in max/T <= logsumexp <= max/T + log V. `value_checks` has the same rules for the host."""
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


def _place(spec: Column, count: int) -> int:
    """Returns the number of bytes that a column of ``count`` samples takes up."""
    return -(-count * spec.bytes // ALIGNMENT) * ALIGNMENT


def _views(block: Tensor, specs: Mapping[str, Column], count: int) -> dict[str, Tensor]:
    views, start = {}, ALIGNMENT
    for name, spec in specs.items():
        raw = block[start : start + count * spec.bytes].view(DTYPES[spec.dtype.str[1:]])
        views[name] = raw.view(count, *spec.shape)
        start += _place(spec, count)
    return views


def _numbers(block: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two float32 scalars of a block: the largest magnitude among the values that were converted to
    float16, and a number that is not 0 if an impossible value was found."""
    largest, impossible = block[:8].view(torch.float32).unbind()
    return largest, impossible
