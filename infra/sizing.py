"""How long a teacher pass takes on many workers that fail, and what it costs: a simulation of its scheduler.

    python -m infra.sizing --tokens 4e9 --tokens-per-second 40000 --bytes-per-token 1803 --workers 8 64 512

Measured figures go in: tokens a second of one worker and bytes a token, from ``offline_teacher.main plan``;
or, instead of the rate, the seconds that tasks took in a pass (``--task-seconds 20.2 21.0 ...``). Stated
ones: how often a worker is lost, how long its place stays empty, what the store takes a second, prices.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, replace
from typing import NoReturn

from infra.console import command, duration, table
from infra.errors import UserError

IN_FLIGHT = 2
"""Tasks on one worker, as in offline_teacher.cluster.pool: one is written while the next is computed."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A teacher pass. Rates are of one worker."""

    tokens: float
    """R times the corpus."""
    tokens_per_second: float
    bytes_per_token: float
    workers: int
    task_tokens: int = 4096 * 128
    spread: tuple[float, ...] = (1.0,)
    """Measured seconds of tasks over their mean; every task draws one."""
    start_seconds: float = 60.0
    """From the command until workers compute."""
    mtbf_hours: float = 24.0
    """Mean time between losses of one worker (exponential): the stated failure rate."""
    replace_seconds: float = 180.0
    """From a loss until another worker is ready: a new machine, its image, the teacher's weights."""
    store_bytes_per_second: float = 1e9
    """What the store takes from all workers together."""
    driver_seconds: float = 0.002
    """What the driver spends on one task; it does one at a time."""
    slow_share: float = 0.02
    slow_factor: float = 2.0
    """Share of the workers that are this much slower (stragglers)."""

    @property
    def tasks(self) -> int:
        return max(1, round(self.tokens / self.task_tokens))


@dataclass(frozen=True)
class Timing:
    seconds: float
    efficiency: float
    """Time of perfect workers that never wait, over time taken."""
    lost_tasks: int
    bottleneck: str


def simulate(job: Pass, seed: int = 0) -> Timing:
    """Every task, on an event queue.

    A task takes the longest of computing it, of its share of the store's rate, and of the driver's turns. A
    worker that is lost loses the task it computes; that and the one waiting behind it go to others.
    """
    compute = job.task_tokens / job.tokens_per_second
    busy = min(job.workers, job.tasks)
    write = job.task_tokens * job.bytes_per_token * busy / job.store_bytes_per_second
    handing = job.driver_seconds * busy
    run = _Simulation(job, compute, max(write, handing), random.Random(seed))
    end = run.end()
    perfect = job.tasks * compute / job.workers
    slowest = max((compute, "the teacher"), (write, "the store"), (handing, "the driver"))[1]
    few = job.tasks < 4 * job.workers
    return Timing(end, perfect / end, run.lost, "too few tasks" if few else slowest)


class _Simulation:
    """The workers' next events; ``held`` are the tasks on a worker, the first of them being computed."""

    def __init__(self, job: Pass, compute: float, least: float, rng: random.Random) -> None:
        self._job, self._compute, self._least, self._rng = job, compute, least, rng
        self._slow = [job.slow_factor if rng.random() < job.slow_share else 1.0 for _ in range(job.workers)]
        self._dies = [self._death(job.start_seconds) for _ in range(job.workers)]
        self._held = [0] * job.workers
        self._idle: set[int] = set()
        self._todo, self._left = job.tasks, job.tasks
        self._events: list[tuple[float, int, str]] = []
        self.lost = 0

    def end(self) -> float:
        """When the last task is done."""
        now = self._job.start_seconds
        for _ in range(IN_FLIGHT):  # breadth first
            for worker in range(self._job.workers):
                self._fill(worker, 1)
        for worker in range(self._job.workers):
            self._go_on(worker, now)
        while self._left:
            now, worker, what = heapq.heappop(self._events)
            if what == "lost":
                self.lost += 1
                self._todo += self._held[worker]
                self._held[worker] = 0
                heapq.heappush(self._events, (now + self._job.replace_seconds, worker, "ready"))
                while self._idle and self._todo:
                    self._turn(self._idle.pop(), now, 1)
            elif what == "ready":
                self._dies[worker] = self._death(now)
                self._turn(worker, now, IN_FLIGHT)
            else:
                self._left -= 1
                self._held[worker] -= 1
                self._turn(worker, now, 1)
        return now

    def _turn(self, worker: int, now: float, room: int) -> None:
        self._fill(worker, room)
        self._go_on(worker, now)

    def _fill(self, worker: int, room: int) -> None:
        taken = min(room, self._todo)
        self._todo -= taken
        self._held[worker] += taken

    def _go_on(self, worker: int, now: float) -> None:
        """The worker's next event: its task is done, or it is lost before; none where it holds nothing."""
        if not self._held[worker]:
            self._idle.add(worker)
            return
        if self._dies[worker] < now:  # lost while it was idle, and replaced since
            self._dies[worker] = self._death(now)
        taken = max(self._compute * self._slow[worker] * self._rng.choice(self._job.spread), self._least)
        lost = self._dies[worker] < now + taken
        event = (self._dies[worker], worker, "lost") if lost else (now + taken, worker, "done")
        heapq.heappush(self._events, event)

    def _death(self, now: float) -> float:
        return now + self._rng.expovariate(1 / (self._job.mtbf_hours * 3600))


def main() -> None:
    options = _parser().parse_args()
    job = _job(options)
    rows = []
    for workers in options.workers:
        found = simulate(replace(job, workers=workers))
        money = f"{found.seconds / 3600 * workers * options.price:,.0f}" if options.price else "-"
        cells = [f"{workers}", duration(found.seconds), f"{found.efficiency:.0%}", f"{found.lost_tasks:,}"]
        rows.append([*cells, found.bottleneck, money])
    print(table(rows, ["workers", "time", "efficiency", "lost tasks", "bottleneck", "money"]))
    terabytes = job.tokens * job.bytes_per_token / 1e12
    kept = f", {terabytes * options.terabyte_price:,.0f} a month" if options.terabyte_price else ""
    print(f"one worker: {job.tokens_per_second:,.0f} tokens/s; {job.tasks:,} tasks")
    print(f"store: {terabytes:,.2f} TB{kept}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.sizing", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tokens", type=_positive, required=True, help="of the corpus")
    add("--masking-epochs", type=int, default=1)
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--tokens-per-second", type=_positive, help="of one worker, from plan")
    rate.add_argument("--task-seconds", type=_positive, nargs="+", help="measured, of one worker")
    add("--task-tokens", type=int, default=Pass.task_tokens, help="task_sequences times length")
    add("--bytes-per-token", type=_positive, required=True, help="from plan")
    add("--workers", type=int, nargs="+", default=[8, 64, 512])
    add("--start-seconds", type=float, default=Pass.start_seconds)
    add("--mtbf-hours", type=_positive, default=Pass.mtbf_hours, help="between losses of one worker")
    add("--replace-seconds", type=float, default=Pass.replace_seconds)
    add("--store-bytes-per-second", type=_positive, default=Pass.store_bytes_per_second)
    add("--price", type=float, default=0.0, help="of one worker an hour")
    add("--terabyte-price", type=float, default=0.0, help="of keeping a terabyte for a month")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, not {text}")
    return value


def _job(options: argparse.Namespace) -> Pass:
    if min(*options.workers, options.masking_epochs, options.task_tokens) < 1:
        raise UserError("--workers, --masking-epochs and --task-tokens: must be >= 1")
    seconds = options.task_seconds or [options.task_tokens / options.tokens_per_second]
    mean = sum(seconds) / len(seconds)
    return Pass(
        tokens=options.tokens * options.masking_epochs,
        tokens_per_second=options.task_tokens / mean,
        bytes_per_token=options.bytes_per_token,
        workers=1,
        task_tokens=options.task_tokens,
        spread=tuple(one / mean for one in seconds),
        start_seconds=options.start_seconds,
        mtbf_hours=options.mtbf_hours,
        replace_seconds=options.replace_seconds,
        store_bytes_per_second=options.store_bytes_per_second,
    )


def cli() -> NoReturn:
    """The command: ``main`` with its mistakes in one line and its exit codes."""
    command(main)


if __name__ == "__main__":
    cli()
