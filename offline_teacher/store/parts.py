"""Writes and reads the parts of a store's text: token ids before masking. See FORMAT.md, "sequences"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.cache import Cache
from offline_teacher.store.blocks import arrow_schema, record_batch
from offline_teacher.store.index import PartIndex
from offline_teacher.store.paths import part_path, repair_command
from offline_teacher.store.schema import Column, Columns, Layout

COUNT_COLUMNS = {"token": Column(np.dtype("<u4"), ()), "count": Column(np.dtype("<i8"), ())}


def part_columns(layout: Layout) -> dict[str, Column]:
    """Returns the columns of a part: ``input_ids`` [rows, L] and ``token_count`` [rows]."""
    columns = layout.columns()
    return {name: columns[name] for name in ("input_ids", "token_count")}


def publish_part(
    root: str,
    layout: Layout,
    split: str,
    part: int,
    columns: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    counts: Mapping[str, np.ndarray] | None = None,
) -> PartIndex:
    """Publishes the rows of a part (``part_columns``), then its index, which is returned.

    ``facts``: the fields text, made_from, documents, text_bytes and problems of the index. ``counts``, needed
    if masking is by frequency: ``token`` uint32 [ids] and ``count`` int64 [ids].
    """
    path = part_path(root, split, part, ".arrow")
    with storage.publishing(path) as draft:
        _write(draft, part_columns(layout), columns)
        size, digest = storage.size(draft), storage.digest_file(draft)
    counts_digest = None
    if counts is not None:
        with storage.publishing(part_path(root, split, part, ".counts.arrow")) as draft:
            _write(draft, COUNT_COLUMNS, counts)
            counts_digest = storage.digest_file(draft)
    token_count = columns["token_count"]
    index = PartIndex(
        split=split,
        part=part,
        bytes=size,
        file=digest,
        rows=len(token_count),
        tokens=int(token_count.sum(dtype=np.int64)),
        counts=counts_digest,
        **facts,
    )
    storage.publish_bytes(part_path(root, split, part, ".json"), index.to_bytes())
    return index


def read_part(root: str, layout: Layout, index: PartIndex, cache: Cache) -> Columns:
    """Returns the columns of a part as read-only views. The digest of the file is checked when it enters
    ``cache``. Raises UserError if the part is damaged."""
    path = part_path(root, index.split, index.part, ".arrow")
    columns = _read(root, path, index.file, part_columns(layout), cache)
    if len(columns["token_count"]) != index.rows:
        raise _damaged_part(root, path, f"it has {len(columns['token_count'])} rows instead of {index.rows}")
    return columns


def read_counts(root: str, index: PartIndex, cache: Cache) -> Columns:
    """Returns the token counts of a part: ``token`` and ``count``. Raises UserError if they are damaged."""
    assert index.counts is not None
    path = part_path(root, index.split, index.part, ".counts.arrow")
    return _read(root, path, index.counts, COUNT_COLUMNS, cache)


def _write(path: str, columns: Mapping[str, Column], values: Mapping[str, np.ndarray]) -> None:
    for name, column in columns.items():
        array = values[name]
        good = array.dtype == column.dtype and array.shape[1:] == column.shape
        assert good, f"{name}: {array.dtype} {array.shape}"
    schema = arrow_schema(columns)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        if len(next(iter(values.values()))):
            writer.write_batch(record_batch(schema, values))


def _read(root: str, path: str, digest: str, columns: Mapping[str, Column], cache: Cache) -> Columns:
    try:
        with pa.memory_map(cache.local_path(path, digest)) as file:
            reader = pa.ipc.open_file(file)
            if not reader.schema.equals(arrow_schema(columns)):
                raise _damaged_part(root, path, "it has other columns")
            table = reader.read_all().combine_chunks()  # does not copy, because there is only one batch
    except (WrongContent, pa.ArrowException, OSError) as error:
        raise _damaged_part(root, path, str(error)) from None
    arrays = {}
    for name, column in columns.items():
        values = table.column(name).chunk(0) if len(table) else table.column(name).combine_chunks()
        flat = values.flatten() if column.shape else values
        arrays[name] = flat.to_numpy().reshape(-1, *column.shape)
    return arrays


def _damaged_part(root: str, path: str, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): run `{repair_command(root)}`")
