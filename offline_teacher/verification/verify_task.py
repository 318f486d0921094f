"""One task of a store, checked from its index to its last number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from infra.files import storage
from offline_teacher.store.blocks import (
    arrow_schema,
    block_digest,
    column_view,
    measured,
    row_digests,
    shard_metadata,
)
from offline_teacher.store.checks import check_block
from offline_teacher.store.index import ShardIndex, TaskIndex
from offline_teacher.store.manifest import SHARDS, TASKS, Spec, task_path
from offline_teacher.store.numbering import Task, shards_of
from offline_teacher.store.records import read
from offline_teacher.store.schema import DIGESTS


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store."""

    file: str
    """Path below the store."""
    what: str
    split: str | None = None
    task: str | None = None
    """The task that the file belongs to, if to any."""
    column: str | None = None
    missing: bool = False
    """There is no such file."""

    def __str__(self) -> str:
        where = f", column {self.column}" if self.column else ""
        return f"{self.file}{where}: {self.what}"


@dataclass(frozen=True)
class Expected:
    """What is known of a task before its files are read."""

    split: str
    task: Task
    digest: str | None
    """File digest of its index; None without a manifest."""


@dataclass
class _Sums:
    tokens: int = 0
    masked: int = 0


def check_task(root: str, spec: Spec, expected: Expected) -> list[Finding]:
    """Everything that is wrong with the index, the shards and the numbers of a task."""
    split, task = expected.split, expected.task
    file, path = f"{TASKS}/{split}/{task.name}.json", task_path(root, split, task.name)
    try:
        data = read(path, expected.digest)
        if data is None:
            return [Finding(file, "is missing", split, task.name, missing=True)]
        index = TaskIndex.from_bytes(data)
        index.check(spec.layout, spec.plan, split, task, spec.digest)
    except ValueError as error:
        return [Finding(file, str(error), split, task.name)]
    return list(_check_shards(root, spec, split, task, index))


def _check_shards(root: str, spec: Spec, split: str, task: Task, index: TaskIndex) -> Iterator[Finding]:
    directory = f"{SHARDS}/{split}/{task.name}"
    there = storage.list_sizes(storage.join(root, directory))
    named = {shard.file for shard in index.shards}
    for name in storage.list_names(storage.join(root, directory)):
        if name not in named:
            what = "is foreign: the index of the task does not name it"
            yield Finding(f"{directory}/{name}", what, split)
    sums, complete = _Sums(), True
    for number, shard in enumerate(index.shards):
        file = f"{directory}/{shard.file}"
        if shard.file not in there:
            complete = False
            yield Finding(file, "is missing", split, task.name, missing=True)
            continue
        for column, what in _check_shard(root, spec, split, task, index, number, sums):
            complete = False
            yield Finding(file, what, split, task.name, column)
    if complete and (sums.tokens, sums.masked) != (index.tokens, index.masked):
        what = f"counts {index.tokens} tokens and {index.masked} masked, not {sums.tokens} and {sums.masked}"
        yield Finding(f"{TASKS}/{split}/{task.name}.json", what, split, task.name)


def _check_shard(
    root: str, spec: Spec, split: str, task: Task, index: TaskIndex, number: int, sums: _Sums
) -> Iterator[tuple[str | None, str]]:
    """(column or None, what is wrong with it) of one shard, whose bytes are read once."""
    shard = index.shards[number]
    data = storage.read_bytes(storage.join(root, SHARDS, split, task.name, shard.file), shard.digest)
    if len(data) != shard.bytes:
        yield None, f"has {len(data)} bytes, the index of its task says {shard.bytes}"
        return
    if storage.digest_bytes(data) != shard.digest:
        yield None, "its digest is not its name"
        return
    sizes = shards_of(task, spec.plan)[number]
    metadata = shard_metadata(spec.digest, split, task.name, number)
    try:
        start, frames = measured(data, arrow_schema(spec.layout.columns(), metadata), sizes)
    except ValueError as error:
        yield None, str(error)
        return
    if start != shard.start or any(index.frames[rows] != frame for rows, frame in frames.items()):
        yield None, "its blocks are not where the index of its task says"
        return
    first = number * spec.plan.shard_blocks * spec.plan.block_samples
    for block, rows in enumerate(sizes):
        ids = task.sequence_ids()[first : first + rows]
        for column, row, what in _check_block(spec, data, shard, index, (start, block, rows), ids, sums):
            yield column, what if row is None else f"sample {first + row} of the task: {what}"
        start, first = start + index.frames[rows].bytes, first + rows


def _check_block(
    spec: Spec,
    data: bytes,
    shard: ShardIndex,
    index: TaskIndex,
    place: tuple[int, int, int],
    ids: np.ndarray,
    sums: _Sums,
) -> Iterator[tuple[str, int | None, str]]:
    """(column, row or None, what is wrong); ``place``: offset, number and rows of the block."""
    start, block, rows = place
    layout, offsets = spec.layout, index.frames[rows].offsets
    views = {
        name: column_view(data, start + offsets[name], rows, column)
        for name, column in layout.columns().items()
    }
    digests = views.pop(DIGESTS)
    if block_digest(digests) != shard.block_digests[block]:
        yield DIGESTS, None, f"block {block}: has another digest than the index of the task says"
    for slot, (name, values) in enumerate(views.items()):
        wrong = row_digests(values) != digests[:, slot]
        if wrong.any():
            yield name, int(wrong.argmax()), "has another digest than its column of digests says"
    for bad in check_block(layout, spec.special, ids, views):
        yield bad.column, bad.row, bad.what
    sums.tokens += int(views["token_count"].sum(dtype=np.int64))
    if layout.masked:
        sums.masked += int((views["masked_positions"] >= 0).sum())
