"""Indices and manifests whose digests are right and whose fields cannot be: they are checked all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.files import storage
from offline_teacher.store.records import canonical, decode, encode
from offline_teacher.store.store import DamagedStore, Store, open_store
from offline_teacher.verification.verify import verify
from tests.store.synthetic import make_store, small_plan
from tests.store.test_round_trip import read_split

INDEX, MANIFEST = "tasks/train/e000-p00000-0000.json", "manifest.json"
WRONG = [
    (INDEX, ("samples",), -1),
    (INDEX, ("tokens",), 1.5),
    (INDEX, ("task",), "../../etc"),
    (INDEX, ("environment",), {"a": []}),
    (INDEX, ("frames", "2", "bytes"), 8),
    (INDEX, ("frames", "2", "offsets", "topk_ids"), 2**40),
    (INDEX, ("frames", "2", "offsets", "topk_ids"), 4),
    (INDEX, ("frames", "2", "offsets", "digests"), 0),
    (INDEX, ("frames", "3"), {"bytes": 8, "offsets": {}}),
    (INDEX, ("shards",), []),
    (INDEX, ("shards", 0, "file"), "../../x.arrow"),
    (INDEX, ("shards", 0, "bytes"), 100),
    (INDEX, ("shards", 0, "start"), 4),
    (INDEX, ("shards", 0, "start"), 2**50),
    (INDEX, ("shards", 0, "blocks"), "00"),
    (INDEX, ("shards", 0, "samples"), 3),
    (INDEX, ("shards", 0, "more"), 3),
    (MANIFEST, ("format_version",), 3),
    (MANIFEST, ("spec",), "sha256:0"),
    (MANIFEST, ("files", "../x"), "xxh3-128:" + "0" * 32),
    (MANIFEST, ("files", "tokenizer/vocab.txt"), None),
    (MANIFEST, ("splits", "train", "rows"), [10**12]),
    (MANIFEST, ("splits", "train", "rows"), []),
    (MANIFEST, ("splits", "train", "rows"), [9, 9]),
    (MANIFEST, ("splits", "train", "tasks"), []),
    (MANIFEST, ("splits", "train", "tokens"), -1),
    (MANIFEST, ("splits", "test"), {}),
    (MANIFEST, ("splits",), {}),
    (MANIFEST, ("more",), 1),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two tasks of training text, one of validation text."""
    rows = {"train": (9,), "validation": (1,)}
    return make_store(str(tmp_path / "store"), plan=small_plan(masking_epochs=1), rows=rows)


def change(record: Path, path: tuple, value: object) -> None:
    """Sets one field of a record, whose digest is then that of the changed record."""
    content = inner = decode(record.read_bytes())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    record.write_bytes(encode(content))


@pytest.mark.parametrize(("file", "path", "value"), WRONG)
def test_a_record_that_says_what_cannot_be_is_refused(
    store: Store, file: str, path: tuple, value: object
) -> None:
    root = Path(store.root)
    change(root / file, path, value)
    if file == INDEX:
        change(root / MANIFEST, ("splits", "train", "tasks", 0), storage.digest_file(str(root / INDEX)))
        open_store(store.root)  # reads no index
    with pytest.raises(DamagedStore, match=file):
        read_split(open_store(store.root), "train")
    found = {finding.file for finding in verify(store.root)}
    assert found == {file} if file == INDEX else file in found


def test_json_that_is_no_record_is_refused() -> None:
    for data in (b"", b"[]", b"{}", b'{"digest":1}', canonical({"digest": "x"}), b"[" * 100_000):
        with pytest.raises(ValueError, match="JSON|digest"):
            decode(data)
