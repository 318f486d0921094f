"""Assigns items to workers, decides what caused a failure, and finds late items. Does not import Ray.

An error is caused by the user (the run ends), by a node (its worker is replaced) or by the item (the item
loses an attempt). Times are seconds of a clock that the caller reads.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError
from offline_teacher.cluster.deadlines import Deadlines

ITEMS_IN_FLIGHT = 2
"""Items on one worker: it computes one while it writes the other."""
ITEM_DEATHS = 8
"""An item that was on this many workers when they died is quarantined."""
ITEM_DELAYS = 4
"""An item that this many workers did not finish in time is quarantined."""
WORKER_FAILURES = 2
"""A worker is broken after this many failures in a row. Items that also failed elsewhere do not count."""


@dataclass(eq=False)
class Worker:
    """The driver's record of one worker actor."""

    number: int
    actor: Any
    place: str = "a node"
    """Host and device, known after its first answer."""
    ready: bool = False
    items: dict[Any, Item] = field(default_factory=dict)
    """Result reference -> item."""
    proven: bool = False
    """Its last item succeeded."""
    failures: int = 0
    """Failures in a row; items that also failed at another place do not count."""

    @property
    def in_time(self) -> bool:
        """Whether it holds an item that is not late yet."""
        return any(self not in item.late for item in self.items.values())


@dataclass(eq=False)
class Item:
    """One unit of work, ``<method>(*arguments)`` of a worker, and what happened to it so far."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    size: float = 1.0
    """Amount of work relative to other items of its kind."""
    attempts: int = 0
    deaths: int = 0
    delays: int = 0
    reason: str = ""
    failed_on: set[str] = field(default_factory=set)
    """Places where it failed or was late."""
    holders: dict[Worker, float] = field(default_factory=dict)
    """Worker -> time at which it got this item."""
    late: set[Worker] = field(default_factory=set)
    """Holders that passed the deadline."""
    queued: bool = True
    ended: bool = False
    """Done or quarantined."""
    log: list[str] = field(default_factory=list)


class WorkQueue:
    """The remaining items, and the failures of items and workers.

    ``attempts``: failures after which an item is quarantined. ``bound``: how many workers
    may be lost since the last finished item, and how many may be replaced.
    """

    def __init__(self, attempts: int, bound: int) -> None:
        self.attempts, self.bound = attempts, bound
        self.retries = 0
        self.begin([], lambda item: None)

    def begin(self, items: Iterable[Item], quarantine: Callable[[Item], None]) -> None:
        """Starts anew with these items; ``quarantine(item)`` is called for each one that is quarantined."""
        self.todo, self.quarantined, self._quarantine = deque(items), list[Item](), quarantine
        self.left = len(self.todo)
        """Items that are neither done nor quarantined."""
        self._deadlines = Deadlines()
        self._lost = self._replaced = 0
        self._suspects_dropped = False

    # --- giving ---

    def take(self, worker: Worker, ready: Sequence[Worker], now: float) -> Item | None:
        """The next item for ``worker``, which is one of those ``ready``; None if there is none for it."""
        if any(held.deaths for held in worker.items.values()):
            return None
        while self.todo and self.todo[0].ended:
            self.todo.popleft()
        for position, item in enumerate(self.todo):
            # An item that a worker had when it died runs next on a worker with no other item: if that dies
            # too,
            # no other item is blamed.
            if item.ended or worker in item.holders or (item.deaths and worker.items):
                continue
            if worker in self._fit(item, ready):
                del self.todo[position]
                item.queued, item.holders[worker] = False, now
                return item
        return None

    def _fit(self, item: Item, ready: Sequence[Worker]) -> Sequence[Worker]:
        """The workers that may get ``item``.

        A failed item goes to another place, and there to a worker whose last item succeeded. Otherwise broken
        workers would get it, because they fail fast and so ask first. Before its last attempt, an item waits
        while there is, or may soon be, a worker that has succeeded.
        """
        if not (item.attempts or item.deaths or item.delays):
            return ready
        others = [worker for worker in ready if worker.place not in item.failed_on] or ready
        proven = [worker for worker in others if worker.proven]
        free = [worker for worker in proven if len(worker.items) < (1 if item.deaths else ITEMS_IN_FLIGHT)]
        promising = [worker for worker in others if worker.proven or (worker.items and not worker.failures)]
        if free or (promising and item.attempts == self.attempts - 1):
            return free
        return [worker for worker in others if not worker.failures] or others

    # --- what came of it ---

    def finished(self, worker: Worker, item: Item, now: float) -> bool:
        """Records a finished item. Returns False if it had ended before, for example on another worker."""
        self._deadlines.took(now - item.holders.pop(worker), item.size)
        worker.proven, worker.failures = True, 0
        self._lost = self._replaced = 0
        self._suspects_dropped = False
        first = not item.ended
        if first:
            self._end(item)
        return first

    def failed(self, worker: Worker, item: Item, reason: str) -> None:
        """Records an error raised by an item. The worker is not blamed if the item failed elsewhere too."""
        del item.holders[worker]
        worker.proven = False
        if not item.failed_on - {worker.place}:
            worker.failures += 1
        item.failed_on.add(worker.place)
        if not item.ended:
            item.attempts, item.reason = item.attempts + 1, f"{worker.place}: {reason}"
            self._requeue_or_quarantine(item, item.attempts >= self.attempts)

    def is_broken(self, worker: Worker) -> bool:
        """Whether a new worker should replace it. False after too many replacements since the last finished
        item."""
        return worker.failures >= WORKER_FAILURES and self._replaced < self.bound

    def replaced(self, worker: Worker) -> None:
        """Records that a worker was replaced. Its items are queued again without blame."""
        self._replaced += 1
        self._give_back(worker)

    def lost(self, worker: Worker, reason: str, busy: bool, died: bool) -> None:
        """Records that a worker ``died``, or else that its node failed.

        While another worker still holds an item that is not late (``busy``), the loss does not count.
        Raises UserError if too many workers are lost in a row and no item is finished.
        """
        self._lost += not busy
        for item in worker.items.values() if died else ():
            item.deaths += 1
            times = f"{item.deaths} times" if item.deaths > 1 else "once"
            item.reason = (
                f"workers died {times} with this item, the last at {worker.place} ({last_line(reason)})"
            )
        self._give_back(worker)
        if self._lost > self.bound:
            self._drop_suspects(f"{worker.place}: {last_line(reason)}")

    def delayed(self, workers: Iterable[Worker], now: float) -> Iterator[tuple[Worker, Item, bool]]:
        """Yields (worker, item, replace) for each worker that is late with an item.

        At the first deadline the item is also queued for another worker. ``replace`` is true if the worker
        also passed the second deadline, which is twice as long, or if the item has ended meanwhile.
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
                    self._requeue_or_quarantine(item, item.delays >= ITEM_DELAYS)
                    yield worker, item, False

    # --- inside ---

    def _give_back(self, worker: Worker) -> None:
        for item in worker.items.values():
            item.holders.pop(worker, None)
            if not item.ended:
                self._requeue_or_quarantine(item, item.deaths >= ITEM_DEATHS)

    def _drop_suspects(self, reason: str) -> None:
        """Quarantines the items with which workers died, since they may be the cause.

        Raises UserError if there are none, or if workers still die after that was done before."""
        suspects = [item for item in self.todo if item.deaths and not item.ended]
        for item in suspects:
            self._requeue_or_quarantine(item, give_up=True)
        if not suspects or (self._suspects_dropped and self.left):
            raise UserError(
                f"{self._lost} workers failed or died one after the other and finished nothing (the last:"
                f" {reason}); run the same command again to continue",
                EXIT_INCOMPLETE,
            )
        self._lost, self._suspects_dropped = 0, True

    def _requeue_or_quarantine(self, item: Item, give_up: bool) -> None:
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
