"""Copies batches to a GPU through a few pinned buffers, on a stream of its own.

A GPU copies from pinned memory without its host. Pinning memory is slow, so the buffers are kept. The reader
gathers the teacher's columns directly into a buffer; the rest of the batch is put behind them. One copy then
brings everything to the GPU while it still computes the batch before. A buffer is filled again after its copy
has ended; only a collating thread waits for that, never the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_train.data.collate import UNCHANGED, Batch

ALIGNMENT = 256
"""Bytes to which every tensor in a buffer is aligned, as torch's allocator does on a GPU."""


class Slot:
    """A pinned buffer with the tensors of one batch."""

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._copied: Any = None
        """Event at the end of the last copy out of the buffer."""

    def empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array for a column of a batch: in the buffer, if the batch keeps the column as it is."""
        if name not in UNCHANGED:
            return np.empty(shape, dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        start, self._used = self._used, _aligned(self._used + size)
        if self._used > len(self._buffer):
            return np.empty(shape, dtype)
        return self._buffer[start : start + size].numpy().view(dtype).reshape(shape)

    def start(self) -> None:
        """Empties the buffer, as soon as its last copy has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        self._used = 0

    def send(self, batch: Batch) -> Batch:
        """Starts to copy the batch to the device, and returns it there without waiting for the copy."""
        places = self._put(batch)
        backend = torch.get_device_module(self._device)
        with backend.stream(self._stream):
            there = torch.empty(self._used, dtype=torch.uint8, device=self._device)
            there.copy_(self._buffer[: self._used], non_blocking=True)
            event = backend.Event()
            event.record(self._stream)
        self._copied = event
        moved = {
            name: there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, (start, tensor) in places.items()
        }
        return batch.moved(moved, event)

    def _put(self, batch: Batch) -> dict[str, tuple[int, Tensor]]:
        """Puts every tensor of the batch into the buffer, which grows if needed: name -> offset, tensor."""
        while True:
            places = {}
            for name, tensor in batch.tensors().items():
                start = tensor.data_ptr() - self._buffer.data_ptr()
                if not 0 <= start < len(self._buffer):
                    start, self._used = self._used, _aligned(self._used + tensor.nbytes)
                    if self._used <= len(self._buffer):
                        flat = tensor.contiguous().view(-1).view(torch.uint8)
                        self._buffer[start : start + tensor.nbytes].copy_(flat)
                places[name] = start, tensor
            if self._used <= len(self._buffer):
                return places
            pinned = self._device.type == "cuda"
            self._buffer = torch.empty(self._used, dtype=torch.uint8, pin_memory=pinned)
            self._used = 0


class Ring:
    """Some slots, which collating threads take in turn, and the stream on which they copy."""

    def __init__(self, device: torch.device, slots: int) -> None:
        with torch.device(device):
            stream = torch.get_device_module(device).Stream()
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(slots):
            self._free.put(Slot(device, stream))

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot that is ready to be filled; waits until there is one."""
        slot = self._free.get()
        try:
            slot.start()
            yield slot
        finally:
            self._free.put(slot)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
