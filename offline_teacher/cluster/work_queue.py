"""Assigns items of work to workers and decides whether an item or a worker caused a failure. Has no Ray."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.errors import EXIT_INCOMPLETE, UserError

ITEMS_IN_FLIGHT = 2
"""Items on one worker: it computes one while it writes the other."""
ITEM_DEATHS = 8
"""An item that was running on this many workers when they died is quarantined."""
WORKER_FAILURES = 2
"""A worker counts as broken if it fails this many items in a row that failed on no other worker."""


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
    """The driver's record of one worker actor."""

    number: int
    actor: Any
    ready: bool = False
    items: dict[Any, Item] = field(default_factory=dict)
    """Result reference -> item."""
    proven: bool = False
    """Its last item succeeded."""
    failures: int = 0
    """Failures in a row of items that failed on no other worker."""


class WorkQueue:
    """The remaining items, and the failures of items and workers.

    ``attempts``: failures after which an item is quarantined. ``bound``: the largest number of workers that
    may die or be replaced in a row while no item is finished.
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
        """The next item for ``worker``, which is one of those ``ready``; None if there is none for it."""
        if any(held.deaths for held in worker.items.values()):
            return None
        for position, item in enumerate(self.todo):
            # An item on which a worker died runs alone, so that no other item is blamed if it happens again.
            if not (item.deaths and worker.items) and worker in self._fit(item, ready):
                del self.todo[position]
                return item
        return None

    def _fit(self, item: Item, ready: Sequence[Worker]) -> Sequence[Worker]:
        """The workers that may get ``item``. An item that failed goes to a worker that did not fail it and
        whose last item succeeded, because broken workers are the first to ask for more items. Its last
        attempt waits for such a worker as long as there may be one."""
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
        """Records that an item raised an exception. If it failed on another worker too, only the item is
        blamed."""
        item.attempts, item.reason = item.attempts + 1, reason
        worker.proven = False
        if not item.failed_on - {worker.number}:
            worker.failures += 1
        item.failed_on.add(worker.number)
        self._again_or_quarantine(item, item.attempts >= self.attempts)

    def is_broken(self, worker: Worker) -> bool:
        """Whether a new worker should replace it; False after too many replacements without success."""
        return worker.failures >= WORKER_FAILURES and self._replaced < self.bound

    def replaced(self, worker: Worker) -> None:
        """Puts the items of a replaced worker back, without blame."""
        self._replaced += 1
        self.todo.extend(worker.items.values())

    def died(self, worker: Worker, reason: str, busy: bool) -> None:
        """Records a worker's death. Raises UserError if workers do nothing but die. The death of a worker
        without items does not count while others are ``busy``, because these may still finish."""
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
        """Quarantines all items on which workers died, because they may cause the deaths; only once."""
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
