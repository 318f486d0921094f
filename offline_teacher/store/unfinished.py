"""Reads an unfinished store: its spec, parts, finished tasks and quarantined tasks."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store import paths
from offline_teacher.store.index import PartIndex, TaskIndex
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import Task
from offline_teacher.store.records import read
from offline_teacher.store.schema import require

T = TypeVar("T")
R = TypeVar("R")

THREADS = 32
"""Number of threads that read small files, because each remote file costs a round trip."""
FORMAT_1_SPEC = "declaration.json"
"""Name of the file that stores of format 1 have instead of spec.json."""


def refuse_format_1(root: str) -> None:
    """Raises UserError if the directory has a store of format 1."""
    if storage.exists(storage.join(root, FORMAT_1_SPEC)):
        raise UserError(
            f"the store {root} is of format 1, which this version does not read: make it again with the "
            "teacher pass, under another store.path"
        )


@contextlib.contextmanager
def _damage_as_user_error(root: str, path: str) -> Iterator[None]:
    """Turns a ValueError about the file ``path`` into a UserError that says how to repair the store."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `{paths.repair_command(root)}`") from None


def read_spec(root: str) -> Spec:
    """Reads the spec of a store. Raises UserError if it is absent or damaged."""
    path = storage.join(root, paths.SPEC)
    if not storage.exists(path):
        refuse_format_1(root)
        raise UserError(f"{root} is not a store: it has no {paths.SPEC}")
    with _damage_as_user_error(root, path):
        return read(path, Spec.from_bytes)[0]


def finished_tasks(root: str, split: str) -> set[str]:
    """Returns the names of the tasks of a split that have an index, by one listing of their directory."""
    return _json_names(storage.join(root, paths.TASKS, split))


def quarantined_tasks(root: str, split: str) -> set[str]:
    """Returns the names of the tasks of a split that were given up after repeated failures."""
    return _json_names(storage.join(root, paths.FAILED, split))


def finished_parts(root: str, split: str) -> int:
    """Returns the number of parts of a split that have an index, counted from the first to the first gap."""
    names = _json_names(storage.join(root, paths.SEQUENCES, split))
    count = 0
    while paths.part_name(count) in names:
        count += 1
    return count


def foreign_files(root: str, expected: Set[str]) -> list[str]:
    """Returns the paths, relative to the store, of files in tokenizer/ and teacher/ that are not expected."""
    names = [
        f"{directory}/{name}"
        for directory in (paths.TOKENIZER, paths.TEACHER)
        for name in storage.list_names(storage.join(root, directory))
    ]
    return [name for name in names if name not in expected]


def _json_names(directory: str) -> set[str]:
    return {name[:-5] for name in storage.list_names(directory) if name.endswith(".json")}


def task_index(
    root: str, spec: Spec, split: str, task: Task, digest: str | None = None
) -> tuple[TaskIndex, str]:
    """Reads a task's index. Returns the index and the digest of its file. Raises ValueError if the index is
    absent, damaged or of another task, or if its file does not have the given ``digest``."""

    def parse(data: bytes) -> TaskIndex:
        index = TaskIndex.from_bytes(data)
        index.check(spec.layout, spec.plan, split, task, spec.digest)
        return index

    return read(paths.task_path(root, split, task.name), parse, digest)


def part_index(root: str, split: str, part: int, digest: str | None = None) -> tuple[PartIndex, str]:
    """Like ``task_index``, for a part."""

    def parse(data: bytes) -> PartIndex:
        index = PartIndex.from_bytes(data)
        require((index.split, index.part) == (split, part), "is the index of another part")
        return index

    return read(paths.part_path(root, split, part, ".json"), parse, digest)


def read_task_index(root: str, spec: Spec, split: str, task: Task) -> tuple[TaskIndex, str]:
    """Like ``task_index``, but raises UserError, which says how to repair the store."""
    with _damage_as_user_error(root, paths.task_path(root, split, task.name)):
        return task_index(root, spec, split, task)


def read_part_index(root: str, split: str, part: int) -> tuple[PartIndex, str]:
    """Like ``part_index``, but raises UserError, which says how to repair the store."""
    with _damage_as_user_error(root, paths.part_path(root, split, part, ".json")):
        return part_index(root, split, part)


def read_parts(root: str, split: str, count: int | None = None) -> Iterator[tuple[PartIndex, str]]:
    """Yields ``read_part_index`` of the first ``count`` parts, in order; None: of all finished parts."""
    parts = range(finished_parts(root, split) if count is None else count)
    return map_in_order(lambda part: read_part_index(root, split, part), parts)


def map_in_order(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """Yields ``function`` of each item, in order, like ``map``, but with several threads."""
    with ThreadPoolExecutor(threads) as pool:
        yield from ahead(pool, function, items, 2 * threads)


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], limit: int) -> Iterator[R]:
    """Like ``pool.map``, but keeps at most ``limit`` results that are not consumed yet, to limit memory."""
    running: deque[Future[R]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= limit:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
