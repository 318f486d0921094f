"""The batches of one rank, read and collated ahead of the step by threads.

The only state of a stream is the number of its next step. A new stream from that step gives identical
batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from student_train.data.collate import Batch, collate
from student_train.data.order import Places, SampleOrder, micro_batch_rows
from student_train.data.ring import Ring

FETCHES = 8
"""Blocks of a remote store that are downloaded at once; each costs a round trip."""


Empty = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]
"""Allocates the array of a column, by name, shape and dtype, without setting its values."""


def new_array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An ``Empty`` in new memory."""
    return np.empty(shape, dtype)


class Reader(Protocol):
    """What the stream needs of ``student_train.data.reading.Samples``. Several threads call it."""

    @property
    def names(self) -> Sequence[str]:
        """The columns that it reads."""
        ...

    def gather(
        self, epoch: np.ndarray, block: np.ndarray, row: np.ndarray, empty: Empty = new_array
    ) -> Mapping[str, np.ndarray]:
        """Reads and checks n samples, given by masking epoch, block and row: arrays [n, *shape], which
        ``empty`` allocates."""
        ...

    def fetch(self, epoch: int, block: int) -> None:
        """Brings a block of a remote store to this machine, unless it is there."""
        ...


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimiser step."""

    step: int
    micro_batches: list[Batch]
    """This rank's micro-batches; every rank has the same number."""
    places: Places
    """Where the samples of the global batch are, that is, of all ranks."""

    @property
    def tokens(self) -> int:
        """Real tokens of this rank's share."""
        return sum(batch.tokens for batch in self.micro_batches)

    @property
    def masked(self) -> int:
        """Masked tokens of this rank's share."""
        return sum(batch.masked for batch in self.micro_batches)


@dataclass(frozen=True)
class Share:
    """This rank's part of every global batch, and how it is read."""

    rank: int
    world: int
    micro_batch_size: int
    prefetch: int = 4
    """Micro-batches prepared in advance, rounded up to whole steps."""
    threads: int = 2


class Stream:
    """Iterates the steps [start, stop) of a run for one rank.

    A damaged sample raises ``UserError`` at the step that needs it, even if it was read before. Use the
    stream as a context manager, or ``close`` it: its threads end after their current micro-batch.
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
        ring: Ring | None = None,
    ) -> None:
        """``ring``: brings the batches to a GPU; without one they stay in the host's memory."""
        assert start >= 0
        assert stop <= order.steps
        self._reader, self._order, self._share = reader, order, share
        self._masked_only, self._bfloat16, self._remote = masked_only, bfloat16, remote
        self._ring = ring
        self._next, self._stop = start, stop
        micro_steps = len(self._rows(order.batch_size))
        self._steps_ahead = max(1, -(-share.prefetch // micro_steps))
        self._pool = ThreadPoolExecutor(share.threads, thread_name_prefix="stream")
        self._fetchers = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._pending: deque[tuple[int, Places, list[Future[Batch]]]] = deque()
        self._fetched_window = start // order.window_batches - 1
        self._closing = False

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._submit_ahead()
        if not self._pending:
            self.close()
            raise StopIteration
        step, places, batches = self._pending.popleft()
        self._submit_ahead()
        try:
            return Step(step, [batch.result() for batch in batches], places)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads; iteration is over."""
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
        share = self._share
        return micro_batch_rows(n, share.micro_batch_size, share.rank, share.world)

    def _submit_ahead(self) -> None:
        while self._next < self._stop and len(self._pending) < self._steps_ahead:
            step, self._next = self._next, self._next + 1
            if self._remote:
                self._fetch_window(step // self._order.window_batches + 1)
            places = self._order.batch(step)
            batches = [self._submit(places, rows) for rows in self._rows(len(places))]
            self._pending.append((step, places, batches))

    def _submit(self, places: Places, rows: range) -> Future[Batch]:
        # A rank without samples takes one of weight 0, so that all ranks run the same micro-batches.
        part = slice(rows.start, rows.stop) if rows else slice(0, 1)
        own = Places(places.masking_epoch[part], places.block[part], places.row[part])
        return self._pool.submit(self._collate, own, 1.0 if rows else 0.0)

    def _collate(self, places: Places, weight: float) -> Batch:
        where = places.masking_epoch, places.block, places.row
        if self._ring is None:
            return collate(self._reader.gather(*where), self._masked_only, self._bfloat16, weight)
        with self._ring.slot() as slot:
            columns = self._reader.gather(*where, slot.empty)
            return slot.send(collate(columns, self._masked_only, self._bfloat16, weight))

    def _fetch_window(self, window: int) -> None:
        """Queues the download of this rank's blocks of the next window, so that no step waits for them."""
        first_of_window = window * self._order.window_batches
        if window <= self._fetched_window or first_of_window >= self._stop:
            return
        self._fetched_window = window
        places = self._order.window_places(window, self._share.rank, self._share.world)
        needed = np.unique(np.stack([places.masking_epoch, places.block]), axis=1)
        for epoch, block in needed.T.tolist():
            self._fetchers.submit(self._fetch, epoch, block)

    def _fetch(self, epoch: int, block: int) -> None:
        if not self._closing:
            try:
                self._reader.fetch(epoch, block)
            except Exception:
                return  # the step that needs the block will read it again and report the error
