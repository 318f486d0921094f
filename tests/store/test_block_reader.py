"""What a reader of blocks reads, checks, counts and keeps open."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from infra.errors import UserError
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import block_digest
from offline_teacher.store.store import Store
from tests.store.synthetic import make_store, small_layout, small_plan
from tests.store.test_round_trip import columns_of_split


def test_any_rows_of_any_columns(store: Store) -> None:
    (first, _), reader = (
        columns_of_split(store, "train"),
        BlockReader(store, "train", ["topk_ids", "input_ids"]),
    )
    at = 0
    for block in range(store.splits["train"].plan.blocks_per_epoch):
        whole = reader.rows(0, block)
        assert list(whole) == ["topk_ids", "input_ids"]
        n = len(whole["topk_ids"])
        for rows in ([n - 1, 0], np.array([0]), slice(0, 1), slice(n, n)):
            found = reader.rows(0, block, rows)
            for name in found:
                assert np.array_equal(found[name], first[name][at : at + n][rows])
        assert not whole["topk_ids"].flags.writeable
        at += n
    for columns in (["logits"], ["digests"]):
        with pytest.raises(UserError, match=f"holds no {columns[0]}"):
            BlockReader(store, "train", columns)


def test_a_reader_counts_what_it_reads(store: Store) -> None:
    reader, columns = BlockReader(store, "train", ["topk_ids"]), store.layout.columns()
    for bytes_read in (2 * columns["digests"].bytes, 0):  # the column of digests is read once
        before = reader.bytes_read
        reader.rows(0, 0, [1, 0])
        assert reader.bytes_read - before == bytes_read + 2 * columns["topk_ids"].bytes
    assert reader.requests == 0


def test_digests_are_of_copies_because_the_file_may_change_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked must be what the training uses, and not the mapped file behind it."""
    layout, hashed = store.layout.columns()["topk_ids"], []
    target = np.zeros((2, layout.bytes), np.uint8)

    def digest_of_block(digests: np.ndarray) -> int:
        assert digests.flags.writeable, "a view of the file"
        return block_digest(digests)

    def digest_of_sample(values: np.ndarray) -> int:
        hashed.append(np.shares_memory(values, target))
        return xxhash.xxh3_64_intdigest(values.data)

    monkeypatch.setattr("offline_teacher.store.block_reader.block_digest", digest_of_block)
    monkeypatch.setattr(
        "offline_teacher.store.block_reader.xxhash", SimpleNamespace(xxh3_64_intdigest=digest_of_sample)
    )
    reader = BlockReader(store, "train", ["topk_ids"])
    reader.copy_rows(0, 0, [1, 0], {"topk_ids": target}, [0, 1])
    assert hashed == [True, True]
    first, _ = columns_of_split(store, "train")
    assert target.tobytes() == first["topk_ids"][[1, 0]].tobytes()


class Advised(mmap.mmap):
    """A mapped file that notes which bytes the system was asked to read ahead."""

    spans: list[tuple[int, int]]

    def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
        assert option == mmap.MADV_WILLNEED
        self.spans.append((start, start + length))
        super().madvise(option, start, length)


def test_a_local_block_is_asked_for_once_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the system reads up to megabytes around each page: what other ranks, or nobody, need."""
    layout = small_layout(length=128, hidden_size=64, vocab_size=100, top_k=50)  # 26 kB and 16 kB a sample
    store = make_store(str(tmp_path), layout, {"train": (14,)}, small_plan(masking_epochs=1, block_samples=7))
    spans: list[tuple[int, int]] = []

    def mapped(root: str, name: str) -> mmap.mmap:
        with open(Path(root, name), "rb") as file:
            data = Advised(file.fileno(), 0, access=mmap.ACCESS_READ)
        data.spans = spans
        return data

    monkeypatch.setattr("offline_teacher.store.block_reader._map_file", mapped)
    reader = BlockReader(store, "train", ["hidden_states"])
    for block in (1, 0, 1):
        reader.rows(0, block, [6, 2])
    index, columns = store.task_index("train", 1), layout.columns()
    (frame,) = index.frames.values()
    used = [frame.offsets["digests"], frame.offsets["hidden_states"] + 7 * columns["hidden_states"].bytes]
    expected = [index.shards[0].start + offset for offset in used]
    assert len(spans) == 2, "one range for each of two blocks"
    assert expected[0] - mmap.PAGESIZE < spans[0][0] <= expected[0]
    assert spans[0][1] == expected[1]


def test_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map keeps a file handle, of which a process often has 1,024; a store may have a million shards."""
    monkeypatch.setattr("offline_teacher.store.block_reader.SHARDS_KEPT", 3)
    plan = small_plan(masking_epochs=1, block_samples=2, task_sequences=2)
    store = make_store(str(tmp_path), small_layout(), {"train": (24,)}, plan)

    def open_shards() -> int:
        """Returns how many shards of this store the process has open; other tests may have left theirs."""
        files = (path.resolve() for path in Path("/proc/self/fd").iterdir())
        return sum(file.is_relative_to(tmp_path) and file.suffix == ".arrow" for file in files)

    reader = BlockReader(store, "train", ["topk_ids"])
    target = {"topk_ids": np.zeros((1, store.layout.columns()["topk_ids"].bytes), np.uint8)}
    for block in range(12):
        reader.copy_rows(0, block, [0], target, [0])
        assert open_shards() == min(block + 1, 3)
    del reader  # without a collection of garbage
    assert open_shards() == 0
