"""Compares the rows of a report: intervals, retention, gap closed, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.measures import intervals
from evaluation.measures.intervals import Estimates, Ratio
from evaluation.recipe_rows import RANDOM, TEACHER
from evaluation.tasks.task import Task


def add_comparisons(
    rows: dict[str, dict[str, Any]],
    tasks: Mapping[str, Estimates],
    macro: Estimates,
    known: Mapping[str, Task],
) -> None:
    """Fill retention, gaps closed, differences and intervals of every row.

    tasks, macro: estimates whose models are in the rows' order; known: the tasks by name.
    """
    names = list(rows)
    for row in rows.values():
        row["best_reference"] = _best(row, rows)
    for place, (name, row) in enumerate(rows.items()):
        row["intervals"] = {
            "scores": {task: _score_ends(one, place, _least(known[task])) for task, one in tasks.items()},
            "macro": _score_ends(macro, place, -1.0),
        }
        for measure, divisors in _ratios(name, row, names).items():
            ratios = {task: _parts(_ratio(one, *divisors)) for task, one in tasks.items()}
            row[measure], row["intervals"][measure] = _parts(_ratio(macro, *divisors))
            row[f"{measure}_by_task"] = {task: value for task, (value, _) in ratios.items()}
            row["intervals"][f"{measure}_by_task"] = {task: ends for task, (_, ends) in ratios.items()}
        row["differences"] = {
            other: {
                **_difference(macro, place, names.index(other)),
                "by_task": {task: _difference(one, place, names.index(other)) for task, one in tasks.items()},
            }
            for other in dict.fromkeys([TEACHER, *row["references"].values()])
            if other in names and other != name
        }


def _best(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The reference of highest macro score."""
    return max(row["references"].values(), key=lambda name: rows[name]["macro"], default=None)


def _ratios(name: str, row: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, tuple[int | None, ...]]:
    """Measure -> positions of student, teacher and reference; () where it is not defined."""
    if name == TEACHER or TEACHER not in names:
        return dict.fromkeys(("retention", "gap_closed", "gap_closed_best"), ())
    both = names.index(name), names.index(TEACHER)
    references = {"gap_closed": row["references"].get(RANDOM), "gap_closed_best": row["best_reference"]}
    return {"retention": (*both, None)} | {
        measure: () if reference is None else (*both, names.index(reference))
        for measure, reference in references.items()
    }


def _ratio(
    estimates: Estimates,
    student: int | None = None,
    teacher: int | None = None,
    reference: int | None = None,
) -> Ratio | None:
    if student is None or teacher is None:
        return None
    if reference is None:
        return intervals.retention(estimates, student, teacher)
    return intervals.gap_closed(estimates, student, reference, teacher)


def _parts(ratio: Ratio | None) -> tuple[float | None, dict[str, float] | None]:
    """Its value and its interval for report.json."""
    if ratio is None:
        return None, None
    return ratio.value, ratio.interval and dict(zip(("low", "high"), ratio.interval, strict=True))


def _difference(estimates: Estimates, place: int, other: int) -> dict[str, Any]:
    """How much higher a row scores than another, with interval and p of the paired test."""
    unit = np.eye(len(estimates.scores))
    contrast = unit[place] - unit[other]
    low, high = intervals.interval(estimates, contrast)
    return {
        "difference": float(contrast @ estimates.scores),
        "interval": {"low": low, "high": high},
        "p": intervals.p_value(estimates, contrast),
    }


def _score_ends(estimates: Estimates, place: int, least: float) -> dict[str, float]:
    """Of a score, which is in [least, 1]."""
    low, high = intervals.interval(estimates, np.eye(len(estimates.scores))[place])
    return {"low": max(low, least), "high": min(high, 1.0)}


def _least(task: Task) -> float:
    """The least value of a task's score: correlations can be negative, shares cannot."""
    return -1.0 if {"matthews", "pearson", "spearman"} & set(task.main) else 0.0
