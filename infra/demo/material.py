"""What the demo feeds the stages: corpus, task files and teacher, made once and published whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from infra.demo.language import documents
from infra.demo.tasks import TASKS, task_files
from infra.storage import digest_bytes

TEACHER = Path(__file__).with_name("teacher")
CORPUS = {"train": (1, 1_000_000), "validation": (2, 60_000)}
"""File -> seed and bytes of its text."""
TASK_SEED = 3


def make_material(root: Path) -> None:
    """``root/corpus``, ``root/glue`` and ``root/teacher``: the same bytes on every machine.

    Written beside ``root`` and then renamed; nothing is done where they are there, made by the same program.
    """
    sources = sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix not in ("", ".pyc"))
    key, note = digest_bytes(b"".join(path.read_bytes() for path in sources)), root / "made_by.txt"
    if note.exists() and note.read_text() == key:
        return
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    for stale in root.parent.glob(f".{root.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    shutil.copytree(TEACHER, draft / "teacher")
    files = {f"corpus/{name}.txt": "\n".join(documents(*what)) + "\n" for name, what in CORPUS.items()}
    for task in TASKS:
        files |= {f"glue/{task.name}/{name}": text for name, text in task_files(task, TASK_SEED).items()}
    for name, text in (files | {note.name: key}).items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_text(text, encoding="utf-8")
    draft.chmod(0o755)
    os.rename(draft, root)
