"""Simulates how long a teacher pass takes on many workers that can fail, task by task.

A worker computes tasks one after the other. Its host checks and writes each computed task, then uploads it. A
worker has several tasks in flight, so these three steps overlap. All workers share the driver and the store,
each of which serves one task at a time; the store is limited by bytes and by requests per second. If a worker
is lost, its tasks go to other workers, and later a new worker replaces it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARD_BYTES, PART_BYTES = 256 << 20, 50 << 20
"""Bytes of a shard (``store.shard_bytes``), and of one part of a multipart upload by s3fs."""


def _option(default: float, text: str) -> Any:
    """Declares a field that an option of the command sets; ``text``, the option's help, describes it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TeacherPass:
    """A teacher pass on a cluster. Rates are per worker, except those of the store. docs/sizing.md names the
    source of each default and says which defaults are estimates."""

    tokens: float
    """Tokens of the corpus times masking epochs."""
    tokens_per_second: float
    """Tokens per second of one teacher, with the copy of its results to host memory, without writing."""
    bytes_per_token: float
    workers: int
    task_tokens: int = _option(4096 * 128, "tokens per task: store.task_sequences times sequences.length")
    in_flight: int = _option(2, "largest number of unfinished tasks of one worker")
    host_bytes_per_second: float = _option(
        1.35e9, "bytes per second that the host of one worker checks and writes"
    )
    uploads: int = _option(4, "files that one worker uploads at once")
    """Two per task in flight, as in ``offline_teacher.store``."""
    upload_bytes_per_second: float = _option(200e6, "bytes per second of one file's upload")
    store_bytes_per_second: float = _option(
        100e9, "bytes per second that the store accepts from all workers together"
    )
    store_requests_per_second: float = _option(
        3500.0, "write requests per second that the store accepts under one key prefix"
    )
    prefixes: int = _option(16, "number of key prefixes among which the store has split its load")
    driver_seconds: float = _option(1e-3, "seconds of the driver's work per task")
    """The driver handles one task at a time."""
    relative_durations: tuple[float, ...] = (1.0,)
    """Measured task durations divided by their mean. Each simulated task draws one of them as its factor."""
    start_seconds: float = _option(60.0, "seconds from the command until workers compute")
    finish_seconds: float = _option(
        60.0, "seconds from the end of the last task until the manifest is published"
    )
    mtbf_hours: float = _option(24.0, "mean time between failures of one worker, in hours")
    """These times have an exponential distribution."""
    replace_seconds: float = _option(
        180.0, "seconds from the loss of a worker until its replacement is ready"
    )
    slow_share: float = 0.02
    """Share of the workers that compute slower by ``slow_factor``."""
    slow_factor: float = 2.0

    @property
    def tasks(self) -> int:
        return max(1, round(self.tokens / self.task_tokens))

    @property
    def task_bytes(self) -> float:
        return self.task_tokens * self.bytes_per_token

    @property
    def task_requests(self) -> int:
        """Write requests per task: the parts, start and completion of each shard's upload, and one index."""
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
        """Seconds for which one task occupies the store, whichever worker uploads it."""
        request_seconds = self.task_requests / (self.prefixes * self.store_requests_per_second)
        return max(self.task_bytes / self.store_bytes_per_second, request_seconds)

    def limits(self) -> dict[str, float]:
        """Returns possible bottleneck -> tasks per second that it would allow if it were the only one."""
        sequential_seconds = self.compute_seconds + self.write_seconds + self.upload_seconds
        requests = self.prefixes * self.store_requests_per_second / self.task_requests
        return {
            "the teacher": self.workers / self.compute_seconds,
            "the workers' hosts": self.workers / self.write_seconds,
            "the workers' uploads": self.workers / self.upload_seconds,
            "tasks in flight": self.workers * self.in_flight / sequential_seconds,
            "the store's bytes": self.store_bytes_per_second / self.task_bytes,
            "the store's requests": requests,
            "the driver": 1 / self.driver_seconds if self.driver_seconds else math.inf,
        }


@dataclass(frozen=True)
class Timing:
    seconds: float
    efficiency: float
    """Seconds that teachers would take without ever waiting, divided by ``seconds``."""
    lost_tasks: int
    """Number of tasks that were in flight on lost workers and had to be repeated."""
    bottleneck: str


def simulate(teacher_pass: TeacherPass, seed: int = 0) -> Timing:
    """Simulates every task of ``teacher_pass`` with an event queue; equal seeds give equal results."""
    simulation = _Simulation(teacher_pass, random.Random(seed))
    seconds = simulation.run() + teacher_pass.finish_seconds
    limits = teacher_pass.limits()
    too_few = teacher_pass.tasks < teacher_pass.workers * teacher_pass.in_flight
    bottleneck = "too few tasks" if too_few else min(limits, key=lambda name: limits[name])
    ideal = teacher_pass.tasks * teacher_pass.compute_seconds / teacher_pass.workers
    return Timing(seconds, ideal / seconds, simulation.lost_tasks, bottleneck)


class _Worker:
    """A worker and, after each loss, its replacement."""

    def __init__(self, time_factor: float) -> None:
        self.time_factor = time_factor
        """Factor of the time that a task takes."""
        self.replacements = 0
        """Number of times that the worker was replaced."""
        self.reset(0.0)

    def reset(self, now: float) -> None:
        """Makes the worker idle at the time ``now``, with no tasks."""
        self.tasks = 0
        """Number of unfinished tasks."""
        self.computed_at = self.written_at = now
        """Times at which the last of these tasks will be computed and written."""
        self.waiting_uploads = 0
        """Number of written tasks that wait until the current upload ends."""
        self.uploading = False


class _Simulation:
    """A queue of events. An event of a worker that has been replaced since is ignored, as that worker is
    lost."""

    def __init__(self, teacher_pass: TeacherPass, rng: random.Random) -> None:
        self._pass, self._rng = teacher_pass, rng
        slow, share = teacher_pass.slow_factor, teacher_pass.slow_share
        self._workers = [_Worker(slow if rng.random() < share else 1.0) for _ in range(teacher_pass.workers)]
        self._unassigned = self._unfinished = teacher_pass.tasks
        self._available: deque[int] = deque()
        """Numbers of the workers that have fewer than ``in_flight`` tasks."""
        self._driver_free_at = self._store_free_at = 0.0
        self._events: list[tuple[float, int, Callable[[float, int], None], int, int]] = []
        """Heap of (time, number of the event, handler, number of the worker, replacements of the worker)."""
        self._event_count = 0
        self.lost_tasks = 0

    def run(self) -> float:
        """Returns the time in seconds at which the last task is uploaded."""
        now = self._pass.start_seconds
        for number in range(self._pass.workers):
            self._on_ready(now, number)
        self._assign(now)
        while self._unfinished:
            now, _, handler, number, replacements = heapq.heappop(self._events)
            if replacements == self._workers[number].replacements:
                handler(now, number)
                self._assign(now)
        return now

    def _schedule(self, when: float, handler: Callable[[float, int], None], number: int) -> None:
        self._event_count += 1
        replacements = self._workers[number].replacements
        heapq.heappush(self._events, (when, self._event_count, handler, number, replacements))

    def _assign(self, now: float) -> None:
        """Assigns tasks to workers in turn: no worker gets a second task before every worker has one."""
        while self._unassigned and self._available:
            number = self._available.popleft()
            self._workers[number].tasks += 1
            self._unassigned -= 1
            self._driver_free_at = max(self._driver_free_at, now) + self._pass.driver_seconds
            self._schedule(self._driver_free_at, self._on_assigned, number)
            if self._workers[number].tasks < self._pass.in_flight:
                self._available.append(number)

    def _on_assigned(self, now: float, number: int) -> None:
        worker = self._workers[number]
        relative_duration = self._rng.choice(self._pass.relative_durations)
        compute_seconds = self._pass.compute_seconds * worker.time_factor * relative_duration
        worker.computed_at = max(worker.computed_at, now) + compute_seconds
        worker.written_at = max(worker.written_at, worker.computed_at) + self._pass.write_seconds
        self._schedule(worker.written_at, self._on_written, number)

    def _on_written(self, now: float, number: int) -> None:
        self._workers[number].waiting_uploads += 1
        self._start_upload(now, number)

    def _start_upload(self, now: float, number: int) -> None:
        """Starts to upload a waiting task of the worker, unless the worker uploads another task."""
        worker = self._workers[number]
        if worker.uploading or not worker.waiting_uploads:
            return
        worker.uploading = True
        worker.waiting_uploads -= 1
        self._store_free_at = max(self._store_free_at, now) + self._pass.store_seconds
        self._schedule(max(self._store_free_at, now + self._pass.upload_seconds), self._on_uploaded, number)

    def _on_uploaded(self, now: float, number: int) -> None:
        worker = self._workers[number]
        self._unfinished -= 1
        worker.uploading = False
        if worker.tasks == self._pass.in_flight:
            self._available.append(number)
        worker.tasks -= 1
        self._start_upload(now, number)

    def _on_lost(self, now: float, number: int) -> None:
        worker = self._workers[number]
        self.lost_tasks += worker.tasks
        self._unassigned += worker.tasks
        if worker.tasks < self._pass.in_flight:
            self._available.remove(number)
        worker.replacements += 1
        worker.reset(now)
        self._schedule(now + self._pass.replace_seconds, self._on_ready, number)

    def _on_ready(self, now: float, number: int) -> None:
        self._workers[number].reset(now)
        self._available.append(number)
        failure_seconds = self._rng.expovariate(1 / (self._pass.mtbf_hours * 3600))
        self._schedule(now + failure_seconds, self._on_lost, number)
