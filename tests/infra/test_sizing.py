"""The simulation of a teacher pass where its answer is known in closed form."""

from __future__ import annotations

import math
import re
import shlex
import statistics
import sys
from dataclasses import replace

import pytest

from infra.settings.sections import Sequences, Store, Teacher
from infra.sizing.__main__ import main
from infra.sizing.simulation import PART_BYTES, SHARD_BYTES, TeacherPass, simulate
from offline_teacher.store.writer import SHARDS_IN_FLIGHT
from tests.conftest import ROOT

FREE = 1e18
CALM = TeacherPass(
    tokens=1e8, tokens_per_second=1e4, bytes_per_token=1000, workers=8, task_tokens=100_000,
    host_bytes_per_second=FREE, upload_bytes_per_second=FREE, store_bytes_per_second=FREE,
    store_requests_per_second=FREE, driver_seconds=0.0, start_seconds=0.0, finish_seconds=0.0,
    mtbf_hours=1e12, slow_share=0.0,
)  # fmt: skip
"""1,000 tasks of 100 MB and 10 s; nothing but the teacher takes time, and no worker is lost."""


def test_perfect_workers_take_the_time_of_the_work() -> None:
    found = simulate(CALM)
    assert found.seconds == pytest.approx(1e8 / 1e4 / 8)
    assert found.efficiency == pytest.approx(1)
    assert found.lost_tasks == 0
    assert found.bottleneck == "the teacher"


BOUND = {
    "the workers' hosts": (replace(CALM, host_bytes_per_second=1e6), 1000 / 8 * 100),
    "the workers' uploads": (replace(CALM, uploads=2, upload_bytes_per_second=1e6), 1000 / 8 * 50),
    "the store's bytes": (replace(CALM, store_bytes_per_second=2e7), 1000 * 5),
    "the store's requests": (replace(CALM, store_requests_per_second=0.25, prefixes=2), 1000 * 5 / 0.5),
    "the driver": (replace(CALM, driver_seconds=2.5), 1000 * 2.5),
}
"""What bounds the pass -> the pass, and its tasks times the seconds that each keeps the bound busy."""


@pytest.mark.parametrize("name", BOUND)
def test_the_slowest_part_decides(name: str) -> None:
    """All parts overlap: the time is that of the slowest, and some tasks more to fill the others."""
    job, seconds = BOUND[name]
    found = simulate(job)
    assert found.bottleneck == name
    assert seconds <= found.seconds <= seconds * 1.03


def test_a_task_alone_takes_the_sum_of_its_parts() -> None:
    job = replace(
        CALM, tokens=1e5, workers=1, host_bytes_per_second=1e7, upload_bytes_per_second=5e6, uploads=4,
        driver_seconds=3.0, start_seconds=7.0, finish_seconds=9.0,
    )  # fmt: skip
    assert simulate(job).seconds == pytest.approx(7 + 3 + 10 + 10 + 5 + 9)


def test_with_one_task_in_flight_nothing_overlaps() -> None:
    job = replace(CALM, in_flight=1, host_bytes_per_second=1e7, upload_bytes_per_second=1e7, uploads=1)
    found = simulate(job)
    assert found.seconds == pytest.approx(1000 / 8 * 30)
    assert found.bottleneck == "tasks in flight"
    assert simulate(replace(job, in_flight=3)).seconds == pytest.approx(1000 / 8 * 10, rel=0.03)


def test_defaults_of_the_pool_and_of_the_writer_are_the_programs() -> None:
    assert TeacherPass.in_flight == Teacher(model="").tasks_in_flight
    assert TeacherPass.uploads == TeacherPass.in_flight * SHARDS_IN_FLIGHT
    assert TeacherPass.task_tokens == Store.task_sequences * Sequences.length
    assert Store.shard_bytes == SHARD_BYTES


def test_requests_of_a_task_are_those_of_uploads_in_parts() -> None:
    job = replace(CALM, bytes_per_token=SHARD_BYTES / 100_000)
    assert job.task_requests == math.ceil(SHARD_BYTES / PART_BYTES) + 2 + 1
    assert replace(job, task_tokens=200_000).task_requests == math.ceil(2 * SHARD_BYTES / PART_BYTES) + 4 + 1


def test_lost_workers_cost_what_renewal_theory_says() -> None:
    """One worker, one task of c seconds at a time, lost after an exponential time of mean m, back after r:
    E = (m + r) (exp(c / m) - 1) for each task (Ross, Introduction to Probability Models, 7.3)."""
    c, m, r = 10.0, 40.0, 15.0
    job = replace(CALM, workers=1, in_flight=1, mtbf_hours=m / 3600, replace_seconds=r, tokens=2e7)
    found = [simulate(job, seed) for seed in range(20)]
    expected = (m + r) * (math.exp(c / m) - 1)
    assert statistics.mean(one.seconds for one in found) / job.tasks == pytest.approx(expected, rel=0.03)
    lost = statistics.mean(one.lost_tasks for one in found) / job.tasks
    assert lost == pytest.approx(math.exp(c / m) - 1, rel=0.05)


def test_the_tasks_of_a_lost_worker_go_to_others() -> None:
    job = replace(CALM, workers=2, tokens=4e5, in_flight=2, mtbf_hours=0.01, replace_seconds=1e6)
    lost = [found for seed in range(50) if (found := simulate(job, seed)).lost_tasks]
    one_worker = [found.seconds for found in lost if found.seconds < 1e6]
    assert one_worker
    assert max(one_worker) < 100  # the other worker did them, before there was another one


def test_the_spread_and_the_start_are_paid_for() -> None:
    found = simulate(replace(CALM, relative_durations=(0.5, 1.5), start_seconds=100))
    assert found.seconds == pytest.approx(100 + 1e8 / 1e4 / 8, rel=0.05)
    assert simulate(replace(CALM, workers=1, relative_durations=(2.0,))).efficiency == pytest.approx(0.5)


def test_a_slow_worker_holds_back_the_end_by_what_waits_on_it() -> None:
    """Twenty tasks of 10 s; a worker ten times as slow holds two of them, the second until 200 s."""
    slow = replace(CALM, workers=2, tokens=2e6, in_flight=2, slow_share=0.5, slow_factor=10.0)
    seconds = sorted(round(value) for value in {simulate(slow, seed).seconds for seed in range(20)})
    assert seconds[0] == 100  # none is slow
    assert seconds[-1] == 1000  # both are
    assert seconds[1:-1] == [300]  # one is: it takes a third task at 100 s, when seven are left


def test_too_few_tasks_for_the_workers_is_said() -> None:
    assert simulate(replace(CALM, workers=501)).bottleneck == "too few tasks"


def test_the_same_seed_gives_the_same_answer() -> None:
    job = replace(CALM, mtbf_hours=0.5)
    assert simulate(job, seed=3) == simulate(job, seed=3) != simulate(job, seed=4)


def _printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["sizing", *words])
    main()
    return capsys.readouterr().out


def test_measured_tasks_give_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--tokens 1e8 --bytes-per-token 1000 --workers 8 --price 2 --terabyte-price 20"
    measured = "--task-tokens 100000 --task-seconds 9 11"
    printed = _printed(monkeypatch, capsys, [*words.split(), *measured.split()])
    assert "10,000 tokens/s; 1,000 tasks" in printed
    assert "0.10 TB, 2 a month" in printed


WRONG = ["--tokens 0", "--workers 0", "--mtbf-hours -1", "--masking-epochs 0", "--uploads 1.5"]


@pytest.mark.parametrize("words", WRONG)
def test_no_pass_of_nothing(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = "sizing --tokens 1e6 --bytes-per-token 1 --tokens-per-second 1 --workers 1"
    monkeypatch.setattr(sys, "argv", [*right.split(), *words.split()])
    with pytest.raises(SystemExit):
        main()


def test_tables_of_the_documentation_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "sizing.md").read_text()
    blocks = re.findall(r"```bash\npython -m infra\.sizing (.*?)\n```\n+```\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) >= 3
    for words, table in blocks:
        printed = _printed(monkeypatch, capsys, shlex.split(words.replace("\\\n", " ")))
        assert [line.rstrip() for line in printed.strip().splitlines()] == table.splitlines()
