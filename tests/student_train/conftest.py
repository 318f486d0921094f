"""Stores for the tests of the student, made once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.student_train.tiny_run import make_run


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two stores by ``replay_layers``: one of last hidden states, one of the top layer's input."""
    made = {}
    for replay_layers in (0, 1):
        made[replay_layers] = tmp_path_factory.mktemp("original")
        make_run(made[replay_layers], replay_layers=replay_layers)
    return made


@pytest.fixture
def run_dir(originals: dict[int, Path], tmp_path: Path) -> Path:
    """A fresh copy of a recipe and its store of last hidden states and top-k logits."""
    return copied(originals[0], tmp_path / "run")


@pytest.fixture
def replay_dir(originals: dict[int, Path], tmp_path: Path) -> Path:
    """A fresh copy of a recipe and its store of the top layer's input."""
    return copied(originals[1], tmp_path / "replay")


def copied(original: Path, path: Path) -> Path:
    shutil.copytree(original, path)
    recipe = path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(original), str(path)))
    return path
