"""Which worker is given which item of work, who is to blame when one fails, and what is late. No Ray in here.

An error is the user's (it ends the run), a node's (it costs its worker) or the item's (it counts against the
item). Times are seconds of a clock that the caller reads.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError
from offline_teacher.cluster.patience import Deadlines

ITEMS_IN_FLIGHT = 2
"""Items on one worker: it computes one while it writes the other."""
ITEM_DEATHS = 8
"""An item in whose hands this many workers died is quarantined."""
ITEM_DELAYS = 4
"""An item that this many workers did not finish in time is quarantined."""
WORKER_FAILURES = 2
"""In a row: a worker that fails so many items, none of which failed elsewhere, is broken itself."""


@dataclass(eq=False)
class Worker:
    """The driver's record of one worker actor."""

    number: int
    actor: Any
    place: str = "a node"
    """Host and device, once it has answered."""
    ready: bool = False
    items: dict[Any, Item] = field(default_factory=dict)
    """Result reference -> item."""
    proven: bool = False
    """Its last item succeeded."""
    failures: int = 0
    """In a row, of items that failed nowhere else."""

    @property
    def in_time(self) -> bool:
        """Whether it is at work on an item that it may yet finish in time."""
        return any(self not in item.late for item in self.items.values())


@dataclass(eq=False)
class Item:
    """One unit of work: a worker's ``<method>(*arguments)``, and what happened to it so far."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    size: float = 1.0
    """How much work it is, compared with others of its kind."""
    attempts: int = 0
    deaths: int = 0
    delays: int = 0
    reason: str = ""
    failed_on: set[str] = field(default_factory=set)
    """Places that failed it, or were late."""
    holders: dict[Worker, float] = field(default_factory=dict)
    """Worker -> since when."""
    late: set[Worker] = field(default_factory=set)
    """Holders that are late."""
    queued: bool = True
    ended: bool = False
    """Done or quarantined."""
    log: list[str] = field(default_factory=list)


class WorkQueue:
    """The remaining items, and the failures of items and workers.

    ``attempts``: an item that fails so often is quarantined. ``bound``: of workers lost or replaced one after
    the other while nothing is finished.
    """

    def __init__(self, attempts: int, bound: int) -> None:
        self.attempts, self.bound = attempts, bound
        self.retries = 0
        self.begin([], lambda item: None)

    def begin(self, items: Iterable[Item], quarantine: Callable[[Item], None]) -> None:
        """Starts anew with these items; ``quarantine(item)`` is called for each that is given up."""
        self.todo, self.quarantined, self._quarantine = deque(items), list[Item](), quarantine
        self.left = len(self.todo)
        """Items that are neither done nor quarantined."""
        self._deadlines = Deadlines()
        self._lost = self._replaced = 0
        self._suspects_dropped = False

    # --- giving ---

    def take(self, worker: Worker, ready: Sequence[Worker], now: float) -> Item | None:
        """The first item that ``worker``, one of those ``ready``, should have; None where there is none."""
        if any(held.deaths for held in worker.items.values()):
            return None
        while self.todo and self.todo[0].ended:
            self.todo.popleft()
        for position, item in enumerate(self.todo):
            # One that had a worker die is alone on its next, so that no other is blamed with it.
            if item.ended or worker in item.holders or (item.deaths and worker.items):
                continue
            if worker in self._fit(item, ready):
                del self.todo[position]
                item.queued, item.holders[worker] = False, now
                return item
        return None

    def _fit(self, item: Item, ready: Sequence[Worker]) -> Sequence[Worker]:
        """The workers that should have the item.

        One that went wrong goes to a place that did not fail it, and to a worker that works: broken workers
        are the first to ask for more. Its last attempt waits for a worker that works, as long as one may be
        found.
        """
        if not (item.attempts or item.deaths or item.delays):
            return ready
        others = [worker for worker in ready if worker.place not in item.failed_on] or ready
        proven = [worker for worker in others if worker.proven]
        room = [worker for worker in proven if len(worker.items) < (1 if item.deaths else ITEMS_IN_FLIGHT)]
        hopeful = [worker for worker in others if worker.proven or (worker.items and not worker.failures)]
        if room or (hopeful and item.attempts == self.attempts - 1):
            return room
        return [worker for worker in others if not worker.failures] or others

    # --- what came of it ---

    def finished(self, worker: Worker, item: Item, now: float) -> bool:
        """Whether the item is done now; False where another worker was first."""
        self._deadlines.took(now - item.holders.pop(worker), item.size)
        worker.proven, worker.failures = True, 0
        self._lost = self._replaced = 0
        self._suspects_dropped = False
        first = not item.ended
        if first:
            self._end(item)
        return first

    def failed(self, worker: Worker, item: Item, reason: str) -> None:
        """By an error of the item's. What failed elsewhere too is held against the item alone."""
        del item.holders[worker]
        worker.proven = False
        if not item.failed_on - {worker.place}:
            worker.failures += 1
        item.failed_on.add(worker.place)
        if not item.ended:
            item.attempts, item.reason = item.attempts + 1, f"{worker.place}: {reason}"
            self._again_or_quarantine(item, item.attempts >= self.attempts)

    def is_broken(self, worker: Worker) -> bool:
        """Whether a new worker should replace it; False after too many replacements without success."""
        return worker.failures >= WORKER_FAILURES and self._replaced < self.bound

    def replaced(self, worker: Worker) -> None:
        """The worker is gone. What it held is not to blame."""
        self._replaced += 1
        self._give_back(worker)

    def lost(self, worker: Worker, reason: str, busy: bool, died: bool) -> None:
        """The worker ``died``, or its node failed it. UserError where workers are only lost, and nothing is
        finished; while others are ``busy`` they may yet finish."""
        self._lost += not busy
        for item in worker.items.values() if died else ():
            item.deaths += 1
            times = f"{item.deaths} times" if item.deaths > 1 else "once"
            item.reason = f"{worker.place}: its worker died {times} (the last: {last_line(reason)})"
        self._give_back(worker, died)
        if self._lost > self.bound:
            self._drop_suspects(f"{worker.place}: {last_line(reason)}")

    def delayed(self, workers: Iterable[Worker], now: float) -> Iterator[tuple[Worker, Item, bool]]:
        """(worker, item, replace) for each worker that is late with an item.

        Late the first time, the item is queued for another worker as well. ``replace``: the worker is late by
        the doubled deadline, or another one has finished its item.
        """
        for worker in workers:
            for item in list(worker.items.values()):
                late = now - item.holders[worker] > self._deadlines.limit(item.size, item.delays)
                if worker in item.late and (late or item.ended):
                    yield worker, item, True
                    break
                if late and not item.ended:
                    item.late.add(worker)
                    item.failed_on.add(worker.place)
                    item.delays += 1
                    item.reason = f"{worker.place}: no answer for {now - item.holders[worker]:.0f} s"
                    self._again_or_quarantine(item, item.delays >= ITEM_DELAYS)
                    yield worker, item, False

    # --- inside ---

    def _give_back(self, worker: Worker, died: bool = False) -> None:
        for item in worker.items.values():
            item.holders.pop(worker, None)
            item.late.discard(worker)
            if not item.ended:
                self._again_or_quarantine(item, died and item.deaths >= ITEM_DEATHS)

    def _drop_suspects(self, reason: str) -> None:
        """The items over which workers died may be why nothing gets done: once, it goes on without them."""
        suspects = [item for item in self.todo if item.deaths and not item.ended]
        for item in suspects:
            self._again_or_quarantine(item, give_up=True)
        if not suspects or (self._suspects_dropped and self.left):
            raise UserError(
                f"{self._lost} workers failed or died one after the other and finished nothing (the last:"
                f" {reason}); the same command continues",
                EXIT_INCOMPLETE,
            )
        self._lost, self._suspects_dropped = 0, True

    def _again_or_quarantine(self, item: Item, give_up: bool) -> None:
        if give_up:
            self.quarantined.append(item)
            self._end(item)
            self._quarantine(item)
            return
        self.retries += 1
        held_in_time = any(holder not in item.late for holder in item.holders)
        if not item.queued and not held_in_time:
            item.queued = True
            self.todo.append(item)

    def _end(self, item: Item) -> None:
        item.ended = True
        self.left -= 1


def last_line(text: str) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[-1].strip()[:300] if lines else "no reason given"
