"""Ray: a pool of worker actors that pull items of work; the only module that imports it.

An item is a method of `ShardWorker` with arguments, and idempotent: it publishes files under
deterministic names, so that it may be done twice. The driver keeps a bounded number of items on each
worker, replaces workers that die, gives the items they held to others, and sets aside an item that
fails for its own reason. Only small metadata goes through the object store.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError
from infra.recipe import Recipe

ITEMS_IN_FLIGHT = 2
"""On one worker: one is computed while the other is written."""
ITEM_DEATHS = 8
"""An item in whose hands this many workers died is set aside."""
WAIT_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""Without a worker for this long, say what is being waited for."""


@dataclass(eq=False)
class Item:
    """One unit of work: ``ShardWorker.<method>(*arguments)``, and what happened to it so far."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    attempts: int = 0
    deaths: int = 0
    reason: str = ""


@dataclass(eq=False)
class _Worker:
    actor: Any
    ready: bool = False
    items: dict[Any, Item] = field(default_factory=dict)
    """Result reference -> item."""


class Pool:
    """At most ``teacher.workers`` workers on a running or local Ray; started when first used.

    A context manager: leaving it ends the workers, and Ray where it was started here.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.settings = recipe, recipe.teacher
        self.workers: list[_Worker] = []
        self.retries = 0
        self._starting: dict[Any, _Worker] = {}
        self._deaths_in_a_row = 0
        self._started = False
        self._path: dict[str, str] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            import ray

            for worker in self.workers:
                ray.kill(worker.actor)
            ray.shutdown()

    def run(
        self,
        items: Iterable[Item],
        done: Callable[[Item, dict[str, Any]], None],
        waiting: Callable[[str], None],
    ) -> list[Item]:
        """Does all items; returns those set aside, each with its reason.

        ``done(item, metadata)`` is called as items finish, in any order; ``waiting(text)`` while there are
        too few workers. Raises UserError where an item meets a user's mistake (nothing was half written),
        or where workers only die.
        """
        todo = deque(items)
        if not todo:
            return []
        if not self._started:
            self._path = {} if _connect(self.settings) else {"PYTHONPATH": _python_path()}
            self._started = True
        aside: list[Item] = []
        last_alive = time.monotonic()
        while todo or any(worker.items for worker in self.workers):
            while len(self.workers) < self.settings.workers:
                self._start_worker()
            self._hand_out(todo)
            if any(worker.ready for worker in self.workers):
                last_alive = time.monotonic()
            elif time.monotonic() - last_alive > PATIENCE_SECONDS:
                waiting(f"waiting for {self._wish()}")
            self._collect(todo, aside, done)
        return aside

    def _wish(self) -> str:
        gpus = f" and {self.settings.gpus_per_worker:g} GPU" if self.settings.gpus_per_worker else ""
        return f"{self.settings.min_workers} workers with {self.settings.cpu_threads} CPU{gpus} each"

    def _start_worker(self) -> None:
        import ray

        from offline_teacher.shard_work import ShardWorker

        threads = str(self.settings.cpu_threads)
        remote: Any = ray.remote(_guarded(ShardWorker)).options(
            num_cpus=self.settings.cpu_threads,
            num_gpus=self.settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=ITEMS_IN_FLIGHT,
            runtime_env={
                "env_vars": {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"} | self._path
            },
        )
        worker = _Worker(remote.remote(self.recipe, "cuda" if self.settings.gpus_per_worker else "cpu"))
        self._starting[worker.actor.__ray_ready__.remote()] = worker
        self.workers.append(worker)

    def _hand_out(self, todo: deque[Item]) -> None:
        """Breadth first, so that the last items are spread; only while there are enough workers."""
        ready = [worker for worker in self.workers if worker.ready]
        if len(ready) < self.settings.min_workers:
            return
        for room in range(ITEMS_IN_FLIGHT):
            for worker in ready:
                if not todo:
                    return
                suspects = [item for item in (*worker.items.values(), todo[0]) if item.deaths]
                # An item that had a worker die is alone on its next one, so that no other is blamed with it.
                if len(worker.items) <= room and not (worker.items and suspects):
                    item = todo.popleft()
                    reference = worker.actor.call.remote(item.method, item.arguments)
                    worker.items[reference] = item

    def _collect(
        self, todo: deque[Item], aside: list[Item], done: Callable[[Item, dict[str, Any]], None]
    ) -> None:
        import ray

        owners = {reference: worker for worker in self.workers for reference in worker.items} | self._starting
        finished, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        if not finished:
            finished, _ = ray.wait(list(owners), num_returns=1, timeout=WAIT_SECONDS)
        for reference in finished:
            worker = owners[reference]
            if worker not in self.workers:
                continue  # buried with an earlier reference
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._bury(worker, str(error), todo, aside)
                continue
            if self._starting.pop(reference, None) is not None:
                worker.ready = True
                continue
            self._settle(worker.items.pop(reference), answer, todo, aside, done)

    def _settle(
        self,
        item: Item,
        answer: dict[str, Any],
        todo: deque[Item],
        aside: list[Item],
        done: Callable[[Item, dict[str, Any]], None],
    ) -> None:
        if "mistake" in answer:
            raise UserError(answer["mistake"], answer["exit_code"])
        if "failure" not in answer:
            self._deaths_in_a_row = 0
            done(item, answer)
            return
        item.attempts, item.reason = item.attempts + 1, answer["failure"]
        self._again_or_aside(item, item.attempts >= self.settings.shard_attempts, todo, aside)

    def _again_or_aside(self, item: Item, give_up: bool, todo: deque[Item], aside: list[Item]) -> None:
        if give_up:
            aside.append(item)
        else:
            self.retries += 1
            todo.append(item)

    def _bury(self, worker: _Worker, reason: str, todo: deque[Item], aside: list[Item]) -> None:
        """A worker is dead or out of reach: its items go to others, and another takes its place."""
        import ray

        ray.kill(worker.actor)
        self.workers.remove(worker)
        self._starting = {
            reference: other for reference, other in self._starting.items() if other is not worker
        }
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > 10 * self.settings.workers + ITEM_DEATHS * ITEMS_IN_FLIGHT:
            raise UserError(
                f"{self._deaths_in_a_row} workers died one after the other and finished nothing (the last:"
                f" {_last_line(reason)}); is there enough memory? The same command continues",
                EXIT_INCOMPLETE,
            )
        for item in worker.items.values():
            item.deaths, item.reason = item.deaths + 1, f"its worker died {item.deaths + 1} times"
            self._again_or_aside(item, item.deaths >= ITEM_DEATHS, todo, aside)


def _guarded(kind: type) -> type:
    """``kind`` with ``call``: a method's answer, or why there is none, as plain data."""

    class Guarded(kind):
        def call(self, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
            try:
                return getattr(self, method)(*arguments)
            except UserError as error:
                return {"mistake": str(error), "exit_code": error.exit_code}
            except Exception as error:  # whatever it is, it is this item's, and the others go on
                return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}

    Guarded.__name__ = Guarded.__qualname__ = kind.__name__  # what Ray calls the process
    return Guarded


def _connect(settings: Any) -> bool:
    """Joins the cluster named in the recipe or the one this process belongs to; else starts a local Ray.

    True where it joined one.
    """
    import ray

    handler = signal.getsignal(signal.SIGTERM)  # ray.init replaces it with an exit that says nothing
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    local: dict[str, Any] = {
        "num_cpus": settings.workers * settings.cpu_threads,
        "object_store_memory": 100 << 20,
    }
    try:
        if settings.ray_address is None:
            try:
                # Not address="auto", which would join the private Ray of any other process on this machine.
                ray.init(include_dashboard=False, **local, **quiet)
                return False
            except ValueError:  # sizes are refused where a cluster is joined
                pass
        try:
            ray.init(address=settings.ray_address, runtime_env={"py_modules": _packages()}, **quiet)
        except ConnectionError:
            address = settings.ray_address or os.environ.get("RAY_ADDRESS")
            if address:
                raise UserError(
                    f"teacher.ray_address: no Ray cluster answers at {address}; start it, or leave it out"
                ) from None
            ray.init(address="local", include_dashboard=False, **local, **quiet)  # only a dead head's note
            return False
        return True
    except Exception as error:  # no type of its own
        if "timed out during startup" not in str(error):
            raise
        raise UserError(
            "Ray did not start within 30 seconds; the machine is overloaded: the same command tries again"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, handler)


_ROOT = Path(__file__).resolve().parents[1]


def _packages() -> list[str]:
    """What the nodes of a cluster need of us where we are not installed."""
    return [str(_ROOT / "offline_teacher"), str(_ROOT / "infra")]


def _python_path() -> str:
    """For local workers, wherever the command was started from."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_line(text: str) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[-1].strip() if lines else "no reason given"
