"""Logs failures: one file per failed item, and short lines on the driver's terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime

from infra.errors import UserError
from infra.files import storage
from offline_teacher.cluster.work_queue import Item

REMIND_SECONDS = 60.0
"""The same failure at the same place is printed at most once in this many seconds."""
COMPARED_CHARACTERS = 40
"""Two failures are the same if the first characters of their reasons, this many, are equal."""


class FailureLog:
    """Writes to ``root``, the recipe's output. The driver writes the logs, as a worker's disk may be full."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.say: Callable[[str], None] = print
        self._silent_until: dict[tuple[str, str], float] = {}

    def report(self, place: str, item: Item | None, reason: str, trace: str = "") -> None:
        """Adds the failure to the log file of ``item``, if not None, and prints one line with ``say``."""
        line = f"{place}: {item.name if item else 'start'}: {reason}"
        log_path = ""
        if item is not None:
            item.log.append(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC {line}\n{trace}".rstrip())
            path = storage.join(self._root, "logs", f"{item.name.replace('/', '-')}.log")
            with contextlib.suppress(UserError):  # the pass continues if the log cannot be written
                storage.publish_bytes(path, "\n\n".join([*item.log, ""]).encode())
                log_path = f" (log: {path})"
        now, key = time.monotonic(), (place, reason[:COMPARED_CHARACTERS])
        if now >= self._silent_until.get(key, now):
            self._silent_until[key] = now + REMIND_SECONDS
            self.say(f"{line}{log_path}")
