from __future__ import annotations

import itertools
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from student_train import order as order_module
from student_train.order import SampleOrder, check_world, micro_batch_rows, run_samples, run_steps


def plan(sequences: int, samples_per_shard: int, replicas: int = 1) -> Any:
    return SimpleNamespace(sequences=sequences, samples_per_shard=samples_per_shard, replicas=replicas)


@given(
    sequences=st.integers(1, 300),
    per_shard=st.integers(1, 40),
    replicas=st.integers(1, 3),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_epoch_reads_every_sequence_once(sequences, per_shard, replicas, window, seed):
    order = SampleOrder(plan(sequences, per_shard, replicas), seed, window)
    for epoch in range(replicas + 1):
        replica, ids = order.samples(epoch * sequences, (epoch + 1) * sequences)
        assert sorted(ids.tolist()) == list(range(sequences))
        assert set(replica.tolist()) == {epoch % replicas}


@given(
    sequences=st.integers(1, 120),
    per_shard=st.integers(1, 20),
    window=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 400), min_size=1, max_size=8),
)
def test_any_slicing_gives_the_same_stream(sequences, per_shard, window, cuts):
    whole = SampleOrder(plan(sequences, per_shard, 2), 7, window).samples(0, 400)
    borders = [0, *sorted(cuts), 400]
    fresh = SampleOrder(plan(sequences, per_shard, 2), 7, window)
    parts = [fresh.samples(a, b) for a, b in itertools.pairwise(borders)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole[0])
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), whole[1])
    late = SampleOrder(plan(sequences, per_shard, 2), 7, window).samples(cuts[0], 400)  # a resume
    np.testing.assert_array_equal(late[1], whole[1][cuts[0] :])


@given(
    n=st.integers(1, 500),
    micro=st.integers(1, 64),
    world=st.integers(1, 9),
)
def test_micro_batches_share_out_the_batch(n, micro, world):
    shares = [micro_batch_rows(n, micro, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for part in share for row in part]
    assert rows == list(range(n))
    sizes = [len(part) for share in shares for part in share]
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_by_eye():
    assert micro_batch_rows(8, 4, 0, 1) == [range(4), range(4, 8)]
    assert micro_batch_rows(8, 4, 1, 2) == [range(4, 8)]
    assert [micro_batch_rows(2, 4, rank, 3) for rank in range(3)] == [
        [range(0)],
        [range(1)],
        [range(1, 2)],
    ]


@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_and_its_inverse(n, key):
    permuted = order_module._permute(np.arange(n), n, key)
    assert sorted(permuted.tolist()) == list(range(n))
    for element in {0, n // 2, n - 1}:
        assert permuted[order_module._permutation_position(n, key, element)] == element


def test_the_short_shard_lands_anywhere():
    positions = set()
    for seed in range(40):
        order = SampleOrder(plan(22, 5), seed, 1)
        indices = [order.window_shard_ids(window)[0][1] for window in range(5)]
        positions.add(indices.index(4))
        _, ids = order.samples(0, 22)
        assert (ids // 5).tolist() == [i for i in indices for _ in range(2 if i == 4 else 5)]
        assert [order.window(p) for p in range(22)] == [
            w for w, i in enumerate(indices) for _ in range(2 if i == 4 else 5)
        ]
    assert positions == set(range(5))


def test_shuffle_looks_random():
    n = 64 * 256
    order = SampleOrder(plan(n, 256), 3, 8)
    _, first = order.samples(0, n)
    _, second = order.samples(n, 2 * n)
    rank = np.arange(n)
    # Correlations of random permutations are about N(0, 1/n) within, but shards move as blocks: 1/64 there.
    assert abs(np.corrcoef(rank, first)[0, 1]) < 4 / 8
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 8
    window = first[: 8 * 256]
    within = np.argsort(np.argsort(window))
    assert abs(np.corrcoef(np.arange(len(within)), within)[0, 1]) < 4 / np.sqrt(len(within))
    assert np.mean(np.diff(first) == 1) < 0.005
    # Every shard of the window is drawn evenly in each quarter: chi-square of 8 shards, 7 degrees of freedom.
    counts = np.bincount(np.unique(window[:512] // 256, return_inverse=True)[1], minlength=8)
    assert len(counts) == 8
    assert ((counts - 64) ** 2 / 64).sum() < 30
    assert not np.array_equal(SampleOrder(plan(n, 256), 4, 8).samples(0, n)[1], first)


def test_shard_permutation_is_uniform():
    """Over seeds, every shard stands at every position equally often (chi-square, 49 cells, p > 1e-6)."""
    counts = np.zeros((7, 7))
    for seed in range(1400):
        order = SampleOrder(plan(7, 1), seed, 1)
        counts[np.arange(7), order.samples(0, 7)[1]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 36 + 6 * np.sqrt(72)


def test_a_billion_samples_cost_one_window():
    tracemalloc.start()
    order = SampleOrder(plan(1_000_000_007, 1024, 3), 11, 8)
    replica, ids = order.samples(2_700_000_000, 2_700_004_096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(ids)) == 4096
    assert set(replica.tolist()) == {2}
    assert len(np.unique(ids // 1024)) <= 16
    assert peak < 4 << 20


def test_length_of_a_run():
    assert run_samples(100, 3.0, None, 32) == 300
    assert run_samples(100, 0.5, None, 32) == 50
    assert run_samples(100, 3.0, 2, 32) == 64
    assert run_samples(100, 3.0, 1000, 32) == 300
    assert run_samples(3, 0.01, None, 32) == 1
    assert [run_steps(n, 32) for n in (1, 32, 33)] == [1, 1, 2]


def test_bad_worlds_are_one_sentence():
    with pytest.raises(UserError, match="9 ranks for a store of 5 sequences"):
        check_world(32, 9, 5)
    with pytest.raises(UserError, match=r"train.batch_size: 4 sequences cannot be shared by 8 ranks"):
        check_world(4, 8, 100)
    with pytest.raises(UserError, match="no sequences"):
        SampleOrder(plan(0, 10), 0, 1)
    check_world(8, 8, 8)
