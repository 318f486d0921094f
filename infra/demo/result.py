"""The table that the demo ends with, from its report. ``__main__`` prints the lines around the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra import console

TEACHER, RANDOM = "teacher", "random"


def result_table(report: Mapping[str, Any], held_out: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table of scores, sizes and times, with a column for the teacher and for each student.

    Args:
        report: content of report.json (evaluation/report/content.py).
        held_out: student -> its measures on held-out sequences (``results.validation`` of its model.json).
    """
    rows, students = report["rows"], report["students"]
    shown = {name: rows[name] for name in (TEACHER, *students)}
    lines = [
        [task, *(_score(row, "scores", task) for row in shown.values()), _gaps(rows, students, task)]
        for task in rows[TEACHER]["scores"]
    ]
    lines.append(["mean", *(_score(row, "macro") for row in shown.values()), _gaps(rows, students)])
    undistilled = [rows[rows[name]["references"][RANDOM]] for name in students]
    lines.append(["undistilled mean", "", *(_score(row, "macro") for row in undistilled), ""])
    losses = [held_out[name].get("mlm_loss") for name in students]
    teacher_loss = next(
        (one["teacher_mlm_loss"] for one in held_out.values() if "teacher_mlm_loss" in one), None
    )
    lines += [
        ["masked-LM loss", *("" if loss is None else f"{loss:.3f}" for loss in (teacher_loss, *losses)), ""],
        ["parameters", *(f"{row['parameters'] / 1e6:.2f} M" for row in shown.values()), ""],
        ["latency", *(f"{row['latency']['p50_ms']:.2f} ms" for row in shown.values()), ""],
    ]
    return console.table(lines, ["", *shown, "gap closed"])


def _score(row: Mapping[str, Any], name: str, task: str | None = None) -> str:
    value, ends = row[name], row["intervals"][name]
    if task is not None:
        value, ends = value[task]["score"], ends[task]
    return f"{100 * value:.1f} [{100 * ends['low']:.1f}, {100 * ends['high']:.1f}]"


def _gaps(rows: Mapping[str, Any], students: list[str], task: str | None = None) -> str:
    gaps = (
        rows[name]["gap_closed"] if task is None else rows[name]["gap_closed_by_task"][task]
        for name in students
    )
    return ", ".join("unclear" if gap is None else f"{100 * gap:.0f} %" for gap in gaps)
