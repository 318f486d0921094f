"""A Ray cluster, and pools of workers (Ray actors) in it. This module starts, calls and ends the workers.

The rules for items and failures are in `work_queue`, those for late items and failed hosts in `deadlines`.

An item is a call of a worker's method. It may run twice, even on two workers at once. This is safe, because
the names of the files it publishes depend only on its arguments.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from infra.errors import UserError
from infra.ray_cluster import connect, python_path
from infra.settings.recipe import Recipe
from offline_teacher.cluster.crews import WORKER_VARIABLES, Crew, refuse_too_few_gpus
from offline_teacher.cluster.deadlines import Backoff
from offline_teacher.cluster.failure_log import FailureLog
from offline_teacher.cluster.ray_head import HeadLost, RayHead
from offline_teacher.cluster.work_queue import Item, Worker, WorkQueue, last_line
from offline_teacher.cluster.worker_base import NODE, USER

PACKAGES = ("offline_teacher", "infra")
"""The packages of this repository that a worker imports."""
LOSSES_PER_WORKER = 7
"""Limit on lost workers since the last finished item, per worker of the pool. Beyond it, items on which
workers died are quarantined; if there are none, the pass ends."""
WAIT_SECONDS = 2.0
"""Longest wait for an answer, in seconds."""
CHECK_SECONDS = 1.0
"""Seconds between two checks for late workers and for the cluster's head."""
NOTICE_SECONDS = 30.0
"""After this many seconds with too few workers, the pass prints what it waits for."""
REMIND_SECONDS = 60.0
"""Interval, in seconds, at which that message is repeated."""
LOADING_SECONDS = 1800.0
"""A worker that is not ready this many seconds after its actor has started is replaced."""
CLOSE_SECONDS = 5.0
"""Time, in seconds, that workers get at the end to remove their temporary files."""

Done = Callable[[Item, dict[str, Any]], None]
"""Called with a finished item and its result."""
Started = Callable[[str, dict[str, Any]], None]
"""Called with the place (host and device) of a new worker and the result of its ``prepare``."""


class Cluster:
    """A Ray cluster, joined or started locally when a pool needs it. Leaving the context ends a local Ray."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.teacher is not None
        self.recipe, self.settings = recipe, recipe.teacher
        self.numbers = itertools.count()
        self._started = False
        self.head: RayHead | None = None
        """The head of the cluster that was joined; None for a local Ray, which the pass has started."""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._started and kind is not HeadLost:
            import ray

            ray.shutdown()

    def connect(self) -> None:
        if not self._started:
            cpus = self.settings.workers * self.settings.cpu_threads
            memory = 100 << 20  # bytes of the object store, through which only small metadata goes
            local = {"num_cpus": cpus, "object_store_memory": memory}
            address = connect(self.settings.ray_address, "teacher.ray_address", PACKAGES, **local)
            self._started = True
            if address:
                self.head = RayHead(address, time.monotonic())
            else:
                import ray

                refuse_too_few_gpus(self.settings, int(ray.cluster_resources().get("GPU", 0)))

    def pool(self, crew: Crew, started: Started = lambda place, facts: None) -> Pool:
        return Pool(self, crew, started)


class Pool:
    """The workers of one crew. Leaving the context ends them, which frees their CPUs and GPUs."""

    def __init__(self, cluster: Cluster, crew: Crew, started: Started) -> None:
        self.cluster, self.crew, self._started = cluster, crew, started
        self.workers: list[Worker] = []
        self._work = WorkQueue(cluster.settings.task_attempts, 0, crew.in_flight)
        self._waiting_for_room: dict[Any, Worker] = {}
        """Workers whose actor Ray has not started yet. Key: a reference that is ready once it has started."""
        self._starting: dict[Any, Worker] = {}
        self._backoff = Backoff()
        self._pause_ends: list[float] = []
        """End times of the running pauses. Each keeps one worker's place empty until then."""
        self._log = FailureLog(cluster.recipe.root)

    @property
    def retries(self) -> int:
        return self._work.retries

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if not self.workers or kind is HeadLost:
            return
        import ray

        try:
            closing = [worker.actor.close.remote() for worker in self.workers if worker.ready]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        finally:
            for worker in self.workers:
                ray.kill(worker.actor)
            self.workers = []

    def run(
        self,
        items: Iterable[Item],
        done: Done,
        say: Callable[[str], None],
        quarantine: Callable[[Item], None] = lambda item: None,
    ) -> list[Item]:
        """Runs all items and returns the quarantined ones, each with its ``reason``.

        ``done(item, result)`` is called once for each finished item; ``say(text)`` prints a problem. Raises
        UserError if an item fails by a user's mistake, or if workers keep failing and finish nothing.
        """
        work, self._log.say = self._work, say
        work.begin(items, quarantine)
        if work.left:
            self.cluster.connect()
            count = self._count()
            work.max_losses = LOSSES_PER_WORKER * count
        notice_at, check_at = time.monotonic() + NOTICE_SECONDS, 0.0
        while work.left:
            now = time.monotonic()
            self._pause_ends = [end for end in self._pause_ends if end > now]
            while len(self.workers) + len(self._pause_ends) < min(count, work.left):
                self._start_worker()
            ready = [worker for worker in self.workers if worker.ready]
            needed = min(self.crew.min_ready, work.left)
            if len(ready) >= needed:
                self._hand_out(ready, now)
                notice_at = now + NOTICE_SECONDS
            elif now >= notice_at:
                say(self._waiting_message(needed, len(ready)))
                notice_at = now + REMIND_SECONDS
            self._collect_answers(done)
            if now >= check_at:
                self._handle_late_items()
                self._replace_hanging_workers()
                if self.cluster.head:
                    self.cluster.head.raise_if_lost(now)
                check_at = now + CHECK_SECONDS
        return work.quarantined

    # --- workers ---

    def _count(self) -> int:
        if self.crew.count is not None:
            return self.crew.count
        import ray

        return max(self.cluster.settings.workers, int(ray.cluster_resources().get("CPU", 0)))

    def _waiting_message(self, needed: int, ready: int) -> str:
        import ray

        resources = ray.cluster_resources()
        gpus = f" and {self.crew.gpus:g} GPU" if self.crew.gpus else ""
        return (
            f"waiting for {needed} workers with {self.crew.cpus} CPU{gpus} each, {ready} ready;"
            f" the cluster has {resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
            f"{' now, more may join' if self.cluster.head else ''}"
        )

    def _start_worker(self) -> None:
        import ray

        variables = WORKER_VARIABLES | {"OMP_NUM_THREADS": str(self.crew.cpus)}
        if not self.cluster.head:
            variables["PYTHONPATH"] = python_path()
        remote: Any = ray.remote(self.crew.kind).options(
            num_cpus=self.crew.cpus,
            num_gpus=self.crew.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=self.crew.in_flight + 1,  # one more for the method `close`
            runtime_env={"env_vars": variables},
        )
        actor = remote.remote(*self.crew.arguments)
        worker = Worker(next(self.cluster.numbers), actor)
        self._waiting_for_room[actor.__ray_ready__.remote()] = worker
        self._starting[actor.call.options(name="prepare").remote("prepare", ())] = worker
        self.workers.append(worker)

    def _hand_out(self, ready: Sequence[Worker], now: float) -> None:
        """Gives every worker one item before any worker gets a second, which spreads the last items."""
        for held in range(self.crew.in_flight):
            for worker in ready:
                item = self._work.take(worker, ready, now) if len(worker.items) <= held else None
                if item is not None:
                    call = worker.actor.call.options(name=f"{item.method} {item.name}")  # for Ray's dashboard
                    worker.items[call.remote(item.method, item.arguments)] = item

    def _end(self, worker: Worker) -> None:
        import ray

        ray.kill(worker.actor)
        self.workers.remove(worker)
        self._starting = {ref: other for ref, other in self._starting.items() if other is not worker}
        waiting = self._waiting_for_room.items()
        self._waiting_for_room = {ref: other for ref, other in waiting if other is not worker}
        self._pause_ends.append(self._backoff.record_failure(worker.place, time.monotonic()))

    # --- answers ---

    def _collect_answers(self, done: Done) -> None:
        """Waits up to WAIT_SECONDS for answers and handles them. Answers come before deaths, because a worker
        may have answered one item and died on another."""
        import ray

        owners = {reference: worker for worker in self.workers for reference in worker.items} | self._starting
        owners |= self._waiting_for_room
        if not owners:
            time.sleep(WAIT_SECONDS)  # no worker starts or holds an item, mostly because of pauses
            return
        finished, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        if not finished:
            finished, _ = ray.wait(list(owners), num_returns=1, timeout=WAIT_SECONDS)
        lost: dict[Worker, tuple[str, bool]] = {}  # worker -> (reason, whether it died)
        mistakes: list[UserError] = []
        for reference in finished:
            worker = owners[reference]
            if self._waiting_for_room.pop(reference, None) is not None:
                worker.loading_since = time.monotonic()
                continue  # if it has died instead, the answer of `prepare` says so
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                lost[worker] = str(error), True
                continue
            worker.place = f"{answer['host']} ({answer['device']})"
            if "error" in answer:
                item = worker.items.get(reference)
                self._log.report(worker.place, item, answer["reason"], answer["traceback"])
            if answer.get("error") == USER:
                mistakes.append(UserError(answer["reason"], answer["exit_code"]))
            elif answer.get("error") == NODE or ("error" in answer and reference in self._starting):
                lost.setdefault(worker, (answer["reason"], False))
            else:
                self._handle_answer(worker, reference, answer, done)
        if mistakes:
            raise mistakes[0]
        self._end_lost_and_broken(lost)

    def _handle_answer(self, worker: Worker, reference: Any, answer: dict[str, Any], done: Done) -> None:
        if self._starting.pop(reference, None) is not None:
            worker.ready = True
            self._started(worker.place, answer["result"])
            return
        item = worker.items.pop(reference)
        if "error" in answer:
            self._work.failed(worker, item, answer["reason"])
            return
        self._backoff.record_success(worker.place)
        if self._work.finished(worker, item, time.monotonic()):
            done(item, {**answer["result"], "place": worker.place})

    def _end_lost_and_broken(self, lost: dict[Worker, tuple[str, bool]]) -> None:
        for worker, (reason, died) in lost.items():
            self._end(worker)
            busy = any(other.in_time for other in self.workers if other not in lost)
            if died:
                held: list[Item | None] = [*worker.items.values()]
                for item in held or [None]:
                    self._log.report(worker.place, item, f"the worker died: {last_line(reason)}", reason)
            self._work.lost(worker, reason, busy, died)
        for worker in [worker for worker in self.workers if self._work.is_broken(worker)]:
            self._end(worker)
            self._work.removed(worker)

    def _replace_hanging_workers(self) -> None:
        """Replaces workers that load for too long: their node's disk, network or GPU hangs."""
        for worker in list(self.workers):
            since = worker.loading_since
            if worker.ready or since is None or time.monotonic() - since < LOADING_SECONDS:
                continue
            reason = f"it was not ready after {LOADING_SECONDS / 60:.0f} minutes: the worker is replaced"
            self._log.report(worker.place, None, reason, reason)
            self._end(worker)
            self._work.lost(worker, reason, any(other.in_time for other in self.workers), died=False)

    def _handle_late_items(self) -> None:
        for worker, item, remove in [*self._work.delayed(self.workers, time.monotonic())]:
            action = "the worker is replaced" if remove else "another worker also gets this item"
            self._log.report(worker.place, item, f"no answer in time: {action}")
            if remove and worker in self.workers:
                self._end(worker)
                self._work.removed(worker)
