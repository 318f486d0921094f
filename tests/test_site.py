"""The site has every page, and builds without a warning where MkDocs is installed (``make docs``)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_docs import DOCUMENTS

MKDOCS = importlib.util.find_spec("mkdocs") is not None
ELSEWHERE = {"README.md": "index.md", "FORMAT.md": "format.md"}


def entries(tree: Any) -> Iterator[str]:
    """Every page of a navigation."""
    if isinstance(tree, str):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from entries(value)


def page_of(path: Path) -> str:
    """Where the site has a document of the repository."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    if path.is_relative_to(ROOT / "infra" / "deploy"):
        return f"deploy/{path.parent.name}.md"
    return ELSEWHERE.get(path.name, path.name.lower())


def test_every_document_is_in_the_navigation() -> None:
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(map(page_of, DOCUMENTS)), "add the page to nav in mkdocs.yml"


@pytest.mark.skipif(not MKDOCS, reason="MkDocs is not installed here; make docs installs it elsewhere")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "tutorial.html").read_text()
    assert 'src="assets/iframe-worker.js"' in page  # without it, pages opened from a folder have no search
    assert not re.search(r'<(script|img|iframe)[^>]* src="(https?:)?//', page), (
        "the page loads something from another host"
    )
