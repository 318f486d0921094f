"""What went wrong: one log file for each item, and a line on the driver's terminal now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime

from infra.errors import UserError
from infra.files import storage
from offline_teacher.cluster.work_queue import Item

LOGS = "logs"
"""Below a recipe's output."""
REMIND_SECONDS = 60.0
"""The same trouble of the same place is told this often."""
SAME = 40
"""Troubles whose first characters agree are the same."""


class TroubleLog:
    """``root``: of the recipe's output, which the driver writes: a worker's disk may be what is full."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._told: dict[tuple[str, str], float] = {}

    def tell(
        self, say: Callable[[str], None], place: str, item: Item | None, reason: str, trace: str = ""
    ) -> None:
        """Adds to the item's file, if there is an item, and ``say``s one line."""
        line = f"{place}: {item.name if item else 'start'}: {reason}"
        kept = ""
        if item is not None:
            item.log.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC {line}\n{trace}".rstrip())
            path = storage.join(self._root, LOGS, f"{item.name.replace('/', '-')}.log")
            with contextlib.suppress(UserError):  # a log that cannot be written ends nothing
                storage.publish_bytes(path, "\n\n".join([*item.log, ""]).encode())
                kept = f" (log: {path})"
        now, key = time.monotonic(), (place, reason[:SAME])
        if now >= self._told.get(key, now):
            self._told[key] = now + REMIND_SECONDS
            say(f"{line}{kept}")
