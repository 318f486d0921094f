"""The place of every block follows from the rows of the parts: against a plain enumeration."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_teacher.store.numbering import SplitPlan, shards_of
from offline_teacher.store.schema import Plan
from tests.store.synthetic import small_layout

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any).map(tuple)
PLANS = st.builds(Plan, st.integers(1, 3), st.integers(1, 20), st.integers(1, 7), st.integers(1, 4))


def enumerate_blocks(rows: tuple[int, ...], epochs: int, plan: Plan) -> list[tuple]:
    """(task name, shard, block, sequence ids, epoch) of every block, by plain loops over FORMAT.md."""
    found = []
    for epoch in range(epochs):
        for part, count in enumerate(rows):
            for piece, start in enumerate(range(0, count, plan.task_sequences)):
                ids = [part * 2**32 + row for row in range(start, min(start + plan.task_sequences, count))]
                blocks = [ids[at : at + plan.block_samples] for at in range(0, len(ids), plan.block_samples)]
                name = f"e{epoch:03d}-p{part:05d}-{piece:04d}"
                for number, block in enumerate(blocks):
                    found.append(
                        (name, number // plan.shard_blocks, number % plan.shard_blocks, block, epoch)
                    )
    return found


@given(ROWS, st.integers(1, 3), PLANS)
def test_every_block_is_where_an_enumeration_has_it(rows: tuple[int, ...], epochs: int, plan: Plan) -> None:
    split = SplitPlan(rows, epochs, plan)
    expected = enumerate_blocks(rows, epochs, plan)
    assert split.blocks_per_epoch * epochs == len(expected)
    found = []
    for epoch in range(epochs):
        for block in range(split.blocks_per_epoch):
            ids = split.sequence_ids(block).tolist()
            location = split.locate(epoch, block)
            assert location.samples == len(ids)
            found.append((split.task(location.task).name, location.shard, location.block, ids, epoch))
    assert found == expected
    sizes = [split.locate(0, block).samples for block in range(split.blocks_per_epoch)]
    short = {block: size for block, size in enumerate(sizes) if size < plan.block_samples}
    assert dict(zip(*map(np.ndarray.tolist, split.short_blocks()), strict=True)) == short


@given(ROWS, st.integers(1, 3), PLANS)
def test_tasks_are_in_order_and_cover_every_sample_once(
    rows: tuple[int, ...], epochs: int, plan: Plan
) -> None:
    split = SplitPlan(rows, epochs, plan)
    tasks = list(split.tasks())
    assert len(tasks) == split.task_count
    assert [split.number_of(task.name) for task in tasks] == list(range(len(tasks)))
    assert [(task.epoch, task.part, task.piece) for task in tasks] == sorted(
        (task.epoch, task.part, task.piece) for task in tasks
    )
    samples = [(task.epoch, int(number)) for task in tasks for number in task.sequence_ids()]
    assert len(samples) == len(set(samples)) == split.samples
    for task in tasks:
        shards = shards_of(task, plan)
        assert sum(map(sum, shards)) == task.samples
        assert all(len(shard) == plan.shard_blocks for shard in shards[:-1])
        assert {count for shard in shards for count in shard[:-1]} <= {plan.block_samples}


@pytest.mark.parametrize(
    "name", ["e000-p00000-0002", "e002-p00000-0000", "e000-p00001-0000", "e00-p0-0", "e000-p000000-0000", "x"]
)
def test_a_name_of_no_task_has_no_number(name: str) -> None:
    split = SplitPlan((10, 0, 5), 2, Plan(2, 7, 2, 2))
    assert split.number_of(name) is None


def test_numbers_out_of_range_are_refused() -> None:
    split = SplitPlan((10, 0, 5), 2, Plan(2, 7, 2, 2))
    for block in (-1, split.blocks_per_epoch):
        with pytest.raises(IndexError):
            split.locate(0, block)
        with pytest.raises(IndexError):
            split.sequence_ids(block)
    for call in (lambda: split.locate(2, 0), lambda: split.task(split.task_count)):
        with pytest.raises(IndexError):
            call()
    for rows in ((), (0, 0), (-1,), (2**33,), (True,)):
        with pytest.raises(ValueError, match="rows"):
            SplitPlan(rows, 1, Plan(1, 7, 2, 2))


def test_memory_follows_the_tasks_and_not_the_blocks() -> None:
    """A million blocks in 1,000 tasks: less than 1 MB."""
    plan = Plan(1, 32_000, 32, 64)
    tracemalloc.start()
    split = SplitPlan((32_000,) * 1000, 1, plan)
    split.locate(0, 999_999)
    split.short_blocks()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert split.blocks_per_epoch == 1_000_000
    assert peak < 1 << 20


def test_blocks_and_shards_by_bytes() -> None:
    layout = small_layout(length=128, masked=20, vocab_size=30_522, hidden_size=768, top_k=64)
    plan = Plan.from_bytes(layout, 4, 65_536, block_bytes=4 << 20, shard_bytes=256 << 20)
    block, sample = plan.block_samples * layout.bytes_per_sample(), layout.bytes_per_sample()
    assert block <= 4 << 20 < block + sample
    assert plan.shard_blocks * block <= 256 << 20 < (plan.shard_blocks + 1) * block
    assert (plan.masking_epochs, plan.task_sequences) == (4, 65_536)
    assert Plan.from_bytes(layout, 1, 5).block_samples == 5
    tiny = Plan.from_bytes(layout, 1, 100, block_bytes=1, shard_bytes=1)
    assert (tiny.block_samples, tiny.shard_blocks) == (1, 1)
    assert plan.epochs("train") == 4
    assert plan.epochs("validation") == 1


def test_blocks_are_large_enough_for_either_kind_of_columns() -> None:
    """Top-k of K = 64 and hidden states of D = 768, and each of them alone."""
    shape = {"length": 128, "masked": 20, "vocab_size": 30_522, "hidden_size": 768}
    for kinds in ({"top_k": 64}, {"top_k": 0}, {"top_k": 64, "hidden_states": "none"}):
        layout = small_layout(**shape, **kinds)
        samples = Plan.from_bytes(layout, 1, 65_536).block_samples
        text = 8 + 2 + 2 * 128 + 2 * 2 * 20
        hidden = 2 * 128 * 768 if "hidden_states" not in kinds else np.inf
        top_k = 128 * (64 * 4 + 4 * len(layout.temperatures)) if kinds["top_k"] else np.inf
        assert samples * (text + min(hidden, top_k)) >= 1 << 20
        assert samples * layout.bytes_per_sample() > (4 << 20) - layout.bytes_per_sample()
    both = small_layout(**shape, top_k=64)
    assert Plan.from_bytes(both, 1, 65_536).block_samples > (4 << 20) // both.bytes_per_sample()
    assert (
        Plan.from_bytes(both, 1, 65_536, shard_bytes=1 << 20).block_samples * both.bytes_per_sample()
        <= 1 << 20
    )
