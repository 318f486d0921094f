"""``python -m tests.benchmarks [name-filter]``: runs every ``bench_*.py`` here and records the measurements.

A benchmark has ``run() -> list[Row]``; ``results.row`` describes a row. The rows go to
runs/bench/benchmarks.json, where they replace older rows of the same names. A benchmark without ``run`` needs
arguments (models, data); it is left out with a message.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tests.benchmarks.results import RESULTS, Row, record, rows_table

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Returns exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filter", nargs="?", default="", help="part of a name, for example 'teacher'")
    name_part = parser.parse_args().filter
    modules = [path.stem for path in sorted(HERE.glob("bench_*.py")) if name_part in path.stem]
    if not modules:
        print(f"error: no benchmark matches {name_part!r}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in modules:
        module = importlib.import_module(f"tests.benchmarks.{name}")
        if not hasattr(module, "run"):
            print(f"{name}: left out, see python tests/benchmarks/{name}.py --help", flush=True)
            continue
        print(f"{name} ...", flush=True)
        rows += module.run()
        record(rows)
    print(rows_table(rows))
    print(RESULTS)
    return 1 if any(row["holds"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
