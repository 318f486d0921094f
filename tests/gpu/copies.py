"""Checks that batches are copied unchanged to the device through pinned buffers while the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from student_train.data.collate import Batch
from student_train.data.pinned_buffers import BufferPool
from tests.gpu.models import Size, batch_of, layout_for, random_text, tiny_config

BATCHES, SLOTS, THREADS = 24, 3, 2
PRODUCTS = 8
"""Matrix products on the device between two batches, so that copies and computation overlap."""


def ring(device: torch.device, size: Size) -> dict[str, Any]:
    """Checks that batches sent through a ring by two threads equal the collated batches. The thread that
    receives them must not wait for the copies."""
    layout = layout_for(tiny_config(), 32, 0, 1)
    torch.manual_seed(0)
    collated = [_batch(layout, rows) for rows in range(1, BATCHES + 1)]
    side = 1024 if device.type == "cuda" else 64  # on a CPU there is nothing for copies to overlap with
    sender, square = BufferPool(device, SLOTS), torch.randn(side, side, device=device)

    def send(batch: Batch) -> Batch:
        with sender.buffer() as buffer:
            return buffer.send(batch)

    arrived = []
    with ThreadPoolExecutor(THREADS) as threads:
        for sent in threads.map(send, collated):
            for _ in range(PRODUCTS):
                square = square @ square / 32
            with waits_are_errors(device):
                here = sent.to(device)
                arrived.append({name: tensor + 0 for name, tensor in here.tensors().items()})
    for number, (copy, batch) in enumerate(zip(arrived, collated, strict=True)):
        for name, tensor in batch.tensors().items():
            assert torch.equal(copy[name].cpu(), tensor), f"batch {number}: {name} differs"
    return {"batches": BATCHES, "slots": SLOTS}


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """A context in which an operation for which the host waits for the GPU raises RuntimeError. It uses
    torch's sync debug mode, and has no effect on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _batch(layout: Any, rows: int) -> Batch:
    text = random_text(layout, rows, padded=True)
    states = torch.randn(rows, layout.length, layout.hidden_size).half().numpy()
    return batch_of(layout, text, {"hidden_states": states})
