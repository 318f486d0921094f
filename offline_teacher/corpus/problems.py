"""Counts the problems of a corpus by kind, and keeps the locations of the first problems of each kind."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from infra.errors import DamagedFile, UserError
from infra.files import storage

EXAMPLES_PER_KIND = 20
"""Number of problems of each kind whose locations are kept."""


@dataclass(frozen=True)
class Example:
    """Kind and location of a problem."""

    kind: str
    file: str
    """Path of the file. Bytes that are not UTF-8 are written like ``\\xe9``, to be stored and shown."""
    offset: int | None = None
    """Byte offset in the decompressed text, for text and JSON lines."""
    row: int | None = None
    """Number of the row, from 1, for Parquet and hub datasets."""

    def location(self) -> str:
        """Returns file and row, or file and line. The line number is computed by reading the file."""
        if self.row is not None:
            return f"{self.file}, row {self.row}"
        return f"{self.file}, line {line_number(self.file, self.offset or 0)}"


@dataclass
class Problems:
    """Number of problems of each kind, and the locations of the first problems of each kind."""

    strict: bool = False
    """Whether the first problem raises UserError (``corpus.strict``)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Kind -> number of problems."""
    examples: list[Example] = field(default_factory=list)
    cut_documents: int = 0
    """Number of documents that ``sequences.packing: document`` cuts, which are no problems but asked for."""
    cut_tokens: int = 0
    """Number of tokens of these documents that are left out."""

    def add(
        self, kind: str, file: str, *, offset: int | None = None, row: int | None = None, count: int = 1
    ) -> None:
        """Adds ``count`` problems, the first at ``offset`` or ``row``. Raises UserError if ``strict``."""
        example = Example(kind, os.fsencode(file).decode(errors="backslashreplace"), offset, row)
        if self.strict:
            remedy = "fix it, or set corpus.strict: false to count such problems"
            raise UserError(f"{example.location()}: {kind}; {remedy}")
        if self.counts.get(kind, 0) < EXAMPLES_PER_KIND:
            self.examples.append(example)
        self.counts[kind] = self.counts.get(kind, 0) + count

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.counts,
            "examples": [vars(example) for example in self.examples],
            "cut": [self.cut_documents, self.cut_tokens],
        }

    @staticmethod
    def merged(problems_of_parts: Iterable[dict[str, Any]]) -> Problems:
        """Returns the sum of the ``to_json`` of parts, with the first examples in the order of the parts."""
        total = Problems()
        for problems in problems_of_parts:
            documents, tokens = problems.get("cut", (0, 0))
            total.cut_documents, total.cut_tokens = total.cut_documents + documents, total.cut_tokens + tokens
            for kind in sorted(problems["counts"]):
                room = EXAMPLES_PER_KIND - total.counts.get(kind, 0)
                of_kind = [Example(**example) for example in problems["examples"] if example["kind"] == kind]
                total.examples += of_kind[: max(room, 0)]
                total.counts[kind] = total.counts.get(kind, 0) + problems["counts"][kind]
        return total

    def summary(self) -> str:
        """Returns a phrase, e.g. ``2 x invalid UTF-8 (first: a.txt, line 7)``; "" without problems."""
        first = {example.kind: example for example in reversed(self.examples)}
        counts = sorted(self.counts.items())
        clauses = [f"{count} x {kind} (first: {first[kind].location()})" for kind, count in counts]
        if self.cut_documents:
            clauses.append(f"{self.cut_documents:,} documents longer than a sequence")
            clauses.append(f"{self.cut_tokens:,} tokens of them left out")
        return ", ".join(clauses)


def line_number(file: str, offset: int) -> int:
    """Returns the line number, from 1, of byte ``offset`` of the decompressed file; that of the damage if the
    file is damaged before ``offset``."""
    newlines = 0
    if not storage.is_remote(file) and not os.path.exists(file):  # escapes like \xe9 become bytes again
        raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda escape: bytes([int(escape[1], 16)]), file.encode())
        file = os.fsdecode(raw)
    with contextlib.suppress(DamagedFile), storage.open_binary(file) as stream:
        while offset > 0 and (chunk := stream.read1(min(offset, 1 << 20))):  # type: ignore[attr-defined]
            newlines += chunk.count(b"\n")
            offset -= len(chunk)
    return newlines + 1
