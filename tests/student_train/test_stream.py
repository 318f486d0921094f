from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from infra.cache import Cache
from infra.errors import UserError
from offline_teacher.store.reader import DamagedShard, open_store
from offline_teacher.store.schema import Layout, ShardPlan
from student_train.order import SampleOrder, run_samples, run_steps
from student_train.stream import Step, Stream
from tests.store.synthetic import make_store

LAYOUT = Layout(
    length=8,
    masked=3,
    vocab_size=100,
    top_k=4,
    temperatures=(1.0, 2.0),
    hidden_size=6,
    hidden_states="int8",
    positions="all",
)


@dataclass
class MemoryShard:
    columns: dict[str, np.ndarray]


@dataclass
class MemoryStore:
    """A store whose every value is a function of replica and sequence id; shards may be damaged."""

    plan: ShardPlan
    layout: Layout = LAYOUT
    damaged: set[tuple[int, int]] = field(default_factory=set)
    opened: Counter = field(default_factory=Counter)
    gate: threading.Event | None = None

    def shard(self, replica: int, index: int, cache: object = None) -> MemoryShard:
        if self.gate is not None:
            self.gate.wait()
        self.opened[replica, index] += 1
        if (replica, index) in self.damaged:
            raise UserError(f"shard r{replica:03d}-{index:08d} is damaged")
        ids = np.array(self.plan.sequence_range(index), np.int64)
        return MemoryShard(sample_columns(self.layout, ids, replica))


def sample_columns(layout: Layout, ids: np.ndarray, replica: int) -> dict[str, np.ndarray]:
    columns = {}
    for number, (name, column) in enumerate(layout.columns().items()):
        values = (ids * 7 + replica * 13 + number) % 50
        array = np.zeros((len(ids), *column.shape), column.dtype)
        array += values.reshape(-1, *([1] * len(column.shape))).astype(column.dtype)
        array += np.arange(column.items).reshape(column.shape).astype(column.dtype)
        columns[name] = array
    columns["sequence_id"] = ids
    columns["token_count"] = (2 + ids % 7).astype(np.uint16)
    columns["masked_positions"] = np.where(np.arange(layout.masked) <= ids[:, None] % 3, 1, -1).astype(
        np.int16
    )
    return columns


def stream(
    store: MemoryStore, order: SampleOrder, start=0, stop=4, rank=0, world=1, batch=12, micro=4, **kwargs
) -> Stream:
    return Stream(store, order, batch, micro, rank, world, start, stop, **kwargs)


def log(step: Step) -> list[tuple[int, int]]:
    """(replica, sequence id) of what this rank computes, dummies left out."""
    return [
        pair
        for batch in step.micro_batches
        if batch.weight
        for pair in zip(batch.replica.tolist(), batch.sequence_ids.tolist(), strict=True)
    ]


def test_the_log_is_the_same_for_every_world_and_resume():
    store = MemoryStore(ShardPlan(sequences=50, replicas=2, samples_per_shard=8))
    order = SampleOrder(store.plan, 5, 2)
    samples = run_samples(50, 2.5, None, 12)
    steps = run_steps(samples, 12)
    with stream(store, order, stop=steps, samples=samples) as reference:
        expected = [log(step) for step in reference]
    assert len(expected) == 11
    assert len(expected[-1]) == 125 - 120
    for epoch, replica in enumerate([0, 1]):
        flat = sum(expected, [])[epoch * 50 : (epoch + 1) * 50]
        assert sorted(flat) == [(replica, i) for i in range(50)]

    seen: list[list[tuple[int, int]]] = []
    for world, micro, until in [(1, 4, 2), (2, 3, 3), (3, 4, 6), (1, 12, 7), (12, 1, 9), (2, 5, 11)]:
        fresh = SampleOrder(store.plan, 5, 2)
        ranks = [
            list(stream(store, fresh, len(seen), until, rank, world, micro=micro, samples=samples))
            for rank in range(world)
        ]
        for shares in zip(*ranks, strict=True):
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert len({(share.step, share.tokens, share.masked) for share in shares}) == 1
            assert shares[0].step == len(seen)
            seen.append(sum((log(share) for share in shares), []))
            assert seen[-1] == list(
                zip(shares[0].replicas.tolist(), shares[0].sequence_ids.tolist(), strict=True)
            )
    assert seen == expected


def test_batches_hold_the_columns_of_their_samples():
    store = MemoryStore(ShardPlan(sequences=50, replicas=2, samples_per_shard=8))
    order = SampleOrder(store.plan, 1, 3)
    with stream(store, order, start=3, stop=6) as steps:
        for step in steps:
            tokens = masked = 0
            for batch in step.micro_batches:
                for row, (replica, i) in enumerate(
                    zip(batch.replica.tolist(), batch.sequence_ids.tolist(), strict=True)
                ):
                    expected = sample_columns(LAYOUT, np.array([i]), replica)
                    for name in LAYOUT.columns():
                        if name != "sequence_id":
                            np.testing.assert_array_equal(
                                getattr(batch, name)[row].numpy(), expected[name][0]
                            )
                    tokens += int(expected["token_count"][0])
                    masked += int((expected["masked_positions"] >= 0).sum())
                for name in ("input_ids", "token_count", "masked_positions", "masked_labels", "topk_ids"):
                    assert getattr(batch, name).dtype == torch.int64
                assert batch.hidden_states.dtype == torch.int8
                assert batch.hidden_scale.dtype == torch.float32
                assert batch.topk_logits.dtype == torch.float16
                assert batch.logsumexp.dtype == torch.float32
            assert (step.tokens, step.masked) == (tokens, masked)


def test_a_rank_without_samples_gets_a_dummy():
    store = MemoryStore(ShardPlan(sequences=10, replicas=1, samples_per_shard=4))
    order = SampleOrder(store.plan, 0, 1)
    shares = [
        list(stream(store, order, stop=2, rank=rank, world=3, batch=8, micro=8, samples=10))[-1]
        for rank in range(3)
    ]
    weights = [[batch.weight for batch in share.micro_batches] for share in shares]
    assert weights == [[0.0], [1.0], [1.0]]
    dummy = shares[0].micro_batches[0]
    assert len(dummy) == 1
    assert dummy.token_count.item() > 0
    assert sum((log(share) for share in shares), []) == [(0, i) for i in shares[0].sequence_ids.tolist()]


def test_only_the_columns_asked_for():
    store = MemoryStore(ShardPlan(sequences=10, replicas=1, samples_per_shard=4))
    order = SampleOrder(store.plan, 0, 1)
    batch = next(stream(store, order, stop=1, batch=4, columns=["hidden_states"])).micro_batches[0]
    assert batch.hidden_states is not None
    assert batch.hidden_scale is not None
    assert batch.topk_ids is None
    assert batch.topk_logits is None
    assert batch.logsumexp is None
    bare = MemoryStore(store.plan, Layout(8, 3, 100, 4, (1.0,), 6, "none", "all"))
    with pytest.raises(UserError, match="no column hidden_states"):
        stream(bare, order, stop=1, batch=4, columns=["hidden_states"])


def test_a_damaged_shard_stops_at_its_step():
    store = MemoryStore(ShardPlan(sequences=64, replicas=1, samples_per_shard=4), damaged={(0, 9)})
    order = SampleOrder(store.plan, 2, 2)
    guilty = next(g for g in range(16) if 9 in (order.samples(g * 4, g * 4 + 4)[1] // 4).tolist())
    assert guilty > 0
    steps = stream(store, order, stop=16, batch=4, micro=2, prefetch=8)
    for g in range(guilty):
        assert next(steps).step == g
    with pytest.raises(UserError, match="r000-00000009 is damaged"):
        next(steps)
    assert threads() == []


def test_shards_in_use_stay_open_and_few():
    store = MemoryStore(ShardPlan(sequences=400, replicas=1, samples_per_shard=10))
    order = SampleOrder(store.plan, 2, 4)
    with stream(store, order, stop=40, batch=10, micro=5) as steps:
        for _ in steps:
            assert len(steps._shards._open) <= 16
    assert set(store.opened.values()) == {1}
    assert len(store.opened) == 40


def test_work_ahead_is_bounded():
    store = MemoryStore(ShardPlan(sequences=4000, replicas=1, samples_per_shard=4))
    steps = stream(store, SampleOrder(store.plan, 0, 2), stop=900, batch=4, micro=2, prefetch=6)
    next(steps)
    assert len(steps._pending) == 3  # 6 micro-batches
    steps.close()
    assert len(store.opened) <= 16


def test_closing_ends_the_threads():
    store = MemoryStore(ShardPlan(sequences=64, replicas=1, samples_per_shard=4), gate=threading.Event())
    steps = stream(store, SampleOrder(store.plan, 2, 2), stop=16, batch=4, micro=2)
    steps._submit_ahead()
    threading.Timer(0.05, store.gate.set).start()
    steps.close()
    assert threads() == []
    assert len(store.opened) <= 2  # nothing new was begun
    with pytest.raises(StopIteration):
        next(steps)


def test_more_ranks_than_samples():
    store = MemoryStore(ShardPlan(sequences=3, replicas=1, samples_per_shard=4))
    with pytest.raises(UserError, match="4 ranks for a store of 3 sequences"):
        stream(store, SampleOrder(store.plan, 0, 1), world=4)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_a_real_store_and_a_flipped_bit_in_it(tmp_path):
    """Through files, mapping and digests: the same log for worlds 1 to 3, then the damage at its step."""
    root = str(tmp_path / "store")
    store = make_store(root, plan=ShardPlan(sequences=30, replicas=2, samples_per_shard=4))
    order = SampleOrder(store.plan, 0, 2)
    samples = run_samples(30, 2.0, None, 6)
    logs = []
    for world in (1, 2, 3):
        ranks = [
            list(Stream(store, order, 6, 2, rank, world, 0, 10, samples=samples)) for rank in range(world)
        ]
        logs.append(
            [[pair for share in shares for pair in log(share)] for shares in zip(*ranks, strict=True)]
        )
    assert logs[0] == logs[1] == logs[2]
    assert sorted(pair for step in logs[0] for pair in step) == [(r, i) for r in range(2) for i in range(30)]

    file = tmp_path / "store" / "shards" / "r001-00000003.arrow"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    guilty = next(g for g, step in enumerate(logs[0]) if any(r == 1 and i // 4 == 3 for r, i in step))
    steps = Stream(open_store(root), order, 6, 2, 0, 1, 0, 10, samples=samples)
    for g in range(guilty):
        assert next(steps).step == g
    with pytest.raises(DamagedShard, match="r001-00000003"):
        next(steps)


def test_a_store_behind_a_cache(tmp_path):
    plan = ShardPlan(sequences=30, replicas=1, samples_per_shard=4)
    store = make_store(str(tmp_path / "store"), plan=plan)
    order = SampleOrder(plan, 0, 2)
    cache = Cache(str(tmp_path / "cache"), 1 << 20)
    plain = [log(step) for step in Stream(store, order, 6, 2, 0, 1, 0, 5)]
    assert [log(step) for step in Stream(store, order, 6, 2, 0, 1, 0, 5, cache=cache)] == plain
