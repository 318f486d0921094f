"""Batches reach the device through pinned buffers unchanged, and no buffer is reused or read too early."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from student_train.data.collate import Batch, collate
from student_train.data.order import SampleOrder
from student_train.data.pinned_buffers import ALIGNMENT, BufferPool, PinnedBuffer
from student_train.data.stream import Share, Stream
from tests.student_train.data.test_stream import LAYOUT, MemoryReader, plan_of, sample_columns

CPU = torch.device("cpu")


class Backend:
    """Replaces torch.cuda by streams that only record the operations on them."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.main = self.Stream("main")

    def Stream(self, name: str = "side") -> Any:  # noqa: N802
        log = self.log

        class Recorded:
            def wait_event(self, event: Any) -> None:
                log.append(f"{name} waits for copy {event.number}")

        return Recorded()

    def Event(self) -> Any:  # noqa: N802
        log = self.log

        class Recorded:
            number = sum(line.startswith("copied") for line in log) + 1

            def record(self, stream: Any) -> None:
                log.append(f"copied {self.number}")

            def synchronize(self) -> None:
                log.append(f"host waits for copy {self.number}")

        return Recorded()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append("side: on")
        yield
        self.log.append("side: off")

    def current_stream(self) -> Any:
        return self.main


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    backend = Backend(lines)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    return lines


def batch_of(*sequences: int) -> Batch:
    return collate(sample_columns(LAYOUT, [(0, number) for number in sequences]), False, False, 1.0)


def same(ours: Batch, theirs: Batch) -> None:
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in theirs.tensors().items():
        assert ours.tensors()[name].dtype == tensor.dtype
        assert torch.equal(ours.tensors()[name], tensor), name
    assert (ours.no_padding, ours.tokens, ours.masked, ours.weight) == (
        theirs.no_padding, theirs.tokens, theirs.masked, theirs.weight,
    )  # fmt: skip


@pytest.mark.parametrize("slots", [1, 3])
def test_a_stream_through_pinned_buffers_gives_the_same_batches(slots: int) -> None:
    """Two threads use every buffer many times, for micro-batches of several sizes and for dummies."""
    plan = plan_of(23, 18)
    order = SampleOrder(plan, 0, 7, 12 * 7 + 1, 4)
    found = []
    for pool in (None, BufferPool(CPU, slots)):
        with Stream(MemoryReader(plan), order, Share(1, 3, 2), 0, order.steps, buffers=pool) as stream:
            found.append([[batch.to(CPU) for batch in step.micro_batches] for step in stream])
    plain, sent = found
    assert len(plain) == order.steps
    assert {batch.weight for step in plain for batch in step} == {0.0, 1.0}
    for ours, theirs in zip(sent, plain, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)


def test_which_stream_waits_for_a_copy(log: list[str]) -> None:
    """The step's stream waits for the copy on the side stream. The host waits only before it reuses the
    buffer."""
    pool = BufferPool(CPU, 2)
    sent = []
    for number in range(3):
        with pool.buffer() as buffer:
            sent.append(buffer.send(batch_of(number)))
    copies = [["side: on", f"copied {number}", "side: off"] for number in (1, 2, 3)]
    assert log == [*copies[0], *copies[1], "host waits for copy 1", *copies[2]]
    log.clear()
    arrived = sent[1].to(CPU)
    assert log == ["main waits for copy 2"]
    assert arrived.to(CPU).copy_event is None
    assert log == ["main waits for copy 2"]
    for number, batch in enumerate(sent):
        same(batch, batch_of(number))


def test_columns_are_gathered_into_the_buffer() -> None:
    """After the first batch, whose size was unknown, the large columns are not copied on the host."""
    buffer = PinnedBuffer(CPU, torch.cpu.Stream())
    buffer.send(batch_of(1, 2))
    buffer.clear()
    columns = {}
    for name, values in sample_columns(LAYOUT, [(0, 3), (0, 4)]).items():
        columns[name] = buffer.allocate(name, values.shape, values.dtype)
        columns[name][:] = values
    inside = {name for name in columns if _is_inside(buffer, columns[name])}
    assert inside == {"hidden_states", "hidden_scale", "topk_logits", "logsumexp"}
    before = buffer._buffer
    same(buffer.send(collate(columns, False, False, 1.0)), batch_of(3, 4))
    assert buffer._buffer is before


def _is_inside(buffer: PinnedBuffer, array: np.ndarray) -> bool:
    start = array.__array_interface__["data"][0] - buffer._buffer.data_ptr()
    assert start % ALIGNMENT == 0 or not 0 <= start < len(buffer._buffer)
    return 0 <= start < len(buffer._buffer)


def test_a_batch_that_does_not_fit_grows_the_buffer() -> None:
    """Some of its columns were gathered into the old buffer, others beside it."""
    buffer = PinnedBuffer(CPU, torch.cpu.Stream())
    for sequences in ((1,), (1, 2, 3, 4, 5, 6, 7), (8, 9)):
        buffer.clear()
        columns = {}
        for name, values in sample_columns(LAYOUT, [(0, number) for number in sequences]).items():
            columns[name] = buffer.allocate(name, values.shape, values.dtype)
            columns[name][:] = values
        same(buffer.send(collate(columns, False, False, 1.0)), batch_of(*sequences))


def test_an_error_gives_the_slot_back() -> None:
    pool = BufferPool(CPU, 1)
    with pytest.raises(UserError, match="damaged"), pool.buffer():
        raise UserError("damaged")
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(lambda: pool.buffer().__enter__()).result(timeout=5)
    assert isinstance(taken, PinnedBuffer)
