"""``sequences``: how text is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infra.settings.sections.fields import fingerprinted, require

MAX_LENGTH = 1024
"""Largest number of tokens in a sequence; the teacher's position embeddings may allow fewer."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Cutting of documents into sequences."""

    length: int = fingerprinted(128)
    """L: number of tokens of a sequence, special tokens included."""
    packing: Literal["packed", "document"] = fingerprinted("packed")
    """``packed``: documents are concatenated and cut every L tokens. ``document``: a sequence is one
    document, truncated to L tokens."""
    part_bytes: int = fingerprinted(16 << 20)
    """Bytes of text per part; one worker tokenises a part. With ``packing: packed``, only a part's last
    sequence can have fewer than L tokens."""

    def __post_init__(self) -> None:
        require(8 <= self.length <= MAX_LENGTH, f"length: must be 8 to {MAX_LENGTH}, not {self.length}")
        require(self.part_bytes >= 1 << 10, f"part_bytes: must be at least 1024, not {self.part_bytes}")
