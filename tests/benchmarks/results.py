"""Rows of measurements, and the JSON file with the list of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.console import table
from infra.files import storage

RESULTS = Path(__file__).resolve().parents[2] / "runs" / "bench" / "benchmarks.json"
KEYS = ("name", "value", "unit", "goal", "holds", "conditions")

Row = dict[str, Any]


def row(name: str, value: float, unit: str, goal: str | None, conditions: str) -> Row:
    """Returns the row of one measurement; its key ``holds`` says whether the value meets the goal. ``goal``:
    ``<= X``, ``>= X``, or None for a value without a goal (then ``holds`` is None). ``conditions``: the
    circumstances of the measurement, in words."""
    holds = None
    if goal is not None:
        sign, limit = goal.split()
        holds = value <= float(limit) if sign == "<=" else value >= float(limit)
    return dict(zip(KEYS, (name, value, unit, goal, holds, conditions), strict=True))


def record(rows: list[Row], path: Path = RESULTS) -> None:
    """Writes the rows into the file, where they replace older rows of the same names."""
    for measured in rows:
        assert set(measured) == set(KEYS), measured
    names = {measured["name"] for measured in rows}
    before = json.loads(path.read_text()) if path.exists() else []
    kept = [measured for measured in before if measured["name"] not in names]
    storage.publish_json(str(path), sorted(kept + rows, key=lambda measured: measured["name"]))


def rows_table(rows: list[Row]) -> str:
    """Returns the rows as a plain-text table."""
    cells = [[r["name"], _number(r["value"]), r["unit"], r["goal"], _held(r), r["conditions"]] for r in rows]
    return table(cells, list(KEYS))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _held(measured: Row) -> str:
    return {True: "yes", False: "NO", None: "-"}[measured["holds"]]
