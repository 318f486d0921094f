"""How long an item may take, and how long a troubled place rests. Pure arithmetic on seconds."""

from __future__ import annotations

import bisect

FACTOR = 5.0
"""An item is late after this many times the median of its kind ..."""
LEAST_SECONDS = 60.0
"""... and not before this."""
FIRST_SECONDS = 3600.0
"""Until ``ENOUGH`` items are done."""
ENOUGH = 3
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Of a place: none after its first trouble, then 2, 4, 8 ... 60 s."""


class Deadlines:
    """The deadline of items of one kind. An item of size 2 may take twice as long as one of size 1."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        """For size 1, ascending."""

    def took(self, seconds: float, size: float) -> None:
        bisect.insort(self._seconds, seconds / size)

    def limit(self, size: float, delays: int) -> float:
        """Seconds for an item that was late ``delays`` times before: each time it may take twice as long."""
        count = len(self._seconds)
        if count < ENOUGH:
            return FIRST_SECONDS * 2.0**delays
        return max(LEAST_SECONDS, FACTOR * self._seconds[count // 2] * size) * 2.0**delays


class Backoff:
    """When a place (a host and its device) may have a new worker after its last one failed."""

    def __init__(self) -> None:
        self._troubles: dict[str, tuple[int, float]] = {}
        """Place -> troubles in a row, and the end of its pause."""

    def trouble(self, place: str, now: float) -> float:
        """The time from which a new worker may start. Troubles within one pause count once."""
        count, end = self._troubles.get(place, (0, -1.0))
        if now > end:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (count - 1)) if count else 0.0
            count, end = count + 1, now + pause
            self._troubles[place] = count, end
        return end

    def works(self, place: str) -> None:
        """Something was finished there: its troubles are forgotten."""
        self._troubles.pop(place, None)
