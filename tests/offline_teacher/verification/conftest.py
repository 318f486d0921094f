"""A finished store, and a copy of it to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from offline_teacher.verification import repair
from tests.offline_teacher.local_pool import LocalCluster, make
from tests.offline_teacher.tiny_teacher import save_bert, write_recipe, write_text


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "Cluster", LocalCluster)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose store is complete, masked by frequency, with held-out text."""
    directory = tmp_path_factory.mktemp("audit")
    text, model = write_text(directory / "text.txt", 40), save_bert(directory / "model")
    held_out = write_text(directory / "held_out.txt", 10, seed=1)
    path = write_recipe(
        directory,
        text,
        model,
        corpus={"path": [str(text)], "validation_path": [str(held_out)]},
        masking={"sampling": "frequency"},
        teacher={"dtype": "float32"},
    )
    make(path)
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    shutil.copytree(made.parent / "runs/tiny/store", tmp_path / "store")
    return tmp_path / "store"
