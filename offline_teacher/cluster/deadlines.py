"""Deadlines of items, and pauses of hosts after failures. Pure arithmetic on seconds."""

from __future__ import annotations

import bisect

FACTOR = 5.0
"""An item is late after this many times the median duration of its kind ..."""
LEAST_SECONDS = 60.0
"""... but never sooner than after this many seconds."""
FIRST_SECONDS = 3600.0
"""The deadline until ``ENOUGH`` items are done, when there is no useful median yet."""
ENOUGH = 3
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds before a place gets a new worker: none after its first failure, then 2, 4, 8 ... 60."""


class Deadlines:
    """The deadline of items of one kind. An item of size 2 may take twice as long as one of size 1."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        """Durations of finished items, each divided by the item's size, ascending."""

    def took(self, seconds: float, size: float) -> None:
        bisect.insort(self._seconds, seconds / size)

    def limit(self, size: float, delays: int) -> float:
        """The deadline in seconds of an item that was late ``delays`` times. Each delay doubles it."""
        count = len(self._seconds)
        if count < ENOUGH:
            return FIRST_SECONDS * 2.0**delays
        return max(LEAST_SECONDS, FACTOR * self._seconds[count // 2] * size) * 2.0**delays


class Backoff:
    """When a place (a host and its device) may get a new worker after a worker failed there."""

    def __init__(self) -> None:
        self._troubles: dict[str, tuple[int, float]] = {}
        """Place -> number of failures in a row, and the end of its pause."""

    def trouble(self, place: str, now: float) -> float:
        """Records a failure and returns when a new worker may start. Failures within one pause count once."""
        count, end = self._troubles.get(place, (0, -1.0))
        if now > end:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (count - 1)) if count else 0.0
            count, end = count + 1, now + pause
            self._troubles[place] = count, end
        return end

    def works(self, place: str) -> None:
        """Clears the failures of a place, because an item was finished there."""
        self._troubles.pop(place, None)
