"""No damage goes unnoticed: not by verify, and not by a reader before it returns a number."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from offline_teacher.store import writer
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.schema import Layout
from offline_teacher.store.store import DamagedStore, Store, open_store
from offline_teacher.store.unfinished import finished_tasks
from offline_teacher.store.writer import begin_store, finish_store
from offline_teacher.verification.repair import damaged_directory, move_damaged
from offline_teacher.verification.verify import verify
from tests.store.synthetic import (
    Columns,
    make_spec,
    make_store,
    small_plan,
    write_files,
    write_part,
    write_task,
)
from tests.store.test_round_trip import assert_same, columns_of_split, files_of, read_split

PLAN = small_plan(masking_epochs=1)
ROWS = {"train": (9,), "validation": (1,)}
SPLITS = ("train", "validation")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two tasks of training text, one of validation text."""
    return make_store(str(tmp_path / "store"), plan=PLAN, rows=ROWS)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def read_everything(root: str) -> list:
    """All that training reads; what is damaged raises before its numbers are returned."""
    store = open_store(root)
    store.tokenizer_files()
    store.teacher_config()
    store.teacher_weights()
    return [epoch for split in SPLITS for epoch in read_split(store, split)]


def test_a_thousand_of_a_thousand_bit_flips_are_found(store: Store) -> None:
    generator, files = random.Random(0), files_of(store.root)
    expected = [epoch for split in SPLITS for epoch in columns_of_split(store, split)]
    names = sorted(files)
    raised = equal = 0
    for _ in range(1000):
        name = generator.choice(names)
        path, data = Path(store.root, name), files[name]
        path.write_bytes(flip(data, generator.randrange(8 * len(data))))
        findings = verify(store.root)
        assert findings, name
        if name != "manifest.json":
            assert name in {finding.file for finding in findings}
        try:
            found = read_everything(store.root)
        except DamagedStore:
            raised += 1
        else:
            assert_same(found, expected)
            equal += 1
        path.write_bytes(data)
    assert raised > 500
    assert equal > 50, "the text and the framing of shards are not read"
    assert verify(store.root) == []


def test_every_byte_of_a_block_is_found_by_the_reader_that_uses_it(store: Store) -> None:
    index = store.task_index("train", 0)
    shard, frame = index.shards[0], index.frames[2]
    path = Path(store.root, "shards", "train", index.task, shard.file)
    data = path.read_bytes()
    for name, column in store.layout.columns().items():
        for row in (0, 1):
            at = shard.start + frame.offsets[name] + row * column.bytes
            path.write_bytes(flip(data, 8 * at + 5))
            wanted = (
                f"column {name}:"
                if name == "digests"
                else rf"sample {row} \(sequence {row}\), column {name}:"
            )
            with pytest.raises(
                DamagedStore, match=rf"{shard.file}, task {index.task}, block 0 .*{wanted}.*--repair"
            ):
                read_split(open_store(store.root), "train")
            path.write_bytes(data)


def shard_paths(root: Path, task: str = "e000-p00000-0000") -> list[Path]:
    return sorted((root / "shards" / "train" / task).iterdir())


def damage_truncated(root: Path) -> None:
    path = shard_paths(root)[0]
    path.write_bytes(path.read_bytes()[:-64])


def damage_extended(root: Path) -> None:
    with shard_paths(root)[0].open("ab") as file:
        file.write(b"\0")


def damage_empty(root: Path) -> None:
    shard_paths(root)[0].write_bytes(b"")


def damage_missing(root: Path) -> None:
    shard_paths(root)[0].unlink()


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def damage_swapped(root: Path) -> None:
    swap(*shard_paths(root))


def damage_swapped_indices(root: Path) -> None:
    swap(root / "tasks/train/e000-p00000-0000.json", root / "tasks/train/e000-p00000-0001.json")


def damage_duplicate(root: Path) -> None:
    shutil.copy(shard_paths(root)[0], shard_paths(root)[1])


def damage_from_another_store(root: Path) -> None:
    make_store(f"{root}-other", plan=PLAN, rows=ROWS, seed=5)
    for directory in ("shards/train/e000-p00000-0000", "tasks/train"):
        shutil.rmtree(root / directory)
        shutil.copytree(Path(f"{root}-other", directory), root / directory)


SHARD_DAMAGE = [
    damage_truncated,
    damage_extended,
    damage_empty,
    damage_missing,
    damage_swapped,
    damage_swapped_indices,
    damage_duplicate,
    damage_from_another_store,
]


@pytest.mark.parametrize(("content", "words"), [(None, "the file is missing"), (b"", "the file has 0 bytes")])
def test_a_reader_says_whether_a_shard_is_missing_or_empty(
    store: Store, content: bytes | None, words: str
) -> None:
    for path in shard_paths(Path(store.root)):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(DamagedStore, match=words):
        BlockReader(store, "train", ["input_ids"]).rows(0, 0, slice(None))


@pytest.mark.parametrize("damage", SHARD_DAMAGE, ids=lambda function: function.__name__)
def test_damaged_tasks_are_named_and_repaired(store: Store, damage: Callable[[Path], None]) -> None:
    before = files_of(store.root)
    damage(Path(store.root))
    findings = verify(store.root)
    assert "e000-p00000-0000" in {finding.task for finding in findings}
    with pytest.raises(DamagedStore, match="e000-p00000-0000.*verify .* --repair"):
        read_split(open_store(store.root), "train")
    move_damaged(store.root, findings)
    assert "e000-p00000-0000" not in finished_tasks(store.root, "train")
    remake(store.root)
    assert verify(store.root) == []
    assert files_of(store.root) == before


def remake(root: str) -> None:
    """What a pass that goes on does."""
    spec = make_spec(plan=PLAN)
    begin_store(root, spec)
    write_files(root, spec)
    for split, rows in ROWS.items():
        whole = SplitPlan.of(split, rows, PLAN)
        for part in range(len(rows)):
            write_part(root, spec, whole, split, part)
        for task in whole.tasks():
            if task.name not in finished_tasks(root, split):
                write_task(root, spec, split, task)
    finish_store(root, {split: len(rows) for split, rows in ROWS.items()})


@pytest.mark.parametrize(
    "name",
    [
        "shards/train/e000-p00000-0000/0123.arrow",
        "shards/train/notes.txt",
        "shards/test",
        "tasks/train/e000-p00000-0002.json",
        "tasks/train/e000-p00000-0000.txt",
        "tokenizer/more.txt",
        "teacher/more.bin",
        "sequences/train/part-00001.arrow",
        "sequences/train/part-00000.counts.arrow",
        "failed",
        "core",
    ],
)
def test_foreign_files_are_found_and_moved_away(store: Store, name: str) -> None:
    before = files_of(store.root)
    Path(store.root, name).write_bytes(b"something")
    findings = verify(store.root)
    assert [finding.file for finding in findings] == [name]
    assert move_damaged(store.root, findings) == [name, "manifest.json"]
    assert Path(damaged_directory(store.root), name).read_bytes() == b"something"
    finish_store(store.root, {split: len(rows) for split, rows in ROWS.items()})
    assert files_of(store.root) == before


def test_any_missing_or_altered_file_is_found_and_repaired(store: Store) -> None:
    before = files_of(store.root)
    for name in sorted(before):
        path = Path(store.root, name)
        for damaged in (None, b"", b"{}", before[name] + b"\n", b" " + before[name]):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            findings = verify(store.root)
            assert name in {finding.file for finding in findings}, damaged
            move_damaged(store.root, findings)
            assert not Path(store.root, "manifest.json").exists()
            remake(store.root)
            assert files_of(store.root) == before


@pytest.mark.parametrize("name", ["manifest.json", "spec.json", "tasks/train/e000-p00000-0000.json"])
def test_changes_that_json_does_not_see(store: Store, name: str) -> None:
    path = Path(store.root, name)
    data = path.read_bytes()
    for changed in (
        data.replace(b'":', b'": ', 1),
        data.replace(b'"spec"', b'"\\u0073pec"').replace(b'"plan"', b'"\\u0070lan"'),
        data.replace(b'"digest":"xxh3-128:', b'"digest":"x","digest":"xxh3-128:'),
        data[:-1],
    ):
        assert changed != data
        path.write_bytes(changed)
        assert name in [finding.file for finding in verify(store.root)]
        with pytest.raises(DamagedStore):
            read_split(open_store(store.root), "train")


def test_repair_of_a_directory_where_a_file_belongs_is_refused(store: Store) -> None:
    Path(store.root, "core").mkdir()
    Path(store.root, "core", "x").write_bytes(b"")
    with pytest.raises(UserError, match="core is a directory where none belongs"):
        move_damaged(store.root, verify(store.root))


def test_an_unfinished_store_is_checked_as_far_as_it_goes(store: Store) -> None:
    os.unlink(f"{store.root}/manifest.json")
    os.unlink(f"{store.root}/tasks/train/e000-p00000-0001.json")
    damage_truncated(Path(store.root))
    findings = {finding.file: finding for finding in verify(store.root)}
    shard = f"shards/train/e000-p00000-0000/{shard_paths(Path(store.root))[0].name}"
    assert set(findings) == {"manifest.json", "tasks/train", shard}
    assert findings["tasks/train"].problem.startswith("1 of 2 tasks have no index")
    move_damaged(store.root, findings.values())
    remake(store.root)
    assert verify(store.root) == []


def failed_teacher(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
    columns["hidden_states"][:] = np.nan


def test_numbers_that_are_wrong_though_their_digests_are_right_are_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that a faulty program wrote, without the checks of the writer."""
    monkeypatch.setattr(writer, "check_block", lambda *_: [])
    root = f"{store.root}-wrong"
    wrong = make_store(root, plan=PLAN, rows=ROWS, teacher=failed_teacher)
    findings = verify(wrong.root)
    assert {finding.column for finding in findings} == {"topk_ids", "hidden_states"}
    assert all(finding.task is not None for finding in findings)


def test_processes_find_what_one_process_finds(store: Store) -> None:
    damage_swapped(Path(store.root))
    Path(store.root, "core").write_bytes(b"")
    seen: list[int] = []
    alone = verify(store.root)
    assert verify(store.root, workers=2, done=lambda: seen.append(len(seen))) == alone
    assert seen == [0, 1, 2]
    assert len(alone) == 3
