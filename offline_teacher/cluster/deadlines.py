"""Deadlines of items, and pauses of places (host and device) after failures. `pool` prints what is late."""

from __future__ import annotations

import bisect

FACTOR = 5.0
"""The deadline is this many times the median duration of finished items of the same size."""
LEAST_SECONDS = 60.0
"""Shortest deadline, in seconds."""
FIRST_SECONDS = 3600.0
"""Deadline, in seconds, until ``ENOUGH`` items are finished."""
ENOUGH = 3
"""Number of finished items from which the median is used."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""A place gets a new worker at once after its first failure, then after 2, 4, 8, ... at most 60 seconds."""


class Deadlines:
    """Deadlines from the durations of finished items. An item of size 2 may take twice as long as size 1."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        """Durations of finished items, each divided by the item's size, ascending."""

    def record(self, seconds: float, size: float) -> None:
        bisect.insort(self._seconds, seconds / size)

    def limit(self, size: float, delays: int) -> float:
        """Returns the deadline in seconds. It doubles with each of the ``delays`` of the item."""
        count = len(self._seconds)
        if count < ENOUGH:
            return FIRST_SECONDS * 2.0**delays
        return max(LEAST_SECONDS, FACTOR * self._seconds[count // 2] * size) * 2.0**delays


class Backoff:
    """Decides when a place (host and device) may get a new worker after a worker failed there."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}
        """Place -> (number of failures in a row, end of the pause)."""

    def record_failure(self, place: str, now: float) -> float:
        """Records a failure; failures during a pause count as one. Returns when a new worker may start."""
        count, end = self._failures.get(place, (0, -1.0))
        if now > end:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (count - 1)) if count else 0.0
            count, end = count + 1, now + pause
            self._failures[place] = count, end
        return end

    def record_success(self, place: str) -> None:
        """Clears the failures of a place where an item was finished."""
        self._failures.pop(place, None)
