"""The pool, with a Ray whose workers answer at once, as the test says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import UserError
from infra.recipe import Recipe
from infra.recipe_file import load_recipe
from offline_teacher.cluster import pool as cluster
from offline_teacher.cluster.pool import Item, Pool
from tests.offline_teacher.tiny_teacher import write_recipe

FAILURE = {"failure": "RuntimeError: CUDA error"}


class Death(Exception):
    """What a dead worker's references raise."""


class Reference:
    """A call: ``method`` of worker ``number``; hashed by identity."""

    def __init__(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self.number, self.method = number, method
        self.item = arguments[1][0] if arguments else ""


class FakeRay:
    """``behave(number of the worker, item)`` gives the answer or raises Death. ``events``: the calls."""

    exceptions = SimpleNamespace(RayError=Death)

    def __init__(self, behave: Callable[[int, str], dict[str, Any]]) -> None:
        self.behave = behave
        self.events: list[tuple[Any, ...]] = []
        self.started = self.waits = 0
        self.dead = set[int]()
        self.is_ready: Callable[[int], bool] = lambda number: True
        self.resources = {"CPU": 2.0}

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._actor))

    def _actor(self, *_: Any) -> Any:
        number, self.started = self.started, self.started + 1

        def method(name: str) -> Any:
            def call(*arguments: Any) -> Reference:
                self.events.append((name, number))
                return Reference(number, name, arguments)

            return SimpleNamespace(remote=call)

        methods = {name: method(name) for name in ("call", "close", "__ray_ready__")}
        return SimpleNamespace(number=number, **methods)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        assert self.waits < 10_000, "it waits for ever"
        self.events += [("closed", r.number) for r in references if r.method == "close"]
        return [r for r in references if r.method != "__ray_ready__" or self.is_ready(r.number)], []

    def get(self, reference: Reference) -> Any:
        if reference.method == "__ray_ready__":
            return True
        if reference.number in self.dead:
            raise Death("killed")
        try:
            return self.behave(reference.number, reference.item)
        except Death:
            self.dead.add(reference.number)
            raise

    def kill(self, actor: Any) -> None:
        self.events.append(("kill", actor.number))

    def shutdown(self) -> None:
        self.events.append(("shutdown",))

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    path = write_recipe(tmp_path, tmp_path / "text.txt", tmp_path / "model")
    return lambda *overrides: load_recipe(str(path), list(overrides))


def fake(
    monkeypatch: pytest.MonkeyPatch, behave: Callable[[int, str], dict[str, Any]], joins: bool = False
) -> FakeRay:
    ray = FakeRay(behave)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: joins)
    return ray


def items(count: int) -> list[Item]:
    return [Item(str(number), "capture", (str(number),)) for number in range(count)]


def run(recipe: Recipe, count: int, waiting: Callable[[str], None] = print) -> tuple[list[str], list[Item]]:
    """Names of the items done, and the items quarantined."""
    done: list[str] = []
    with Pool(recipe) as pool:
        quarantined = pool.run(items(count), lambda item, answer: done.append(item.name), waiting)
    assert len(done) + len(quarantined) == count
    return done, quarantined


def test_broken_workers_quarantine_nothing(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second one, their successors too: each fails all that it is given, at once."""
    ray = fake(monkeypatch, lambda worker, item: FAILURE if worker % 2 else {})
    _, quarantined = run(recipe("teacher.workers=4", "teacher.min_workers=2"), 200)
    assert quarantined == []
    assert ("kill", 1) in ray.events[: ray.events.index(("close", 0))], "the broken are replaced at once"


def test_many_bad_items_are_quarantined_by_one_worker(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(monkeypatch, lambda worker, item: FAILURE if int(item) % 3 else {})
    done, quarantined = run(recipe(), 99)
    assert len(done) == 33
    assert {item.attempts for item in quarantined} == {3}
    assert ray.started <= 1 + 66 / 2, "half a worker for each bad item at most"


def test_where_everything_fails_workers_are_not_replaced_for_ever(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(monkeypatch, lambda worker, item: FAILURE)
    _, quarantined = run(recipe(), 500)
    assert {item.attempts for item in quarantined} == {3}
    assert ray.started == 1 + 10 + 16


def test_many_items_that_kill_their_workers_are_named_and_the_others_are_done(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    killers = {"0", "3", "7", "11", "19"}

    def behave(worker: int, item: str) -> dict[str, Any]:
        if item in killers:
            raise Death("killed")
        return {}

    fake(monkeypatch, behave)
    done, quarantined = run(recipe(), 20)
    assert len(done) == 15
    assert {item.name for item in quarantined} == killers
    assert all("its worker died" in item.reason for item in quarantined)


def test_what_is_quarantined_is_told_before_a_users_mistake_ends_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"0": FAILURE, "1": {"mistake": "the disk is full", "exit_code": 2}}
    fake(monkeypatch, lambda worker, item: answers[item])
    told: list[str] = []
    with Pool(recipe("teacher.task_attempts=1")) as pool, pytest.raises(UserError, match="disk is full"):
        pool.run(items(2), lambda item, answer: None, print, lambda item: told.append(item.name))
    assert told == ["0"]


def test_a_dead_workers_good_answer_counts(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its death over the other item is seen first."""
    calls: list[str] = []

    def behave(worker: int, item: str) -> dict[str, Any]:
        calls.append(item)
        if worker == 0 and item == "0":
            raise Death("killed")
        return {}

    ray = fake(monkeypatch, behave)
    monkeypatch.setattr(
        ray, "get", lambda r: True if r.method == "__ray_ready__" else behave(r.number, r.item)
    )
    done, _ = run(recipe(), 2)
    assert done == ["1", "0"]
    assert calls == ["0", "1", "0"]


def test_too_few_workers_are_waited_for_aloud(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is there: nothing is handed out, and it says so now and then."""
    clock = [0.0]
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    ray = fake(monkeypatch, lambda worker, item: {}, joins=True)
    ray.is_ready = lambda number: number == 0 or clock[0] > 100
    said: list[tuple[float, str]] = []
    wait = ray.wait

    def slow_wait(references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        clock[0] += timeout
        if clock[0] <= 100:
            assert "call" not in [event[0] for event in ray.events]
        return wait(references, num_returns, timeout)

    monkeypatch.setattr(ray, "wait", slow_wait)
    run(recipe("teacher.workers=3", "teacher.min_workers=2"), 4, lambda text: said.append((clock[0], text)))
    assert [second for second, _ in said] == [30.0, 90.0]
    assert said[0][1] == (
        "waiting for 2 workers with 1 CPU each, 1 ready; the cluster has 2 CPU and 0 GPU now, more may join"
    )


def test_no_more_workers_than_items(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, lambda worker, item: {})
    done, _ = run(recipe("teacher.workers=4", "teacher.min_workers=4"), 1)
    assert (done, ray.started) == (["0"], 1)


def test_workers_clean_up_before_they_end(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(monkeypatch, lambda worker, item: {})
    run(recipe("teacher.workers=2"), 2)
    steps = ["close", "close", "closed", "closed", "kill", "kill", "shutdown"]
    assert [event[0] for event in ray.events[-7:]] == steps


@pytest.mark.parametrize(
    ("gpus", "share", "workers", "enough"),
    [
        (0, 1, 1, False),
        (1, 1, 2, False),
        (2, 1, 2, True),
        (1, 0.1, 10, True),
    ],
)
def test_too_few_gpus_for_a_ray_of_our_own(
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    share: float,
    workers: int,
    enough: bool,
) -> None:
    ray = fake(monkeypatch, lambda worker, item: {})
    ray.resources["GPU"] = float(gpus)
    settings = [f"teacher.workers={workers}", f"teacher.min_workers={workers}"]
    made = recipe(f"teacher.gpus_per_worker={share}", *settings)
    if enough:
        run(made, workers)
        return
    with pytest.raises(UserError, match=rf"^teacher.gpus_per_worker: {share} for each .* finds {gpus} GPUs"):
        run(made, workers)
    assert ray.events == [("shutdown",)]


def test_a_cluster_may_get_gpus_later(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda worker, item: {}, joins=True)
    assert run(recipe("teacher.gpus_per_worker=1"), 1)[0] == ["0"]
