"""Copies batches to a GPU from pinned host memory, on a CUDA stream of their own.

A GPU copies from pinned memory while host and kernels go on. Pinning memory is slow, so a few buffers are
kept and reused. The reader writes the teacher's columns directly into a buffer; the other tensors of the
batch are appended to it. One copy then brings the batch to the GPU, which still computes the previous batch.
A collating thread reuses a buffer after the buffer's copy has ended; the training step never waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_train.data.collate import UNCONVERTED, Batch

ALIGNMENT = 256
"""Every tensor starts at a multiple of this many bytes in its buffer, as in torch's GPU allocator."""


class PinnedBuffer:
    """Pinned memory for the tensors of one batch."""

    def __init__(self, device: torch.device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        """Bytes of the buffer that hold tensors."""
        self._copy_event: Any = None
        """Event at the end of the last copy out of the buffer; None before the first copy."""

    def allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an uninitialised array for the column ``name``. It lies in the buffer if there is room and
        the batch uses the column without conversion."""
        if name not in UNCONVERTED:
            return np.empty(shape, dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        start, self._used = self._used, _aligned(self._used + size)
        if self._used > len(self._buffer):
            return np.empty(shape, dtype)
        return self._buffer[start : start + size].numpy().view(dtype).reshape(shape)

    def clear(self) -> None:
        """Waits until the last copy has ended, and makes the whole buffer available again."""
        if self._copy_event is not None:
            self._copy_event.synchronize()
        self._used = 0

    def send(self, batch: Batch) -> Batch:
        """Starts to copy the batch to the GPU. Returns the batch on the GPU, without waiting for the copy."""
        offsets = self._put(batch)
        backend = torch.get_device_module(self._device)
        with backend.stream(self._stream):
            device_bytes = torch.empty(self._used, dtype=torch.uint8, device=self._device)
            device_bytes.copy_(self._buffer[: self._used], non_blocking=True)
            event = backend.Event()
            event.record(self._stream)
        self._copy_event = event
        tensors = {
            name: device_bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, (start, tensor) in offsets.items()
        }
        return batch.with_tensors(tensors, event)

    def _put(self, batch: Batch) -> dict[str, tuple[int, Tensor]]:
        """Puts all tensors into the buffer, which grows if needed. Returns name -> (byte offset, tensor)."""
        while True:
            offsets = {}
            for name, tensor in batch.tensors().items():
                start = tensor.data_ptr() - self._buffer.data_ptr()
                if not 0 <= start < len(self._buffer):  # `allocate` did not put it into the buffer
                    start, self._used = self._used, _aligned(self._used + tensor.nbytes)
                    if self._used <= len(self._buffer):
                        flat = tensor.contiguous().view(-1).view(torch.uint8)
                        self._buffer[start : start + tensor.nbytes].copy_(flat)
                offsets[name] = start, tensor
            if self._used <= len(self._buffer):
                return offsets
            pinned = self._device.type == "cuda"
            self._buffer = torch.empty(self._used, dtype=torch.uint8, pin_memory=pinned)
            self._used = 0


class BufferPool:
    """Several pinned buffers, shared by the collating threads, and the CUDA stream of their copies."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        with torch.device(device):
            stream = torch.get_device_module(device).Stream()
        self._free: SimpleQueue[PinnedBuffer] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(PinnedBuffer(device, stream))

    @contextmanager
    def buffer(self) -> Iterator[PinnedBuffer]:
        """Yields an empty buffer, for one thread at a time; waits until a buffer is free."""
        buffer = self._free.get()
        try:
            buffer.clear()
            yield buffer
        finally:
            self._free.put(buffer)


def _aligned(size: int) -> int:
    """Returns ``size`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT
