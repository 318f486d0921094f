"""What a recipe requires of its students (``evaluation.require``), compared with a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from infra.settings.sections import Require

AT_MOST = ("int8_loss", "calibration_error", "p50_ms", "megabytes")
"""Limits; the other requirements are least values."""


def unmet(report: Mapping[str, Any], require: Require) -> list[str]:
    """One phrase for every requirement that a student does not meet; it names student, value and limit."""
    found = []
    for student in report["students"]:
        values = measured(report, student)
        for name, limit in dataclasses.asdict(require).items():
            if limit is None:
                continue
            if name == "beats":
                found += [f"{student}: {phrase}" for phrase in _not_better(report, student, limit)]
                continue
            value = values[name]
            if value is None:
                found.append(f"{student}: {name} is unknown, required is {_sign(name)} {limit:g}")
            elif not (value <= limit if name in AT_MOST else value >= limit):
                found.append(f"{student}: {name} is {value:.4g}, required is {_sign(name)} {limit:g}")
    return found


def measured(report: Mapping[str, Any], student: str) -> dict[str, float | None]:
    """Every number that can be required of a student, by its name in ``Require``."""
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
    row = report["rows"][student]
    reference = row["references"].get(kind)
    if reference is None:
        yield f"there is no row {kind} to beat"
        return
    better = row["differences"][reference]
    if not (better["difference"] > 0 and better["p"] < 0.05):
        low, high = better["interval"]["low"], better["interval"]["high"]
        yield (
            f"does not beat {reference}: its macro score is {100 * better['difference']:+.1f} points from it "
            f"[{100 * low:.1f}, {100 * high:.1f}]"
        )
