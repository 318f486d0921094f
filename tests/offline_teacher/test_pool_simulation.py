"""Whatever workers do, every item is done once or set quarantined, and the pool comes to an end."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from offline_teacher.cluster import pool as pool_module
from offline_teacher.cluster.crews import teacher_crew
from offline_teacher.cluster.failure_log import FailureLog
from offline_teacher.cluster.pool import LOADING_SECONDS, LOSSES_PER_WORKER, WAIT_SECONDS, Cluster
from offline_teacher.cluster.work_queue import Item
from tests.offline_teacher.simulated_ray import SimulatedRay

Outcome = tuple[list[str], list[str], str | None]


def simulate(
    ray: SimulatedRay, items: int, workers: int, min_workers: int = 1, in_flight: int = 2
) -> Outcome:
    """Names of the items done and set quarantined, and the mistake that ended it."""
    settings = SimpleNamespace(
        workers=workers,
        min_workers=min_workers,
        task_attempts=3,
        tasks_in_flight=in_flight,
        cpu_threads=1,
        gpus_per_worker=0,
        ray_address=None,
    )
    done: list[str] = []
    told: list[str] = []
    todo = [Item(str(number), "infer", (str(number),)) for number in range(items)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setattr(pool_module, "connect", lambda *address, **local: "head:6379")
        patch.setattr("socket.create_connection", ray.connect_to_head)
        patch.setattr(pool_module, "time", ray)
        patch.setattr(FailureLog, "report", lambda *words: None)
        recipe: Any = SimpleNamespace(teacher=settings, root="runs")
        try:
            with Cluster(recipe) as cluster, cluster.pool(teacher_crew(recipe, "store")) as pool:
                quarantined = pool.run(
                    todo,
                    lambda item, answer: done.append(item.name),
                    lambda text: None,
                    lambda item: told.append(item.name),
                )
        except UserError as error:
            return done, told, str(error)
    assert told == [item.name for item in quarantined]
    assert sorted(done + told, key=int) == [item.name for item in todo]
    return done, told, None


shares = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@given(
    workers=st.integers(1, 8), items=st.integers(1, 40), few=st.integers(1, 8), in_flight=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    broken=shares, fails=shares, dies=shares, start_dies=shares, bad=shares, killers=shares, hangs=shares,
    sick=st.sampled_from([0.0, 0.1, 0.5]),
)  # fmt: skip
def test_no_item_is_lost_or_held_twice_and_it_ends(
    workers: int, items: int, few: int, in_flight: int, seed: int, broken: float, fails: float, dies: float,
    start_dies: float, bad: float, killers: float, hangs: float, sick: float,
) -> None:  # fmt: skip
    luck = random.Random(seed)
    kinds = {str(item): luck.random() for item in range(items)}
    is_broken: dict[int, bool] = {}

    def work(number: int, item: str) -> tuple[float, str]:
        seconds = luck.choice([0.0, 0.1, 1.0, 30.0])
        if is_broken.setdefault(number, luck.random() < broken) or kinds[item] < bad / 2:
            return seconds, "fail"
        if kinds[item] > 1 - killers / 4:
            return seconds, "die"
        if luck.random() < hangs / 8:
            return seconds, "hang"
        if luck.random() < sick:
            return seconds, "node"
        chance = luck.random()
        return seconds, "fail" if chance < fails / 4 else "die" if chance > 1 - dies / 4 else "ok"

    ray = SimulatedRay(lambda number: (luck.choice([0.0, 1.0, 5.0, 100.0]), luck.random() < start_dies), work)
    simulate(ray, items, workers, min(few, workers), in_flight)


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_a_worker_holds_as_many_tasks_as_the_recipe_allows(in_flight: int) -> None:
    ray = SimulatedRay(lambda number: (1.0, False), lambda number, item: (1.0, "ok"))
    simulate(ray, items=12, workers=2, in_flight=in_flight)
    assert ray.most_held == in_flight


def on_slots(workers: int, broken: int, seconds: float) -> SimulatedRay:
    """A new worker takes the first free slot, the broken ones first, where everything fails in a second."""
    slots: dict[int, int] = {}
    ray: SimulatedRay

    def start(number: int) -> tuple[float, bool]:
        taken = {slots[other.number] for other in alive if other.death > ray.now}
        slots[number] = min(set(range(workers)) - taken)
        return 5.0, False

    def place(number: int) -> str:
        return f"slot-{slots[number]}"

    ray = SimulatedRay(
        start, lambda number, item: (1.0, "fail") if slots[number] < broken else (seconds, "ok")
    )
    ray.place = place
    alive: list = []
    make: Callable = ray._make

    def noted(*arguments: Any) -> Any:
        alive.append(made := make(*arguments))
        return made

    ray._make = noted  # type: ignore[method-assign]
    return ray


@pytest.mark.parametrize(
    ("workers", "broken", "items"), [(3, 2, 8), (4, 2, 30), (8, 4, 32), (8, 1, 8), (2, 1, 2)]
)
def test_broken_nodes_quarantine_no_good_item(workers: int, broken: int, items: int) -> None:
    done, quarantined, mistake = simulate(on_slots(workers, broken, 60.0), items, workers)
    assert (len(done), quarantined, mistake) == (items, [], None)


def test_a_node_on_which_starts_die_does_not_end_it() -> None:
    ray = SimulatedRay(lambda number: (3.0, number != 0), lambda number, item: (1000.0, "ok"))
    done, quarantined, mistake = simulate(ray, 4, 2)
    assert (len(done), quarantined, mistake) == (4, [], None)


def test_after_a_mass_death_all_new_workers_share_what_is_left() -> None:
    """One of them is ready before the rest, and is not given everything."""
    used: set[int] = set()

    def work(number: int, item: str) -> tuple[float, str]:
        if number >= 8:
            used.add(number)
        return 10.0, "die" if number < 8 else "ok"

    ray = SimulatedRay(lambda number: (5.0 if number < 8 else 30.0 if number == 8 else 45.0, False), work)
    assert len(simulate(ray, 16, 8)[0]) == 16
    assert len(used) == 8


def test_a_hung_worker_holds_nothing_up() -> None:
    """One of four hangs at its fifth item; the others take ten seconds for each."""
    calls = [0]

    def work(number: int, item: str) -> tuple[float, str]:
        calls[0] += number == 0
        return 10.0, "hang" if number == 0 and calls[0] >= 5 else "ok"

    ray = SimulatedRay(lambda number: (1.0, False), work)
    assert len(simulate(ray, 60, 4)[0]) == 60
    assert ray.now < 60 * 10 / 4 + 2 * 60, "its items wait for one deadline, and are done"


def test_a_worker_that_never_becomes_ready_is_replaced() -> None:
    """Its disk or network hangs. It is the only one."""
    ray = SimulatedRay(
        lambda number: (float("inf") if number == 0 else 5.0, False), lambda number, item: (1.0, "ok")
    )
    done, told, mistake = simulate(ray, items=3, workers=1)
    assert (len(done), told, mistake) == (3, [], None)
    assert ray.started == 2
    assert LOADING_SECONDS <= ray.now <= LOADING_SECONDS + 60


def test_a_worker_that_waits_for_room_is_not_replaced() -> None:
    """Other programs use the cluster for longer than a worker may load."""
    ray = SimulatedRay(lambda number: (5.0, False), lambda number, item: (1.0, "ok"))
    ray.waits_for_room = lambda number: 2 * LOADING_SECONDS
    done, _, mistake = simulate(ray, items=3, workers=1)
    assert (len(done), mistake, ray.started) == (3, None, 1)


def test_where_no_worker_ever_becomes_ready_the_pass_ends() -> None:
    ray = SimulatedRay(lambda number: (float("inf"), False), lambda number, item: (1.0, "ok"))
    done, _, mistake = simulate(ray, items=3, workers=2)
    assert done == []
    assert "not ready after 30 minutes" in str(mistake)


def test_a_straggler_does_not_decide_when_it_ends() -> None:
    """One of eight is a hundred times slower: its two items are done by others."""
    ray = SimulatedRay(
        lambda number: (1.0, False), lambda number, item: (1000.0 if number == 0 else 10.0, "ok")
    )
    assert len(simulate(ray, 80, 8)[0]) == 80
    assert ray.now < 300


def test_a_minute_of_errors_of_everybody_ends_nothing() -> None:
    """The object store is away: every worker fails, again and again."""
    ray: SimulatedRay = SimulatedRay(
        lambda number: (5.0, False), lambda number, item: (20.0, "node" if ray.now < 60 else "ok")
    )
    done, quarantined, mistake = simulate(ray, 12, 3)
    assert (len(done), quarantined, mistake) == (12, [], None)


@pytest.mark.parametrize("worker", ["ok", "hang"])
def test_a_lost_head_ends_it_before_ray_does(worker: str) -> None:
    """Ray ends the driver 60 seconds after it has lost the head."""
    ray = SimulatedRay(lambda number: (1.0, False), lambda number, item: (10.0, worker))
    ray.head_dies = 25.0
    done, _, mistake = simulate(ray, 1000, 2)
    assert len(done) < 20
    assert mistake
    assert "the head of the Ray cluster at head:6379 is lost" in mistake
    assert ray.head_dies + 20 < ray.now < ray.head_dies + 40


def test_a_place_where_everything_fails_is_tried_after_growing_pauses() -> None:
    ray = SimulatedRay(lambda number: (5.0, False), lambda number, item: (1.0, "node"))
    ray.place = lambda number: "node-0"
    _, _, mistake = simulate(ray, 3, 1)
    assert mistake is not None
    assert ray.started == LOSSES_PER_WORKER + 1
    pauses = 0 + 2 + 4 + 8 + 16 + 32 + 60
    assert 0 <= ray.now - pauses - 6 * ray.started < LOSSES_PER_WORKER * WAIT_SECONDS
