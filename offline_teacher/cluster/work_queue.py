"""The rules for failures: which worker gets which item, and when a worker is removed or an item given up.

A worker is removed if it dies, if its node fails, after ``WORKER_FAILURES`` failed items in a row, or if it
misses both deadlines of an item. An item is quarantined after too many failures, deaths or delays. This
module does not import Ray. Times are seconds of a clock that the caller reads.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError
from offline_teacher.cluster.deadlines import Deadlines

ITEM_DEATHS = 8
"""An item that was on this many workers when they died is quarantined."""
ITEM_DELAYS = 4
"""An item that this many workers did not finish in time is quarantined."""
WORKER_FAILURES = 2
"""A worker is broken after this many failed items in a row. Items that also failed elsewhere do not count."""


@dataclass(eq=False)
class Worker:
    """The driver's record of one worker actor."""

    number: int
    actor: Any
    place: str = "a node"
    """Host and device of the worker, known after its first answer."""
    loading_since: float | None = None
    """Time at which Ray had started the actor, so that ``prepare`` began; None before."""
    ready: bool = False
    """Whether ``prepare`` has succeeded."""
    items: dict[Any, Item] = field(default_factory=dict)
    """Ray's reference to the result -> the item that the worker holds."""
    last_succeeded: bool = False
    """Whether the last item of the worker succeeded."""
    failures: int = 0
    """Number of failures in a row. Items that also failed at another place do not count."""

    @property
    def in_time(self) -> bool:
        """Whether the worker holds an item that is not late."""
        return any(self not in item.late for item in self.items.values())


@dataclass(eq=False)
class Item:
    """One unit of work, the call ``<method>(*arguments)`` on a worker, with its history."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    size: float = 1.0
    """Amount of work relative to other items of its kind."""
    attempts: int = 0
    """Number of attempts that raised an error."""
    deaths: int = 0
    """Number of workers that died while they held the item."""
    delays: int = 0
    """Number of workers that were late with the item."""
    reason: str = ""
    """The last failure, in words."""
    failed_on: set[str] = field(default_factory=set)
    """Places where the item failed or was late."""
    holders: dict[Worker, float] = field(default_factory=dict)
    """Worker that holds the item -> time at which it got the item."""
    late: set[Worker] = field(default_factory=set)
    """Holders that passed the deadline."""
    queued: bool = True
    ended: bool = False
    """Whether the item is done or quarantined."""
    log: list[str] = field(default_factory=list)
    """Entries of the item's log file."""


class WorkQueue:
    """The remaining items, and the failures of items and workers.

    ``attempts``: failures after which an item is quarantined. ``max_losses``: workers that may be lost, and
    that may be removed, since the last finished item. ``in_flight``: items that a worker holds at most.
    """

    def __init__(self, attempts: int, max_losses: int, in_flight: int = 2) -> None:
        self.attempts, self.max_losses, self.in_flight = attempts, max_losses, in_flight
        self.retries = 0
        self.begin([], lambda item: None)

    def begin(self, items: Iterable[Item], quarantine: Callable[[Item], None]) -> None:
        """Replaces all items by ``items``; calls ``quarantine(item)`` for each one that is quarantined."""
        self.todo, self.quarantined, self._quarantine = deque(items), list[Item](), quarantine
        self.left = len(self.todo)
        """Number of items that are neither done nor quarantined."""
        self._deadlines = Deadlines()
        self._lost = self._removed = 0
        self._suspects_dropped = False

    # --- assigning items ---

    def take(self, worker: Worker, ready: Sequence[Worker], now: float) -> Item | None:
        """Assigns the next item to ``worker``, one of the ``ready`` workers; None if no item suits it."""
        if any(held.deaths for held in worker.items.values()):
            return None
        while self.todo and self.todo[0].ended:
            self.todo.popleft()
        for position, item in enumerate(self.todo):
            # An item whose worker died goes to a worker without other items, so that a second death is not
            # blamed on another item.
            if item.ended or worker in item.holders or (item.deaths and worker.items):
                continue
            if worker in self._eligible(item, ready):
                del self.todo[position]
                item.queued, item.holders[worker] = False, now
                return item
        return None

    def _eligible(self, item: Item, ready: Sequence[Worker]) -> Sequence[Worker]:
        """Returns the workers that may get ``item``.

        A failed item goes to another place and, if possible, to a worker whose last item succeeded. Otherwise
        broken workers would get it, because they fail fast and so are free first. The last attempt of an item
        waits while there is, or may soon be, a worker whose last item succeeded.
        """
        if not (item.attempts or item.deaths or item.delays):
            return ready
        others = [worker for worker in ready if worker.place not in item.failed_on] or ready
        room = 1 if item.deaths else self.in_flight
        free = [worker for worker in others if worker.last_succeeded and len(worker.items) < room]
        promising = [w for w in others if w.last_succeeded or (w.items and not w.failures)]
        if free or (promising and item.attempts == self.attempts - 1):
            return free
        return [worker for worker in others if not worker.failures] or others

    # --- results and failures ---

    def finished(self, worker: Worker, item: Item, now: float) -> bool:
        """Records a finished item. Returns False if the item ended before, for example on another worker."""
        self._deadlines.record(now - item.holders.pop(worker), item.size)
        worker.last_succeeded, worker.failures = True, 0
        self._lost = self._removed = 0
        self._suspects_dropped = False
        first = not item.ended
        if first:
            self._end(item)
        return first

    def failed(self, worker: Worker, item: Item, reason: str) -> None:
        """Records an error raised by an item. The worker is not blamed if the item also failed elsewhere."""
        del item.holders[worker]
        worker.last_succeeded = False
        if not item.failed_on - {worker.place}:
            worker.failures += 1
        item.failed_on.add(worker.place)
        if not item.ended:
            item.attempts, item.reason = item.attempts + 1, f"{worker.place}: {reason}"
            self._requeue_or_quarantine(item, item.attempts >= self.attempts)

    def is_broken(self, worker: Worker) -> bool:
        """Whether the worker must be removed: it failed ``WORKER_FAILURES`` times in a row. False after
        ``max_losses`` removals without a finished item."""
        return worker.failures >= WORKER_FAILURES and self._removed < self.max_losses

    def removed(self, worker: Worker) -> None:
        """Records that a broken or late worker was removed. Its items are queued again; no failure counts."""
        self._removed += 1
        self._give_back(worker)

    def lost(self, worker: Worker, reason: str, busy: bool, died: bool) -> None:
        """Records the loss of a worker, which ``died`` or whose node failed. It counts unless another is
        ``busy`` with an item in time. UserError after more than ``max_losses`` without a finished item."""
        self._lost += not busy
        for item in worker.items.values() if died else ():
            item.deaths += 1
            times = f"{item.deaths} times" if item.deaths > 1 else "once"
            last = f"{worker.place} ({last_line(reason)})"
            item.reason = f"workers died {times} with this item, the last at {last}"
        self._give_back(worker)
        if self._lost > self.max_losses:
            self._drop_suspects(f"{worker.place}: {last_line(reason)}")

    def delayed(self, workers: Iterable[Worker], now: float) -> Iterator[tuple[Worker, Item, bool]]:
        """Yields (worker, item, whether to remove the worker) for each worker that is late with an item.

        At the first deadline the item is also queued for another worker. The worker is removed at the second
        deadline, which is twice as long, or as soon as the item ends elsewhere.
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

    # --- internal ---

    def _give_back(self, worker: Worker) -> None:
        for item in worker.items.values():
            item.holders.pop(worker, None)
            if not item.ended:
                self._requeue_or_quarantine(item, item.deaths >= ITEM_DEATHS)

    def _drop_suspects(self, reason: str) -> None:
        """Quarantines the queued items on which workers died, because these items may be the cause. Raises
        UserError if there are none, or if they were quarantined before and workers still die."""
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
