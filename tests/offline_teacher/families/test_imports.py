"""The rooms need nothing else of their stage, and families neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_package_imports_no_torch(root_dir: Path) -> None:
    modules = "offline_teacher.families, offline_teacher.families.positions, offline_teacher.models.pooling"
    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    program = f"import sys, {modules}; found = {heavy}; sys.exit(f'imports {{found}}' if found else 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root_dir, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("room", "allowed"),
    [("families", ("families",)), ("models", ("families", "models"))],
)
def test_the_package_imports_no_other_room(root_dir: Path, room: str, allowed: tuple[str, ...]) -> None:
    names = ("infra.", *(f"offline_teacher.{name}" for name in allowed))
    for path in (root_dir / "offline_teacher" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            stages = ("offline_teacher", "student_train", "evaluation", "infra")
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in stages:
                assert str(node.module).startswith(names), path
