"""Checks one task of a store: its index, its shards, their digests and all numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.files import storage
from offline_teacher.store.blocks import (
    arrow_schema,
    block_digest,
    column_view,
    measure_blocks,
    row_digests,
    shard_metadata,
)
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import Task, shards_of
from offline_teacher.store.paths import SHARDS, TASKS
from offline_teacher.store.records import Missing
from offline_teacher.store.schema import DIGESTS, require
from offline_teacher.store.unfinished import task_index
from offline_teacher.store.value_checks import check_block


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store."""

    file: str
    """Path relative to the store."""
    problem: str
    split: str | None = None
    task: str | None = None
    """Name of the task that the file belongs to; None if it belongs to no task."""
    column: str | None = None
    missing: bool = False
    """Whether there is no file to move."""
    foreign: bool = False
    """Whether the file does not belong to the store. Repair then only moves it away."""

    @classmethod
    def of_task(cls, split: str, task: Task, column: str, problem: str) -> Finding:
        """Returns a finding about a column in an unknown shard; ``file`` is the task's directory."""
        return cls(f"{SHARDS}/{split}/{task.name}", problem, split, task.name, column)

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{self.file}{column}: {self.problem}"


def foreign(file: str) -> Finding:
    return Finding(file, "is foreign: a store has no file of this name", foreign=True)


Job = tuple[str, Task, str | None]
"""Split, task, and the digest that the manifest has for the task's index (None without a manifest)."""


def check_task(root: str, spec: Spec, job: Job) -> list[Finding]:
    """Returns a finding for everything that is wrong with the index, the shards or the numbers of a task."""
    split, task, digest = job
    try:
        index, _ = task_index(root, spec, split, task, digest)
    except ValueError as error:
        file = f"{TASKS}/{split}/{task.name}.json"
        return [Finding(file, str(error), split, task.name, missing=isinstance(error, Missing))]
    return list(_Check(root, spec, task, index).findings())


class _Check:
    """The check of a task's shards; ``tokens`` and ``masked`` are counted while it runs."""

    def __init__(self, root: str, spec: Spec, task: Task, index: TaskIndex) -> None:
        self._root, self._spec, self._task, self._index = root, spec, task, index
        self._directory = f"{SHARDS}/{index.split}/{task.name}"
        self.tokens = self.masked = 0

    def findings(self) -> Iterator[Finding]:
        index, split, task = self._index, self._index.split, self._task.name
        names = storage.list_names(storage.join(self._root, self._directory))
        for name in sorted(set(names).difference(shard.file for shard in index.shards)):
            problem = "is foreign: the index of the task does not name it"
            yield Finding(f"{self._directory}/{name}", problem, split, foreign=True)
        counts_valid = True
        for number, shard in enumerate(index.shards):
            file = f"{self._directory}/{shard.file}"
            if shard.file not in names:
                counts_valid = False
                yield Finding(file, "is missing", split, task, missing=True)
                continue
            for column, problem in self._check_shard(number):
                counts_valid = False
                yield Finding(file, problem, split, task, column)
        if counts_valid and (self.tokens, self.masked) != (index.tokens, index.masked):
            problem = f"says tokens: {index.tokens}, masked: {index.masked}, but its shards"
            problem += f" hold {self.tokens} and {self.masked}"
            yield Finding(f"{TASKS}/{split}/{task}.json", problem, split, task)

    def _check_shard(self, number: int) -> Iterator[tuple[str | None, str]]:
        """Reads one shard once and yields (column, problem) pairs; column is None for the whole file."""
        shard, frames, plan = self._index.shards[number], self._index.frames, self._spec.plan
        sizes = shards_of(self._task, plan)[number]
        metadata = shard_metadata(self._spec.digest, self._index.split, self._task.name, number)
        schema = arrow_schema(self._spec.layout.columns(), metadata)

        def require_undamaged(data: bytes) -> bytes:
            problem = f"has {len(data)} bytes, but {shard.bytes} according to the index of its task"
            require(len(data) == shard.bytes, problem)
            require(storage.digest_bytes(data) == shard.digest, "its digest differs from its name")
            start, measured_frames = measure_blocks(data, schema, sizes)
            same = start == shard.start and all(
                frames[rows] == frame for rows, frame in measured_frames.items()
            )
            require(same, "its blocks are not at the byte offsets in the index of its task")
            return data

        path = storage.join(self._root, self._directory, shard.file)
        try:  # one byte more, so that a file that is too long is noticed
            data = storage.read_checked(path, shard.bytes + 1, require_undamaged)
        except ValueError as error:
            yield None, str(error)
            return
        start, first = shard.start, number * plan.shard_blocks * plan.block_samples
        for block, rows in enumerate(sizes):
            ids = self._task.sequence_ids()[first : first + rows]
            for column, row, problem in self._check_block(data, start, shard.block_digests[block], ids):
                where = f"block {block}" if row is None else f"sample {first + row} of the task"
                yield column, f"{where}: {problem}"
            start, first = start + frames[rows].bytes, first + rows

    def _check_block(
        self, data: Any, start: int, expected_digest: int, ids: np.ndarray
    ) -> Iterator[tuple[str, int | None, str]]:
        """Yields (column, row or None, problem) of the block that holds ``ids`` and begins at ``start``."""
        layout, offsets, rows = self._spec.layout, self._index.frames[len(ids)].offsets, len(ids)
        views = {
            name: column_view(data, start + offsets[name], rows, column)
            for name, column in layout.columns().items()
        }
        digests = views.pop(DIGESTS)
        if block_digest(digests) != expected_digest:
            yield DIGESTS, None, "its digest differs from the one in the index of the task"
        for slot, (name, values) in enumerate(views.items()):
            wrong = row_digests(values) != digests[:, slot]
            if wrong.any():
                yield name, int(wrong.argmax()), "its digest differs from the one in the column of digests"
        for bad in check_block(layout, self._spec.special, ids, views):
            yield bad.column, bad.row, bad.what
        self.tokens += int(views["token_count"].sum(dtype=np.int64))
        if layout.masked:
            self.masked += int((views["masked_positions"] >= 0).sum())
