"""The pool, with a Ray whose workers answer at once, as the test says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from infra.errors import EXIT_INCOMPLETE, UserError
from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe
from offline_teacher.cluster import pool as pool_module
from offline_teacher.cluster.crews import teacher_crew, text_crew
from offline_teacher.cluster.pool import LOSSES_PER_WORKER, Cluster
from offline_teacher.cluster.work_queue import Item
from tests.offline_teacher.tiny_teacher import write_recipe

FAILURE = {"error": "item", "reason": "ValueError: NaN", "traceback": "", "exit_code": None}
FULL = {"error": "node", "reason": "/tmp: the disk is full", "traceback": "Traceback", "exit_code": 2}


class Death(Exception):
    """What a dead worker's references raise."""


class Reference:
    """A call: ``method`` of worker ``number``; hashed by identity."""

    def __init__(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        self.number, self.method = number, arguments[0] if arguments else method
        self.item = arguments[1][0] if arguments and arguments[1] else ""


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
                reference = Reference(number, name, arguments)
                self.events.append((reference.method, number))
                return reference

            called = SimpleNamespace(remote=call)
            called.options = lambda **_: called
            return called

        methods = {name: method(name) for name in ("call", "close")}
        created = Reference(number, "__ray_ready__", ())
        methods["__ray_ready__"] = SimpleNamespace(remote=lambda: created)
        return SimpleNamespace(number=number, **methods)

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        assert self.waits < 10_000, "it waits for ever"
        self.events += [("closed", r.number) for r in references if r.method == "close"]
        return [r for r in references if r.method != "prepare" or self.is_ready(r.number)], []

    def get(self, reference: Reference) -> Any:
        place = {"host": f"node-{reference.number}", "device": "cpu"}
        if reference.method == "prepare":
            return {"result": {}, **place}
        if reference.number in self.dead:
            raise Death("killed")
        try:
            answer = self.behave(reference.number, reference.item)
        except Death:
            self.dead.add(reference.number)
            raise
        return {**({} if "error" in answer else {"result": answer}), **answer, **place}

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


class Clock:
    """Time that passes only while the pool sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fake(
    monkeypatch: pytest.MonkeyPatch, behave: Callable[[int, str], dict[str, Any]], joins: bool = False
) -> FakeRay:
    ray = FakeRay(behave)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(pool_module, "connect", lambda *_, **__: "node-0:6379" if joins else None)
    monkeypatch.setattr(pool_module, "RayHead", mock.Mock())  # of a cluster that always answers
    monkeypatch.setattr(pool_module, "time", Clock())
    return ray


def items(count: int) -> list[Item]:
    return [Item(str(number), "infer", (str(number),)) for number in range(count)]


def run(recipe: Recipe, count: int, say: Callable[[str], None] = print) -> tuple[list[str], list[Item]]:
    """Names of the items done, and the items quarantined."""
    done: list[str] = []
    with Cluster(recipe) as cluster, cluster.pool(teacher_crew(cluster.recipe, "store")) as pool:
        quarantined = pool.run(items(count), lambda item, result: done.append(item.name), say)
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
    assert ray.started == 1 + LOSSES_PER_WORKER


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
    assert all("workers died" in item.reason for item in quarantined)


def test_what_is_quarantined_is_told_before_a_users_mistake_ends_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = {"error": "user", "reason": "text.txt, line 3: invalid UTF-8", "traceback": "", "exit_code": 2}
    answers: dict[str, dict[str, Any]] = {"0": FAILURE, "1": mistake}
    fake(monkeypatch, lambda worker, item: answers[item])
    told: list[str] = []
    with (
        Cluster(recipe("teacher.task_attempts=1")) as cluster,
        cluster.pool(teacher_crew(cluster.recipe, "store")) as pool,
        pytest.raises(UserError, match="line 3"),
    ):
        pool.run(items(2), lambda item, result: None, print, lambda item: told.append(item.name))
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
    get = ray.get

    def late(reference: Reference) -> dict[str, Any]:
        ray.dead.clear()
        return get(reference)

    monkeypatch.setattr(ray, "get", late)
    done, _ = run(recipe(), 2)
    assert done == ["1", "0"]
    assert calls == ["0", "1", "0"]


def test_too_few_workers_are_waited_for_aloud(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is there: nothing is handed out, and it says so now and then."""
    ray = fake(monkeypatch, lambda worker, item: {}, joins=True)
    clock = pool_module.time
    ray.is_ready = lambda number: number == 0 or clock.monotonic() > 100
    said: list[tuple[float, str]] = []
    wait = ray.wait

    def slow_wait(references: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        clock.sleep(timeout)
        if clock.monotonic() <= 100:
            assert "infer" not in [event[0] for event in ray.events]
        return wait(references, num_returns, timeout)

    monkeypatch.setattr(ray, "wait", slow_wait)
    run(
        recipe("teacher.workers=3", "teacher.min_workers=2"),
        4,
        lambda text: said.append((clock.monotonic(), text)),
    )
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


def test_a_node_that_fails_is_replaced_and_its_items_are_done_elsewhere(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no item's fault: nothing is quarantined, whatever ``task_attempts`` says."""
    ray = fake(monkeypatch, lambda worker, item: FULL if worker == 0 else {})
    said: list[str] = []
    done, quarantined = run(recipe("teacher.workers=2", "teacher.task_attempts=1"), 10, said.append)
    assert (len(done), quarantined) == (10, [])
    assert ("kill", 0) in ray.events
    assert said[0].startswith("node-0 (cpu): 0: /tmp: the disk is full (log: ")


def test_where_every_node_fails_it_ends_with_host_and_cause(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After pauses that grow; the log has the traceback."""
    ray = fake(monkeypatch, lambda worker, item: FULL)
    made = recipe()
    with pytest.raises(
        UserError, match=r"finished nothing .*node-\d+ \(cpu\): /tmp: the disk is full"
    ) as raised:
        run(made, 3)
    assert raised.value.exit_code == EXIT_INCOMPLETE
    assert ray.started == LOSSES_PER_WORKER + 1
    assert "Traceback" in Path(made.root, "logs/0.log").read_text()


def test_a_node_whose_teacher_cannot_be_had_is_given_no_item(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake(monkeypatch, lambda worker, item: {})
    get = ray.get
    refused = {**FULL, "reason": "429 Too Many Requests", "host": "node-0", "device": "cpu"}
    monkeypatch.setattr(ray, "get", lambda r: refused if (r.method, r.number) == ("prepare", 0) else get(r))
    done, _ = run(recipe("teacher.workers=2"), 6)
    assert len(done) == 6
    assert ("infer", 0) not in ray.events
    assert ("kill", 0) in ray.events


def test_a_worker_that_hangs_does_not_hold_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 0 answers three items and then no more: another does its items, and it is replaced."""
    ray = fake(monkeypatch, lambda worker, item: {})
    answered = [0]

    def wait(references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ray.waits += 1
        assert ray.waits < 10_000, "it waits for ever"
        ended = [r for r in references if r.number or r.method == "prepare" or answered[0] < 3]
        answered[0] += sum(r.number == 0 and r.method == "infer" for r in ended)
        if not ended:
            pool_module.time.sleep(timeout)
        return ended[:1], []

    monkeypatch.setattr(ray, "wait", wait)
    said: list[str] = []
    done, _ = run(recipe("teacher.workers=2"), 12, said.append)
    assert sorted(done, key=int) == [str(number) for number in range(12)]
    assert ("kill", 0) in ray.events
    assert any("node-0" in line and "another worker also gets this item" in line for line in said)


def test_text_is_tokenised_on_all_cpus_without_a_gpu(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where teachers take GPUs; leaving the pool ends its workers and not the cluster."""
    ray = fake(monkeypatch, lambda worker, item: {}, joins=True)
    ray.resources = {"CPU": 5.0, "GPU": 1.0}
    asked: list[dict[str, Any]] = []

    def with_options(**options: Any) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(remote=ray._actor)

    monkeypatch.setattr(ray, "remote", lambda kind: SimpleNamespace(options=with_options))
    with Cluster(recipe("teacher.gpus_per_worker=1")) as cluster:
        with cluster.pool(text_crew(mock.Mock())) as pool:
            pool.run(items(50), lambda item, result: None, print)
        assert [options["num_gpus"] for options in asked] == [0] * 5
        assert ray.events[-1][0] == "kill"
        assert ("shutdown",) not in ray.events
        with cluster.pool(teacher_crew(cluster.recipe, "store")) as pool:
            pool.run(items(1), lambda item, result: None, print)
    assert asked[-1]["num_gpus"] == 1
