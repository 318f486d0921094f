"""Writing a store: spec.json first, then parts and tasks in any order from any worker, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest, Spec
from offline_teacher.store.numbering import Task


def begin_store(root: str, spec: Spec) -> None:
    """Publishes ``spec.json``, or finds the same one there.

    UserError, with the differences in words, if the directory holds a store of another fingerprint.
    """
    raise NotImplementedError


def read_spec(root: str) -> Spec:
    """UserError if it is absent or damaged."""
    raise NotImplementedError


class TaskWriter:
    """One attempt of one task. Use it as a context; without ``publish`` nothing of the task exists."""

    def __init__(
        self, root: str, spec: Spec, split: str, task: Task, environment: Mapping[str, Any]
    ) -> None: ...

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Appends samples: arrays [n, *shape], any n >= 1, of ``spec.layout.data_columns()``.

        Raises ValueError naming column and sample if a value cannot be right. Digests are computed here.
        Shards are published in the background as they fill up.
        """
        raise NotImplementedError

    def publish(self) -> TaskIndex:
        """Publishes the index, if no other attempt has, and returns the one that holds.

        Then removes all shards of the task that this index does not name.
        """
        raise NotImplementedError


def finished_tasks(root: str, split: str) -> set[str]:
    """Names of the tasks of a split that have an index: one paged listing."""
    raise NotImplementedError


def quarantine_task(root: str, split: str, task: str, record: Mapping[str, Any]) -> None:
    """Publishes why a task was given up: ``failed/SPLIT/TASK.json``."""
    raise NotImplementedError


def quarantined_tasks(root: str, split: str) -> list[str]:
    raise NotImplementedError


def finish_store(root: str, parts: Mapping[str, int]) -> Manifest:
    """Publishes the manifest once every task is there. ``parts``: number of parts of each split.

    UserError with exit code 3 if tasks are missing.
    """
    raise NotImplementedError
