"""Opens a finished store by reading two small files. ``block_reader`` checks the others at their use."""

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
from offline_teacher.store import paths, unfinished
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest, Spec, SplitRecord
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.records import Missing, read
from offline_teacher.store.schema import SPLITS, require

INDICES_KEPT = 1024
"""Number of task indices that a store keeps in memory, of about 50 kB each."""
CACHE_BYTES = 20 << 30
"""Size of the private cache for remote files that is created if the caller passes none."""


class DamagedStore(UserError):
    """A file of a store is missing, or its bytes do not have the digest that is recorded for them."""

    def __init__(self, root: str, what: str) -> None:
        super().__init__(f"the store {root} is damaged: {what}: run `{paths.repair_command(root)}`")


@dataclass(frozen=True)
class Split:
    """One split of a store. All fields after ``plan`` are as in `SplitRecord`, empty without a manifest."""

    name: str
    plan: SplitPlan
    parts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tokens: int = 0
    masked: int = 0

    @classmethod
    def of(cls, name: str, spec: Spec, record: SplitRecord) -> Split:
        """Returns the split of a manifest's record. Raises ValueError if the record does not fit the spec."""
        plan = SplitPlan.of(name, record.rows, spec.plan)
        wrong = f"{paths.MANIFEST}: {len(record.tasks)} tasks of {name} instead of {plan.task_count}"
        require(len(record.tasks) == plan.task_count, wrong)
        return cls(name, plan, record.parts, record.tasks, record.tokens, record.masked)


class Store:
    """A finished store, local or remote, as ``open_store`` returns it. Several threads may share it.

    Methods that read a file of it raise DamagedStore if the file is damaged.
    """

    def __init__(self, root: str, spec: Spec, manifest: Manifest) -> None:
        """Raises ValueError if the manifest does not fit the spec."""
        self.root, self.spec, self.manifest = root, spec, manifest
        self.layout, self.plan, self.special = spec.layout, spec.plan, spec.special
        self.fingerprint = spec.fingerprint
        self.splits = {name: Split.of(name, spec, record) for name, record in manifest.splits.items()}
        self.task_index = lru_cache(INDICES_KEPT)(partial(_read_index, root, spec, self.splits))
        """Function of (split, number of a task): the task's index, checked against the manifest."""

    @property
    def digest(self) -> str:
        """Digest of manifest.json, which identifies every byte of the store."""
        return self.manifest.digest

    def tasks(self) -> list[tuple[str, Task]]:
        """Returns (split, task) of all tasks in order: first those of train, then those of validation."""
        return [(name, task) for name, split in self.splits.items() for task in split.plan.tasks()]

    def tokenizer_files(self) -> dict[str, bytes]:
        """Returns file name -> content of the tokenizer files."""
        prefix = f"{paths.TOKENIZER}/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file(name) for name in names}

    def teacher_config(self) -> dict[str, Any]:
        return self._json(paths.CONFIG)

    def pooling(self) -> dict[str, Any] | None:
        """Returns pooling, normalisation and prompts if the teacher is a sentence encoder, else None."""
        return self._json(paths.POOLING) if paths.POOLING in self.manifest.files else None

    def teacher_weights(self, cache: Cache | None = None) -> str:
        """Returns the local path of the teacher's ``model.safetensors``, and checks the file's digest. A
        remote file is downloaded to ``cache``. Raises UserError if the store has no weights."""
        if paths.WEIGHTS not in self.manifest.files:
            raise UserError(f"the store {self.root} holds no weights of its teacher ({paths.WEIGHTS})")
        self._cache = cache or Cache(None, CACHE_BYTES)  # a private cache is deleted with its object
        try:
            path = storage.join(self.root, paths.WEIGHTS)
            return self._cache.local_path(path, self.manifest.files[paths.WEIGHTS])
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
        return unfinished.task_index(root, spec, split, task, splits[split].tasks[number])[0]
    except ValueError as error:
        raise DamagedStore(root, f"{paths.TASKS}/{split}/{task.name}.json {error}") from None


def open_store(root: str) -> Store:
    """Returns the store. Raises UserError if there is none, if it is of format 1, or, with the number of
    missing tasks, if it is incomplete; DamagedStore if manifest.json or spec.json is damaged."""
    try:
        spec_and_manifest = read_root(root)
        if spec_and_manifest is not None:
            return Store(root, *spec_and_manifest)
    except ValueError as error:
        unfinished.refuse_format_1(root)
        raise DamagedStore(root, str(error)) from None
    raise UserError(incomplete_message(root))


def read_root(root: str) -> tuple[Spec, Manifest] | None:
    """Reads and checks spec.json and manifest.json. Returns None if there is no manifest.

    Raises ValueError, with the name of the file and what is wrong, if one of them is damaged.
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


def incomplete_message(root: str) -> str:
    """Returns an error message that says what is missing from a store without a manifest."""
    spec = unfinished.read_spec(root)
    missing = total = 0
    for split in SPLITS:
        rows = [index.rows for index, _ in unfinished.read_parts(root, split)]
        if sum(rows):
            tasks = SplitPlan.of(split, tuple(rows), spec.plan).task_count
            total, missing = total + tasks, missing + tasks - len(unfinished.finished_tasks(root, split))
    if total == 0:
        what = "its text is not tokenised yet"
    else:
        what = f"{missing} of {total} tasks are missing" if missing else "its manifest is missing"
    again = "run the teacher pass again; it continues where it stopped"
    return f"the store {root} is incomplete, {what}: {again}"
