"""No sentence of the documentation is longer than a reader can follow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import DOCUMENTS, named

PAGES = [path for path in DOCUMENTS if path != ROOT / "CHANGELOG.md"]

LIMIT = 35
"""Words of a sentence."""


def sentences(text: str) -> Iterator[str]:
    """Sentences of paragraphs, list items and table cells (whose entries end at a semicolon too).

    Code blocks are left out, and a link is its text.
    """
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^#+ .*$", r"\g<0>\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*#|]|\d+\.) ?)", text):
        for cell in re.split(r"(?<!\\)\||; ", block) if block.lstrip().startswith("|") else [block]:
            yield from re.split(r"(?<=[.!?])[*_]*\s+(?=[\"*_(`'A-Z0-9])", " ".join(cell.split()))


def length(sentence: str) -> int:
    """Words, of which code in backquotes is one and a lone sign or a number of a list none."""
    words = re.sub(r"`[^`]*`", "code", sentence).split()
    return sum(bool(re.search(r"[A-Za-z0-9]", word)) for word in words)


def test_the_count() -> None:
    text = "# A title\nOne `two words` three. Four\nfive: six\n\n- seven - 8\n\n| nine ten | [11](x.md) |\n"
    assert [length(one) for one in sentences(text) if one] == [2, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_sentences_are_short(path: Path) -> None:
    long = [one for one in sentences(path.read_text()) if length(one) > LIMIT]
    assert not long, f"{named(path)}: {length(long[0])} words: {long[0]}"
