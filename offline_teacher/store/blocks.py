"""One shard: an Arrow IPC stream of blocks, written with digests, and read by offsets without Arrow.

Spec: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

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
BLOCK_FRAMING = 2048
SHARD_FRAMING = 4096
"""Bytes that a block and a shard add to their columns, at most."""
END_OF_STREAM = struct.pack("<Ii", 0xFFFFFFFF, 0)


def shard_metadata(spec: str, split: str, task: str, shard: int) -> bytes:
    """What a shard says about itself in its Arrow schema; ``spec`` is the digest of spec.json."""
    return canonical(
        {"format_version": FORMAT_VERSION, "spec": spec, "split": split, "task": task, "shard": shard}
    )


def arrow_schema(columns: Mapping[str, Column], metadata: bytes | None = None) -> pa.Schema:
    """The Arrow schema of these columns; ``metadata`` is the value of its one key."""

    def field(name: str, column: Column) -> pa.Field:
        kind = pa.from_numpy_dtype(column.dtype)
        if column.shape:
            kind = pa.list_(pa.field("item", kind, nullable=False), column.items)
        return pa.field(name, kind, nullable=False)

    fields = [field(name, column) for name, column in columns.items()]
    return pa.schema(fields, metadata=None if metadata is None else {METADATA_KEY: metadata})


def record_batch(schema: pa.Schema, columns: Mapping[str, np.ndarray]) -> pa.RecordBatch:
    """The arrays [n, *shape] as a record batch of this schema; nothing is copied if they are contiguous."""
    arrays = []
    for field in schema:
        items = pa.array(np.ascontiguousarray(columns[field.name]).reshape(-1))
        lists = pa.types.is_fixed_size_list(field.type)
        arrays.append(pa.FixedSizeListArray.from_arrays(items, type=field.type) if lists else items)
    return pa.record_batch(arrays, schema=schema)


def row_digests(values: np.ndarray) -> np.ndarray:
    """uint64 [n]: XXH3 (64 bits, seed 0) of the bytes of each row of [n, ...]."""
    raw = _raw(values)
    n, digest = len(values), xxhash.xxh3_64_intdigest
    size = max(1, len(raw) // max(1, n))
    return np.fromiter((digest(raw[at : at + size]) for at in range(0, len(raw), size)), np.uint64, n)


def sample_digests(layout: Layout, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint64 [n, C]: the column ``digests`` of these samples."""
    return np.stack([row_digests(columns[name]) for name in layout.data_columns()], axis=1)


def block_digest(digests: np.ndarray) -> int:
    """XXH3 (64 bits, seed 0) of the bytes of a block's column ``digests``."""
    return xxhash.xxh3_64_intdigest(_raw(digests))


def _raw(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class Memory:
    """Memory of shards that are published, for the next ones: fresh memory costs a page fault every 4 KiB.

    Threads may share it. It holds as much as was ever in use at once.
    """

    def __init__(self) -> None:
        self._spare: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """At least ``size`` bytes of undefined content, uint8."""
        try:
            spare = self._spare.pop()
        except IndexError:
            return np.empty(size, np.uint8)
        return spare if len(spare) >= size else np.empty(size, np.uint8)

    def give(self, memory: np.ndarray) -> None:
        """Takes back what ``take`` returned, once nobody reads it any more."""
        self._spare.append(memory)


class ShardStream:
    """A shard as it grows in memory. Its size is known before: one allocation, one copy of each number."""

    def __init__(
        self, layout: Layout, metadata: bytes, samples: int, blocks: int, memory: Memory | None = None
    ) -> None:
        """``memory``: where to take the bytes from; None: new ones."""
        self._layout, self._samples = layout, 0
        room = samples * layout.bytes_per_sample() + blocks * BLOCK_FRAMING + SHARD_FRAMING
        self.memory = (memory or Memory()).take(room)
        self._sink = pa.FixedSizeBufferWriter(pa.py_buffer(self.memory))
        self._schema = arrow_schema(layout.columns(), metadata)
        self._stream = pa.ipc.new_stream(self._sink, self._schema)
        self._rows: list[int] = []
        self._blocks: list[str] = []

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Appends a block: arrays [n, *shape] of ``layout.data_columns()``."""
        digests = sample_digests(self._layout, columns)
        self._stream.write_batch(record_batch(self._schema, {**columns, DIGESTS: digests}))
        self._rows.append(len(digests))
        self._blocks.append(f"{block_digest(digests):016x}")

    def close(self, frames: dict[int, Frame]) -> tuple[memoryview, ShardIndex]:
        """The bytes of the whole shard and its index; its frames are added to ``frames``."""
        self._stream.close()
        data = self.memory.data[: self._sink.tell()]
        self._sink.close()
        start, own = measured(data, self._schema, self._rows)
        for rows, frame in own.items():
            assert frames.setdefault(rows, frame) == frame, (
                "pyarrow framed two blocks of one size differently"
            )
        name = shard_file(storage.digest_bytes(data))
        return data, ShardIndex(name, len(data), sum(self._rows), start, "".join(self._blocks))


def measured(data: Any, schema: pa.Schema, rows: Iterable[int]) -> tuple[int, dict[int, Frame]]:
    """Offset of the first block, and the frame for each number of rows, of a shard as it lies there.

    ValueError unless the bytes are a stream of this schema, of blocks of these numbers of rows, one behind
    the other, alike if they have the same number of rows, and of nothing else.
    """
    try:
        return _measured(pa.py_buffer(data), schema, rows)
    except (pa.ArrowException, struct.error, StopIteration, EOFError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"is not the Arrow stream that it should be ({what})") from None


def _measured(data: pa.Buffer, schema: pa.Schema, rows: Iterable[int]) -> tuple[int, dict[int, Frame]]:
    start = 8 + int(struct.unpack_from("<Ii", data, 0)[1])
    if not pa.ipc.read_schema(data.slice(0, start)).equals(schema, check_metadata=True):
        raise ValueError("has another schema than the store, or that of another shard")
    frames: dict[int, Frame] = {}
    at = start
    for expected in rows:
        message = pa.ipc.read_message(data.slice(at))
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate()
        if batch.num_rows != expected:
            raise ValueError(f"has a block of {batch.num_rows} samples instead of {expected}")
        size = message.body.address + message.body.size - data.address - at
        offsets = {
            name: _values(column).address - data.address - at
            for name, column in zip(schema.names, batch.columns, strict=True)
        }
        frame = Frame(size, offsets)
        if frames.setdefault(expected, frame) != frame:
            raise ValueError(f"has two blocks of {expected} samples with different offsets")
        at += size
    if data.slice(at).to_pybytes() != END_OF_STREAM:
        raise ValueError("does not end with the end-of-stream marker behind its last block")
    return start, frames


def _values(column: pa.Array) -> pa.Buffer:
    """The one buffer of a column's values."""
    if column.null_count:
        raise ValueError("holds nulls")
    return (column.values if pa.types.is_fixed_size_list(column.type) else column).buffers()[1]


def column_view(data: Any, offset: int, rows: int, column: Column) -> np.ndarray:
    """Read-only view [rows, *shape] of a column whose buffer starts at byte ``offset`` of ``data``."""
    values = np.frombuffer(data, column.dtype, rows * column.items, offset)
    values.flags.writeable = False
    return values.reshape(rows, *column.shape)


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [..., D] of int8 [..., D] and scale [...], one a position: scale = max|x| / 127."""
    hidden: np.ndarray = values.astype(np.float32) * scale[..., None]
    return hidden


def hidden_values(layout: Layout, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [n, P, D] of the columns ``hidden_states`` and, for int8, ``hidden_scale``."""
    stored = columns["hidden_states"]
    if layout.hidden_states == "int8":
        return dequantise(stored, columns["hidden_scale"])
    if layout.hidden_states == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
