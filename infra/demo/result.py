"""The table that the demo ends with, from its report. ``__main__`` prints the lines around the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra import console

TEACHER, RANDOM = "teacher", "random"


def result_table(report: Mapping[str, Any], held_out: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table of scores, sizes and times, with a column for the teacher and for each student.
    ``report``: content of report.json. ``held_out``: student -> ``results.validation`` of its model.json."""
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
    name = "teacher_mlm_loss"
    teacher_loss = next((measures[name] for measures in held_out.values() if name in measures), None)
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
    closed = (rows[name] for name in students)
    gaps = (row["gap_closed"] if task is None else row["gap_closed_by_task"][task] for row in closed)
    return ", ".join("unclear" if gap is None else f"{100 * gap:.0f} %" for gap in gaps)
