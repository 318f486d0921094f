"""``python -m tests.benchmarks [name-filter]``: runs every ``bench_*.py`` here and records what it measured.

Each has ``run() -> list[dict]`` of {name, value, unit, goal, holds, conditions}; goal and holds may be
None. The list goes to runs/bench/benchmarks.json; a run with a filter replaces only what it measured.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from infra import storage
from infra.console import table

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "runs" / "bench" / "benchmarks.json"
KEYS = {"name", "value", "unit", "goal", "holds", "conditions"}


def main(wanted: str) -> int:
    """Exit code 1 where a goal is missed."""
    modules = [path.stem for path in sorted(HERE.glob("bench_*.py")) if wanted in path.stem]
    if not modules:
        print(f"error: no benchmark matches {wanted!r}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for name in modules:
        print(f"{name} ...", flush=True)
        rows += importlib.import_module(f"tests.benchmarks.{name}").run()
        record(rows)
    cells = [[r["name"], _number(r["value"]), r["unit"], r["goal"], _held(r), r["conditions"]] for r in rows]
    print(table(cells, ["name", "value", "unit", "goal", "holds", "conditions"]))
    print(RESULTS)
    return 1 if any(row["holds"] is False for row in rows) else 0


def record(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == KEYS, row
    names = {row["name"] for row in rows}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [row for row in before if row["name"] not in names]
    storage.publish_json(str(RESULTS), sorted(kept + rows, key=lambda row: row["name"]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _held(row: dict[str, Any]) -> str:
    return {True: "yes", False: "NO", None: "-"}[row["holds"]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
