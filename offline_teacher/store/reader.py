"""Reading a finished store: every shard's digest is checked before its first number is returned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from infra import storage
from infra.cache import Cache
from infra.errors import UserError, WrongContent
from offline_teacher.store.head import HEAD_NAME, MlmHead, parse_head
from offline_teacher.store.manifest import (
    DECLARATION_NAME,
    MANIFEST_NAME,
    Manifest,
    repair_command,
    shard_path,
)
from offline_teacher.store.schema import Layout, ShardPlan, shard_name
from offline_teacher.store.sealed import MAX_BYTES
from offline_teacher.store.shard_file import open_file
from offline_teacher.store.writer import missing_shards, read_declaration

CACHE_BYTES = 20 << 30
"""Of the private cache a store makes for itself where the caller of ``shard`` brings none."""


class DamagedShard(UserError):
    """A shard is not, byte for byte, the one the manifest lists."""

    def __init__(self, root: str, name: str, what: str) -> None:
        super().__init__(f"shard {name} of {root} is damaged ({what}): run `{repair_command(root)}`")
        self.name = name


@dataclass(frozen=True)
class Shard:
    """The samples of one shard."""

    replica: int
    index: int
    columns: dict[str, np.ndarray]
    """Read-only views [n, *shape] of the mapped file, in the dtypes of the layout."""

    @property
    def sequence_ids(self) -> np.ndarray:
        """int64 [n], consecutive."""
        return self.columns["sequence_id"]

    def __len__(self) -> int:
        return len(self.columns["sequence_id"])


def open_store(root: str) -> Store:
    """UserError where the store is incomplete (how many shards are missing) or its manifest is damaged."""
    return Store(root, read_manifest(root))


def read_manifest(root: str) -> Manifest:
    """UserError in one sentence, whatever the file holds."""
    path = storage.join(root, MANIFEST_NAME)
    if not storage.exists(path):
        raise UserError(_incomplete(root))
    if storage.size(path) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES} bytes: run `{repair_command(root)}`")
    try:
        return storage.read_checked(path, Manifest.from_bytes)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run `{repair_command(root)}`") from None


def _incomplete(root: str) -> str:
    if not storage.exists(storage.join(root, DECLARATION_NAME)):
        return f"{root} is not a store: it has no {MANIFEST_NAME}"
    declaration = read_declaration(root)
    missing = missing_shards(root, declaration)
    what = (
        f"{len(missing)} of {declaration.plan.total} shards are missing" if missing else "it was not finished"
    )
    return f"the store {root} is incomplete, {what}: run the teacher pass again, it goes on where it stopped"


class Store:
    """A finished store, local or remote."""

    def __init__(self, root: str, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def plan(self) -> ShardPlan:
        return self.manifest.plan

    def shard(self, replica: int, index: int, cache: Cache | None = None) -> Shard:
        """Maps one shard. Its digest is checked the first time this process asks ``cache`` for it.

        Raises DamagedShard before any number of it is returned; IndexError for a shard not in the plan.
        A remote shard is fetched into ``cache`` (default: a private one of this store).
        """
        digest = self.manifest.shard_digest(replica, index)
        name, path = shard_name(replica, index), shard_path(self.root, replica, index)
        if not storage.exists(path):
            raise DamagedShard(self.root, name, "its file is missing")
        try:
            local = (cache or self._cache).local(path, digest)
            metadata, columns = open_file(local, self.layout)
        except WrongContent:
            raise DamagedShard(self.root, name, "its digest is not the manifest's") from None
        except ValueError as error:
            raise DamagedShard(self.root, name, f"it {error}") from None
        if parsed_metadata(metadata) != self.manifest.declaration.shard_metadata(replica, index):
            raise DamagedShard(self.root, name, "it says it is another shard")
        return Shard(replica, index, columns)

    def head(self) -> MlmHead:
        """The teacher's masked-LM head. UserError where the store has none or it is damaged."""
        try:
            return parse_head(self._file(HEAD_NAME))
        except ValueError as error:
            raise UserError(f"{storage.join(self.root, HEAD_NAME)} {error}") from None

    def tokenizer_files(self) -> dict[str, bytes]:
        """Plain file name -> content of every tokenizer file."""
        prefix = "tokenizer/"
        names = [name for name in self.manifest.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file(name) for name in names}

    def teacher_config(self) -> dict[str, Any]:
        """The teacher's ``config.json``."""
        return dict(json.loads(self._file("teacher/config.json")))

    def _file(self, name: str) -> bytes:
        """A file of the manifest, checked against its digest."""
        path = storage.join(self.root, name)
        if name not in self.manifest.files:
            raise UserError(f"{path} is not part of the store")

        def right(data: bytes) -> bytes:
            if storage.digest_bytes(data) != self.manifest.files[name]:
                raise ValueError
            return data

        try:
            return storage.read_checked(path, right)
        except ValueError:
            raise UserError(f"{path} is damaged: run `{repair_command(self.root)}`") from None

    @cached_property
    def _cache(self) -> Cache:
        return Cache(None, CACHE_BYTES)


def parsed_metadata(metadata: bytes) -> object:
    """What a shard says about itself; None where that is not JSON."""
    try:
        return json.loads(metadata)
    except (ValueError, RecursionError):
        return None
