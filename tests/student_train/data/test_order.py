"""The order of samples: each once per epoch, the same for any number of ranks, whole blocks per rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from student_train.data.order import (
    Locations,
    SampleOrder,
    chained_digest,
    check_world,
    micro_batch_rows,
    run_samples,
)
from student_train.data.permutation import permute, positions_of


@dataclass(frozen=True)
class TaskBlocks:
    """The blocks of tasks with given numbers of samples, cut in the simplest way."""

    tasks: tuple[int, ...]
    block_samples: int = 4
    masking_epochs: int = 1

    @property
    def sizes(self) -> list[int]:
        size = self.block_samples
        return [min(size, task - start) for task in self.tasks for start in range(0, task, size)]

    @property
    def samples_per_epoch(self) -> int:
        return sum(self.tasks)

    @property
    def blocks_per_epoch(self) -> int:
        return len(self.sizes)

    def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        short = [(i, n) for i, n in enumerate(self.sizes) if n < self.block_samples]
        return np.array([i for i, _ in short], np.int64), np.array([n for _, n in short], np.int64)


def stream(blocks: TaskBlocks, order: SampleOrder, epochs: int) -> list[tuple[int, int, int]]:
    """Returns (masking epoch, block, row) of every sample of the first epochs, by listing every block."""
    listed = []
    for epoch in range(epochs):
        key = order._permuted_epoch(epoch).key
        for block in permute(np.arange(blocks.blocks_per_epoch), blocks.blocks_per_epoch, key).tolist():
            listed += [(epoch % blocks.masking_epochs, block, row) for row in range(blocks.sizes[block])]
    return listed


def all_batches(order: SampleOrder) -> list[list[tuple[int, int, int]]]:
    locations = [order.batch(step) for step in range(order.steps)]
    return [
        list(zip(p.masking_epoch.tolist(), p.block.tolist(), p.row.tolist(), strict=True)) for p in locations
    ]


splits = st.builds(
    TaskBlocks,
    st.lists(st.integers(1, 23), min_size=1, max_size=6).map(tuple),
    st.integers(1, 7),
    st.integers(1, 3),
)


@given(splits, st.integers(0, 5), st.integers(1, 9), st.integers(1, 4), st.data())
@settings(max_examples=150, deadline=None)
def test_a_run_reads_the_stream_and_nothing_twice(
    blocks: TaskBlocks, seed: int, batch_size: int, window: int, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(1, 3 * blocks.samples_per_epoch))
    order = SampleOrder(blocks, seed, batch_size, samples, window)
    expected = stream(blocks, order, 3)[:samples]
    batches = all_batches(order)
    assert sorted(sample for batch in batches for sample in batch) == sorted(expected)
    assert [len(batch) for batch in batches] == [order.batch_rows(step) for step in range(order.steps)]
    for first in range(0, order.steps, window):  # every window reads its own part of the stream
        got = sorted(sample for batch in batches[first : first + window] for sample in batch)
        assert got == sorted(expected[first * batch_size : (first + window) * batch_size])


@given(splits, st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_share_the_global_batch(blocks: TaskBlocks, world: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(world, 12))
    order = SampleOrder(blocks, 1, batch_size, 2 * blocks.samples_per_epoch, 3)
    for step, whole in enumerate(all_batches(order)):
        rows = [
            rows for rank in range(world) for rows in micro_batch_rows(order.batch_rows(step), 2, rank, world)
        ]
        parts = [order.batch(step, part) for part in rows]
        assert [
            sample for p in parts for sample in zip(p.masking_epoch, p.block, p.row, strict=True)
        ] == whole


def test_a_rank_reads_blocks_of_its_own() -> None:
    """The blocks that 32 ranks read in a window add up to hardly more than the window's blocks."""
    blocks = TaskBlocks((4000,) * 20, block_samples=8)
    order = SampleOrder(blocks, 0, 256, blocks.samples_per_epoch, 64)
    for world in (1, 2, 8, 32):
        touched = [
            set(zip(p.masking_epoch.tolist(), p.block.tolist(), strict=True))
            for p in (order.window_locations(1, rank, world) for rank in range(world))
        ]
        whole = set().union(*touched)
        assert sum(map(len, touched)) <= 1.03 * len(whole)
        assert sum(map(len, touched)) - len(whole) <= world - 1  # only neighbours share one
    batch = order.batch(70)
    assert len({*batch.block.tolist()}) > 250  # and a batch still comes from everywhere


def test_window_locations_are_what_the_rank_reads_in_the_window() -> None:
    blocks = TaskBlocks((50, 33, 20), block_samples=4)
    order = SampleOrder(blocks, 2, 8, 2 * blocks.samples_per_epoch, 3)
    for window in range(-(-order.steps // 3)):
        for rank in range(3):
            ahead = order.window_locations(window, rank, 3)
            read = []
            for step in range(window * 3, min(order.steps, window * 3 + 3)):
                if order.batch_rows(step) < 8:
                    continue  # a short batch shares its rows out anew
                for rows in micro_batch_rows(8, 2, rank, 3):
                    p = order.batch(step, rows)
                    read += list(zip(p.masking_epoch.tolist(), p.block.tolist(), p.row.tolist(), strict=True))
            planned = set(
                zip(ahead.masking_epoch.tolist(), ahead.block.tolist(), ahead.row.tolist(), strict=True)
            )
            assert set(read) <= planned


def test_seeds_and_epochs_differ() -> None:
    blocks = TaskBlocks((64,), block_samples=2)
    batches = [all_batches(SampleOrder(blocks, seed, 8, 64, 2)) for seed in (0, 1)]
    assert batches[0] != batches[1]
    two = all_batches(SampleOrder(blocks, 0, 8, 128, 2))
    assert two[:8] == batches[0]
    assert two[8:] != batches[0]


def test_a_longer_run_reads_the_same_but_for_its_last_window() -> None:
    blocks = TaskBlocks((100,), block_samples=5)
    short, long = (all_batches(SampleOrder(blocks, 0, 10, samples, 3)) for samples in (70, 90))
    assert short[:6] == long[:6]


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_permutation_and_its_inverse(n: int, key: int) -> None:
    everything = np.arange(n)
    permuted = permute(everything, n, key)
    assert sorted(permuted.tolist()) == everything.tolist()
    assert positions_of(permuted, n, key).tolist() == everything.tolist()


def test_a_store_of_a_hundred_billion_tokens_costs_nothing() -> None:
    """With 37 million blocks in 10,000 tasks, no list of blocks is made, and locations are found at once."""
    rows = np.full(10_000, 78_125)

    class Large:
        masking_epochs, block_samples = 1, 21
        samples_per_epoch, blocks_per_epoch = int(rows.sum()), int((-(-rows // 21)).sum())

        def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
            ends = np.cumsum(-(-rows // 21)) - 1
            return ends, np.full(len(rows), 78_125 % 21)

    order = SampleOrder(Large(), 0, 4096, 3 * Large.samples_per_epoch, 64)
    locations = order.batch(500_000)
    assert len(locations) == 4096
    assert locations.block.max() < Large.blocks_per_epoch
    assert locations.row.max() < 21


def test_run_lengths_and_worlds() -> None:
    assert run_samples(10, 2.0, None, 4) == 20
    assert run_samples(10, 0.25, None, 4) == 3
    assert run_samples(10, 2.0, 3, 4) == 12
    with pytest.raises(UserError, match="start at most 3 ranks"):
        check_world(8, 4, 3)
    with pytest.raises(UserError, match="train.batch_size: 2 sequences"):
        check_world(2, 4, 30)
    with pytest.raises(UserError, match="holds no sequences"):
        SampleOrder(TaskBlocks(()), 0, 1, 1, 1)


def test_chained_digest_sees_order_masking_epoch_and_history() -> None:
    zero, some = np.zeros(3, np.int64), np.arange(3)
    first = chained_digest("", Locations(zero, zero, some))
    assert first == chained_digest("", Locations(zero, zero, some))
    others = [
        chained_digest("", Locations(zero, zero, some[::-1])),
        chained_digest("", Locations(zero, some, zero)),
        chained_digest("", Locations(zero + 1, zero, some)),
        chained_digest(first, Locations(zero, zero, some)),
    ]
    assert len({first, *others}) == 5
