"""The simulation of a teacher pass where its answer is known."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from infra.errors import UserError
from infra.sizing import Pass, main, simulate

CALM = Pass(
    tokens=1e8, tokens_per_second=1e4, bytes_per_token=1000, workers=8, task_tokens=100_000,
    mtbf_hours=1e12, slow_share=0.0, store_bytes_per_second=1e12, driver_seconds=0.0,
    start_seconds=0.0,
)  # fmt: skip


def test_perfect_workers_take_the_time_of_the_work() -> None:
    found = simulate(CALM)
    assert found.seconds == pytest.approx(1e8 / 1e4 / 8)
    assert found.efficiency == pytest.approx(1)
    assert found.lost_tasks == 0


def test_a_slow_store_is_the_bottleneck() -> None:
    found = simulate(replace(CALM, store_bytes_per_second=2e7))
    assert found.bottleneck == "the store"
    assert found.seconds == pytest.approx(1e8 * 1000 / 2e7, rel=0.01)


def test_a_slow_driver_is_the_bottleneck_of_many_workers() -> None:
    assert simulate(replace(CALM, driver_seconds=0.5, workers=100)).bottleneck == "the driver"


def test_failures_cost_tasks_and_time_and_the_work_is_done() -> None:
    found = simulate(replace(CALM, mtbf_hours=0.1, replace_seconds=60))
    assert found.lost_tasks > 10
    assert 0.5 < found.efficiency < 1


def test_the_spread_and_the_start_are_paid_for() -> None:
    found = simulate(replace(CALM, spread=(0.5, 1.5), start_seconds=100))
    assert found.seconds == pytest.approx(100 + 1e8 / 1e4 / 8, rel=0.05)
    assert simulate(replace(CALM, workers=1, spread=(2.0,))).efficiency == pytest.approx(0.5)


def test_a_slow_worker_holds_back_the_end_by_what_waits_on_it() -> None:
    """Twenty tasks of 10 s; a worker ten times as slow gets a third one at 100 s, when six are left."""
    slow = replace(CALM, workers=2, tokens=2e6, slow_share=0.5, slow_factor=10.0)
    seconds = {simulate(slow, seed).seconds for seed in range(20)}
    assert max(seconds) == pytest.approx(1000)  # both slow
    assert min(seconds) == pytest.approx(100)  # none
    assert sorted(round(value) for value in seconds)[1:-1] == [300]  # one: nobody takes what it holds


def test_a_lost_workers_second_task_is_given_to_an_idle_one() -> None:
    job = replace(CALM, workers=2, tokens=3e5, mtbf_hours=0.01, replace_seconds=1e6)
    one_lost = [found for seed in range(50) if (found := simulate(job, seed)).lost_tasks == 1]
    assert one_lost
    assert all(found.seconds < 100 for found in one_lost)


def test_measured_tasks_give_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "sizing --tokens 1e8 --bytes-per-token 1000 --workers 8 --price 2 --terabyte-price 20"
    measured = "--task-tokens 100000 --task-seconds 9 11"
    monkeypatch.setattr(sys, "argv", [*words.split(), *measured.split()])
    main()
    printed = capsys.readouterr().out
    assert "10,000 tokens/s; 1,000 tasks" in printed
    assert "0.10 TB, 2 a month" in printed


@pytest.mark.parametrize("words", ["--tokens 0", "--workers 0", "--mtbf-hours -1", "--masking-epochs 0"])
def test_no_pass_of_nothing(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = "sizing --tokens 1e6 --bytes-per-token 1 --tokens-per-second 1 --workers 1"
    monkeypatch.setattr(sys, "argv", [*right.split(), *words.split()])
    with pytest.raises((SystemExit, UserError)):
        main()


def test_the_same_seed_gives_the_same_answer() -> None:
    job = replace(CALM, mtbf_hours=0.5)
    assert simulate(job, seed=3) == simulate(job, seed=3) != simulate(job, seed=4)
