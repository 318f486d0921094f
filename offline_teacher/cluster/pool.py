"""Ray: a pool of worker actors that pull items of work.

An item is a method of `TaskWorker` with arguments. It is idempotent: it publishes files under deterministic
names, so running it twice does no harm. The driver gives each worker a bounded number of items and replaces
workers that die or are broken. `work_queue` decides which worker gets which item. Only small metadata goes
through Ray's object store.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from infra.errors import UserError
from infra.ray_cluster import connect, python_path
from infra.recipe import Recipe
from infra.scratch import Scratch
from infra.sections import Teacher
from offline_teacher.cluster.work_queue import ITEM_DEATHS, ITEMS_IN_FLIGHT, Worker, WorkQueue
from offline_teacher.cluster.work_queue import Item as Item

PACKAGES = ("offline_teacher", "infra")
"""The packages of this repository that a worker imports."""
WAIT_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""After so many seconds with too few workers, the pass says what it waits for."""
REMIND_SECONDS = 60.0
"""Seconds after which it says so again."""
START_PAUSE_SECONDS = 10.0
"""Seconds before a worker that died at its start is replaced, while other workers run."""
CLOSE_SECONDS = 5.0
"""Seconds that workers have to remove their files at the end."""

Done = Callable[[Item, dict[str, Any]], None]


class Pool:
    """At most ``teacher.workers`` workers on a running or local Ray; started when first used.

    A context manager: leaving it ends the workers, and Ray where it was started here.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.teacher is not None
        self.recipe, self.settings = recipe, recipe.teacher
        self.workers: list[Worker] = []
        bound = 10 * self.settings.workers + ITEM_DEATHS * ITEMS_IN_FLIGHT
        self._work = WorkQueue(self.settings.task_attempts, bound)
        self._numbers = itertools.count()
        self._starting: dict[Any, Worker] = {}
        self._start_at = 0.0
        self._started = self._joined = False

    @property
    def retries(self) -> int:
        return self._work.retries

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            import ray

            try:
                closing = [worker.actor.close.remote() for worker in self.workers if worker.ready]
                if closing:
                    ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
            finally:
                for worker in self.workers:
                    ray.kill(worker.actor)
                ray.shutdown()

    def run(
        self,
        items: Iterable[Item],
        done: Done,
        waiting: Callable[[str], None],
        quarantine: Callable[[Item], None] = lambda item: None,
    ) -> list[Item]:
        """Does all items; returns those that are quarantined, each with its reason.

        It calls ``done(item, metadata)`` when an item finishes, in any order, ``waiting(text)`` from time to
        time while there are too few workers, and ``quarantine(item)`` at once. Raises UserError if an item
        fails because of a user's mistake (nothing is half written), or if workers do nothing but die.
        """
        self._work.begin(items, quarantine)
        if self._work.todo:
            self._connect()
        speak_at = time.monotonic() + PATIENCE_SECONDS
        while left := len(self._work.todo) + sum(len(worker.items) for worker in self.workers):
            while len(self.workers) < min(self.settings.workers, left):
                if time.monotonic() < self._start_at and any(worker.items for worker in self.workers):
                    break
                self._start_worker()
            ready = [worker for worker in self.workers if worker.ready]
            needed = min(self.settings.min_workers, left)
            if len(ready) >= needed:
                self._hand_out(ready)
                speak_at = time.monotonic() + PATIENCE_SECONDS
            elif time.monotonic() >= speak_at:
                waiting(self._lack(needed, len(ready)))
                speak_at = time.monotonic() + REMIND_SECONDS
            self._collect(done)
        return self._work.quarantined

    def _connect(self) -> None:
        if not self._started:
            cpus = self.settings.workers * self.settings.cpu_threads
            memory = 100 << 20  # bytes of the object store, through which only small metadata goes
            local = {"num_cpus": cpus, "object_store_memory": memory}
            self._joined = connect(self.settings.ray_address, "teacher.ray_address", PACKAGES, **local)
            self._started = True
            if not self._joined:
                _refuse_too_few_gpus(self.settings)

    def _lack(self, needed: int, ready: int) -> str:
        import ray

        has = ray.cluster_resources()
        gpus = f" and {self.settings.gpus_per_worker:g} GPU" if self.settings.gpus_per_worker else ""
        return (
            f"waiting for {needed} workers with {self.settings.cpu_threads} CPU{gpus} each, {ready} ready;"
            f" the cluster has {has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU"
            f"{' now, more may join' if self._joined else ''}"
        )

    def _start_worker(self) -> None:
        import ray

        from offline_teacher.cluster.task_work import TaskWorker

        variables = {"OMP_NUM_THREADS": str(self.settings.cpu_threads), "TOKENIZERS_PARALLELISM": "false"}
        if not self._joined:
            variables["PYTHONPATH"] = python_path()
        remote: Any = ray.remote(_guarded(TaskWorker)).options(
            num_cpus=self.settings.cpu_threads,
            num_gpus=self.settings.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=ITEMS_IN_FLIGHT + 1,  # one for `close`
            runtime_env={"env_vars": variables},
        )
        actor = remote.remote(self.recipe, "cuda" if self.settings.gpus_per_worker else "cpu")
        worker = Worker(next(self._numbers), actor)
        self._starting[actor.__ray_ready__.remote()] = worker
        self.workers.append(worker)

    def _hand_out(self, ready: Sequence[Worker]) -> None:
        """Gives every worker one item before any gets a second, so that the last items are spread."""
        for room in range(ITEMS_IN_FLIGHT):
            for worker in ready:
                item = self._work.take(worker, ready) if len(worker.items) <= room else None
                if item is not None:
                    worker.items[worker.actor.call.remote(item.method, item.arguments)] = item

    def _collect(self, done: Done) -> None:
        """Handles answers before deaths: a worker may have answered one item and died on its other."""
        import ray

        owners = {reference: worker for worker in self.workers for reference in worker.items} | self._starting
        finished, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        if not finished:
            finished, _ = ray.wait(list(owners), num_returns=1, timeout=WAIT_SECONDS)
        dead: dict[Worker, str] = {}
        mistakes: list[UserError] = []
        for reference in finished:
            worker = owners[reference]
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                dead[worker] = str(error)
                continue
            if self._starting.pop(reference, None) is not None:
                worker.ready = True
            elif "mistake" in answer:
                mistakes.append(UserError(answer["mistake"], answer["exit_code"]))
            else:
                self._settle(worker, worker.items.pop(reference), answer, done)
        if mistakes:
            raise mistakes[0]
        for worker, reason in dead.items():
            self._end(worker)
            busy = any(other.items for other in self.workers if other not in dead)
            if busy and not worker.ready:  # no item is blocked by it, and the cause on its node may go away
                self._start_at = time.monotonic() + START_PAUSE_SECONDS
            self._work.died(worker, reason, busy)
        for worker in [worker for worker in self.workers if self._work.is_broken(worker)]:
            self._end(worker)
            self._work.replaced(worker)

    def _settle(self, worker: Worker, item: Item, answer: dict[str, Any], done: Done) -> None:
        if "failure" in answer:
            self._work.failed(worker, item, answer["failure"])
        else:
            self._work.finished(worker)
            done(item, answer)

    def _end(self, worker: Worker) -> None:
        import ray

        ray.kill(worker.actor)
        self.workers.remove(worker)
        self._starting = {
            reference: other for reference, other in self._starting.items() if other is not worker
        }


def _refuse_too_few_gpus(settings: Teacher) -> None:
    """Raises UserError if the local Ray, which cannot grow, has too few GPUs for ``min_workers``.

    CPUs are not checked, because the local Ray is started with as many as needed.
    """
    import ray

    share, there = settings.gpus_per_worker, int(ray.cluster_resources().get("GPU", 0))
    if not share:
        return
    workers = there * int(1 / share + 1e-9)
    if workers < settings.min_workers:
        raise UserError(
            f"teacher.gpus_per_worker: {share:g} for each of teacher.min_workers = {settings.min_workers}"
            f" workers, but Ray finds {there} GPUs on this machine; ask for less, or join a cluster"
            " (teacher.ray_address)"
        )


def _guarded(kind: type) -> type:
    """A subclass of ``kind`` with two more methods: ``call`` returns a method's answer or its error as plain
    data, and ``close`` removes temporary files.

    All temporary files are in one directory. If the worker is killed, the next worker on the machine removes
    it."""

    class Guarded(kind):
        def __init__(self, *arguments: Any) -> None:
            self._mistake: UserError | None = None
            try:
                self._scratch = Scratch()
            except UserError as error:  # An exception here would look like a dead worker without a reason.
                self._mistake = error
                return
            tempfile.tempdir = self._scratch.path
            super().__init__(*arguments)

        def call(self, method: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
            try:
                if self._mistake is not None:
                    raise self._mistake
                return getattr(self, method)(*arguments)
            except UserError as error:
                return {"mistake": str(error), "exit_code": error.exit_code}
            except Exception as error:  # any failure of one item must not stop the others
                return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}

        def close(self) -> None:
            if self._mistake is None:
                self._scratch.close()

    Guarded.__name__ = Guarded.__qualname__ = kind.__name__  # what Ray calls the process
    return Guarded
