"""The package needs nothing else of its stage, and to be imported neither torch nor transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path


def test_the_package_imports_no_torch(root_dir: Path) -> None:
    modules = "offline_teacher.families, offline_teacher.families.positions, offline_teacher.families.pooling"
    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    program = f"import sys, {modules}; found = {heavy}; sys.exit(f'imports {{found}}' if found else 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root_dir, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_package_imports_no_other_room(root_dir: Path) -> None:
    for path in (root_dir / "offline_teacher/families").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in (
                "offline_teacher",
                "student_train",
                "evaluation",
                "infra",
            ):
                assert str(node.module).startswith(("offline_teacher.families", "infra.errors")), path
