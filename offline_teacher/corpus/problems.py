"""Counts the problems of a corpus by kind, and keeps file and line or row of the first of each kind."""

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


@dataclass(frozen=True)
class Example:
    """Location of a problem: a row, or a line of text. Its number is computed from ``offset`` when needed."""

    kind: str
    file: str
    """Name of the file. Bytes that are not UTF-8 are written as ``\\xe9``, to be stored and printed."""
    offset: int | None = None
    row: int | None = None

    def place(self) -> str:
        if self.row is not None:
            return f"{self.file}, row {self.row}"
        return f"{self.file}, line {line_number(self.file, self.offset or 0)}"


@dataclass
class Problems:
    """Problems of the corpus: a count of each kind, and the location of the first ones."""

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    cut_documents: int = 0
    """Documents cut to one sequence by ``packing: document``; no mistake, because the recipe asks for it."""
    cut_tokens: int = 0

    def add(
        self, kind: str, file: str, *, offset: int | None = None, row: int | None = None, count: int = 1
    ) -> None:
        """Adds ``count`` problems, of which this is the first. Raises UserError instead if ``strict``."""
        example = Example(kind, os.fsencode(file).decode(errors="backslashreplace"), offset, row)
        if self.strict:
            raise UserError(
                f"{example.place()}: {kind}; fix it, or set corpus.strict: false to count such problems only"
            )
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
    def merged(found: Iterable[dict[str, Any]]) -> Problems:
        """The problems of all parts, in part order; keeps the first examples of each kind."""
        total = Problems()
        for problems in found:
            documents, tokens = problems.get("cut", (0, 0))
            total.cut_documents, total.cut_tokens = total.cut_documents + documents, total.cut_tokens + tokens
            for kind in sorted(problems["counts"]):
                room = EXAMPLES_PER_KIND - total.counts.get(kind, 0)
                of_kind = [Example(**example) for example in problems["examples"] if example["kind"] == kind]
                total.examples += of_kind[: max(room, 0)]
                total.counts[kind] = total.counts.get(kind, 0) + problems["counts"][kind]
        return total

    def summary(self) -> str:
        """One clause, e.g. ``2 x invalid UTF-8 (first: a.txt, line 7)``; empty if there are no problems."""
        first = {example.kind: example for example in reversed(self.examples)}
        clauses = [
            f"{count} x {kind} (first: {first[kind].place()})" for kind, count in sorted(self.counts.items())
        ]
        if self.cut_documents:
            clauses.append(
                f"{self.cut_documents:,} documents longer than a sequence,"
                f" {self.cut_tokens:,} tokens of them left out"
            )
        return ", ".join(clauses)


def line_number(file: str, offset: int) -> int:
    """1 + the newlines before byte ``offset`` of the (decompressed) file, as far as it can be read."""
    newlines = 0
    with contextlib.suppress(DamagedFile), storage.open_binary(_path(file)) as stream:
        while offset > 0 and (block := stream.read1(min(offset, 1 << 20))):  # type: ignore[attr-defined]
            newlines += block.count(b"\n")
            offset -= len(block)
    return newlines + 1


def _path(file: str) -> str:
    """The path of ``Example.file``."""
    if storage.is_remote(file) or os.path.exists(file):
        return file
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda spelled: bytes([int(spelled[1], 16)]), file.encode())
    return os.fsdecode(raw)
