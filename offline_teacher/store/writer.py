"""Writes a store: spec.json first, then parts and tasks in any order from any worker, and the manifest last.

If several workers attempt a task, the first index that is published counts; see FORMAT.md, "Commit protocol".
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
from offline_teacher.store import paths, unfinished
from offline_teacher.store.blocks import BufferPool, ShardStream, shard_metadata
from offline_teacher.store.index import Frame, ShardIndex, TaskIndex
from offline_teacher.store.manifest import Manifest, Spec, SplitRecord
from offline_teacher.store.numbering import SplitPlan, Task, shards_of
from offline_teacher.store.records import encode
from offline_teacher.store.value_checks import check_block, check_shapes

SHARDS_IN_FLIGHT = 2
"""Maximum number of shards that a writer publishes while it fills the next one; all of them are in memory."""
HOST_CHECKS = 8
"""One of this many blocks is checked again on the host if the device has found all its values possible."""


def begin_store(root: str, spec: Spec) -> None:
    """Publishes ``spec.json``, unless it is published. Raises UserError like `refuse_different_spec`."""
    refuse_different_spec(root, spec)
    path = storage.join(root, paths.SPEC)
    if not storage.exists(path) and not storage.publish_if_absent(path, spec.to_bytes()):
        refuse_different_spec(root, spec)


def refuse_different_spec(root: str, spec: Spec, remedy: str = "choose another store.path") -> None:
    """Raises UserError, with the differences and the remedy, if the directory has a store of another spec."""
    unfinished.refuse_format_1(root)
    if not storage.exists(storage.join(root, paths.SPEC)):
        return
    found = unfinished.read_spec(root)
    differences = difference(found.fingerprint, spec.fingerprint)
    for name in ("layout", "plan", "special"):
        differences += difference({name: asdict(getattr(found, name))}, {name: asdict(getattr(spec, name))})
    if differences:
        raise UserError(f"{root} holds a store made differently ({'; '.join(differences)}): {remedy}")


class TaskWriter:
    """One attempt to write a task, as a context manager. The task exists only after ``publish``.

    Keeps the shard that is being filled in memory, and up to ``SHARDS_IN_FLIGHT`` that are being published.
    """

    def __init__(
        self,
        root: str,
        spec: Spec,
        split: str,
        task: Task,
        environment: Mapping[str, Any],
        buffers: BufferPool | None = None,
    ) -> None:
        """``environment``: see `TaskIndex`. ``buffers``: a pool shared with the writers of other tasks."""
        self._buffers = buffers or BufferPool()
        self._root, self._spec, self._split, self._task = root, spec, split, task
        self._environment = dict(environment)
        self._ids = task.sequence_ids()
        self._shard_blocks = shards_of(task, spec.plan)
        self._blocks = self._samples = self._tokens = self._masked = 0  # of what is written
        self._waiting: list[dict[str, np.ndarray]] = []  # samples of the next block
        self._checked = False  # whether all of them are
        self._stream: ShardStream | None = None
        self._blocks_left = 0  # blocks still to be written to the open shard
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

    def write(self, columns: Mapping[str, np.ndarray], checked: bool = False) -> None:
        """Appends the next n >= 1 samples: arrays [n, *shape] of ``spec.layout.data_columns()``.

        ``checked``: the teacher's values were found possible on the device, so that only a sample of the
        blocks is checked here. The caller may change the arrays afterwards. Raises ValueError, with column
        and sample, if a value is impossible: NaN, out of order, out of range, or not zero in padding.
        """
        for bad in check_shapes(self._spec.layout, columns):
            raise ValueError(f"task {self._task.name}: column {bad.column} {bad.what}")
        n, at = len(columns["sequence_id"]), 0
        while at < n:
            waiting_rows = sum(len(piece["sequence_id"]) for piece in self._waiting)
            self._checked = checked and (self._checked or not self._waiting)
            if self._samples + waiting_rows == self._task.samples:
                raise ValueError(f"task {self._task.name}: more than its {self._task.samples} samples")
            block_rows = min(self._spec.plan.block_samples, self._task.samples - self._samples)
            stop = min(n, at + block_rows - waiting_rows)
            self._waiting.append({name: array[at:stop] for name, array in columns.items()})
            if waiting_rows + stop - at == block_rows:
                self._write_block(_concatenated(self._waiting))
                self._waiting = []
            at = stop
        self._waiting = [{name: a.copy() for name, a in piece.items()} for piece in self._waiting]

    def _write_block(self, block: Mapping[str, np.ndarray]) -> None:
        layout, n = self._spec.layout, len(block["sequence_id"])
        ids = self._ids[self._samples : self._samples + n]
        text_only = self._checked and self._blocks % HOST_CHECKS != 0
        self._blocks += 1
        for bad in check_block(layout, self._spec.special, ids, block, text_only):
            where = f"sample {self._samples + bad.row} (sequence {ids[bad.row]})"
            raise ValueError(f"task {self._task.name}: column {bad.column}, {where}: {bad.what}")
        if self._stream is None:
            number = len(self._shards)
            metadata = shard_metadata(self._spec.digest, self._split, self._task.name, number)
            sizes = self._shard_blocks[number]
            self._blocks_left = len(sizes)
            self._stream = ShardStream(layout, metadata, sum(sizes), len(sizes), self._buffers)
        self._stream.write(block)
        self._samples += n
        self._tokens += int(block["token_count"].sum(dtype=np.int64))
        if layout.masked:
            self._masked += int((block["masked_positions"] >= 0).sum())
        self._blocks_left -= 1
        if self._blocks_left == 0:
            self._close_shard(self._stream)
            self._stream = None

    def _close_shard(self, stream: ShardStream) -> None:
        data, index = stream.close(self._frames)  # which also adds the shard's frames to them
        path = paths.shard_path(self._root, self._split, self._task.name, index.file)
        self._shards.append(index)
        while len(self._publishing) >= SHARDS_IN_FLIGHT:
            self._publishing.pop(0).result()
        self._publishing.append(self._pool.submit(self._publish_shard, path, data, stream.buffer))

    def _publish_shard(self, path: str, data: memoryview, buffer: np.ndarray) -> None:
        storage.publish_bytes(path, data)
        self._buffers.give_back(buffer)

    def publish(self) -> TaskIndex:
        """Publishes the index unless another attempt already has, removes this task's shards that the
        published index does not name, and returns that index. Raises ValueError if samples are missing."""
        if self._samples != self._task.samples:
            name = self._task.name
            raise ValueError(f"task {name}: {self._samples} of {self._task.samples} samples written")
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
        published = own
        if not first:
            published, _ = unfinished.read_task_index(self._root, self._spec, self._split, self._task)
        named = {shard.file for shard in published.shards}
        directory = storage.join(self._root, paths.SHARDS, self._split, self._task.name)
        for name in storage.list_names(directory):
            if name not in named:
                storage.remove(storage.join(directory, name))
        return published


def _concatenated(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def quarantine_task(root: str, split: str, task: str, record: Mapping[str, Any]) -> None:
    """Publishes ``failed/SPLIT/TASK.json``. ``record`` says why the task is quarantined."""
    storage.publish_bytes(paths.failed_path(root, split, task), encode(record))


def finish_store(root: str, parts: Mapping[str, int]) -> Manifest:
    """Publishes the manifest of a store whose tasks are all finished, and returns it.

    ``parts`` is the number of parts of each split. Reads the index of every part and task, and digests the
    files of tokenizer and teacher. Raises UserError with exit code 3 if tasks are missing.
    """
    spec = unfinished.read_spec(root)
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
    parts = [(index.rows, digest) for index, digest in unfinished.read_parts(root, split, count)]
    plan = SplitPlan.of(split, tuple(rows for rows, _ in parts), spec.plan)
    finished = unfinished.finished_tasks(root, split)
    missing = [task.name for task in plan.tasks() if task.name not in finished]
    if missing:
        names = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise UserError(
            f"{root} is incomplete: {len(missing)} of {plan.task_count} tasks of {split} are missing "
            f"({names}); run the same command again",
            EXIT_INCOMPLETE,
        )
    digests, tokens, masked = [], 0, 0
    read = partial(unfinished.read_task_index, root, spec, split)
    for index, digest in unfinished.map_in_order(read, plan.tasks()):
        digests.append(digest)
        tokens, masked = tokens + index.tokens, masked + index.masked
    return SplitRecord(plan.rows, tuple(digest for _, digest in parts), tuple(digests), tokens, masked)


def _fixed_files(root: str) -> Iterator[tuple[str, str]]:
    """Yields (path relative to the store, digest) of every file of ``tokenizer/`` and ``teacher/``."""
    for directory in (paths.TOKENIZER, paths.TEACHER):
        path = storage.join(root, directory)
        for name in storage.list_names(path):
            yield f"{directory}/{name}", storage.digest_file(storage.join(path, name))
