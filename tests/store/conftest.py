"""The S3 server and its proxy, as the tests of ``infra`` have them, and a small store."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.infra.conftest import bucket, proxy, s3_endpoint  # noqa: F401 - fixtures

from offline_teacher.store.reader import Store
from tests.store.synthetic import make_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of the default layout, of two splits."""
    return make_store(str(tmp_path / "store"))
