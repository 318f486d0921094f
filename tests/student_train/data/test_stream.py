"""The batches of a rank: the same samples on any number of ranks, read ahead, errors at the right step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Train
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.schema import Layout
from offline_teacher.store.store import DamagedStore, Store, open_store
from student_train.data.order import SampleOrder, run_samples
from student_train.data.reading import open_stream
from student_train.data.stream import Allocate, Share, Step, Stream, new_array
from student_train.engine.world import World
from tests.store.synthetic import make_store, small_layout, small_plan

LAYOUT = small_layout(hidden_states="int8")
Sample = tuple[int, int]
"""Masking epoch and sequence."""


@dataclass
class MemoryReader:
    """A split in memory: every value is a function of masking epoch and sequence; blocks may be damaged."""

    plan: SplitPlan
    layout: Layout = LAYOUT
    names: tuple[str, ...] = ()
    damaged: set[Sample] = field(default_factory=set)
    """Masking epoch and block."""
    read: Counter = field(default_factory=Counter)
    gate: threading.Event | None = None

    def gather(
        self, epoch: np.ndarray, block: np.ndarray, row: np.ndarray, allocate: Allocate = new_array
    ) -> Mapping[str, np.ndarray]:
        if self.gate is not None:
            self.gate.wait()
        locations = list(zip(epoch.tolist(), block.tolist(), row.tolist(), strict=True))
        for place in locations:
            self.read[place[:2]] += 1
            if place[:2] in self.damaged:
                raise UserError(f"block {place[1]} of masking epoch {place[0]} is damaged")
        samples = [(e, int(self.plan.sequence_ids(b)[r])) for e, b, r in locations]
        columns = {}
        for name, values in sample_columns(self.layout, samples).items():
            columns[name] = allocate(name, values.shape, values.dtype)
            columns[name][:] = values
        return columns

    def fetch(self, epoch: int, block: int) -> None: ...


def sample_columns(layout: Layout, samples: list[Sample]) -> dict[str, np.ndarray]:
    columns = {}
    sequence, epoch = np.array([s for _, s in samples], np.int64), np.array([e for e, _ in samples], np.int64)
    for number, (name, column) in enumerate(layout.data_columns().items()):
        values = (sequence * 7 + epoch * 13 + number) % 31
        array = np.zeros((len(samples), *column.shape), column.dtype)
        array += values.reshape(-1, *([1] * len(column.shape))).astype(column.dtype)
        columns[name] = array
    columns["input_ids"][:, 0], columns["input_ids"][:, 1] = epoch, sequence  # tells a sample from all others
    columns["token_count"] = (3 + sequence % 10).astype(np.uint16)
    columns["masked_positions"][:] = [1, 2]
    columns["masked_positions"][sequence % 3 == 0, 1] = -1
    return columns


def plan_of(*rows: int, epochs: int = 2, block_samples: int = 4) -> SplitPlan:
    plan = small_plan(masking_epochs=epochs, task_sequences=11, block_samples=block_samples)
    return SplitPlan.of("train", rows, plan)


def stream(
    reader: MemoryReader,
    order: SampleOrder,
    start: int = 0,
    stop: int = 4,
    rank: int = 0,
    world: int = 1,
    micro: int = 4,
    **options: Any,
) -> Stream:
    return Stream(reader, order, Share(rank, world, micro, **options), start, stop)


def log(step: Step) -> list[Sample]:
    """Returns the samples that this rank computes, without dummies."""
    return [
        (int(ids[0]), int(ids[1])) for batch in step.micro_batches if batch.weight for ids in batch.input_ids
    ]


def whole_batch(plan: SplitPlan, step: Step) -> list[Sample]:
    """Returns the samples of the global batch, from the step's locations."""
    locations = step.locations
    columns = locations.masking_epoch.tolist(), locations.block.tolist(), locations.row.tolist()
    return [(e, int(plan.sequence_ids(b)[r])) for e, b, r in zip(*columns, strict=True)]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("stream", "fetch"))]


def test_the_log_is_the_same_for_every_world_and_resume() -> None:
    plan = plan_of(50)
    samples = run_samples(50, 2.5, None, 12)
    reader = MemoryReader(plan)
    order = SampleOrder(plan, 5, 12, samples, window_batches=2)
    with stream(reader, order, stop=order.steps) as reference:
        expected = [log(step) for step in reference]
    assert len(expected) == 11
    assert len(expected[-1]) == 125 - 120
    read = Counter(sum(expected, []))
    assert {read[1, s] for s in range(50)} == {1}
    assert Counter(read[0, s] for s in range(50)) == {
        1: 25,
        2: 25,
    }  # it comes twice, once by half

    seen: list[list[Sample]] = []
    for world, micro, until in [(1, 4, 2), (2, 3, 3), (3, 4, 6), (1, 12, 7), (12, 1, 9), (2, 5, 11)]:
        fresh = SampleOrder(plan, 5, 12, samples, window_batches=2)
        ranks = [
            list(stream(reader, fresh, len(seen), until, rank, world, micro=micro)) for rank in range(world)
        ]
        for shares in zip(*ranks, strict=True):
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert {share.number for share in shares} == {len(seen)}
            seen.append(sum((log(share) for share in shares), []))
            assert all(whole_batch(plan, share) == seen[-1] for share in shares)
    assert seen == expected


def test_batches_hold_the_columns_of_their_samples() -> None:
    plan = plan_of(50)
    order = SampleOrder(plan, 1, 12, 100, window_batches=3)
    with stream(MemoryReader(plan), order, start=3, stop=6) as steps:
        for step in steps:
            tokens = masked = 0
            for batch in step.micro_batches:
                samples = [(int(row[0]), int(row[1])) for row in batch.input_ids]
                expected = sample_columns(LAYOUT, samples)
                for name in ("input_ids", "token_count", "topk_ids", "topk_logits", "logsumexp"):
                    np.testing.assert_array_equal(getattr(batch, name).numpy(), expected[name])
                for name in ("hidden_states", "hidden_scale"):
                    np.testing.assert_array_equal(getattr(batch, name).numpy(), expected[name])
                tokens += int(expected["token_count"].sum())
                masked += int((expected["masked_positions"] >= 0).sum())
                for name in ("input_ids", "token_count", "labels", "topk_ids"):
                    assert getattr(batch, name).dtype == torch.int64
                assert batch.hidden_states is not None
                assert batch.hidden_states.dtype == torch.int8
            assert (step.tokens, step.masked) == (tokens, masked)


def test_a_rank_without_samples_gets_a_dummy() -> None:
    plan = plan_of(10, epochs=1)
    order = SampleOrder(plan, 0, 8, 10, window_batches=1)
    shares = [
        list(stream(MemoryReader(plan), order, stop=2, rank=rank, world=3, micro=8))[-1] for rank in range(3)
    ]
    weights = [[batch.weight for batch in share.micro_batches] for share in shares]
    assert weights == [[0.0], [1.0], [1.0]]
    (dummy,) = shares[0].micro_batches
    assert len(dummy) == 1
    assert dummy.token_count.item() > 0
    assert (shares[0].tokens, shares[0].masked) == (0, 0)
    assert sum((log(share) for share in shares), []) == whole_batch(plan, shares[0])


def test_a_damaged_block_stops_at_its_step() -> None:
    plan = plan_of(64, epochs=1)
    order = SampleOrder(plan, 2, 4, 64, window_batches=2)
    guilty = next(g for g in range(16) if 9 in order.batch(g).block.tolist())
    assert guilty > 0
    reader = MemoryReader(plan, damaged={(0, 9)})
    steps = stream(reader, order, stop=16, micro=2, prefetch=8)
    for g in range(guilty):
        assert next(steps).number == g
    with pytest.raises(UserError, match="block 9 of masking epoch 0 is damaged"):
        next(steps)
    assert threads() == []


def test_work_ahead_is_bounded() -> None:
    plan = plan_of(4000, epochs=1)
    reader = MemoryReader(plan)
    steps = stream(reader, SampleOrder(plan, 0, 4, 3600, 2), stop=900, micro=2, prefetch=6)
    next(steps)
    assert len(steps._pending) == 3  # 6 micro-batches
    steps.close()
    assert sum(reader.read.values()) <= 4 * 4


def test_closing_ends_the_threads() -> None:
    plan = plan_of(64, epochs=1)
    reader = MemoryReader(plan, gate=threading.Event())
    steps = stream(reader, SampleOrder(plan, 2, 4, 64, 2), stop=16, micro=2)
    steps._submit_ahead()
    assert reader.gate is not None
    threading.Timer(0.05, reader.gate.set).start()
    steps.close()
    assert threads() == []
    assert sum(reader.read.values()) <= 2 * 2  # nothing new was started
    with pytest.raises(StopIteration):
        next(steps)


# --- real stores --------------------------------------------------------------------------------------------

TRAIN = Train(batch_size=6, micro_batch_size=2)


def open_real(store: Store, rank: int, world: int, columns: list[str], steps: int = 10) -> Stream:
    plan = store.splits["train"].plan
    order = SampleOrder(plan, 0, 6, min(6 * steps, 60), window_batches=2)
    return open_stream(store, "train", columns, order, TRAIN, World(rank, world, torch.device("cpu")))


def real_log(store: Store, world: int) -> list[list[list[int]]]:
    """Returns, for every step, the token ids of its samples in order."""
    ranks = [list(open_real(store, rank, world, ["hidden_states"])) for rank in range(world)]
    return [
        [row.tolist() for share in shares for b in share.micro_batches if b.weight for row in b.input_ids]
        for shares in zip(*ranks, strict=True)
    ]


def test_only_the_columns_asked_for(tmp_path: Path) -> None:
    store = make_store(str(tmp_path / "store"), LAYOUT, {"train": (30,)})
    with open_real(store, 0, 1, ["hidden_states", "hidden_scale"]) as steps:
        batch = next(steps).micro_batches[0]
    assert batch.hidden_states is not None
    assert batch.hidden_scale is not None
    assert (batch.topk_ids, batch.topk_logits, batch.logsumexp) == (None, None, None)
    bare = make_store(str(tmp_path / "bare"), small_layout(hidden_states="none"), {"train": (30,)})
    with pytest.raises(UserError, match="holds no hidden_states"):
        open_real(bare, 0, 1, ["hidden_states"])


def test_a_real_store_and_a_flipped_bit_in_it(tmp_path: Path) -> None:
    """A store on disk gives the same log on 1 to 3 ranks, and a flipped bit raises an error at its step."""
    root = tmp_path / "store"
    store = make_store(str(root), rows={"train": (18, 12)})
    logs = [real_log(store, world) for world in (1, 2, 3)]
    assert logs[0] == logs[1] == logs[2]
    assert sum(map(len, logs[0])) == 60
    reader = BlockReader(store, "train", ["hidden_states", "input_ids"])
    for block in range(3, 9):  # of a sample that is masked otherwise in the other masking epoch
        found = reader.rows(1, block, slice(0, 1))
        states, sample = found["hidden_states"].tobytes(), found["input_ids"][0].tolist()
        if sum(step.count(sample) for step in logs[0]) == 1:
            break
    (file,) = (f for f in (root / "shards" / "train").rglob("*.arrow") if states in f.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.find(states) + 7] ^= 1
    file.write_bytes(bytes(data))
    guilty = next(g for g, step in enumerate(logs[0]) if sample in step)
    steps = open_real(open_store(str(root)), 0, 1, ["hidden_states"])
    for g in range(guilty):
        assert next(steps).number == g
    with pytest.raises(DamagedStore, match="column hidden_states"):
        next(steps)
    assert len(list(open_real(open_store(str(root)), 0, 1, ["topk_ids"]))) == 10  # bytes that are not read


def test_a_remote_store_gives_the_same(tmp_path: Path, bucket: str) -> None:
    root = tmp_path / "store"
    store = make_store(str(root), rows={"train": (18, 12)})
    for file in root.rglob("*"):
        if file.is_file():
            storage.publish_bytes(f"{bucket}/store/{file.relative_to(root)}", file.read_bytes())
    assert real_log(open_store(f"{bucket}/store"), 2) == real_log(store, 1)
