"""How long a teacher pass takes on many workers that fail: a simulation of every task of it.

A worker computes tasks one after the other, then its host checks and writes them, then they are uploaded; the
three overlap, as far as the tasks that the driver keeps on one worker go. Two things are shared by all
workers and serve one task at a time: the driver, and what the store takes in bytes and in requests a second.
A worker that is lost loses the tasks on it; they go to others, and another worker comes in its place.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass

SHARD_BYTES, PART_BYTES = 256 << 20, 50 << 20
"""Of a shard (``store.shard_bytes``), and of a part in which s3fs uploads it."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A teacher pass. Rates are of one worker unless they are the store's. Where each default is from, and
    which are estimates, is in docs/sizing.md."""

    tokens: float
    """Of the corpus, times the masking epochs."""
    tokens_per_second: float
    """The teacher's: to host memory, with nothing written."""
    bytes_per_token: float
    workers: int
    task_tokens: int = 4096 * 128
    in_flight: int = 2
    """Tasks on a worker: computed, written or uploaded. As offline_teacher.cluster has it."""
    host_bytes_per_second: float = 1.35e9
    """What the host of a worker checks, digests and writes."""
    uploads: int = 4
    """Files that a worker uploads at once: two of each task, as offline_teacher.store has it."""
    upload_bytes_per_second: float = 200e6
    """Of one of them."""
    store_bytes_per_second: float = 100e9
    """From all workers together."""
    store_requests_per_second: float = 3500.0
    """Of one prefix, writing."""
    prefixes: int = 16
    """Into which the store has split its keys by load."""
    driver_seconds: float = 1e-3
    """The driver's work on one task; it does one at a time."""
    spread: tuple[float, ...] = (1.0,)
    """Measured seconds of tasks over their mean; the computing of every task draws one."""
    start_seconds: float = 60.0
    """From the command until workers compute."""
    finish_seconds: float = 60.0
    """From the last task to the manifest."""
    mtbf_hours: float = 24.0
    """Mean time between losses of one worker; they are exponential."""
    replace_seconds: float = 180.0
    """From a loss until another worker is ready: a new machine, its image, the teacher's weights."""
    slow_share: float = 0.02
    slow_factor: float = 2.0
    """Share of the workers that compute this much slower."""

    @property
    def tasks(self) -> int:
        return max(1, round(self.tokens / self.task_tokens))

    @property
    def task_bytes(self) -> float:
        return self.task_tokens * self.bytes_per_token

    @property
    def task_requests(self) -> int:
        """Write requests of a task: for each shard its parts, start and completion, and one index."""
        shards = math.ceil(self.task_bytes / SHARD_BYTES)
        return math.ceil(self.task_bytes / PART_BYTES) + 2 * shards + 1

    @property
    def compute_seconds(self) -> float:
        return self.task_tokens / self.tokens_per_second

    @property
    def write_seconds(self) -> float:
        return self.task_bytes / self.host_bytes_per_second

    @property
    def upload_seconds(self) -> float:
        return self.task_bytes / (self.uploads * self.upload_bytes_per_second)

    @property
    def store_seconds(self) -> float:
        """Of the store, for one task of anybody's."""
        requests = self.task_requests / (self.prefixes * self.store_requests_per_second)
        return max(self.task_bytes / self.store_bytes_per_second, requests)

    def limits(self) -> dict[str, float]:
        """Tasks a second of the whole pass, if this alone held it back."""
        alone = self.compute_seconds + self.write_seconds + self.upload_seconds
        requests = self.prefixes * self.store_requests_per_second / self.task_requests
        return {
            "the teacher": self.workers / self.compute_seconds,
            "the workers' hosts": self.workers / self.write_seconds,
            "the workers' uploads": self.workers / self.upload_seconds,
            "tasks in flight": self.workers * self.in_flight / alone,
            "the store's bytes": self.store_bytes_per_second / self.task_bytes,
            "the store's requests": requests,
            "the driver": 1 / self.driver_seconds if self.driver_seconds else math.inf,
        }


@dataclass(frozen=True)
class Timing:
    seconds: float
    efficiency: float
    """Time of teachers that never wait, over the time taken."""
    lost_tasks: int
    bottleneck: str


def simulate(job: Pass, seed: int = 0) -> Timing:
    """Every task of ``job``, on an event queue; the same seed gives the same answer."""
    run = _Simulation(job, random.Random(seed))
    seconds = run.end() + job.finish_seconds
    limits = job.limits()
    few = job.tasks < job.workers * job.in_flight
    bottleneck = "too few tasks" if few else min(limits, key=lambda name: limits[name])
    return Timing(seconds, job.tasks * job.compute_seconds / job.workers / seconds, run.lost, bottleneck)


class _Worker:
    def __init__(self, slowness: float) -> None:
        self.slowness, self.life = slowness, 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        self.held = 0
        self.computed = self.written = now
        """When the tasks that it holds will be."""
        self.waiting = 0
        """Written tasks that wait behind the one being uploaded."""
        self.uploading = False


class _Simulation:
    """Events are (time, order, what, worker, its life); those of a life that is over are void."""

    def __init__(self, job: Pass, rng: random.Random) -> None:
        self._job, self._rng = job, rng
        slowness = [job.slow_factor if rng.random() < job.slow_share else 1.0 for _ in range(job.workers)]
        self._workers = [_Worker(slow) for slow in slowness]
        self._todo = self._left = job.tasks
        self._room: deque[int] = deque()
        """Workers that hold less than they may."""
        self._driver_free = self._store_free = 0.0
        self._events: list[tuple[float, int, str, int, int]] = []
        self._pushed = 0
        self.lost = 0

    def end(self) -> float:
        """When the last task is done."""
        now = self._job.start_seconds
        for number in range(self._job.workers):
            self._ready(now, number)
        self._hand_out(now)
        handlers = {"given": self._given, "written": self._written, "done": self._done, "ready": self._ready}
        while self._left:
            now, _, what, number, life = heapq.heappop(self._events)
            if life != self._workers[number].life:
                continue
            if what == "lost":
                self._lose(now, number)
            else:
                handlers[what](now, number)
            self._hand_out(now)
        return now

    def _push(self, when: float, what: str, number: int) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (when, self._pushed, what, number, self._workers[number].life))

    def _hand_out(self, now: float) -> None:
        """Breadth first: no worker gets its second task before all have their first."""
        while self._todo and self._room:
            number = self._room.popleft()
            self._workers[number].held += 1
            self._todo -= 1
            self._driver_free = max(self._driver_free, now) + self._job.driver_seconds
            self._push(self._driver_free, "given", number)
            if self._workers[number].held < self._job.in_flight:
                self._room.append(number)

    def _given(self, now: float, number: int) -> None:
        worker, job = self._workers[number], self._job
        seconds = job.compute_seconds * worker.slowness * self._rng.choice(job.spread)
        worker.computed = max(worker.computed, now) + seconds
        worker.written = max(worker.written, worker.computed) + job.write_seconds
        self._push(worker.written, "written", number)

    def _written(self, now: float, number: int) -> None:
        self._workers[number].waiting += 1
        self._upload(now, number)

    def _upload(self, now: float, number: int) -> None:
        worker = self._workers[number]
        if worker.uploading or not worker.waiting:
            return
        worker.uploading = True
        worker.waiting -= 1
        self._store_free = max(self._store_free, now) + self._job.store_seconds
        self._push(max(self._store_free, now + self._job.upload_seconds), "done", number)

    def _done(self, now: float, number: int) -> None:
        worker = self._workers[number]
        self._left -= 1
        worker.uploading = False
        if worker.held == self._job.in_flight:
            self._room.append(number)
        worker.held -= 1
        self._upload(now, number)

    def _lose(self, now: float, number: int) -> None:
        worker = self._workers[number]
        self.lost += worker.held
        self._todo += worker.held
        if worker.held < self._job.in_flight:
            self._room.remove(number)
        worker.life += 1
        worker.begin(now)
        self._push(now + self._job.replace_seconds, "ready", number)

    def _ready(self, now: float, number: int) -> None:
        self._workers[number].begin(now)
        self._room.append(number)
        self._push(now + self._rng.expovariate(1 / (self._job.mtbf_hours * 3600)), "lost", number)
