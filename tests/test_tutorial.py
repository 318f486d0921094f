"""The tutorial, followed word by word: an installed wheel, an empty directory, the page's own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from infra.files import storage
from tests.conftest import ROOT
from tests.test_docs import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
MINUTES = 10
"""What the page promises, on two idle cores. The test prints the time and does not judge it."""


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment in which this project is an installed wheel. The other packages are those
    of the environment that runs the tests."""
    source, home = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("evaluation", "infra", "offline_teacher", "student_train"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    quick = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *quick, "--wheel-dir", source, "."], cwd=source, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (wheel,) = source.glob("*.whl")
    python = home / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    packages = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def recipe() -> str:
    (found,) = re.findall(r"```yaml\n(name: mine\n.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_tutorial(binaries: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{binaries}{os.pathsep}{environment['PATH']}", "HF_HUB_OFFLINE": "1"}
    assert len(recipe().splitlines()) == 15
    (tmp_path / "recipe.yaml").write_text(recipe())
    begin = time.monotonic()
    for line in commands(PAGE):
        if "--web" in line and shutil.which("npm") is None:
            continue  # the page is built with Node
        ended = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}"
    print(f"{time.monotonic() - begin:.0f} s; the page promises {MINUTES} minutes")
    report = storage.read_json(str(tmp_path / "runs/mine/evaluation/report.json"))
    rows = report["rows"]
    assert {"teacher", "half", "small"} < set(rows)
    for row in rows.values():
        ends = row["intervals"]["scores"]["reviews"]
        assert ends["low"] < ends["high"]
    for student in ("half", "small"):
        assert rows[student]["gap_closed"] is not None
        assert rows[student]["parameters"] < rows["teacher"]["parameters"]
