"""The package and a family's description need neither torch nor transformers."""

from __future__ import annotations

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
