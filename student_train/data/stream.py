"""The batches of one rank, which threads read and collate before the training step needs them.

A stream's whole state is the number of its next step: a new stream from there gives identical batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from student_train.data.collate import Batch, collate
from student_train.data.order import Locations, SampleOrder, micro_batch_rows
from student_train.data.pinned_buffers import BufferPool

PARALLEL_DOWNLOADS = 8
"""Number of blocks of a remote store that are downloaded at once, since a download mostly waits."""

Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]
"""A function that returns an uninitialised array for a column, given the column's name, shape and dtype."""


def new_array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An ``Allocate`` function that uses new memory."""
    return np.empty(shape, dtype)


class Reader(Protocol):
    """The interface of ``student_train.data.reading.Samples``. Several threads call its methods at once."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the columns that ``gather`` returns."""
        ...

    def gather(
        self, epoch: np.ndarray, block: np.ndarray, row: np.ndarray, allocate: Allocate = new_array
    ) -> Mapping[str, np.ndarray]:
        """Reads n samples, given by masking epoch, block and row, each int64 [n]. Returns column name ->
        array [n, *shape], made by ``allocate``."""
        ...

    def fetch(self, epoch: int, block: int) -> None:
        """Downloads a block of a remote store to this machine, unless it is there."""
        ...


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step."""

    number: int
    """Number of the step, from 0 in the stream's order; `Phases` counts on from phase to phase."""
    micro_batches: list[Batch]
    """This rank's micro-batches; every rank has the same number."""
    locations: Locations
    """Locations of the samples of all ranks."""

    @property
    def tokens(self) -> int:
        """Number of tokens without padding in this rank's part."""
        return sum(batch.tokens for batch in self.micro_batches)

    @property
    def masked(self) -> int:
        """Number of masked tokens in this rank's part."""
        return sum(batch.masked for batch in self.micro_batches)


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a rank reads, and how far ahead of the training step."""

    rank: int
    world: int
    micro_batch_size: int
    prefetch: int = 4
    """Number of micro-batches prepared in advance, rounded up to whole steps."""
    threads: int = 2
    """Number of threads that read and collate."""


class Stream:
    """Iterates the steps [start, stop) of an order for one rank. Close it, or use it as a context manager.

    Raises UserError at the step that needs a damaged sample, although a thread read the sample earlier.
    """

    def __init__(
        self,
        reader: Reader,
        order: SampleOrder,
        share: Share,
        start: int,
        stop: int,
        *,
        masked_only: bool = False,
        bfloat16: bool = False,
        remote: bool = False,
        buffers: BufferPool | None = None,
    ) -> None:
        """``masked_only``, ``bfloat16``: see `collate`. ``remote``: blocks are downloaded a window (see
        `order`) ahead, except the first window's. ``buffers``: for copies to a GPU; None: no copies."""
        assert start >= 0
        assert stop <= order.steps
        self._reader, self._order, self._share = reader, order, share
        self._masked_only, self._bfloat16, self._remote = masked_only, bfloat16, remote
        self._buffers = buffers
        self._next, self._stop = start, stop
        micro_batches = len(self._rows(order.batch_size))
        self._steps_ahead = max(1, -(-share.prefetch // micro_batches))
        self._pool = ThreadPoolExecutor(share.threads, thread_name_prefix="stream")
        self._fetchers = ThreadPoolExecutor(PARALLEL_DOWNLOADS, thread_name_prefix="fetch")
        self._pending: deque[tuple[int, Locations, list[Future[Batch]]]] = deque()
        self._queued_window = start // order.window_batches  # the first is downloaded when it is read
        self._closing = False  # once True, queued downloads no longer start

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._submit_ahead()
        if not self._pending:
            self.close()
            raise StopIteration
        number, locations, batches = self._pending.popleft()
        self._submit_ahead()
        try:
            return Step(number, [batch.result() for batch in batches], locations)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads and the iteration."""
        self._closing = True
        self._next = self._stop
        self._pending.clear()
        for pool in (self._pool, self._fetchers):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rows(self, n: int) -> list[range]:
        """Returns the rows of a global batch of ``n`` rows that this rank reads, by micro-batch."""
        share = self._share
        return micro_batch_rows(n, share.micro_batch_size, share.rank, share.world)

    def _submit_ahead(self) -> None:
        while self._next < self._stop and len(self._pending) < self._steps_ahead:
            step, self._next = self._next, self._next + 1
            if self._remote:
                self._fetch_window(step // self._order.window_batches + 1)
            locations = self._order.batch(step)
            batches = [self._submit(locations, rows) for rows in self._rows(len(locations))]
            self._pending.append((step, locations, batches))

    def _submit(self, locations: Locations, rows: range) -> Future[Batch]:
        # Empty rows: the batch's first sample with weight 0, as all ranks run equally many micro-batches.
        part = slice(rows.start, rows.stop) if rows else slice(0, 1)
        samples = Locations(locations.masking_epoch[part], locations.block[part], locations.row[part])
        return self._pool.submit(self._collate, samples, 1.0 if rows else 0.0)

    def _collate(self, locations: Locations, weight: float) -> Batch:
        samples = locations.masking_epoch, locations.block, locations.row
        if self._buffers is None:
            return collate(self._reader.gather(*samples), self._masked_only, self._bfloat16, weight)
        with self._buffers.buffer() as buffer:
            columns = self._reader.gather(*samples, buffer.allocate)
            return buffer.send(collate(columns, self._masked_only, self._bfloat16, weight))

    def _fetch_window(self, window: int) -> None:
        """Queues the download of this rank's blocks of ``window``, unless they are queued."""
        first_step = window * self._order.window_batches
        if window <= self._queued_window or first_step >= self._stop:
            return
        self._queued_window = window
        locations = self._order.window_locations(window, self._share.rank, self._share.world)
        needed = np.unique(np.stack([locations.masking_epoch, locations.block]), axis=1)
        for epoch, block in needed.T.tolist():
            self._fetchers.submit(self._fetch, epoch, block)

    def _fetch(self, epoch: int, block: int) -> None:
        if not self._closing:
            try:
                self._reader.fetch(epoch, block)
            except Exception:
                return  # the step that needs the block will read it again and report the error
