"""Reads samples of a store by masking epoch, block and rows, and checks the digests of each sample."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import xxhash

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.files.os_errors import reporting_os_errors
from offline_teacher.store.blocks import block_digest, bytes_of_rows, column_view
from offline_teacher.store.index import Frame, ShardIndex
from offline_teacher.store.numbering import Task
from offline_teacher.store.paths import SHARDS
from offline_teacher.store.schema import DIGESTS, Columns
from offline_teacher.store.store import CACHE_BYTES, DamagedStore, Store

Rows = slice | np.ndarray | Sequence[int]
"""Selection of rows of a block: anything that indexes the first axis of an array."""

SHARDS_KEPT = 256
"""Number of local shards that a reader keeps open, each with one file handle and its open blocks."""
GAP_BYTES = 64 << 10
"""Two needed byte ranges are read in one request if the gap between them is at most this many bytes."""
LOCATIONS_KEPT = 4096
"""Number of blocks of which a reader remembers the location."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Location:
    """Location of a block in the files of the store."""

    number: int
    """Number of the block in its masking epoch."""
    rows: int
    task: str
    in_shard: int
    """Number of the block in its shard."""
    shard_path: str
    """Path of the shard, relative to the store."""
    shard: ShardIndex
    frame: Frame
    offset: int
    """Byte offset in the shard at which the block's message begins."""


@dataclass(frozen=True)
class _Block:
    """An open block, whose column of digests has been checked."""

    location: _Location
    columns: Columns
    """Read-only views [rows, *shape] of the columns that the reader reads."""
    raw: Columns
    """The bytes of these columns, uint8 [rows, bytes]."""
    digests: Columns
    """Column -> recorded digests, uint64 [rows]. They were copied from the file and then checked, so a later
    change of the file cannot change them."""


@dataclass(frozen=True)
class _Shard:
    """A local shard that is mapped into memory."""

    data: mmap.mmap
    blocks: dict[int, _Block]
    """Number of a block in the shard -> the block, if it is open."""


class BlockReader:
    """Reads some columns of one split. Several threads may share a reader."""

    def __init__(self, store: Store, split: str, columns: Sequence[str], cache: Cache | None = None) -> None:
        """``cache`` keeps the bytes read from a remote store; by default the reader creates a private cache.

        Raises UserError if the store has no such split or column.
        """
        if split not in store.splits:
            raise UserError(f"the store {store.root} has no split {split}")
        data = store.layout.data_columns()
        for name in columns:
            if name not in data:
                raise UserError(f"the store {store.root} holds no {name}; it holds {', '.join(data)}")
        self._store, self._split, self._plan = store, split, store.splits[split].plan
        self._columns = tuple(columns)
        needed = {DIGESTS, *columns}
        # In the order of the file, which merging ranges of bytes needs.
        self._needed = {name: own for name, own in store.layout.columns().items() if name in needed}
        self._sample_bytes = sum(data[name].bytes for name in columns)
        self._digest_index = {name: index for index, name in enumerate(data)}
        self._remote = storage.is_remote(store.root)
        if self._remote:
            self._cache = cache or Cache(None, CACHE_BYTES)
        # Training reads many samples of each block within a window, and opening a block costs more than
        # copying a sample. So open blocks are kept. An array that was returned earlier keeps the
        # map of its shard, so it stays valid after the shard is dropped.
        self._shard = lru_cache(SHARDS_KEPT)(partial(_open_shard, store.root))
        self._locate = lru_cache(LOCATIONS_KEPT)(partial(_locate, store, split))
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Number of bytes checked in local files, or requested from an object store, so far."""
        self.requests = 0
        """Number of byte ranges requested from an object store so far."""

    def rows(self, epoch: int, block: int, rows: Rows | None = None) -> Columns:
        """Returns the selected rows of a block (default: all) as a dict: column -> array [n, *shape].

        The arrays are read-only views if ``rows`` is a slice, else copies. bfloat16 columns are returned as
        their bits, uint16. Raises DamagedStore, with file, task, block, sample and column, if the digest of
        a selected row differs from the recorded digest.
        """
        selected = slice(None) if rows is None else rows

        def read(found: _Block) -> Columns:
            arrays = {name: view[selected] for name, view in found.columns.items()}
            numbers = np.arange(found.location.rows)[selected].tolist()
            for name, values in arrays.items():
                self._check(found, name, numbers, bytes_of_rows(values))
            self._count(len(numbers))
            return arrays

        return self._read(epoch, block, read)

    def copy_rows(self, epoch: int, block: int, rows: list[int], target: Columns, places: list[int]) -> None:
        """Copies the n ``rows`` of a block into the distinct ``places`` of ``target``: column -> contiguous
        bytes of samples, uint8 [m, bytes]. Digests are of the copies, so a change of the file meanwhile is
        noticed. Raises DamagedStore like ``rows``."""

        def read(found: _Block) -> None:
            for name, source in found.raw.items():
                copies = target[name]
                for row, place in zip(rows, places, strict=True):
                    copies[place] = source[row]
                self._check(found, name, rows, (copies[place] for place in places))
            self._count(len(rows))

        self._read(epoch, block, read)

    def _read(self, epoch: int, number: int, read: Callable[[_Block], T]) -> T:
        """Opens a block and returns ``read(block)``. Downloads a damaged remote block again, once."""
        location = self._locate(epoch, number)
        if not self._remote:
            return read(self._local_block(location))
        try:
            return read(self._checked(location, self._remote_columns(location)))
        except DamagedStore:  # perhaps only the cached copy or the download is damaged: download again
            for start, stop in self._byte_ranges(location):
                self._cache.drop(_cache_key(location, start, stop))
            return read(self._checked(location, self._remote_columns(location)))

    def task_rows(self, task: Task, rows: np.ndarray) -> Columns:
        """Like ``rows``, for rows of a task: ``rows`` int [n], ascending, counted from the task's first."""
        size, pieces = self._plan.block_samples, []
        for number, block in enumerate(self._plan.blocks(task)):
            in_block = rows[(rows >= number * size) & (rows < (number + 1) * size)] - number * size
            if len(in_block):
                pieces.append(self.rows(task.epoch, block, in_block))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _checked(self, location: _Location, views: Columns) -> _Block:
        """Returns the block of these columns. Raises DamagedStore if its column of digests is damaged."""
        digests = views[DIGESTS].copy()
        if block_digest(digests) != location.shard.block_digests[location.in_shard]:
            raise self._damaged(location, f"column {DIGESTS}")
        recorded = {name: digests[:, self._digest_index[name]].copy() for name in self._columns}
        columns = {name: views[name] for name in self._columns}
        raw = {name: bytes_of_rows(view) for name, view in columns.items()}
        return _Block(location, columns, raw, recorded)

    def _check(self, found: _Block, name: str, rows: list[int], data: Iterable[Any]) -> None:
        """Raises DamagedStore if the bytes of one of these rows do not have the recorded digest."""
        recorded, digest = found.digests[name], xxhash.xxh3_64_intdigest
        for row, values in zip(rows, data, strict=True):
            if digest(values) != int(recorded[row]):
                sequence = self._plan.sequence_ids(found.location.number)[row]
                raise self._damaged(found.location, f"sample {row} (sequence {sequence}), column {name}")

    def _count(self, rows: int) -> None:
        """Adds the bytes of this number of samples to ``bytes_read`` if the store is local."""
        if not self._remote:
            with self._lock:
                self.bytes_read += rows * self._sample_bytes

    def _damaged(self, location: _Location, what: str) -> DamagedStore:
        where = f"{location.shard_path}, task {location.task}, block {location.in_shard} of the shard"
        return DamagedStore(self._store.root, f"{where}, {what}")

    # --- local ---

    def _local_block(self, location: _Location) -> _Block:
        """Returns an open block of a local shard. When it opens a block, it checks the block's digests, and
        asks the system to read the needed columns. Otherwise the system reads up to megabytes around every
        missing page, and evicts pages of other reads."""
        try:
            shard = self._shard(location.shard_path)
        except (FileNotFoundError, ValueError) as error:  # the file is absent, or empty
            size = None if isinstance(error, FileNotFoundError) else 0
            raise self._damaged(location, _size_error(size, location.shard.bytes)) from None
        if len(shard.data) != location.shard.bytes:
            raise self._damaged(location, _size_error(len(shard.data), location.shard.bytes))
        if location.in_shard not in shard.blocks:
            for start, stop in self._byte_ranges(location):
                page = (location.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
                shard.data.madvise(mmap.MADV_WILLNEED, page, location.offset + stop - page)
            with self._lock:
                self.bytes_read += location.rows * self._needed[DIGESTS].bytes
            start, offsets = location.offset, location.frame.offsets
            views = {
                name: column_view(shard.data, start + offsets[name], location.rows, column)
                for name, column in self._needed.items()
            }
            shard.blocks[location.in_shard] = self._checked(location, views)
        return shard.blocks[location.in_shard]

    def _byte_ranges(self, location: _Location) -> list[tuple[int, int]]:
        """Byte ranges of the needed columns, counted from the block's message; close ones are merged."""
        ranges: list[tuple[int, int]] = []
        for name, column in self._needed.items():
            start = location.frame.offsets[name]
            stop = start + location.rows * column.bytes
            if ranges and start - ranges[-1][1] <= GAP_BYTES:
                ranges[-1] = ranges[-1][0], stop
            else:
                ranges.append((start, stop))
        return ranges

    # --- remote ---

    def _remote_columns(self, location: _Location) -> Columns:
        views = {}
        for start, stop in self._byte_ranges(location):
            data = self._read_range(location, start, stop)
            for name, column in self._needed.items():
                offset = location.frame.offsets[name]
                if start <= offset < stop:
                    views[name] = column_view(data, offset - start, location.rows, column)
        return views

    def _read_range(self, location: _Location, start: int, stop: int) -> Any:
        """Bytes [start, stop) of the block's message, from the cache or the object store."""

        def fetch() -> bytes:
            with self._lock:
                self.bytes_read += stop - start
                self.requests += 1
            path = storage.join(self._store.root, location.shard_path)
            try:
                return storage.read_range(path, location.offset + start, location.offset + stop)
            except UserError as error:
                size = storage.size(path) if storage.exists(path) else None
                if size == location.shard.bytes:
                    raise
                raise self._damaged(location, _size_error(size, location.shard.bytes)) from error

        key = _cache_key(location, start, stop)
        data = self._cache.get_or_fetch(key, fetch)
        if len(data) == stop - start:
            return data
        self._cache.drop(key)  # a crash of the machine has truncated the cached file
        return self._cache.get_or_fetch(key, fetch)


def _locate(store: Store, split: str, epoch: int, number: int) -> _Location:
    plan = store.splits[split].plan
    task, shard_number, in_shard, rows = plan.locate(epoch, number)
    index = store.task_index(split, task)
    shard = index.shards[shard_number]
    # None if the task has no full block; then its only block is the first of the shard.
    full = index.frames.get(plan.plan.block_samples)
    offset = shard.start + (in_shard * full.bytes if full else 0)
    path = f"{SHARDS}/{split}/{index.task}/{shard.file}"
    return _Location(number, rows, index.task, in_shard, path, shard, index.frames[rows], offset)


def _cache_key(location: _Location, start: int, stop: int) -> str:
    shard = location.shard.file.removesuffix(".arrow")
    return f"{shard}-{location.offset + start}-{location.offset + stop}"


def _size_error(size: int | None, expected: int) -> str:
    found = "the file is missing" if size is None else f"the file has {size} bytes"
    return f"{found}; it should have {expected} bytes"


def _open_shard(root: str, name: str) -> _Shard:
    return _Shard(_map_file(root, name), {})


def _map_file(root: str, name: str) -> mmap.mmap:
    path = storage.join(root, name)
    with reporting_os_errors(path, FileNotFoundError), open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
