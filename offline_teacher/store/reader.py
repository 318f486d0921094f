"""Opening a finished store: two small files are read; all others are checked when they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra.cache import Cache
from infra.errors import UserError
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest, Spec
from offline_teacher.store.numbering import SplitPlan


class DamagedStore(UserError):
    """Something in a store is not, byte for byte, what its manifest says."""


@dataclass(frozen=True)
class Split:
    """One split of a finished store."""

    name: str
    plan: SplitPlan
    """Tasks, shards, blocks and samples."""
    tasks: tuple[str, ...]
    """File digests of the indices of its tasks, in order."""
    tokens: int
    """Real tokens of all its samples."""
    masked: int
    """Masked tokens of all its samples."""


class Store:
    """A finished store, local or remote: ``layout``, ``plan``, ``special``, ``fingerprint``, ``digest``, ``splits``."""

    root: str
    spec: Spec
    manifest: Manifest
    splits: dict[str, Split]

    def task_index(self, split: str, number: int) -> TaskIndex:
        """The index of a task, checked; the last used ones are kept."""
        raise NotImplementedError

    def tokenizer_files(self) -> dict[str, bytes]:
        """Plain file name -> content of every tokenizer file."""
        raise NotImplementedError

    def teacher_config(self) -> dict[str, Any]:
        """The teacher's ``config.json``."""
        raise NotImplementedError

    def teacher_weights(self, cache: Cache | None = None) -> str:
        """Local path of the teacher's ``model.safetensors``, its digest checked."""
        raise NotImplementedError

    def pooling(self) -> dict[str, Any] | None:
        """Pooling, normalisation and prompts of a sentence encoder; None for others."""
        raise NotImplementedError


def open_store(root: str) -> Store:
    """UserError if the store is incomplete (how many tasks are missing), of format 1, or damaged."""
    raise NotImplementedError
