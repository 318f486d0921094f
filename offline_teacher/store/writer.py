"""Writing a store: spec.json first, then parts and tasks in any order from any worker, the manifest last.

Of several attempts of one task, whichever publishes its index first is the task; see FORMAT.md, "Commit
protocol".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.trees import difference
from offline_teacher.store import paths
from offline_teacher.store.blocks import Memory, ShardStream, shard_metadata
from offline_teacher.store.index import Frame, ShardIndex, TaskIndex
from offline_teacher.store.manifest import Manifest, Spec, SplitRecord
from offline_teacher.store.numbering import SplitPlan, Task, shards_of
from offline_teacher.store.pending import (
    finished_tasks,
    in_order,
    read_parts,
    read_spec,
    read_task_index,
    refuse_format_1,
)
from offline_teacher.store.records import encode
from offline_teacher.store.value_checks import check_block, check_shapes

SHARDS_IN_FLIGHT = 2
"""Shards that a writer publishes while it fills the next: this many are in memory on top of it."""


def begin_store(root: str, spec: Spec) -> None:
    """Publishes ``spec.json``, or finds the same one there.

    UserError, with the differences in words, if the directory holds a store of another fingerprint.
    """
    refuse_other(root, spec)
    path = storage.join(root, paths.SPEC)
    if not storage.exists(path) and not storage.publish_if_absent(path, spec.to_bytes()):
        refuse_other(root, spec)


def refuse_other(root: str, spec: Spec, remedy: str = "choose another store.path") -> None:
    """UserError, with the differences in words and the remedy, if the directory holds another store."""
    refuse_format_1(root)
    if not storage.exists(storage.join(root, paths.SPEC)):
        return
    found = read_spec(root)
    differences = difference(found.fingerprint, spec.fingerprint)
    for name in ("layout", "plan", "special"):
        differences += difference({name: asdict(getattr(found, name))}, {name: asdict(getattr(spec, name))})
    if differences:
        raise UserError(f"{root} holds a store made differently ({'; '.join(differences)}): {remedy}")


class TaskWriter:
    """One attempt of one task, as a context. Without ``publish`` nothing of the task exists.

    Holds one shard in memory while it fills up, and up to ``SHARDS_IN_FLIGHT`` more that are being published.
    """

    def __init__(
        self,
        root: str,
        spec: Spec,
        split: str,
        task: Task,
        environment: Mapping[str, Any],
        memory: Memory | None = None,
    ) -> None:
        """``memory``: of shards, shared with the writers of other tasks."""
        self._memory = memory or Memory()
        self._root, self._spec, self._split, self._task = root, spec, split, task
        self._environment = dict(environment)
        self._ids = task.sequence_ids()
        self._plan = shards_of(task, spec.plan)
        self._done = self._tokens = self._masked = 0
        self._pending: list[dict[str, np.ndarray]] = []  # samples of the next block
        self._stream: ShardStream | None = None
        self._left = 0  # blocks that the open shard still needs
        self._shards: list[ShardIndex] = []
        self._frames: dict[int, Frame] = {}
        self._pool = ThreadPoolExecutor(SHARDS_IN_FLIGHT)
        self._publishing: list[Future[None]] = []

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Appends samples in order: arrays [n, *shape], any n >= 1, of ``spec.layout.data_columns()``.

        The caller may change the arrays afterwards. Raises ValueError, which names column and sample, if a
        value cannot be right (NaN, order, range, padding).
        """
        for bad in check_shapes(self._spec.layout, columns):
            raise ValueError(f"task {self._task.name}: column {bad.column} {bad.what}")
        n, at = len(columns["sequence_id"]), 0
        while at < n:
            waiting = sum(len(part["sequence_id"]) for part in self._pending)
            if self._done + waiting == self._task.samples:
                raise ValueError(f"task {self._task.name}: more than its {self._task.samples} samples")
            size = min(self._spec.plan.block_samples, self._task.samples - self._done)
            stop = min(n, at + size - waiting)
            self._pending.append({name: array[at:stop] for name, array in columns.items()})
            if waiting + stop - at == size:
                self._write_block(_joined(self._pending))
                self._pending = []
            at = stop
        self._pending = [{name: a.copy() for name, a in part.items()} for part in self._pending]

    def _write_block(self, block: Mapping[str, np.ndarray]) -> None:
        layout, n = self._spec.layout, len(block["sequence_id"])
        ids = self._ids[self._done : self._done + n]
        for bad in check_block(layout, self._spec.special, ids, block):
            where = f"sample {self._done + bad.row} (sequence {ids[bad.row]})"
            raise ValueError(f"task {self._task.name}: column {bad.column}, {where}: {bad.what}")
        if self._stream is None:
            number = len(self._shards)
            metadata = shard_metadata(self._spec.digest, self._split, self._task.name, number)
            sizes = self._plan[number]
            self._left = len(sizes)
            self._stream = ShardStream(layout, metadata, sum(sizes), len(sizes), self._memory)
        self._stream.write(block)
        self._done += n
        self._tokens += int(block["token_count"].sum(dtype=np.int64))
        if layout.masked:
            self._masked += int((block["masked_positions"] >= 0).sum())
        self._left -= 1
        if self._left == 0:
            self._close_shard(self._stream)
            self._stream = None

    def _close_shard(self, stream: ShardStream) -> None:
        data, index = stream.close(self._frames)
        path = paths.shard_path(self._root, self._split, self._task.name, index.file)
        self._shards.append(index)
        while len(self._publishing) >= SHARDS_IN_FLIGHT:
            self._publishing.pop(0).result()
        self._publishing.append(self._pool.submit(self._publish_shard, path, data, stream.memory))

    def _publish_shard(self, path: str, data: memoryview, memory: np.ndarray) -> None:
        storage.publish_bytes(path, data)
        self._memory.give(memory)

    def publish(self) -> TaskIndex:
        """Publishes the index, unless another attempt has, and returns the one that holds.

        Then removes the shards of the task that this index does not name.
        """
        if self._done != self._task.samples:
            raise ValueError(f"task {self._task.name}: {self._done} of {self._task.samples} samples written")
        for publishing in self._publishing:
            publishing.result()
        own = TaskIndex(
            split=self._split,
            task=self._task.name,
            spec=self._spec.digest,
            samples=self._task.samples,
            tokens=self._tokens,
            masked=self._masked,
            environment=self._environment,
            frames=self._frames,
            shards=tuple(self._shards),
        )
        own.check(self._spec.layout, self._spec.plan, self._split, self._task, self._spec.digest)
        path = paths.task_path(self._root, self._split, self._task.name)
        first = storage.publish_if_absent(path, own.to_bytes())
        holds = own if first else read_task_index(self._root, self._spec, self._split, self._task)[0]
        named = {shard.file for shard in holds.shards}
        directory = storage.join(self._root, paths.SHARDS, self._split, self._task.name)
        for name in storage.list_names(directory):
            if name not in named:
                storage.remove(storage.join(directory, name))
        return holds


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def quarantine_task(root: str, split: str, task: str, record: Mapping[str, Any]) -> None:
    """Publishes why a task was given up: ``failed/SPLIT/TASK.json``."""
    storage.publish_bytes(paths.failed_path(root, split, task), encode(record))


def finish_store(root: str, parts: Mapping[str, int]) -> Manifest:
    """Publishes the manifest once every task is there. ``parts``: the number of parts of each split.

    Reads the index of each part and of each task, and digests the files of tokenizer and teacher. UserError
    with exit code 3 if tasks are missing.
    """
    spec = read_spec(root)
    splits = {split: _finished_split(root, spec, split, count) for split, count in parts.items()}
    files = dict(_fixed_files(root))
    if paths.CONFIG not in files or not any(name.startswith(f"{paths.TOKENIZER}/") for name in files):
        raise UserError(f"{root} lacks {paths.CONFIG} or {paths.TOKENIZER}/: run the teacher pass again")
    manifest = Manifest(spec.digest, files, splits)
    storage.remove_tree(storage.join(root, paths.FAILED))
    storage.remove_unfinished(root)
    storage.publish_if_changed(storage.join(root, paths.MANIFEST), manifest.to_bytes())
    return manifest


def _finished_split(root: str, spec: Spec, split: str, count: int) -> SplitRecord:
    found = [(index.rows, digest) for index, digest in read_parts(root, split, count)]
    plan = SplitPlan.of(split, tuple(rows for rows, _ in found), spec.plan)
    finished = finished_tasks(root, split)
    missing = [task.name for task in plan.tasks() if task.name not in finished]
    if missing:
        names = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise UserError(
            f"{root} is incomplete: {len(missing)} of {plan.task_count} tasks of {split} are missing "
            f"({names}); run the same command again",
            EXIT_INCOMPLETE,
        )
    digests, tokens, masked = [], 0, 0
    for index, digest in in_order(partial(read_task_index, root, spec, split), plan.tasks()):
        digests.append(digest)
        tokens, masked = tokens + index.tokens, masked + index.masked
    return SplitRecord(plan.rows, tuple(digest for _, digest in found), tuple(digests), tokens, masked)


def _fixed_files(root: str) -> Iterator[tuple[str, str]]:
    """Path below the store and digest of every file of ``tokenizer/`` and ``teacher/``."""
    for directory in (paths.TOKENIZER, paths.TEACHER):
        path = storage.join(root, directory)
        for name in storage.list_names(path):
            yield f"{directory}/{name}", storage.digest_file(storage.join(path, name))
