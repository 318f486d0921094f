"""A fine-tuned teacher's outputs for the rows of a task's training set, kept as a store keeps a corpus's.

    declaration.json           sealed: layout, plan, fingerprint; written first
    shards/r000-00000000.arrow rows 0 to ``ROWS_PER_SHARD`` - 1, then its sealed sidecar r000-00000000.json
    manifest.json              sealed: the declaration and every shard's digest; written last

The files are those of ``offline_teacher.store`` (FORMAT.md there) with columns of their own: published
whole or not at all, digests checked before a number is returned, storing goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from offline_teacher.store.sealed import content_digest, read_sealed, seal
from offline_teacher.store.shard_file import open_file, write_file

from infra import storage
from infra.cache import Cache
from infra.errors import UserError, WrongContent
from offline_teacher.store.manifest import (
    DECLARATION_NAME,
    MANIFEST_NAME,
    Sidecar,
    shard_path,
    sidecar_path,
)
from offline_teacher.store.schema import Column, ShardPlan, shard_name
from offline_teacher.store.writer import read_sidecar

FORMAT_VERSION = 1
ROWS_PER_SHARD = 1024
AGAIN = "run the same command again, it is stored anew"

Predict = Callable[[range], np.ndarray]
"""Rows -> float32 [n, *shape] of logits."""


@dataclass(frozen=True)
class OutputsLayout:
    """``shape`` of a row's logits: [classes], [1] for a regression, [2, L] for start and end.

    The row's number stands in ``sequence_id``, as in every shard file.
    """

    shape: tuple[int, ...]

    def columns(self) -> dict[str, Column]:
        return {"sequence_id": Column(np.dtype("<i8"), ()), "logits": Column(np.dtype("<f4"), self.shape)}


@dataclass(frozen=True)
class OutputsDeclaration:
    """What a directory of outputs is going to hold."""

    shape: tuple[int, ...]
    rows: int
    fingerprint: Mapping[str, Any]
    """Everything the numbers depend on."""

    @property
    def layout(self) -> OutputsLayout:
        return OutputsLayout(self.shape)

    @property
    def plan(self) -> ShardPlan:
        return ShardPlan(self.rows, 1, ROWS_PER_SHARD)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "plan": self.plan.to_json(),
            "fingerprint": dict(self.fingerprint),
        }

    def shard_metadata(self, index: int) -> dict[str, Any]:
        rows = self.plan.sequence_range(index)
        return {"declaration": content_digest(self.to_json()), "first_row": rows.start, "rows": len(rows)}


def store_outputs(
    root: str,
    declaration: OutputsDeclaration,
    predict: Callable[[], Predict],
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Store every row's logits; shards that are there, whole and of the same declaration are left alone.

    ``predict`` is called once, where there is something to do. Outputs of another declaration (another
    teacher, other rows) are derived data and are replaced. ``advance`` is told the rows of every shard.
    Raises UserError where a logit is not finite.
    """
    _begin(root, declaration)
    digests: list[str] = []
    run: Predict | None = None
    for index in range(declaration.plan.total):
        rows = declaration.plan.sequence_range(index)
        sidecar = _whole(root, declaration, index)
        if sidecar is None:
            run = run or predict()
            sidecar = _write(root, declaration, index, run(rows))
        digests.append(sidecar.shard_digest)
        advance(len(rows))
    storage.remove_unfinished(root)
    manifest = seal({**declaration.to_json(), "shard_digests": digests})
    path = storage.join(root, MANIFEST_NAME)
    if not storage.exists(path) or storage.read_bytes(path) != manifest:
        storage.publish_bytes(path, manifest)


def read_outputs(root: str, declaration: OutputsDeclaration) -> np.ndarray:
    """float32 [rows, *shape]. UserError: incomplete, damaged, or outputs of something else."""
    path = storage.join(root, MANIFEST_NAME)
    content = read_sealed(path, AGAIN)
    digests = content.pop("shard_digests", None)
    if content != declaration.to_json():
        raise UserError(f"{root}: these are outputs of another teacher or for other rows; {AGAIN}")
    if not isinstance(digests, list) or len(digests) != declaration.plan.total:
        raise UserError(f"{path}: does not list {declaration.plan.total} shards; {AGAIN}")
    cache = Cache(None, 1 << 40)
    found = np.empty((declaration.rows, *declaration.shape), np.float32)
    for index, digest in enumerate(digests):
        rows = declaration.plan.sequence_range(index)
        try:
            local = cache.local(shard_path(root, 0, index), digest)
            metadata, columns = open_file(local, declaration.layout)
        except (WrongContent, ValueError):
            raise UserError(f"{root}: shard {shard_name(0, index)} is damaged; {AGAIN}") from None
        found[rows.start : rows.stop] = columns["logits"]
    return found


def _begin(root: str, declaration: OutputsDeclaration) -> None:
    path, data = storage.join(root, DECLARATION_NAME), seal(declaration.to_json())
    if storage.exists(path):
        if storage.read_bytes(path) == data:
            return
        storage.remove_tree(root)
    storage.publish_bytes(path, data)


def _whole(root: str, declaration: OutputsDeclaration, index: int) -> Sidecar | None:
    """The sidecar of a shard whose bytes are the ones it describes, or None."""
    sidecar = read_sidecar(root, 0, index)
    if sidecar is None or sidecar.fingerprint != content_digest(declaration.to_json()):
        return None
    whole = storage.digest_file(shard_path(root, 0, index)) == sidecar.shard_digest
    return sidecar if whole else None


def _write(root: str, declaration: OutputsDeclaration, index: int, logits: np.ndarray) -> Sidecar:
    rows = declaration.plan.sequence_range(index)
    assert logits.shape == (len(rows), *declaration.shape), logits.shape
    if not np.isfinite(logits).all():
        raise UserError(f"{root}: the teacher's outputs are not finite; lower evaluation.learning_rate")
    columns = {"sequence_id": np.arange(rows.start, rows.stop), "logits": logits.astype("<f4")}
    with storage.publishing(shard_path(root, 0, index)) as draft:
        write_file(draft, declaration.layout, declaration.shard_metadata(index), columns)
        sidecar = Sidecar(
            name=shard_name(0, index),
            replica=0,
            index=index,
            first_sequence=rows.start,
            samples=len(rows),
            bytes=storage.size(draft),
            shard_digest=storage.digest_file(draft),
            fingerprint=content_digest(declaration.to_json()),
        )
    storage.publish_bytes(sidecar_path(root, 0, index), sidecar.to_bytes())
    return sidecar
