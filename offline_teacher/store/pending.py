"""What an unfinished store has so far: its spec, its parts, its finished and its quarantined tasks."""

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
"""Small files read at once: each costs a round trip."""
OLD_SPEC = "declaration.json"
"""The name of the first file of a store of format 1."""


def refuse_format_1(root: str) -> None:
    """UserError if the directory holds a store of format 1."""
    if storage.exists(storage.join(root, OLD_SPEC)):
        raise UserError(
            f"the store {root} is of format 1, which this version does not read: make it again with the "
            "teacher pass, in another place"
        )


@contextlib.contextmanager
def _damage_named(root: str, path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `{paths.repair_command(root)}`") from None


def read_spec(root: str) -> Spec:
    """UserError if it is absent or damaged."""
    path = storage.join(root, paths.SPEC)
    if not storage.exists(path):
        refuse_format_1(root)
        raise UserError(f"{root} is not a store: it has no {paths.SPEC}")
    with _damage_named(root, path):
        return read(path, Spec.from_bytes)[0]


def finished_tasks(root: str, split: str) -> set[str]:
    """Names of the tasks of a split that have an index: one listing, page by page."""
    return _json_names(storage.join(root, paths.TASKS, split))


def quarantined_tasks(root: str, split: str) -> set[str]:
    """Names of the tasks of a split that were given up."""
    return _json_names(storage.join(root, paths.FAILED, split))


def finished_parts(root: str, split: str) -> int:
    """How many parts of a split are there, counted from the first without a gap."""
    names = _json_names(storage.join(root, paths.SEQUENCES, split))
    count = 0
    while paths.part_name(count) in names:
        count += 1
    return count


def foreign_files(root: str, own: Set[str]) -> list[str]:
    """Names below the store of files of tokenizer and teacher that are not its ``own``."""
    names = [
        f"{directory}/{name}"
        for directory in (paths.TOKENIZER, paths.TEACHER)
        for name in storage.list_names(storage.join(root, directory))
    ]
    return [name for name in names if name not in own]


def _json_names(directory: str) -> set[str]:
    return {name[:-5] for name in storage.list_names(directory) if name.endswith(".json")}


def task_index(
    root: str, spec: Spec, split: str, task: Task, digest: str | None = None
) -> tuple[TaskIndex, str]:
    """The index of a task and its file digest. ValueError if it is absent, damaged or another's."""

    def parse(data: bytes) -> TaskIndex:
        index = TaskIndex.from_bytes(data)
        index.check(spec.layout, spec.plan, split, task, spec.digest)
        return index

    return read(paths.task_path(root, split, task.name), parse, digest)


def part_index(root: str, split: str, part: int, digest: str | None = None) -> tuple[PartIndex, str]:
    """The same of a part."""

    def parse(data: bytes) -> PartIndex:
        index = PartIndex.from_bytes(data)
        require((index.split, index.part) == (split, part), "is the index of another part")
        return index

    return read(paths.part_path(root, split, part, ".json"), parse, digest)


def read_task_index(root: str, spec: Spec, split: str, task: Task) -> tuple[TaskIndex, str]:
    """``task_index`` with a UserError that says how to repair the store."""
    with _damage_named(root, paths.task_path(root, split, task.name)):
        return task_index(root, spec, split, task)


def read_part_index(root: str, split: str, part: int) -> tuple[PartIndex, str]:
    """``part_index`` with a UserError that says how to repair the store."""
    with _damage_named(root, paths.part_path(root, split, part, ".json")):
        return part_index(root, split, part)


def read_parts(root: str, split: str, count: int) -> Iterator[tuple[PartIndex, str]]:
    """``read_part_index`` of the first ``count`` parts, in order, several at once."""
    return in_order(lambda part: read_part_index(root, split, part), range(count))


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """``map`` with threads."""
    with ThreadPoolExecutor(threads) as pool:
        yield from ahead(pool, function, items, 2 * threads)


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """``pool.map`` that runs at most ``most`` items ahead of what is consumed, so that memory stays flat."""
    running: deque[Future[R]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= most:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
