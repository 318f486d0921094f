"""The reference pages that are generated from the code are up to date."""

from __future__ import annotations

import sys

import pytest

from docs import demo_table
from docs.reference import FOLDER, pages

STALE = "is not up to date: run python -m docs.reference"


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return pages()


def test_settings(written: dict[str, str]) -> None:
    assert (FOLDER / "settings.md").read_text() == written["settings.md"], f"settings.md {STALE}"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently there")
def test_commands(written: dict[str, str]) -> None:
    assert (FOLDER / "commands.md").read_text() == written["commands.md"], f"commands.md {STALE}"


def test_front_page() -> None:
    """The README shows the demo's kept result as the demo prints it today."""
    assert demo_table.README.read_text() == demo_table.front_page(), (
        "README.md: run python -m docs.demo_table"
    )
