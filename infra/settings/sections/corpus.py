"""``corpus``: where the text comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections.fields import fingerprinted, require, unfingerprinted

CorpusSource = Literal["text", "jsonl", "parquet", "hub"]
DocumentUnit = Literal["file", "line", "block"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Source of the documents."""

    source: CorpusSource = fingerprinted("text")
    path: tuple[str, ...] = unfingerprinted()
    """Globs of files (local or URL; .gz and .zst are decompressed), or the hub name of a dataset.
    The content is fingerprinted, not the path."""
    validation_path: tuple[str, ...] = unfingerprinted(())
    """Globs of files with held-out text. Empty: no held-out text, or ``validation_split`` of a hub
    dataset."""
    document: DocumentUnit = fingerprinted("line")
    """The part of a text file that is one document: the file, a line, or a block. Blank lines separate
    blocks."""
    text_column: str = fingerprinted("text")
    """Column or JSON key that holds the text."""
    config: str | None = fingerprinted(None)
    """Hub configuration name, e.g. ``wikitext-103-raw-v1``."""
    split: str = fingerprinted("train")
    validation_split: str | None = fingerprinted(None)
    """Split of a hub dataset that is the held-out text."""
    streaming: bool = fingerprinted(False)
    """Read a hub dataset as a stream instead of downloading it. This changes the sequences, because
    a stream is divided by files, a downloaded dataset by rows, and no sequence crosses such a border."""
    strict: bool = unfingerprinted(False)
    """Stop at the first invalid byte, empty document or missing field instead of counting it."""

    def __post_init__(self) -> None:
        require(len(self.path) > 0, "path: names no files; give a glob or a hub dataset name")
        require(self.source != "hub" or len(self.path) == 1, "path: a hub corpus is exactly one dataset name")
