"""Keeps a demo's result for the documentation, and writes its table into the README.

    python -m docs.demo_table [runs/demo]

With a directory, it copies what the table shows from that run into ``docs/demo.json``. The README's table is
always made from that file; `tests/test_reference.py` checks that it is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from infra.demo.result import result_table

FOLDER = Path(__file__).parent
KEPT, README = FOLDER / "demo.json", FOLDER.parent / "README.md"
TABLE = re.compile(r"(?<=ends with this table:\n\n```\n).*?(?=\n\nScores: percent)", re.DOTALL)
_ROW = (
    "scores",
    "macro",
    "intervals",
    "gap_closed",
    "gap_closed_by_task",
    "parameters",
    "latency",
    "references",
)


def kept_result(directory: Path) -> dict[str, Any]:
    """The part of a demo's report and of its students' measures that the table shows."""
    report = json.loads((directory / "evaluation" / "report.json").read_text())
    models = {name: directory / "students" / name / "model.json" for name in report["students"]}
    rows = {name: {key: row[key] for key in _ROW if key in row} for name, row in report["rows"].items()}
    return {
        "report": {"students": report["students"], "rows": rows},
        "held_out": {
            name: json.loads(path.read_text())["results"]["validation"] for name, path in models.items()
        },
    }


def front_page() -> str:
    """The README with the table of ``docs/demo.json``."""
    kept = json.loads(KEPT.read_text())
    table = result_table(kept["report"], kept["held_out"])
    text, count = TABLE.subn(lambda _: table, README.read_text())
    if count != 1:
        raise ValueError(f"{README}: {count} tables of the demo instead of one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help="of a finished demo, to keep its result")
    options = parser.parse_args()
    if options.directory is not None:
        KEPT.write_text(json.dumps(kept_result(options.directory), indent=1, sort_keys=True) + "\n")
    README.write_text(front_page())


if __name__ == "__main__":
    main()
