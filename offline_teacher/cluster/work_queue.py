"""Which worker is given which item of work, and who is to blame when one fails. No Ray in here."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError

ITEMS_IN_FLIGHT = 2
"""On one worker: one is computed while the other is written."""
ITEM_DEATHS = 8
"""An item in whose hands this many workers died is quarantined."""
WORKER_FAILURES = 2
"""In a row: a worker that fails so many items, none of which failed on another, is broken itself."""


@dataclass(eq=False)
class Item:
    """One unit of work: ``TaskWorker.<method>(*arguments)``, and what happened to it so far."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    attempts: int = 0
    deaths: int = 0
    reason: str = ""
    failed_on: set[int] = field(default_factory=set)
    """Numbers of the workers that failed it."""


@dataclass(eq=False)
class Worker:
    """One actor as its driver knows it."""

    number: int
    actor: Any
    ready: bool = False
    items: dict[Any, Item] = field(default_factory=dict)
    """Result reference -> item."""
    proven: bool = False
    """The last thing it did was right."""
    failures: int = 0
    """In a row, of items that failed on no other worker."""


class WorkQueue:
    """The items that are left, and what is held against items and workers.

    ``attempts``: an item that fails so often is quarantined. ``bound``: of workers that die, or are replaced,
    one after the other while nothing is finished.
    """

    def __init__(self, attempts: int, bound: int) -> None:
        self.attempts, self.bound = attempts, bound
        self.retries = 0
        self.todo: deque[Item] = deque()
        self.quarantined: list[Item] = []
        self._quarantine: Callable[[Item], None]
        self._deaths = self._replaced = 0
        self._suspects_dropped = False

    def begin(self, items: Iterable[Item], quarantine: Callable[[Item], None]) -> None:
        self.todo, self.quarantined, self._quarantine = deque(items), [], quarantine

    def take(self, worker: Worker, ready: Sequence[Worker]) -> Item | None:
        """The first item that ``worker``, one of those ``ready``, should have; None where there is none."""
        if any(held.deaths for held in worker.items.values()):
            return None
        for position, item in enumerate(self.todo):
            # One that had a worker die is alone on its next, so that no other is blamed with it.
            if not (item.deaths and worker.items) and worker in self._fit(item, ready):
                del self.todo[position]
                return item
        return None

    def _fit(self, item: Item, ready: Sequence[Worker]) -> Sequence[Worker]:
        """Those that should have it. One that went wrong goes to a worker that did not fail it, and to one
        that works: the broken are the first to ask for more. Its last attempt waits for one that works, as
        long as one may be found."""
        if not (item.attempts or item.deaths):
            return ready
        others = [worker for worker in ready if worker.number not in item.failed_on] or ready
        proven = [worker for worker in others if worker.proven]
        room = [worker for worker in proven if len(worker.items) < (1 if item.deaths else ITEMS_IN_FLIGHT)]
        hopeful = [worker for worker in others if worker.proven or (worker.items and not worker.failures)]
        if room or (hopeful and item.attempts == self.attempts - 1):
            return room
        return [worker for worker in others if not worker.failures] or others

    def finished(self, worker: Worker) -> None:
        worker.proven, worker.failures = True, 0
        self._deaths = self._replaced = 0
        self._suspects_dropped = False

    def failed(self, worker: Worker, item: Item, reason: str) -> None:
        """By an exception. What failed on another worker too is held against the item alone."""
        item.attempts, item.reason = item.attempts + 1, reason
        worker.proven = False
        if not item.failed_on - {worker.number}:
            worker.failures += 1
        item.failed_on.add(worker.number)
        self._again_or_quarantine(item, item.attempts >= self.attempts)

    def is_broken(self, worker: Worker) -> bool:
        """Whether another should take its place. Where that has helped nothing for long, it stays."""
        return worker.failures >= WORKER_FAILURES and self._replaced < self.bound

    def replaced(self, worker: Worker) -> None:
        """What it held is nobody's fault."""
        self._replaced += 1
        self.todo.extend(worker.items.values())

    def died(self, worker: Worker, reason: str, busy: bool) -> None:
        """UserError where workers only die, whatever they hold. One that held nothing does not count while
        others are ``busy``: they may yet finish."""
        if worker.items or not busy:
            self._deaths += 1
        for item in worker.items.values():
            item.deaths += 1
            times = f"{item.deaths} times" if item.deaths > 1 else "once"
            item.reason = f"its worker died {times} (the last: {_last_line(reason)})"
            self._again_or_quarantine(item, item.deaths >= ITEM_DEATHS)
        if self._deaths > self.bound:
            self._drop_suspects(reason)

    def _drop_suspects(self, reason: str) -> None:
        """The items over which workers died may be why nothing gets done: once, it goes on without them."""
        suspects = [item for item in self.todo if item.deaths]
        self.todo = deque(item for item in self.todo if not item.deaths)
        for item in suspects:
            self._again_or_quarantine(item, give_up=True)
        if not suspects or (self._suspects_dropped and self.todo):
            raise UserError(
                f"{self._deaths} workers died one after the other and finished nothing (the last:"
                f" {_last_line(reason)}); is there enough memory? The same command continues",
                EXIT_INCOMPLETE,
            )
        self._deaths, self._suspects_dropped = 0, True

    def _again_or_quarantine(self, item: Item, give_up: bool) -> None:
        if give_up:
            self.quarantined.append(item)
            self._quarantine(item)
        else:
            self.retries += 1
            self.todo.append(item)


def _last_line(text: str) -> str:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[-1].strip()[:300] if lines else "no reason given"
