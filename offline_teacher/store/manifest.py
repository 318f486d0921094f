"""The three sealed JSON files of a store: its declaration (first), shard sidecars, its manifest (last)."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from infra import storage
from offline_teacher.store.head import HEAD_NAME
from offline_teacher.store.schema import (
    FORMAT_VERSION,
    Layout,
    ShardPlan,
    SpecialIds,
    check_keys,
    is_count,
    require,
    shard_name,
)
from offline_teacher.store.sealed import content_digest, seal, unseal

DECLARATION_NAME = "declaration.json"
MANIFEST_NAME = "manifest.json"
RECIPE_NAME = "recipe.yaml"
RECIPE_SIDECAR_NAME = "recipe.json"
SHARDS = "shards"
FAILED = "failed"
FILE_DIRECTORIES = ("sequences", "tokenizer", "teacher")
"""Directories whose files are listed, with their digests, in the manifest."""

_DIGEST = re.compile(r"xxh3-128:[0-9a-f]{32}")
_FILE = re.compile(
    rf"{re.escape(DECLARATION_NAME)}|({'|'.join(FILE_DIRECTORIES)})(/[A-Za-z0-9_][A-Za-z0-9._+-]*)+"
)


def repair_command(root: str) -> str:
    return f"python -m offline_teacher.main verify {root} --repair"


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


@dataclass(frozen=True)
class Declaration:
    """What a store is going to hold; written before its first shard, so that a resumed pass can compare."""

    layout: Layout
    plan: ShardPlan
    special: SpecialIds
    fingerprint: dict[str, Any]
    """recipe (outcome fields), teacher, tokenizer, corpus digests, format version."""

    def __post_init__(self) -> None:
        require(isinstance(self.fingerprint, dict), "fingerprint: must be an object")
        for name, value in asdict(self.special).items():
            require(value < self.layout.vocab_size, f"special.{name}: {value} is not below vocab_size")

    @cached_property
    def fingerprint_digest(self) -> str:
        return content_digest(self.fingerprint)

    def shard_metadata(self, replica: int, index: int) -> dict[str, Any]:
        """What every shard says about itself, as JSON in its Arrow schema metadata."""
        ids = self.plan.sequence_range(index)
        return {
            "format_version": FORMAT_VERSION,
            "layout": self.layout.to_json(),
            "replica": replica,
            "index": index,
            "first_sequence": ids.start,
            "samples": len(ids),
            "fingerprint": self.fingerprint_digest,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "layout": self.layout.to_json(),
            "plan": self.plan.to_json(),
            "special": self.special.to_json(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_json(cls, value: Any) -> Declaration:
        check_keys(value, {"format_version", "layout", "plan", "special", "fingerprint"}, "declaration")
        version = value["format_version"]
        require(
            is_count(version) and version == FORMAT_VERSION,
            f"format_version: is {str(version)[:40]!r}; this version of the reader knows {FORMAT_VERSION}",
        )
        return cls(
            layout=Layout.from_json(value["layout"]),
            plan=ShardPlan.from_json(value["plan"]),
            special=SpecialIds.from_json(value["special"]),
            fingerprint=value["fingerprint"],
        )


@dataclass(frozen=True)
class Sidecar:
    """What is known of a published shard. A shard without a valid sidecar does not exist."""

    name: str
    replica: int
    index: int
    first_sequence: int
    samples: int
    bytes: int
    shard_digest: str
    """xxh3-128 over the shard file."""
    fingerprint: str
    """digest of the store's fingerprint."""

    def __post_init__(self) -> None:
        for name in ("replica", "index", "first_sequence", "samples", "bytes"):
            require(is_count(getattr(self, name)), f"{name}: must be a whole number")
        require(is_digest(self.shard_digest), "shard_digest: must be xxh3-128:<32 hex>")
        require(is_digest(self.fingerprint), "fingerprint: must be xxh3-128:<32 hex>")
        require(self.name == shard_name(self.replica, self.index), "name: does not fit replica and index")

    def to_bytes(self) -> builtins.bytes:
        return seal(asdict(self))

    @classmethod
    def from_bytes(cls, data: builtins.bytes) -> Sidecar:
        value = unseal(data)
        check_keys(value, {field.name for field in fields(cls)}, "sidecar")
        return cls(**value)


@dataclass(frozen=True)
class Manifest:
    """A finished store: the declaration, every shard's digest, every other file's digest."""

    declaration: Declaration
    shard_digests: list[str]
    """In the order of ``plan.shard_ids()``."""
    files: dict[str, str]
    """Path below the store -> digest, of every file that is not a shard, the recipe or the manifest."""

    def __post_init__(self) -> None:
        digests = self.shard_digests
        require(isinstance(digests, list) and all(map(is_digest, digests)), "shard_digests: must be digests")
        total = self.plan.total
        require(len(digests) == total, f"shard_digests: lists {len(digests)} shards, the plan has {total}")
        require(isinstance(self.files, Mapping), "files: must be an object")
        for name, digest in self.files.items():
            require(_FILE.fullmatch(name) is not None, f"files: {name[:100]!r} is not a path of a store")
            require(is_digest(digest), f"files: {name}: must be xxh3-128:<32 hex>")
        require(DECLARATION_NAME in self.files, f"files: lacks {DECLARATION_NAME}")

    @property
    def format_version(self) -> int:
        return FORMAT_VERSION

    @property
    def layout(self) -> Layout:
        return self.declaration.layout

    @property
    def plan(self) -> ShardPlan:
        return self.declaration.plan

    @property
    def special(self) -> SpecialIds:
        return self.declaration.special

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.declaration.fingerprint

    @property
    def fingerprint_digest(self) -> str:
        return self.declaration.fingerprint_digest

    @property
    def head_digest(self) -> str | None:
        """Digest of the head file; None in a store without one."""
        return self.files.get(HEAD_NAME)

    @cached_property
    def tokenizer_digest(self) -> str:
        """Digest over names and digests of the tokenizer's files."""
        return content_digest({name: d for name, d in self.files.items() if name.startswith("tokenizer/")})

    @cached_property
    def digest(self) -> str:
        """Of the whole store: every byte of it except recipe.yaml goes in."""
        return content_digest(self.to_json())

    def shard_digest(self, replica: int, index: int) -> str:
        return self.shard_digests[self.plan.position(replica, index)]

    def to_json(self) -> dict[str, Any]:
        return {**self.declaration.to_json(), "shard_digests": self.shard_digests, "files": dict(self.files)}

    def to_bytes(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        value = unseal(data)
        own = {"shard_digests", "files"}
        require(own <= set(value), "manifest: lacks shard_digests or files")
        declaration = Declaration.from_json({key: item for key, item in value.items() if key not in own})
        return cls(declaration, value["shard_digests"], value["files"])


def shard_path(root: str, replica: int, index: int) -> str:
    return storage.join(root, SHARDS, f"{shard_name(replica, index)}.arrow")


def sidecar_path(root: str, replica: int, index: int) -> str:
    return storage.join(root, SHARDS, f"{shard_name(replica, index)}.json")
