"""Samples of a store by masking epoch, block and rows; each is checked before its numbers are returned."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.files.os_errors import reporting_os_errors
from offline_teacher.store.blocks import block_digest, column_view, row_digests
from offline_teacher.store.index import Frame, ShardIndex
from offline_teacher.store.numbering import Task
from offline_teacher.store.paths import SHARDS
from offline_teacher.store.reader import CACHE_BYTES, DamagedStore, Store
from offline_teacher.store.schema import DIGESTS, Columns

Rows = slice | np.ndarray | Sequence[int]

MAPS_KEPT = 256
"""Local shards that a reader keeps mapped."""
GAP_BYTES = 64 << 10
"""Two ranges of a shard that are closer become one request."""
BLOCKS_ADVISED = 4096
"""Number of local blocks whose read requests to the operating system a reader remembers."""


@dataclass(frozen=True)
class _Block:
    """Where a block is."""

    number: int
    """Its number in the masking epoch."""
    rows: int
    task: str
    within: int
    """Its number in its shard."""
    name: str
    """The shard's path below the store."""
    shard: ShardIndex
    frame: Frame
    start: int
    """Offset of its message."""


class BlockReader:
    """Reads columns of one split. Several threads may use one reader."""

    def __init__(self, store: Store, split: str, columns: Sequence[str], cache: Cache | None = None) -> None:
        """``cache`` keeps what is read of a remote store; by default the reader makes a private one.

        UserError if the store has no such split or column.
        """
        if split not in store.splits:
            raise UserError(f"the store {store.root} has no split {split}")
        data = store.layout.data_columns()
        for name in columns:
            if name not in data:
                raise UserError(f"the store {store.root} holds no {name}; it holds {', '.join(data)}")
        self._store, self._split, self._plan = store, split, store.splits[split].plan
        self._columns = tuple(columns)
        wanted = {DIGESTS, *columns}  # in file order
        self._needed = {name: column for name, column in store.layout.columns().items() if name in wanted}
        self._slots = {name: slot for slot, name in enumerate(data)}
        if storage.is_remote(store.root):
            self._cached = cache or Cache(None, CACHE_BYTES)
        self._open = lru_cache(MAPS_KEPT)(partial(_mapped, store.root))  # views of a map keep it mapped
        self._advised: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Bytes that were read and checked in local files, or that were requested from an object store."""
        self.requests = 0
        """Ranges that were requested from an object store."""

    def rows(self, epoch: int, block: int, rows: Rows | None = None) -> Columns:
        """Column -> array [n, *shape] of these rows of a block (default: all), every sample checked.

        Read-only views if ``rows`` is a slice, else copies; bfloat16 comes as its bits in uint16. Raises
        DamagedStore, which names file, task, block, sample and column.
        """
        place = self._find(epoch, block)
        wanted = slice(None) if rows is None else rows
        if not storage.is_remote(self._store.root):
            found = self._checked(place, self._local(place), wanted)
            with self._lock:
                self.bytes_read += place.rows * self._needed[DIGESTS].bytes
                self.bytes_read += sum(array.nbytes for array in found.values())
            return found
        try:
            return self._checked(place, self._remote(place), wanted)
        except DamagedStore:  # in the cache or on the way: once more from the source
            for start, stop in self._spans(place):
                self._cached.drop(_entry(place, start, stop))
            return self._checked(place, self._remote(place), wanted)

    def task_rows(self, task: Task, rows: np.ndarray) -> Columns:
        """The columns [n, ...] of some rows of a task, ascending, counted from its first; as of ``rows``."""
        size, pieces = self._plan.block_samples, []
        for place, block in enumerate(self._plan.blocks(task)):
            here = rows[(rows >= place * size) & (rows < (place + 1) * size)] - place * size
            if len(here):
                pieces.append(self.rows(task.epoch, block, here))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _find(self, epoch: int, number: int) -> _Block:
        task, shard_number, within, rows = self._plan.place(epoch, number)
        index = self._store.task_index(self._split, task)
        shard = index.shards[shard_number]
        whole = index.frames.get(self._plan.plan.block_samples)  # None: the block is the first, and short
        start = shard.start + (within * whole.bytes if whole else 0)
        name = f"{SHARDS}/{self._split}/{index.task}/{shard.file}"
        return _Block(number, rows, index.task, within, name, shard, index.frames[rows], start)

    def _checked(self, place: _Block, views: Mapping[str, np.ndarray], wanted: Rows) -> Columns:
        digests = views[DIGESTS]
        if block_digest(digests) != place.shard.block_digests[place.within]:
            raise self._damaged(place, f"column {DIGESTS}")
        expected = digests[wanted]
        found = {}
        for name in self._columns:
            found[name] = views[name][wanted]
            actual, recorded = row_digests(found[name]), expected[:, self._slots[name]]
            if actual.tobytes() != recorded.tobytes():
                row = int(np.arange(place.rows)[wanted][int((actual != recorded).argmax())])
                sequence = self._plan.sequence_ids(place.number)[row]
                raise self._damaged(place, f"sample {row} (sequence {sequence}), column {name}")
        return found

    def _damaged(self, place: _Block, what: str) -> DamagedStore:
        where = f"{place.name}, task {place.task}, block {place.within} of the shard"
        return DamagedStore(self._store.root, f"{where}, {what}")

    # --- local ---

    def _local(self, place: _Block) -> Columns:
        data = self._map(place)
        self._advise(place, data)
        return {
            name: column_view(data, place.start + place.frame.offsets[name], place.rows, column)
            for name, column in self._needed.items()
        }

    def _advise(self, place: _Block, data: mmap.mmap) -> None:
        """Asks the operating system to read the needed bytes of a block at its first use, and no others.

        Without this, the system reads up to megabytes around every missing page and drops pages others need.
        """
        key = place.name, place.within
        with self._lock:
            if key in self._advised:
                return
            if len(self._advised) == BLOCKS_ADVISED:
                self._advised.clear()
            self._advised.add(key)
        for start, stop in self._spans(place):
            first = (place.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_WILLNEED, first, place.start + stop - first)

    def _map(self, place: _Block) -> mmap.mmap:
        try:
            data = self._open(place.name)
        except (FileNotFoundError, ValueError):  # absent, or empty
            raise self._damaged(place, f"it is missing; {place.shard.bytes} bytes belong there") from None
        if len(data) != place.shard.bytes:
            raise self._damaged(place, f"it has {len(data)} bytes; {place.shard.bytes} bytes belong there")
        return data

    def _spans(self, place: _Block) -> list[tuple[int, int]]:
        """Byte ranges of the block's message to request: the needed columns, near ones together."""
        spans: list[tuple[int, int]] = []
        for name, column in self._needed.items():
            start = place.frame.offsets[name]
            stop = start + place.rows * column.bytes
            if spans and start - spans[-1][1] <= GAP_BYTES:
                spans[-1] = spans[-1][0], stop
            else:
                spans.append((start, stop))
        return spans

    # --- remote ---

    def _remote(self, place: _Block) -> Columns:
        views = {}
        for start, stop in self._spans(place):
            data = self._range(place, start, stop)
            for name, column in self._needed.items():
                offset = place.frame.offsets[name]
                if start <= offset < stop:
                    views[name] = column_view(data, offset - start, place.rows, column)
        return views

    def _range(self, place: _Block, start: int, stop: int) -> Any:
        def fetch() -> bytes:
            with self._lock:
                self.bytes_read += stop - start
                self.requests += 1
            path = storage.join(self._store.root, place.name)
            try:
                return storage.read_range(path, place.start + start, place.start + stop)
            except UserError as error:
                size = _size(path)
                if size == place.shard.bytes:
                    raise
                what = "it is missing" if size is None else f"it has {size} bytes"
                belong = f"{place.shard.bytes} bytes belong there"
                raise self._damaged(place, f"{what}; {belong}") from error

        data = self._cached.get_or_fetch(_entry(place, start, stop), fetch)
        if len(data) == stop - start:
            return data
        self._cached.drop(_entry(place, start, stop))  # a crash of the machine cut it short
        return self._cached.get_or_fetch(_entry(place, start, stop), fetch)


def _entry(place: _Block, start: int, stop: int) -> str:
    """The name in the cache of a range of a block."""
    return f"{place.shard.file.removesuffix('.arrow')}-{place.start + start}-{place.start + stop}"


def _mapped(root: str, name: str) -> mmap.mmap:
    path = storage.join(root, name)
    with reporting_os_errors(path, FileNotFoundError), open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _size(path: str) -> int | None:
    return storage.size(path) if storage.exists(path) else None
