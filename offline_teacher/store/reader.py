"""Opening a finished store: two small files are read; every other is checked when it is used."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError, WrongContent
from infra.files import storage
from infra.files.cache import Cache
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import (
    CONFIG,
    MANIFEST,
    POOLING,
    SPEC,
    TASKS,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    Spec,
    repair_command,
    task_path,
)
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.pending import (
    finished_parts,
    finished_tasks,
    read_parts,
    read_spec,
    refuse_format_1,
)
from offline_teacher.store.records import read
from offline_teacher.store.schema import SPLITS, Layout, Plan, SpecialIds

INDICES_KEPT = 1024
"""Indices of tasks that a store holds in memory: some 50 kB each."""
CACHE_BYTES = 20 << 30
"""Of the private cache that is made for a remote file if the caller brings none."""


class DamagedStore(UserError):
    """Something in a store is not, byte for byte, what its manifest says."""

    def __init__(self, root: str, what: str) -> None:
        super().__init__(f"the store {root} is damaged: {what}: run `{repair_command(root)}`")


@dataclass(frozen=True)
class Split:
    """One split of a finished store."""

    name: str
    plan: SplitPlan
    """Its tasks, shards, blocks and samples."""
    tasks: tuple[str, ...]
    """File digests of the indices of its tasks, in order."""
    tokens: int
    """Real tokens of all its samples."""
    masked: int
    """Masked tokens of all its samples."""


class Store:
    """A finished store, local or remote; ``open_store`` makes it. Several threads may use one."""

    def __init__(self, root: str, spec: Spec, manifest: Manifest) -> None:
        """ValueError if the manifest does not fit the spec."""
        self.root, self.spec, self.manifest = root, spec, manifest
        self.splits: dict[str, Split] = {}
        for name, record in manifest.splits.items():
            plan = SplitPlan.of(name, record.rows, spec.plan)
            if plan.task_count != len(record.tasks):
                raise ValueError(
                    f"{MANIFEST}: {len(record.tasks)} tasks of {name} instead of {plan.task_count}"
                )
            self.splits[name] = Split(name, plan, record.tasks, record.tokens, record.masked)
        self._indices: OrderedDict[tuple[str, int], TaskIndex] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def layout(self) -> Layout:
        return self.spec.layout

    @property
    def plan(self) -> Plan:
        return self.spec.plan

    @property
    def special(self) -> SpecialIds:
        return self.spec.special

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.spec.fingerprint

    @property
    def digest(self) -> str:
        """The file digest of manifest.json: it stands for every byte of the store."""
        return self.manifest.digest

    def task_index(self, split: str, number: int) -> TaskIndex:
        """The index of a task, checked against the manifest; the last used ones are kept. DamagedStore."""
        key = split, number
        with self._lock:
            if key in self._indices:
                self._indices.move_to_end(key)
                return self._indices[key]
        index = self._read_index(split, number)
        with self._lock:
            self._indices[key] = index
            while len(self._indices) > INDICES_KEPT:
                self._indices.popitem(last=False)
        return index

    def _read_index(self, split: str, number: int) -> TaskIndex:
        task = self.splits[split].plan.task(number)
        name = f"{TASKS}/{split}/{task.name}.json"
        try:
            data = read(task_path(self.root, split, task.name), self.splits[split].tasks[number])
            if data is None:
                raise ValueError("is missing")
            index = TaskIndex.from_bytes(data)
            index.check(self.layout, self.plan, split, task, self.spec.digest)
        except ValueError as error:
            raise DamagedStore(self.root, f"{name} {error}") from None
        return index

    def tokenizer_files(self) -> dict[str, bytes]:
        """Plain file name -> content of every tokenizer file. DamagedStore."""
        prefix = f"{TOKENIZER}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file(name) for name in names}

    def teacher_config(self) -> dict[str, Any]:
        """The teacher's ``config.json``. DamagedStore."""
        return self._json(CONFIG)

    def pooling(self) -> dict[str, Any] | None:
        """Pooling, normalisation and prompts of a sentence encoder; None for others. DamagedStore."""
        return self._json(POOLING) if POOLING in self.manifest.files else None

    def teacher_weights(self, cache: Cache | None = None) -> str:
        """Local path of the teacher's ``model.safetensors``, its digest checked.

        A remote one is fetched into ``cache``. UserError if the store has none; DamagedStore.
        """
        if WEIGHTS not in self.manifest.files:
            raise UserError(f"the store {self.root} holds no weights of its teacher ({WEIGHTS})")
        self._cache = cache or Cache(None, CACHE_BYTES)  # a private one lives as long as this store
        try:
            return self._cache.local_path(storage.join(self.root, WEIGHTS), self.manifest.files[WEIGHTS])
        except WrongContent:
            raise DamagedStore(self.root, f"{WEIGHTS} has another digest") from None

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
            data = read(storage.join(self.root, name), self.manifest.files[name])
            if data is None:
                raise ValueError("is missing")
        except ValueError as error:
            raise DamagedStore(self.root, f"{name} {error}") from None
        return data


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
        data = read(storage.join(root, MANIFEST))
        if data is None:
            return None
        manifest = Manifest.from_bytes(data)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} {error}") from None
    try:
        data = read(storage.join(root, SPEC), manifest.spec)
        if data is None:
            raise ValueError("is missing")
        return Spec.from_bytes(data), manifest
    except ValueError as error:
        raise ValueError(f"{SPEC} {error}") from None


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
