"""What an unfinished store has so far: its spec, its parts, its finished and its quarantined tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store.index import PartIndex
from offline_teacher.store.manifest import (
    FAILED,
    SEQUENCES,
    SPEC,
    TASKS,
    Spec,
    part_name,
    part_path,
    repair_command,
)
from offline_teacher.store.records import MAX_BYTES

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


def read_spec(root: str) -> Spec:
    """UserError if it is absent or damaged."""
    path = storage.join(root, SPEC)
    if not storage.exists(path):
        refuse_format_1(root)
        raise UserError(f"{root} is not a store: it has no {SPEC}")
    return read_parsed(root, path, Spec.from_bytes)[0]


def read_parsed(root: str, path: str, parse: Callable[[bytes], T]) -> tuple[T, str]:
    """A JSON file of a store, parsed, and its digest. UserError if it is absent or damaged."""
    try:
        found = storage.read_checked(path, MAX_BYTES, lambda data: (parse(data), storage.digest_bytes(data)))
        if found is None:
            raise ValueError("it is missing")
        return found
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `{repair_command(root)}`") from None


def finished_tasks(root: str, split: str) -> set[str]:
    """Names of the tasks of a split that have an index: one listing, page by page."""
    return _json_names(storage.join(root, TASKS, split))


def quarantined_tasks(root: str, split: str) -> set[str]:
    """Names of the tasks of a split that were given up."""
    return _json_names(storage.join(root, FAILED, split))


def finished_parts(root: str, split: str) -> int:
    """How many parts of a split are there, counted from the first without a gap."""
    names = _json_names(storage.join(root, SEQUENCES, split))
    count = 0
    while part_name(count) in names:
        count += 1
    return count


def _json_names(directory: str) -> set[str]:
    return {name[:-5] for name in storage.list_names(directory) if name.endswith(".json")}


def read_part_index(root: str, split: str, part: int) -> tuple[PartIndex, str]:
    """The index of a part and its file digest. UserError if it is absent, damaged or another's."""

    def parse(data: bytes) -> PartIndex:
        index = PartIndex.from_bytes(data)
        if (index.split, index.part) != (split, part):
            raise ValueError("it is the index of another part")
        return index

    return read_parsed(root, part_path(root, split, part, ".json"), parse)


def read_parts(root: str, split: str, count: int) -> Iterator[tuple[PartIndex, str]]:
    """``read_part_index`` of the first ``count`` parts, in order, several at once."""
    return in_order(lambda part: read_part_index(root, split, part), range(count))


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """``map`` with threads that runs only a little ahead of what is consumed, so that memory stays flat."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[R]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
