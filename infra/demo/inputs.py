"""Writes the demo's inputs for the stages: corpus, task files and teacher."""

from __future__ import annotations

from pathlib import Path

from infra.demo.language import documents
from infra.demo.tasks import TASKS, task_files
from infra.files.storage import publish_if_changed

TEACHER = Path(__file__).with_name("teacher")
CORPUS = {"train": (1, 1_000_000), "validation": (2, 60_000)}
"""Name of a corpus file -> random seed and size in bytes of its text."""
TASK_SEED = 3


def write_inputs(root: Path) -> None:
    """Writes ``root/corpus``, ``root/glue`` and ``root/teacher``, with the same bytes on every machine. Files
    that already have these bytes are not written again."""
    files = {f"teacher/{path.name}": path.read_bytes() for path in TEACHER.iterdir()}
    for name, (seed, size) in CORPUS.items():
        files[f"corpus/{name}.txt"] = "".join(f"{text}\n" for text in documents(seed, size)).encode()
    for task in TASKS:
        for name, text in task_files(task, TASK_SEED).items():
            files[f"glue/{task.name}/{name}"] = text.encode()
    for name, data in files.items():
        publish_if_changed(str(root / name), data)
