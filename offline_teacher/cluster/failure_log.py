"""Logs of failures: one file for each item that failed, and short lines on the driver's terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime

from infra.errors import UserError
from infra.files import storage
from offline_teacher.cluster.work_queue import Item

LOGS = "logs"
"""Subdirectory of a recipe's output."""
REMIND_SECONDS = 60.0
"""The same failure at the same place is printed at most once in this many seconds."""
SAME = 40
"""Failures count as the same if this many first characters of their reasons agree."""


class TroubleLog:
    """``root``: the recipe's output. The driver writes the logs, because a worker's disk may be full."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.say: Callable[[str], None] = print
        self._told: dict[tuple[str, str], float] = {}

    def tell(self, place: str, item: Item | None, reason: str, trace: str = "") -> None:
        """Adds the failure to the item's file, if there is an item, and passes one line to ``say``."""
        line = f"{place}: {item.name if item else 'start'}: {reason}"
        kept = ""
        if item is not None:
            item.log.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC {line}\n{trace}".rstrip())
            path = storage.join(self._root, LOGS, f"{item.name.replace('/', '-')}.log")
            with contextlib.suppress(UserError):  # the pass continues if the log cannot be written
                storage.publish_bytes(path, "\n\n".join([*item.log, ""]).encode())
                kept = f" (log: {path})"
        now, key = time.monotonic(), (place, reason[:SAME])
        if now >= self._told.get(key, now):
            self._told[key] = now + REMIND_SECONDS
            self.say(f"{line}{kept}")
