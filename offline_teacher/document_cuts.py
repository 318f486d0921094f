"""Cutting the bytes of a text file into documents: lines, blocks between blank lines, or the whole file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import IO

from infra import storage
from infra.errors import DamagedFile
from offline_teacher.corpus_problems import Problems

LONGEST_DOCUMENT = 4 << 20
"""Bytes of text; a longer document is cut there, so that one line without an end cannot fill memory."""

Document = tuple[int, bytes]
"""Byte offset in the file, and the bytes."""


def cut(document: str, path: str, start: int, stop: int | None, problems: Problems) -> Iterator[Document]:
    """Documents by ``line``, ``block`` or ``file`` that start in bytes [start, stop), decompressed.

    Counts over-long documents, and the lost end of a damaged compressed file.
    """
    pieces = {"line": _lines, "block": _blocks, "file": _file}[document]
    offset = start
    try:
        with storage.open_binary(path) as stream:
            for offset, raw in pieces(stream, start, math.inf if stop is None else stop):
                if len(raw) > LONGEST_DOCUMENT - 4:
                    problems.add(f"document cut at {LONGEST_DOCUMENT >> 20} MiB", path, offset=offset)
                yield offset, raw
    except DamagedFile:
        problems.add("damaged compressed data, the rest of the file is lost", path, offset=offset)


def _lines(stream: IO[bytes], start: int, stop: float) -> Iterator[Document]:
    """Lines that start in [start, stop), newline included, in pieces of at most LONGEST_DOCUMENT."""
    offset = start
    if offset > 0:
        # Skip to the next line; a newline just before the range means that a line starts with the range.
        offset -= 1
        stream.seek(offset)
        piece = stream.readline(LONGEST_DOCUMENT)
        while piece and not piece.endswith(b"\n") and offset + len(piece) < stop:
            offset += len(piece)
            piece = stream.readline(LONGEST_DOCUMENT)
        offset += len(piece)
    ended, carry = True, b""
    while offset < stop or not ended:
        piece = carry + stream.readline(LONGEST_DOCUMENT - len(carry))
        if not piece:
            return
        ended = piece.endswith(b"\n")
        size = len(piece) if ended or len(piece) < LONGEST_DOCUMENT else _last_character(piece)
        piece, carry = piece[:size], piece[size:]
        yield offset, piece
        offset += size


def _blocks(stream: IO[bytes], start: int, stop: float) -> Iterator[Document]:
    """Runs of non-blank lines. A block belongs to the range in which the blank line before it starts.

    That rule needs no look back: a range skips to its first blank line, and goes on past its end until
    a blank line starts there.
    """
    owned = start == 0
    lines: list[bytes] = []
    size = begin = 0
    for offset, line in _lines(stream, start, math.inf):
        blank = not line.strip()
        if lines and (blank or size >= LONGEST_DOCUMENT):
            yield begin, b"".join(lines)
            lines, size = [], 0
        if blank:
            owned = True
        if offset >= stop and (blank or not owned):
            return
        if owned and not blank:
            begin = begin if lines else offset
            lines.append(line)
            size += len(line)
    if lines:
        yield begin, b"".join(lines)


def _file(stream: IO[bytes], start: int, stop: float) -> Iterator[Document]:
    """The whole file, in pieces of at most LONGEST_DOCUMENT."""
    offset, carry = 0, b""
    while True:
        pieces, room = [carry], LONGEST_DOCUMENT - len(carry)
        while room > 0 and (block := stream.read(room)):
            pieces.append(block)
            room -= len(block)
        piece = b"".join(pieces)
        if offset > 0 and not piece:
            return
        size = len(piece) if room > 0 else _last_character(piece)
        carry = piece[size:]
        yield offset, piece[:size]
        if room > 0:
            return
        offset += size


def _last_character(raw: bytes) -> int:
    """Length of ``raw`` without a UTF-8 character that its end cuts in two."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if needed > back else len(raw)
        if byte < 0x80:
            break
    return len(raw)
