"""Compares the rows of a report: intervals, retention, gap closed and paired differences.

retention = student / teacher; gap closed = (student - reference) / (teacher - reference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.candidates.recipe_rows import RANDOM, TEACHER
from evaluation.measures import intervals
from evaluation.measures.intervals import Estimates
from evaluation.tasks.task import Task


def add_comparisons(
    rows: dict[str, dict[str, Any]],
    tasks: Mapping[str, Estimates],
    macro: Estimates,
    task_by_name: Mapping[str, Task],
) -> None:
    """Adds best_reference, retention, gaps closed, differences and intervals to every row.

    ``tasks``: task name -> estimates; ``macro``: estimates of the macro score. Model i of each is the i-th
    row. A row's ``references``: kind of start -> name of the row.
    """
    names = list(rows)
    for row in rows.values():
        row["best_reference"] = _best_reference(row, rows)
    for position, (name, row) in enumerate(rows.items()):
        lowest = {task: _lowest(task_by_name[task]) for task in tasks}
        scores = {
            task: _score_interval(estimates, position, lowest[task]) for task, estimates in tasks.items()
        }
        row["intervals"] = {"scores": scores, "macro": _score_interval(macro, position, -1.0)}
        for measure, positions in _positions(name, row, names).items():
            ratios = {task: _ratio(estimates, *positions) for task, estimates in tasks.items()}
            row[measure], row["intervals"][measure] = _ratio(macro, *positions)
            row[f"{measure}_by_task"] = {task: value for task, (value, _) in ratios.items()}
            row["intervals"][f"{measure}_by_task"] = {task: ends for task, (_, ends) in ratios.items()}
        row["differences"] = {
            other: _differences(tasks, macro, position, names.index(other))
            for other in dict.fromkeys([TEACHER, *row["references"].values()])
            if other in names and other != name
        }


def _best_reference(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the name of the reference with the highest macro score; None if the row has no references."""
    return max(row["references"].values(), key=lambda name: rows[name]["macro"], default=None)


def _positions(name: str, row: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """Returns name of the ratio -> positions in ``names`` of student, teacher and (not for retention)
    reference; () if that ratio is undefined, as a gap closed is without its reference."""
    if name == TEACHER or TEACHER not in names:
        return dict.fromkeys(("retention", "gap_closed", "gap_closed_best"), ())
    student, teacher = names.index(name), names.index(TEACHER)
    references = {"gap_closed": row["references"].get(RANDOM), "gap_closed_best": row["best_reference"]}
    return {"retention": (student, teacher)} | {
        measure: () if reference is None else (student, teacher, names.index(reference))
        for measure, reference in references.items()
    }


def _ratio(estimates: Estimates, *positions: int) -> tuple[float | None, dict[str, float] | None]:
    """Returns the gap closed, or without a reference the retention, and its interval, as in report.json.

    ``positions``: of student, teacher and reference. Both results are None if there are no positions.
    """
    if not positions:
        return None, None
    student, teacher, *reference = positions
    if reference:
        ratio = intervals.gap_closed(estimates, student, reference[0], teacher)
    else:
        ratio = intervals.retention(estimates, student, teacher)
    if ratio is None:
        return None, None
    return ratio.value, ratio.interval and dict(zip(("low", "high"), ratio.interval, strict=True))


def _differences(
    tasks: Mapping[str, Estimates], macro: Estimates, position: int, other: int
) -> dict[str, Any]:
    """Returns the difference of the macro scores, and in ``by_task`` those of the tasks' scores."""
    by_task = {task: _difference(estimates, position, other) for task, estimates in tasks.items()}
    return _difference(macro, position, other) | {"by_task": by_task}


def _difference(estimates: Estimates, position: int, other: int) -> dict[str, Any]:
    """Returns the score at ``position`` minus that at ``other``, its interval and p of the paired test."""
    unit = np.eye(len(estimates.scores))
    contrast = unit[position] - unit[other]
    low, high = intervals.interval(estimates, contrast)
    return {
        "difference": float(contrast @ estimates.scores),
        "interval": {"low": low, "high": high},
        "p": intervals.p_value(estimates, contrast),
    }


def _score_interval(estimates: Estimates, position: int, lowest: float) -> dict[str, float]:
    """Returns the interval of a score, clipped to the possible scores, [lowest, 1]."""
    low, high = intervals.interval(estimates, np.eye(len(estimates.scores))[position])
    return {"low": max(low, lowest), "high": min(high, 1.0)}


def _lowest(task: Task) -> float:
    """Returns the lowest possible score: -1 if the task is scored by a correlation, otherwise 0."""
    return -1.0 if {"matthews", "pearson", "spearman"} & set(task.main_metrics) else 0.0
