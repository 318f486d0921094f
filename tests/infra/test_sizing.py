"""The simulation of a teacher pass where its answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.sizing import Pass, simulate

CALM = Pass(
    tokens=1e8, tokens_per_second=1e4, bytes_per_token=1000, workers=8, shard_tokens=100_000,
    mtbf_hours=1e12, slow_share=0.0, store_bytes_per_second=1e12, driver_seconds=0.0,
)  # fmt: skip


def test_perfect_workers_take_the_time_of_the_work() -> None:
    found = simulate(CALM)
    assert found.seconds == pytest.approx(1e8 / 1e4 / 8)
    assert found.efficiency == pytest.approx(1)
    assert found.lost_shards == 0


def test_a_slow_store_is_the_bottleneck() -> None:
    found = simulate(replace(CALM, store_bytes_per_second=2e7))
    assert found.bottleneck == "the store"
    assert found.seconds == pytest.approx(1e8 * 1000 / 2e7, rel=0.01)


def test_a_slow_driver_is_the_bottleneck_of_many_workers() -> None:
    assert simulate(replace(CALM, driver_seconds=0.5, workers=100)).bottleneck == "the driver"


def test_failures_cost_shards_and_time_and_the_work_is_done() -> None:
    found = simulate(replace(CALM, mtbf_hours=0.1, replace_seconds=60))
    assert found.lost_shards > 10
    assert 0.5 < found.efficiency < 1


def test_the_same_seed_gives_the_same_answer() -> None:
    job = replace(CALM, mtbf_hours=0.5)
    assert simulate(job, seed=3) == simulate(job, seed=3) != simulate(job, seed=4)
