"""The wheel holds all that runs, and its commands work from it, outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("evaluation", "infra", "offline_teacher", "student_train")
DATA = ("*.py", "*.cpp", "*.hpp", "store/FORMAT.md", "recipes/*.yaml", "deploy/deepspeed/*.json")
"""What a package needs at run time."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages that holds the unpacked wheel and nothing else."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=source, check=True)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def installed(site: Path) -> Distribution:
    (found,) = distributions(path=[str(site)])
    return found


def outside(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in an empty directory, where ours are found in ``site`` alone."""
    empty = site.parent / "empty"
    empty.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *words], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )


def test_everything_that_runs_is_in_it(site: Path) -> None:
    for package in PACKAGES:
        paths = {path for pattern in DATA for path in (ROOT / package).rglob(pattern)}
        assert paths
        for path in paths:
            copy = site / path.relative_to(ROOT)
            assert copy.read_bytes() == path.read_bytes(), f"{copy.relative_to(site)} is not in the wheel"


def test_nothing_else_is_in_it(site: Path) -> None:
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == set(PACKAGES)


def test_its_commands_are_found(site: Path, installed: Distribution) -> None:
    scripts = [entry for entry in installed.entry_points if entry.group == "console_scripts"]
    assert {entry.name for entry in scripts} >= {"distil-teacher", "distil-student", "distil-evaluate"}
    for entry in scripts:
        code = (
            f"import sys; from {entry.module} import {entry.attr}; sys.argv[1:] = ['--help']; {entry.attr}()"
        )
        ended = outside(site, "-c", code)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "offline_teacher.main"),
        ("-m", "student_train.main"),
        ("student_train/main.py",),
        ("-m", "evaluation.main"),
        ("-m", "infra.demo"),
        ("-m", "infra.sizing"),
    ],
)
def test_a_command_runs_from_it(site: Path, words: tuple[str, ...]) -> None:
    words = tuple(str(site / word) if word.endswith(".py") else word for word in words)
    ended = outside(site, *words, "--help")
    assert ended.returncode == 0, ended.stderr


def test_what_runs_is_the_wheel(site: Path) -> None:
    names = ", ".join(PACKAGES)
    ended = outside(site, "-c", f"import {names}; print(*(m.__file__ for m in ({names})), sep='\\n')")
    assert ended.stdout.split() == [str(site / name / "__init__.py") for name in PACKAGES]
