"""A small store."""

from __future__ import annotations

from pathlib import Path

import pytest

from offline_teacher.store.store import Store
from tests.store.synthetic import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of the default layout, of two splits."""
    return make_store(str(tmp_path / "store"))
