"""Checks whether the students in a report meet a recipe's requirements (``evaluation.require``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from infra.settings.sections import Require

AT_MOST = ("int8_loss", "calibration_error", "p50_ms", "megabytes")
"""Requirements that are upper limits; the other numeric requirements are lower limits."""


def unmet(report: Mapping[str, Any], require: Require) -> list[str]:
    """Returns one phrase, with student, value and limit, per requirement that a student does not meet."""
    phrases = []
    for student in report["students"]:
        values = measured(report, student)
        for name, limit in dataclasses.asdict(require).items():
            if limit is None:
                continue
            if name == "beats":
                phrases += [f"{student}: {phrase}" for phrase in _not_better(report, student, limit)]
                continue
            value = values[name]
            if value is None:
                phrases.append(f"{student}: {name} is unknown, but must be {_sign(name)} {limit:g}")
            elif not (value <= limit if name in AT_MOST else value >= limit):
                phrases.append(f"{student}: {name} is {value:.4g}, but must be {_sign(name)} {limit:g}")
    return phrases


def measured(report: Mapping[str, Any], student: str) -> dict[str, float | None]:
    """Returns every number that can be required of a student, by its name in ``Require``; None if unknown."""
    row, details = report["rows"][student], report["details"][student]
    losses = [100 * task["int8_lost"] for task in report["devices"].get(student, {}).values()]
    agreements = [task["agreement"] for task in details.values() if task["agreement"] is not None]
    errors = [task["calibration"]["error"] for task in details.values() if "calibration" in task]
    return {
        **{name: row[name] for name in ("macro", "retention", "gap_closed", "gap_closed_best")},
        "agreement": sum(agreements) / len(agreements) if agreements else None,
        "int8_loss": max(losses, default=None),
        "calibration_error": max(errors, default=None),
        "p50_ms": row["latency"]["p50_ms"],
        "megabytes": row["bytes"] / 1e6,
    }


def _sign(name: str) -> str:
    return "at most" if name in AT_MOST else "at least"


def _not_better(report: Mapping[str, Any], student: str, kind: str) -> Iterator[str]:
    """Yields a phrase unless the student is significantly (p < 0.05) better than its reference ``kind``."""
    row = report["rows"][student]
    reference = row["references"].get(kind)
    if reference is None:
        yield f"there is no reference {kind} to beat"
        return
    test = row["differences"][reference]
    if not (test["difference"] > 0 and test["p"] < 0.05):
        low, high = test["interval"]["low"], test["interval"]["high"]
        yield (
            f"does not beat {reference}: the difference of their macro scores is "
            f"{100 * test['difference']:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
        )
