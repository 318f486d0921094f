"""One shard on disk: an Arrow IPC stream of one record batch, followed by an Arrow IPC file footer.

So the same bytes open as a stream (``datasets.Dataset.from_file`` reads nothing else) and as a file
(``pyarrow.ipc.open_file``, which refuses a truncated one). FORMAT.md, "Shard", has the byte layout.
Spec: https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from offline_teacher.store.schema import Column, HasColumns
from offline_teacher.store.sealed import canonical

METADATA_KEY = b"offline_teacher"
PADDING_KEY = b"padding"
ALIGNMENT = 64
MAGIC = b"ARROW1"
END_OF_STREAM_BYTES = 8


def write_file(
    path: str, layout: HasColumns, metadata: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> None:
    """Writes arrays [n, *shape], n >= 1, of exactly the layout's columns and dtypes.

    The same input gives the same bytes. Every buffer starts at a multiple of 64 bytes, so that views
    of a mapped file are aligned.
    """
    batch = _batch(layout, metadata, columns)
    with pa.OSFile(path, "wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        file.write(_footer(batch, end=file.tell() - END_OF_STREAM_BYTES))


def open_file(path: str, layout: HasColumns) -> tuple[bytes, dict[str, np.ndarray]]:
    """Maps a shard: its metadata value (JSON) and read-only views [n, *shape].

    ValueError where the file is not a shard of this layout. The digest is the caller's business.
    """
    try:
        # One buffer of the whole file: from the map Arrow reads in pieces, each with advice to the kernel.
        reader = pa.ipc.open_file(pa.BufferReader(pa.memory_map(path).read_buffer()))
        if reader.num_record_batches != 1:
            raise ValueError(f"holds {reader.num_record_batches} record batches instead of 1")
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"is not a readable Arrow file ({str(error).splitlines()[0]})") from None
    if not batch.schema.equals(_schema(layout)):
        raise ValueError("has other columns than the layout of the store")
    views = {
        name: _view(batch.column(position), batch.num_rows, column)
        for position, (name, column) in enumerate(layout.columns().items())
    }
    return (batch.schema.metadata or {}).get(METADATA_KEY, b""), views


def _schema(layout: HasColumns, metadata: Mapping[bytes, bytes] | None = None) -> pa.Schema:
    def field(name: str, column: Column) -> pa.Field:
        kind = pa.from_numpy_dtype(column.dtype)
        if column.shape:
            kind = pa.list_(pa.field("item", kind, nullable=False), column.items)
        return pa.field(name, kind, nullable=False)

    return pa.schema([field(name, column) for name, column in layout.columns().items()], metadata=metadata)


def _batch(
    layout: HasColumns, metadata: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> pa.RecordBatch:
    n = len(columns["sequence_id"])
    schema = _schema(layout)
    arrays = [_array(columns[field.name], field.type, n) for field in schema]
    words = {METADATA_KEY: canonical(dict(metadata)), PADDING_KEY: b""}
    batch = pa.record_batch(arrays, schema=schema.with_metadata(words))
    words[PADDING_KEY] = b" " * (-sum(_framing(batch)) % ALIGNMENT)
    batch = batch.replace_schema_metadata(words)
    assert sum(_framing(batch)) % ALIGNMENT == 0
    return batch


def _array(values: np.ndarray, kind: pa.DataType, n: int) -> pa.Array:
    """An Arrow array over the values, its buffer zero-padded to the alignment (pyarrow itself pads to 8)."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if raw.size % ALIGNMENT:
        raw = np.concatenate([raw, np.zeros(-raw.size % ALIGNMENT, np.uint8)])
    buffers = [None, pa.py_buffer(raw)]
    if not pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, n, buffers, null_count=0)
    items = pa.Array.from_buffers(kind.value_type, n * kind.list_size, buffers, null_count=0)
    return pa.FixedSizeListArray.from_arrays(items, type=kind)


def _view(array: pa.Array, n: int, column: Column) -> np.ndarray:
    if array.null_count:
        raise ValueError("holds nulls")
    if column.shape:
        array = array.values
    return array.to_numpy(zero_copy_only=True).reshape(n, *column.shape)


def _framing(batch: pa.RecordBatch) -> tuple[int, int]:
    """Bytes of the schema message and of the record batch message before its body, in a stream."""
    message = batch.slice(0, 1).serialize().to_pybytes()  # any n >= 1 frames alike
    return len(batch.schema.serialize()), 8 + struct.unpack_from("<I", message, 4)[0]


def _footer(batch: pa.RecordBatch, end: int) -> bytes:
    """What an Arrow file has after its end-of-stream marker, for a stream whose batch ends at byte ``end``.

    pyarrow writes the footer of a one-row file; its only Block {offset, metadata bytes, body bytes} is
    then set to ours, which starts 8 bytes earlier, there being no magic in front.
    """
    schema_bytes, metadata_bytes = _framing(batch)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch.slice(0, 1))
        body_end = sink.tell()
    one_row = sink.getvalue()
    (length,) = struct.unpack_from("<i", one_row, len(one_row) - len(MAGIC) - 4)
    footer = one_row[-length - 4 - len(MAGIC) :]
    theirs = _block(len(MAGIC) + 2 + schema_bytes, metadata_bytes, body_end)
    assert footer.count(theirs) == 1
    return footer.replace(theirs, _block(schema_bytes, metadata_bytes, end))


def _block(offset: int, metadata_bytes: int, end: int) -> bytes:
    """struct Block of File.fbs."""
    return struct.pack("<qi4xq", offset, metadata_bytes, end - offset - metadata_bytes)
