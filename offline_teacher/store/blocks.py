"""Writes a shard, an Arrow IPC stream of blocks with digests, and reads its columns by offset without Arrow.

Spec: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from infra.files import storage
from offline_teacher.store.index import Frame, ShardIndex, shard_file
from offline_teacher.store.records import canonical
from offline_teacher.store.schema import DIGESTS, FORMAT_VERSION, Column, Layout

METADATA_KEY = b"store"
MAX_BLOCK_OVERHEAD = 2048
"""Maximum number of bytes that a block adds to its columns."""
MAX_SHARD_OVERHEAD = 4096
"""Maximum number of bytes that a shard adds to its blocks."""
END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)


def shard_metadata(spec: str, split: str, task: str, shard: int) -> bytes:
    """Returns the metadata of a shard's Arrow schema. ``spec`` is the digest of spec.json."""
    own = {"spec": spec, "split": split, "task": task, "shard": shard}
    return canonical({"format_version": FORMAT_VERSION, **own})


def arrow_schema(columns: Mapping[str, Column], metadata: bytes | None = None) -> pa.Schema:
    """Returns the Arrow schema of these columns, with ``metadata`` under ``METADATA_KEY`` if given."""

    def field(name: str, column: Column) -> pa.Field:
        kind = pa.from_numpy_dtype(column.dtype)
        if column.shape:
            kind = pa.list_(pa.field("item", kind, nullable=False), column.items)
        return pa.field(name, kind, nullable=False)

    fields = [field(name, column) for name, column in columns.items()]
    return pa.schema(fields, metadata=None if metadata is None else {METADATA_KEY: metadata})


def record_batch(schema: pa.Schema, columns: Mapping[str, np.ndarray]) -> pa.RecordBatch:
    """Returns the arrays [n, *shape] as a record batch of this schema. Contiguous arrays are not copied."""
    arrays = []
    for field in schema:
        items = pa.array(np.ascontiguousarray(columns[field.name]).reshape(-1))
        lists = pa.types.is_fixed_size_list(field.type)
        arrays.append(pa.FixedSizeListArray.from_arrays(items, type=field.type) if lists else items)
    return pa.record_batch(arrays, schema=schema)


def row_digests(values: np.ndarray) -> np.ndarray:
    """Returns XXH3 (64 bits, seed 0) of the bytes of each row of an array [n, ...]: uint64 [n]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, bytes_of_rows(values)), np.uint64, len(values))


def block_digest(digests: np.ndarray) -> int:
    """Returns XXH3 (64 bits, seed 0) of the bytes of a block's column ``digests``."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(digests).data)


def bytes_of_rows(values: np.ndarray) -> np.ndarray:
    """Returns the bytes of each row of an array [n, *shape]: uint8 [n, bytes], a view if it is contiguous."""
    flat = np.ascontiguousarray(values).reshape(len(values), math.prod(values.shape[1:]))
    return flat.view(np.uint8)


class BufferPool:
    """Reuses the buffers of published shards, because each new buffer costs a page fault per 4 KiB. Threads
    may share a pool."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """Returns a uint8 array of at least ``size`` bytes with undefined content."""
        try:
            buffer = self._free.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return buffer if len(buffer) >= size else np.empty(size, np.uint8)

    def give_back(self, buffer: np.ndarray) -> None:
        self._free.append(buffer)


class ShardStream:
    """Builds a shard in one buffer, whose size is known in advance, so that each value is copied once."""

    def __init__(
        self, layout: Layout, metadata: bytes, samples: int, blocks: int, buffers: BufferPool | None = None
    ) -> None:
        """``samples`` and ``blocks``: those that the shard will have. ``buffers``: pool of the buffer."""
        self._layout, self._samples = layout, 0
        size = samples * layout.bytes_per_sample() + blocks * MAX_BLOCK_OVERHEAD + MAX_SHARD_OVERHEAD
        self.buffer = (buffers or BufferPool()).take(size)
        self._sink = pa.FixedSizeBufferWriter(pa.py_buffer(self.buffer))
        self._schema = arrow_schema(layout.columns(), metadata)
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        self._rows: list[int] = []
        self._block_digests: list[str] = []

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Appends a block. ``columns``: arrays [n, *shape] of ``layout.data_columns()``."""
        digests = np.stack([row_digests(columns[name]) for name in self._layout.data_columns()], axis=1)
        self._stream.write_batch(record_batch(self._schema, {**columns, DIGESTS: digests}))
        self._rows.append(len(digests))
        self._block_digests.append(f"{block_digest(digests):016x}")

    def close(self, frames: dict[int, Frame]) -> tuple[memoryview, ShardIndex]:
        """Ends the stream. Returns the bytes of the shard and its index; adds its frames to ``frames``."""
        self._stream.close()
        data = self.buffer.data[: self._sink.tell()]
        self._sink.close()
        start, own_frames = measure_blocks(data, self._schema, self._rows)
        for rows, frame in own_frames.items():
            same = frames.setdefault(rows, frame) == frame
            assert same, f"pyarrow wrote two blocks of {rows} rows with different offsets"
        name = shard_file(storage.digest_bytes(data))
        return data, ShardIndex(name, len(data), sum(self._rows), start, "".join(self._block_digests))


def measure_blocks(data: Any, schema: pa.Schema, rows: Iterable[int]) -> tuple[int, dict[int, Frame]]:
    """Returns the byte offset of a shard's first block, and a frame for each number of rows of a block.

    ``rows``: the expected number of rows of each block. Raises ValueError unless the bytes are an Arrow
    stream of this schema with exactly these blocks, and blocks of equal size have equal frames.
    """
    try:
        return _measure_blocks(pa.py_buffer(data), schema, rows)
    except (pa.ArrowException, struct.error, StopIteration, EOFError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"is not a valid Arrow stream of blocks ({what})") from None


def _measure_blocks(data: pa.Buffer, schema: pa.Schema, rows: Iterable[int]) -> tuple[int, dict[int, Frame]]:
    start = 8 + int(struct.unpack_from("<Ii", data, 0)[1])
    if not pa.ipc.read_schema(data.slice(0, start)).equals(schema, check_metadata=True):
        raise ValueError("has another schema than the store, or the metadata of another shard")
    frames: dict[int, Frame] = {}
    at = start
    for expected in rows:
        message = pa.ipc.read_message(data.slice(at))
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
        if batch.num_rows != expected:
            raise ValueError(f"has a block of {batch.num_rows} samples instead of {expected}")
        size = message.body.address + message.body.size - data.address - at
        offsets = {}
        for name, column in zip(schema.names, batch.columns, strict=True):
            if column.null_count:
                raise ValueError("holds nulls")
            values = column.values if pa.types.is_fixed_size_list(column.type) else column
            offsets[name] = values.buffers()[1].address - data.address - at
        frame = Frame(size, offsets)
        if frames.setdefault(expected, frame) != frame:
            raise ValueError(f"has two blocks of {expected} samples with different offsets")
        at += size
    if data.slice(at).to_pybytes() != END_OF_STREAM:
        raise ValueError("does not end with the end-of-stream marker after its last block")
    return start, frames


def column_view(data: Any, offset: int, rows: int, column: Column) -> np.ndarray:
    """Returns a read-only view [rows, *shape] of a column that starts at byte ``offset`` of ``data``."""
    values = np.frombuffer(data, column.dtype, rows * column.items, offset)
    values.flags.writeable = False
    return values.reshape(rows, *column.shape)


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns float32 [..., D] from int8 values [..., D] and a scale [...] per position, max|x| / 127."""
    hidden: np.ndarray = values.astype(np.float32) * scale[..., None]
    return hidden


def hidden_values(layout: Layout, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the hidden states of the samples as float32 [n, P, D], whatever format the layout has."""
    stored = columns["hidden_states"]
    if layout.hidden_states == "int8":
        return dequantise(stored, columns["hidden_scale"])
    if layout.hidden_states == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
