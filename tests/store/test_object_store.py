"""A store on an S3 server: ranges of what is used, kept in one cache, checked before use."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.parts import part_columns, read_part
from offline_teacher.store.paths import shard_path
from offline_teacher.store.store import DamagedStore, Store, open_store
from offline_teacher.store.unfinished import finished_tasks, read_part_index
from offline_teacher.verification.verify import verify
from tests.s3_server import FaultyProxy
from tests.store.synthetic import make_store, make_text, small_layout, small_plan
from tests.store.test_round_trip import assert_same, columns_of_split, read_split

PLAN = small_plan(masking_epochs=1)
ROWS = {"train": (10,)}


@pytest.fixture
def remote_store(bucket: str) -> Store:
    return make_store(storage.join(bucket, "store"), plan=PLAN, rows=ROWS)


def ranges_of(proxy: FaultyProxy) -> list[str]:
    """Paths of shards that were asked for, since the last look."""
    found = [path for method, path, _ in proxy.seen if method == "GET" and ".arrow" in path]
    proxy.seen.clear()
    return found


def test_a_remote_store_comes_back_bit_for_bit(remote_store: Store) -> None:
    assert_same(read_split(remote_store, "train"), columns_of_split(remote_store, "train"))
    assert verify(remote_store.root) == []
    assert Path(remote_store.teacher_weights()).stat().st_size > 0


def test_opening_reads_two_files(remote_store: Store, proxy: FaultyProxy) -> None:
    proxy.seen.clear()
    open_store(remote_store.root)
    assert [path for method, path, _ in proxy.seen if method == "GET"] == [
        f"/{remote_store.root[5:]}/manifest.json",
        f"/{remote_store.root[5:]}/spec.json",
    ]


@pytest.mark.parametrize(
    "columns",
    [["input_ids", "hidden_states"], ["topk_ids", "topk_logits", "logsumexp", "input_ids", "masked_labels"]],
)
def test_text_and_targets_are_one_request_a_block(
    remote_store: Store, proxy: FaultyProxy, tmp_path: Path, columns: list[str]
) -> None:
    reader = BlockReader(remote_store, "train", columns, Cache(str(tmp_path), 1 << 30))
    remote_store.task_index("train", 0)
    proxy.seen.clear()
    reader.rows(0, 0)
    assert len(ranges_of(proxy)) == reader.requests == 1
    reader.rows(0, 0, [1])
    again = BlockReader(open_store(remote_store.root), "train", columns, Cache(str(tmp_path), 1 << 30))
    again.rows(0, 0, slice(1, 2))
    assert ranges_of(proxy) == [], "the cache is on the disk, for all processes"
    assert again.requests == again.bytes_read == 0


def test_only_what_is_used_is_requested(bucket: str) -> None:
    layout = small_layout(length=128, hidden_size=256, vocab_size=100)
    store = make_store(
        storage.join(bucket, "store"), layout, ROWS, small_plan(masking_epochs=1, block_samples=10)
    )
    columns = layout.columns()
    hidden = sum(columns[name].bytes for name in ("digests", "hidden_states")) * 10
    text = sum(columns[name].bytes for name in ("sequence_id", "token_count", "input_ids")) * 10
    masks = sum(columns[name].bytes for name in ("masked_positions", "masked_labels")) * 10
    reader = BlockReader(store, "train", ["hidden_states"])
    reader.rows(0, 0)
    rows = store.splits["train"].plan.locate(0, 0).samples
    assert reader.requests == 1
    assert hidden <= reader.bytes_read * 10 / rows < hidden + text + masks + 200, "what lies between is small"
    far = BlockReader(store, "train", ["topk_ids", "hidden_states"])
    far.rows(0, 0)
    assert far.requests == 1


def test_distant_columns_are_requests_of_their_own(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline_teacher.store.block_reader.GAP_BYTES", 0)
    store = make_store(storage.join(bucket, "store"), plan=PLAN, rows=ROWS)
    reader = BlockReader(store, "train", ["topk_ids", "hidden_states"])
    found = reader.rows(0, 0)
    assert reader.requests == 3  # topk_ids, digests, hidden_states
    assert reader.bytes_read == sum(store.layout.columns()[n].bytes for n in ("digests", *found)) * 2


def test_a_damaged_cache_entry_is_fetched_again(remote_store: Store, tmp_path: Path) -> None:
    expected = columns_of_split(remote_store, "train")
    cache = Cache(str(tmp_path), 1 << 30)
    assert_same(read_split(remote_store, "train", cache=cache), expected)
    entries = sorted(tmp_path.glob("xxh3-128-*"))
    assert entries
    for number, entry in enumerate(entries):
        data = bytearray(entry.read_bytes())
        data[len(data) // 3] ^= 1
        entry.write_bytes([bytes(data), b"", bytes(data[:-8])][number % 3])
    assert_same(read_split(remote_store, "train", cache=cache), expected)


def test_a_wrong_download_is_made_again(remote_store: Store, proxy: FaultyProxy) -> None:
    """Of any file, in training and where the whole store is verified: the first download of each is wrong."""
    expected = columns_of_split(remote_store, "train")
    for work in (
        lambda: assert_same(read_split(open_store(remote_store.root), "train"), expected),
        lambda: verify(remote_store.root) == [] or pytest.fail("a download was taken for damage"),
    ):
        met = proxy.first_downloads("wrong")
        work()
        assert [fault for _, _, fault in proxy.seen].count("wrong") == len(met) > 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_remote_shard_is_named(
    remote_store: Store, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.files.remote.ATTEMPTS", 2)
    index = remote_store.task_index("train", 0)
    path = shard_path(remote_store.root, "train", index.task, index.shards[1].file)
    data = bytearray(storage.read_bytes(path))
    data[index.shards[1].start + index.frames[2].offsets["hidden_states"]] ^= 1
    if damage == "remove":
        storage.remove(path)
    else:
        cut = len(data) if damage == "flip" else index.shards[1].start + 10
        storage.publish_bytes(path, bytes(data[:cut]))
    with pytest.raises(DamagedStore, match=rf"{index.shards[1].file}.*verify .* --repair"):
        read_split(open_store(remote_store.root), "train")
    assert {finding.task for finding in verify(remote_store.root)} == {index.task}


def test_a_store_that_answers_no_more_is_no_damage(
    remote_store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.files.remote.ATTEMPTS", 2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # s3fs waits seconds between its own
    remote_store.task_index("train", 0)
    proxy.choose = lambda method, path: "reset" if ".arrow" in path and method == "GET" else None
    with pytest.raises(UserError, match="attempts") as caught:
        read_split(remote_store, "train")
    assert not isinstance(caught.value, DamagedStore)


def test_threads_share_a_reader_and_its_cache(remote_store: Store, tmp_path: Path) -> None:
    plan, columns = remote_store.splits["train"].plan, ["sequence_id", "hidden_states"]
    reader = BlockReader(remote_store, "train", columns, Cache(str(tmp_path), 1 << 30))
    together, found = threading.Barrier(4), []

    def work() -> None:
        together.wait(60)
        found.append(
            [reader.rows(0, block)["sequence_id"].tolist() for block in range(plan.blocks_per_epoch)]
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [plan.sequence_ids(block).tolist() for block in range(plan.blocks_per_epoch)]
    assert found == [expected] * 4
    assert reader.requests == plan.blocks_per_epoch, "each range is fetched once"


def test_a_cache_smaller_than_the_store_does(remote_store: Store, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 4000)
    for _ in range(2):
        found = read_split(remote_store, "train", cache=cache)
        assert_same(found, columns_of_split(remote_store, "train"))
    assert sum(path.stat().st_size for path in tmp_path.glob("xxh3-128-*")) <= 4000


def test_the_text_comes_back(remote_store: Store, tmp_path: Path) -> None:
    index, _ = read_part_index(remote_store.root, "train", 0)
    columns = read_part(remote_store.root, remote_store.layout, index, Cache(str(tmp_path), 1 << 30))
    plan = SplitPlan.of("train", (10,), PLAN)
    expected = [make_text(remote_store.layout, "train", task) for task in plan.tasks()]
    for name in part_columns(remote_store.layout):
        assert np.array_equal(columns[name], np.concatenate([text[name] for text in expected]))
    path = storage.join(remote_store.root, "sequences/train/part-00000.arrow")
    storage.publish_bytes(path, storage.read_bytes(path)[:-1] + b"X")
    with pytest.raises(UserError, match="part-00000.arrow is damaged"):
        read_part(remote_store.root, remote_store.layout, index, Cache(None, 1 << 30))


def test_a_long_listing_comes_in_pages(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 indices of tasks: three pages, each repeated by itself when it fails."""
    monkeypatch.setattr("infra.files.remote.PAGE_NAMES", 10)
    names = {f"e000-p{number:05d}-0000" for number in range(25)}
    for task in sorted(names):
        storage.publish_bytes(storage.join(bucket, f"store/tasks/train/{task}.json"), b"")
    proxy.seen.clear()
    proxy.once("500", "500", None, "cut")
    assert finished_tasks(storage.join(bucket, "store"), "train") == names
    assert len(proxy.seen) == 3 + 3
