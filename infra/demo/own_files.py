"""``python -m infra.demo.own_files``: writes example files for the tutorial into the working directory.

The files are ``texts.txt`` (lines of text), ``reviews.csv`` (columns ``text`` and ``label``) and ``teacher/``
(a model directory). They contain the demo's language, sentiment task and teacher.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import NoReturn

from infra import console
from infra.demo.inputs import CORPUS, TEACHER
from infra.demo.language import documents
from infra.demo.tasks import TASKS, task_files
from infra.files.storage import publish_if_changed

LABELS = ("bad", "good")


def write_own_files(root: Path) -> list[str]:
    """Writes the files below ``root``, and returns their names; an unchanged file is not written again."""
    files = {f"teacher/{path.name}": path.read_bytes() for path in TEACHER.iterdir()}
    files["texts.txt"] = "".join(f"{text}\n" for text in documents(*CORPUS["train"])).encode()
    files["reviews.csv"] = _reviews().encode()
    for name, data in files.items():
        publish_if_changed(str(root / name), data)
    return sorted(files)


def _reviews() -> str:
    """Returns the training and dev rows of the demo's sentiment task as one CSV text."""
    (task,) = (task for task in TASKS if task.name == "SST-2")
    output = io.StringIO(newline="")
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(("text", "label"))
    for content in task_files(task, 0).values():
        rows = (line.split("\t") for line in content.splitlines()[1:])
        writer.writerows((text, LABELS[int(label)]) for text, label in rows)
    return output.getvalue()


def main() -> None:
    argparse.ArgumentParser(prog="python -m infra.demo.own_files", description=__doc__).parse_args()
    print("\n".join(write_own_files(Path.cwd())))


def cli() -> NoReturn:
    console.command(main)


if __name__ == "__main__":
    cli()
