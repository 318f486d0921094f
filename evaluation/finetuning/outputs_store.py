"""A fine-tuned teacher's outputs for the rows of a task's training set, kept on disk.

    spec.json                          shape, rows, fingerprint; written first
    rows-00000000-<32 hex>.npy         float32 logits of ``ROWS_PER_FILE`` rows, named by their digest
    manifest.json                      the spec and the digest of every file of rows; written last

The JSON files are those of ``offline_teacher.store.records``, which notice any changed bit. A file is
written atomically, and its digest is checked before a number is returned. An interrupted run resumes with the
missing files.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store.records import decode, encode

SPEC, MANIFEST = "spec.json", "manifest.json"
FORMAT_VERSION = 2
ROWS_PER_FILE = 1024
AGAIN = "run the same command again to store it again"

Predict = Callable[[range], np.ndarray]
"""Rows -> float32 [n, *shape] of logits."""


@dataclass(frozen=True)
class OutputsSpec:
    """What a directory of outputs is going to hold."""

    shape: tuple[int, ...]
    """Of a row's logits: [classes], [1] for a regression, [2, L] for start and end."""
    rows: int
    fingerprint: Mapping[str, Any]
    """Everything the numbers depend on."""

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self), "shape": list(self.shape)}

    def files(self) -> list[range]:
        """The rows of each file."""
        starts = range(0, self.rows, ROWS_PER_FILE)
        return [range(start, min(start + ROWS_PER_FILE, self.rows)) for start in starts]


def store_outputs(
    root: str,
    spec: OutputsSpec,
    predict: Callable[[], Predict],
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Stores every row's logits; valid files of the same spec are kept.

    ``predict`` is called at most once, if files are missing. Outputs of another spec (another teacher, other
    rows) are replaced, because they can be computed again. ``advance`` gets the number of rows of every file.
    Raises UserError if a logit is not finite.
    """
    _begin(root, spec)
    names, digests = storage.list_names(root), []
    run: Predict | None = None
    for rows in spec.files():
        digest = _whole(root, names, rows)
        if digest is None:
            run = run or predict()
            digest = _write(root, spec, rows, run(rows))
        digests.append(digest)
        advance(len(rows))
    storage.remove_unfinished(root)
    _publish(storage.join(root, MANIFEST), {"spec": spec.to_json(), "files": digests})


def read_outputs(root: str, spec: OutputsSpec) -> np.ndarray:
    """float32 [rows, *shape]. UserError: incomplete, damaged, or outputs of something else."""
    path = storage.join(root, MANIFEST)
    if not storage.exists(path):
        raise UserError(f"{path}: is missing; {AGAIN}")
    try:
        content = decode(storage.read_bytes(path))
    except ValueError as problem:
        raise UserError(f"{path}: {problem}; {AGAIN}") from None
    files = spec.files()
    if content.get("spec") != spec.to_json() or len(content["files"]) != len(files):
        raise UserError(f"{root}: these are outputs of another teacher or for other rows; {AGAIN}")
    found = np.empty((spec.rows, *spec.shape), np.float32)
    for rows, digest in zip(files, content["files"], strict=True):
        name = storage.join(root, _name(rows, digest))
        data = storage.read_bytes(name) if storage.exists(name) else b""
        if storage.digest_bytes(data) != digest:
            raise UserError(f"{name}: is missing or damaged; {AGAIN}")
        found[rows.start : rows.stop] = np.load(io.BytesIO(data), allow_pickle=False)
    return found


def _begin(root: str, spec: OutputsSpec) -> None:
    """Publishes the spec; outputs of another one are removed first."""
    path, data = storage.join(root, SPEC), encode(spec.to_json())
    if storage.exists(path) and storage.read_bytes(path) != data:
        storage.remove_tree(root)
    _publish(path, spec.to_json())


def _publish(path: str, content: Mapping[str, Any]) -> None:
    """Publishes a JSON file unless it is there as it should be."""
    data = encode(content)
    if not storage.exists(path) or storage.read_bytes(path) != data:
        storage.publish_bytes(path, data)


def _name(rows: range, digest: str) -> str:
    return f"rows-{rows.start:08d}-{digest.rpartition(':')[2]}.npy"


def _whole(root: str, names: Sequence[str], rows: range) -> str | None:
    """The digest of the file of these rows, where its name says the same; a damaged file is removed."""
    for name in names:
        if name.startswith(f"rows-{rows.start:08d}-"):
            path = storage.join(root, name)
            digest = storage.digest_file(path)
            if name == _name(rows, digest):
                return digest
            storage.remove(path)
    return None


def _write(root: str, spec: OutputsSpec, rows: range, logits: np.ndarray) -> str:
    assert logits.shape == (len(rows), *spec.shape), logits.shape
    if not np.isfinite(logits).all():
        raise UserError(f"{root}: the teacher's outputs are not finite; lower evaluation.learning_rate")
    buffer = io.BytesIO()
    np.save(buffer, logits.astype("<f4"), allow_pickle=False)
    digest = storage.digest_bytes(buffer.getvalue())
    storage.publish_bytes(storage.join(root, _name(rows, digest)), buffer.getvalue())
    return digest
