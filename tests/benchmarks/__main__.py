"""``python -m tests.benchmarks [name-filter]``: runs every ``bench_*.py`` here and records what it measured.

Each has ``run() -> list[dict]`` of {name, value, unit, goal, holds, conditions}; goal and holds may be
None. The list goes to runs/bench/benchmarks.json; a run with a filter replaces only what it measured.
One without ``run`` needs arguments of its own (models, data) and is left out, with a word.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tests.benchmarks.results import RESULTS, Row, record, shown

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Exit code 1 where a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("filter", nargs="?", default="", help="part of a name, for example 'teacher'")
    wanted = parser.parse_args().filter
    modules = [path.stem for path in sorted(HERE.glob("bench_*.py")) if wanted in path.stem]
    if not modules:
        print(f"error: no benchmark matches {wanted!r}", file=sys.stderr)
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
    print(shown(rows))
    print(RESULTS)
    return 1 if any(row["holds"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
