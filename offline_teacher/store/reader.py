"""Opening a finished store: two small files are read; every other is checked when it is used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.cache import Cache
from offline_teacher.store import paths
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest, Spec, SplitRecord
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.pending import (
    finished_parts,
    finished_tasks,
    read_parts,
    read_spec,
    refuse_format_1,
    task_index,
)
from offline_teacher.store.records import Missing, read
from offline_teacher.store.schema import SPLITS, require

INDICES_KEPT = 1024
"""Indices of tasks that a store holds in memory: some 50 kB each."""
CACHE_BYTES = 20 << 30
"""Of the private cache that is made for a remote file if the caller brings none."""


class DamagedStore(UserError):
    """Something in a store is not, byte for byte, what its manifest says."""

    def __init__(self, root: str, what: str) -> None:
        super().__init__(f"the store {root} is damaged: {what}: run `{paths.repair_command(root)}`")


@dataclass(frozen=True)
class Split:
    """One split of a store."""

    name: str
    plan: SplitPlan
    """Its tasks, shards, blocks and samples."""
    parts: tuple[str, ...] = ()
    """File digests of the indices of its parts; none without a manifest."""
    tasks: tuple[str, ...] = ()
    """The same of its tasks, in order."""
    tokens: int = 0
    """Real tokens of all its samples."""
    masked: int = 0
    """Masked tokens of all its samples."""

    @classmethod
    def of(cls, name: str, spec: Spec, record: SplitRecord) -> Split:
        """ValueError if the manifest's record does not fit the spec."""
        plan = SplitPlan.of(name, record.rows, spec.plan)
        wrong = f"{paths.MANIFEST}: {len(record.tasks)} tasks of {name} instead of {plan.task_count}"
        require(len(record.tasks) == plan.task_count, wrong)
        return cls(name, plan, record.parts, record.tasks, record.tokens, record.masked)


class Store:
    """A finished store, local or remote; ``open_store`` makes it. Several threads may use one."""

    def __init__(self, root: str, spec: Spec, manifest: Manifest) -> None:
        """ValueError if the manifest does not fit the spec."""
        self.root, self.spec, self.manifest = root, spec, manifest
        self.layout, self.plan, self.special = spec.layout, spec.plan, spec.special
        self.fingerprint = spec.fingerprint
        self.splits = {name: Split.of(name, spec, record) for name, record in manifest.splits.items()}
        self.task_index = lru_cache(INDICES_KEPT)(partial(_read_index, root, spec, self.splits))
        """(split, number) -> the index of a task, checked against the manifest. DamagedStore."""

    @property
    def digest(self) -> str:
        """The file digest of manifest.json: it stands for every byte of the store."""
        return self.manifest.digest

    def tasks(self) -> list[tuple[str, Task]]:
        """(split, task) of all splits, in order; training text comes first."""
        return [(name, task) for name, split in self.splits.items() for task in split.plan.tasks()]

    def tokenizer_files(self) -> dict[str, bytes]:
        """Plain file name -> content of every tokenizer file. DamagedStore."""
        prefix = f"{paths.TOKENIZER}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file(name) for name in names}

    def teacher_config(self) -> dict[str, Any]:
        """The teacher's ``config.json``. DamagedStore."""
        return self._json(paths.CONFIG)

    def pooling(self) -> dict[str, Any] | None:
        """Pooling, normalisation and prompts of a sentence encoder; None for others. DamagedStore."""
        return self._json(paths.POOLING) if paths.POOLING in self.manifest.files else None

    def teacher_weights(self, cache: Cache | None = None) -> str:
        """Local path of the teacher's ``model.safetensors``, its digest checked.

        A remote one is fetched into ``cache``. UserError if the store has none; DamagedStore.
        """
        if paths.WEIGHTS not in self.manifest.files:
            raise UserError(f"the store {self.root} holds no weights of its teacher ({paths.WEIGHTS})")
        self._cache = cache or Cache(None, CACHE_BYTES)  # a private one lives as long as this store
        try:
            return self._cache.local_path(
                storage.join(self.root, paths.WEIGHTS), self.manifest.files[paths.WEIGHTS]
            )
        except WrongContent:
            raise DamagedStore(self.root, f"{paths.WEIGHTS} has another digest") from None

    def _json(self, name: str) -> dict[str, Any]:
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(self._file(name))
        if not isinstance(value, dict):
            raise DamagedStore(self.root, f"{name} holds no JSON object")
        return value

    def _file(self, name: str) -> bytes:
        if name not in self.manifest.files:
            raise UserError(f"the store {self.root} has no {name}")
        try:
            return read(storage.join(self.root, name), bytes, self.manifest.files[name])[0]
        except ValueError as error:
            raise DamagedStore(self.root, f"{name} {error}") from None


def _read_index(root: str, spec: Spec, splits: Mapping[str, Split], split: str, number: int) -> TaskIndex:
    task = splits[split].plan.task(number)
    try:
        return task_index(root, spec, split, task, splits[split].tasks[number])[0]
    except ValueError as error:
        raise DamagedStore(root, f"{paths.TASKS}/{split}/{task.name}.json {error}") from None


def open_store(root: str) -> Store:
    """Reads manifest.json and spec.json.

    UserError if there is no store, if it is of format 1, or if it is incomplete: it says how many tasks are
    missing. DamagedStore if one of the two files is damaged.
    """
    try:
        found = read_root(root)
        if found is not None:
            return Store(root, *found)
    except ValueError as error:
        refuse_format_1(root)
        raise DamagedStore(root, str(error)) from None
    raise UserError(incomplete(root))


def read_root(root: str) -> tuple[Spec, Manifest] | None:
    """spec.json and manifest.json, checked; None if there is no manifest.

    ValueError names the file that is damaged, and how.
    """
    try:
        manifest, _ = read(storage.join(root, paths.MANIFEST), Manifest.from_bytes)
    except Missing:
        return None
    except ValueError as error:
        raise ValueError(f"{paths.MANIFEST} {error}") from None
    try:
        return read(storage.join(root, paths.SPEC), Spec.from_bytes, manifest.spec)[0], manifest
    except ValueError as error:
        raise ValueError(f"{paths.SPEC} {error}") from None


def incomplete(root: str) -> str:
    """What is missing of a store without manifest, as one sentence. UserError if there is no store at all."""
    spec = read_spec(root)
    missing = total = 0
    for split in SPLITS:
        rows = [index.rows for index, _ in read_parts(root, split, finished_parts(root, split))]
        if sum(rows):
            tasks = SplitPlan.of(split, tuple(rows), spec.plan).task_count
            total, missing = total + tasks, missing + tasks - len(finished_tasks(root, split))
    if total == 0:
        what = "its text is not tokenised yet"
    else:
        what = f"{missing} of {total} tasks are missing" if missing else "its manifest is missing"
    return f"the store {root} is incomplete, {what}: run the teacher pass again, it goes on where it stopped"
