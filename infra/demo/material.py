"""What the demo feeds the stages: corpus, task files and teacher, each made once and published whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from infra.demo.documents import documents
from infra.demo.tasks import TASKS, task_files
from infra.storage import digest_bytes

TRAIN_SEED, VALIDATION_SEED, TASK_SEED = 1, 2, 3


def make_directory(final: Path, fill: Callable[[Path], None], key: str) -> None:
    """Run ``fill`` on a temporary directory beside ``final``, then rename; nothing where it has this key."""
    note = final / "made_by.txt"
    if note.exists() and note.read_text() == key:
        return
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    fill(temporary)
    (temporary / "made_by.txt").write_text(key)
    temporary.chmod(0o755)
    os.rename(temporary, final)


def make_material(root: Path, corpus_bytes: int, validation_bytes: int, teacher_steps: int) -> None:
    """``root/corpus``, ``root/glue``, ``root/teacher``: the same text and tasks on every machine."""

    def corpus(directory: Path) -> None:
        for name, seed, size in (
            ("train", TRAIN_SEED, corpus_bytes),
            ("validation", VALIDATION_SEED, validation_bytes),
        ):
            (directory / f"{name}.txt").write_text("\n".join(documents(seed, size)) + "\n", encoding="utf-8")

    def glue(directory: Path) -> None:
        for task in TASKS:
            (directory / task.name).mkdir()
            for name, text in task_files(task, TASK_SEED).items():
                (directory / task.name / name).write_text(text, encoding="utf-8")

    def teacher(directory: Path) -> None:
        from infra.demo.teacher import train_teacher  # torch is not needed for the rest

        texts = (root / "corpus" / "train.txt").read_text(encoding="utf-8").splitlines()
        train_teacher(texts, directory, teacher_steps)

    sizes = f"{corpus_bytes} {validation_bytes} {teacher_steps}"
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    key = f"{sizes} {digest_bytes(sources)}\n"
    for name, fill in (("corpus", corpus), ("glue", glue), ("teacher", teacher)):
        make_directory(root / name, fill, key)
