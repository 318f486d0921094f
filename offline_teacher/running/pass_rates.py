"""The reports of a running pass: its speed, and warnings about workers in another environment."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from infra.files import storage
from infra.trees import difference
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.paths import task_path
from offline_teacher.store.unfinished import finished_tasks

REPORTS = 100
"""About how many times a pass reports its rates to the tracking server; at most once per finished task."""


class Rates:
    """Tokens per second of all workers together and of each place (host and device)."""

    def __init__(self, items: int, retries: int) -> None:
        self.left, self.tokens = items, 0
        self._every = max(1, items // REPORTS)
        self._done, self._retries, self._begin = 0, retries, time.monotonic()
        self._places: dict[str, list[float]] = {}
        """Place -> [tokens computed there, time at which counting started]."""
        self._spread = ""

    def count(self, place: str, tokens: int) -> bool:
        """Counts a finished task. Returns whether the metrics are to be sent now."""
        self._done, self.left, self.tokens = self._done + 1, self.left - 1, self.tokens + tokens
        self._places.setdefault(place, [0.0, self._begin])[0] += tokens
        due = self._done % self._every == 0 or self.left == 0
        if due:
            low, _, high = self._place_rates()
            self._spread = f" ({low:,.0f} to {high:,.0f} per place)" if len(self._places) > 1 else ""
        return due

    def words(self, retries: int) -> str:
        return f"{self._rate():,.0f} tokens/s{self._spread}, {retries - self._retries} retries"

    def metrics(self, retries: int) -> dict[str, float]:
        low, median, high = self._place_rates()
        return {
            "tokens_per_s": self._rate(),
            "tokens_per_s_slowest_place": low,
            "tokens_per_s_median_place": median,
            "tokens_per_s_fastest_place": high,
            "places": len(self._places),
            "tasks_left": self.left,
            "retries": retries - self._retries,
        }

    def _rate(self) -> float:
        return self.tokens / max(time.monotonic() - self._begin, 1e-9)

    def _place_rates(self) -> tuple[float, float, float]:
        """Returns the lowest, the median and the highest rate of a place, in tokens per second."""
        now = time.monotonic()
        rates = [tokens / max(now - begin, 1e-9) for tokens, begin in self._places.values()]
        return min(rates), statistics.median(rates), max(rates)


class Environments:
    """Warns once about each environment that differs from that of the store's first task. A store may mix
    environments: each task records its own, and `verify --rerun` takes it into account."""

    def __init__(self, root: str, splits: Sequence[str]) -> None:
        self._root, self._splits = root, splits
        self._first: dict[str, Any] | None = None
        self._reported: set[str] = set()

    def check(self, place: str, facts: dict[str, Any]) -> None:
        """Compares the environment of a new worker. ``facts``: the result of the worker's ``prepare``."""
        own = facts["environment"]
        if self._first is None:
            self._first = self._recorded() or own
        changed = "; ".join(difference(self._first, own))
        if changed and changed not in self._reported:
            self._reported.add(changed)
            print(
                f"{place} computes in another environment than the first task of this store ({changed});"
                " the last bits of its tasks may differ",
                file=sys.stderr,
            )

    def _recorded(self) -> dict[str, Any] | None:
        """Returns the environment of a task that is already in the store; None if there is no such task."""
        for split in self._splits:
            for name in sorted(finished_tasks(self._root, split))[:1]:
                data = storage.read_bytes(task_path(self._root, split, name))
                with contextlib.suppress(ValueError):  # a damaged index, which `verify` reports
                    return dict(TaskIndex.from_bytes(data).environment)
        return None
