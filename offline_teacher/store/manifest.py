"""The files spec.json, which is written first, and manifest.json, which is written last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from infra.files import storage
from offline_teacher.store.index import is_digest
from offline_teacher.store.paths import TEACHER, TOKENIZER
from offline_teacher.store.records import decode, encode
from offline_teacher.store.schema import (
    FORMAT_VERSION,
    SPLITS,
    Layout,
    Plan,
    SpecialIds,
    check_keys,
    is_count,
    parsed,
    require,
)

FINGERPRINT_KEYS = {"recipe", "teacher", "tokenizer", "architecture", "corpus", "format"}

_FILE = re.compile(rf"({TOKENIZER}|{TEACHER})(/[A-Za-z0-9_][A-Za-z0-9._+-]*)+")


@dataclass(frozen=True)
class Spec:
    """Describes the content of a store: ``spec.json``. A resumed pass must have an equal spec."""

    layout: Layout
    plan: Plan
    special: SpecialIds
    fingerprint: dict[str, Any]
    """Everything on which the content depends: recipe, teacher, tokenizer, architecture, corpus, format."""

    def __post_init__(self) -> None:
        check_keys(self.fingerprint, FINGERPRINT_KEYS, "fingerprint")
        for name, value in asdict(self.special).items():
            in_vocabulary = value is None or value < self.layout.vocab_size
            require(in_vocabulary, f"special.{name}: {value} is not below vocab_size")
        has_mask = self.special.mask is not None
        require(has_mask or not self.layout.masked, "special.mask: masking needs the id of the mask token")

    @cached_property
    def digest(self) -> str:
        """Digest of the file spec.json."""
        return storage.digest_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        return encode({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Spec:
        """Parses a spec.json. Raises ValueError, which says what is wrong, if it is invalid."""
        value = _decoded(cls, data, "spec")
        return cls(
            layout=parsed(Layout, value["layout"], "layout"),
            plan=parsed(Plan, value["plan"], "plan"),
            special=parsed(SpecialIds, value["special"], "special"),
            fingerprint=value["fingerprint"],
        )


@dataclass(frozen=True)
class SplitRecord:
    """One split, as the manifest records it; FORMAT.md explains the fields."""

    rows: tuple[int, ...]
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    tokens: int
    masked: int

    def __post_init__(self) -> None:
        for name in ("rows", "parts", "tasks"):
            require(isinstance(getattr(self, name), tuple), f"{name}: must be a list")
        require(all(is_count(rows, 0, 2**32) for rows in self.rows), "rows: must be whole numbers")
        for name in ("parts", "tasks"):
            require(all(map(is_digest, getattr(self, name))), f"{name}: must be digests")
        require(len(self.rows) == len(self.parts), "parts: must have as many entries as rows")
        for name in ("tokens", "masked"):
            require(is_count(getattr(self, name)), f"{name}: must be a whole number")


@dataclass(frozen=True)
class Manifest:
    """The root of a finished store's tree of digests: ``manifest.json``.

    The indices that it lists contain the digests of all other files. FORMAT.md explains the fields.
    """

    spec: str
    files: dict[str, str]
    splits: dict[str, SplitRecord]

    def __post_init__(self) -> None:
        require(is_digest(self.spec), "spec: must be xxh3-128:<32 hex>")
        require(isinstance(self.files, Mapping), "files: must be an object")
        for name, digest in self.files.items():
            require(_FILE.fullmatch(name) is not None, f"files: {name[:100]!r} is not a path of a store")
            require(is_digest(digest), f"files: {name}: must be xxh3-128:<32 hex>")
        require("train" in self.splits, "splits: lacks train")
        require(set(self.splits) <= set(SPLITS), "splits: must be train and validation")

    @cached_property
    def digest(self) -> str:
        """Digest of the file manifest.json, which identifies the content of the whole store."""
        return storage.digest_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        return encode({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parses a manifest.json. Raises ValueError, which says what is wrong, if it is invalid."""
        value = _decoded(cls, data, "manifest")
        require(isinstance(value["splits"], dict), "splits: must be an object")
        splits = {name: parsed(SplitRecord, record, "splits") for name, record in value["splits"].items()}
        return cls(value["spec"], value["files"], splits)


def _decoded(kind: type[Any], data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a file that holds a format version and the fields of ``kind``."""
    value = decode(data)
    version = value.get("format_version")
    known = is_count(version) and version == FORMAT_VERSION
    found = str(version)[:40]
    require(known, f"format_version: is {found!r}; this version of the program reads {FORMAT_VERSION}")
    check_keys(value, {"format_version", *(field.name for field in fields(kind))}, where)
    return value
