"""Cutting the bytes of a text file into documents: lines, blocks between blank lines, or the whole file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import IO, Any

from infra.errors import DamagedFile
from infra.files import storage
from infra.files.streams import TooLargeWindow, compression
from offline_teacher.corpus.problems import Problems

LONGEST_DOCUMENT = 4 << 20
"""Largest document in bytes. Longer ones are cut, so that an endless line cannot fill the memory."""
LONGEST_ROW = 256 << 20
"""Largest row of a JSON lines file, in bytes; a longer row is skipped."""

Piece = tuple[int, bytes, bool]
"""Byte offset in the file; the bytes; True if they begin a document, False if they continue a cut one."""


def cut(document: str, path: str, start: int, stop: int | None, problems: Problems) -> Iterator[Piece]:
    """Yields the documents that start in bytes [start, stop) of the decompressed file.

    ``document`` is ``line``, ``block`` or ``file``. A compressed file is decompressed from its start, some
    hundred times as fast as tokenising. A damaged file ends at the damage, which is counted in its range.
    """
    pieces = {"line": _lines, "block": _blocks, "file": _file}[document]
    end = math.inf if stop is None else stop
    with storage.open_binary(path) as stream:
        source = _UntilDamage(stream, path, problems, start, end)
        for offset, raw, begins in pieces(source.buffered(), start, end):
            if source.damaged:
                raw = raw[: _last_character(raw)]
                if not raw.strip():
                    continue
            yield offset, raw, begins


def rows(path: str, start: int, stop: int | None, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Yields byte offset and bytes of each whole line that starts in [start, stop).

    A line longer than LONGEST_ROW is counted and skipped. A line cut off by damage is dropped.
    """
    row: list[bytes] = []
    first = size = 0
    end = math.inf if stop is None else stop
    with storage.open_binary(path) as stream:
        source = _UntilDamage(stream, path, problems, start, end)
        for offset, piece, begins in _lines(source.buffered(), start, end):
            if begins and piece.endswith(b"\n"):
                yield offset, piece
                continue
            if begins:
                first, size = offset, 0
            size += len(piece)
            if size > LONGEST_ROW and size - len(piece) <= LONGEST_ROW:
                problems.add(f"row longer than {LONGEST_ROW >> 20} MiB", path, offset=first)
                row = []
            if size <= LONGEST_ROW:
                row.append(piece)
                if piece.endswith(b"\n"):
                    yield first, b"".join(row)
                    row = []
        if row and not source.damaged:
            yield first, b"".join(row)


class _UntilDamage(io.RawIOBase):
    """A file that ends where its data is damaged, instead of raising; ``damaged`` is true from then on.

    The damage is counted only if it lies in [start, stop), since readers of later ranges meet it too.
    """

    def __init__(self, source: Any, path: str, problems: Problems, start: int, stop: float) -> None:
        self._source, self._path, self._problems = source, path, problems
        self._start, self._stop, self._size = start, stop, 0
        self.damaged = False

    def buffered(self) -> IO[bytes]:
        """The stream to read: for an uncompressed file, the file itself."""
        return self._source if compression(self._path) is None else io.BufferedReader(self, 1 << 20)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.damaged:
            return 0
        try:
            count = int(self._source.readinto1(buffer))
        except DamagedFile as problem:
            self.damaged = True
            if not self._start <= self._size < self._stop:
                return 0
            kind = "damaged compressed data, the rest of the file is lost"
            if isinstance(problem, TooLargeWindow):
                kind = "zstd window above 128 MiB (recompress without --long), the file is left out"
            self._problems.add(kind, self._path, offset=self._size)
            return 0
        self._size += count
        return count


def _lines(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
    """Lines that start in [start, stop), newline included, in pieces of at most LONGEST_DOCUMENT."""
    offset = start
    if offset > 0:
        # Skip to the next line; a newline just before the range means that a line starts with the range.
        offset -= 1
        _skip(stream, offset)
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
        begins, ended = ended, piece.endswith(b"\n")
        size = len(piece) if ended or len(piece) < LONGEST_DOCUMENT else _last_character(piece)
        piece, carry = piece[:size], piece[size:]
        yield offset, piece, begins
        offset += size


def _skip(stream: IO[bytes], offset: int) -> None:
    """Moves from the start of the stream to this offset."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (piece := stream.read(min(offset, 1 << 20))):
        offset -= len(piece)


def _blocks(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
    """Runs of non-blank lines. A block belongs to the range in which the blank line before it starts.

    So a range needs no bytes before it: it skips to its first blank line, and reads past its end to the next
    one. A blank line has only ASCII white space. A line with a no-break or ideographic space counts as text;
    a block of only such lines is an empty document.
    """
    owned = start == 0
    lines: list[bytes] = []
    size = begin = 0
    begins = True
    for offset, line, whole in _lines(stream, start, math.inf):
        blank = whole and not line.strip()
        if lines and (blank or size >= LONGEST_DOCUMENT):
            yield begin, b"".join(lines), begins
            lines, size, begins = [], 0, blank
        if blank:
            owned = begins = True
        if offset >= stop and (blank or not owned):
            return
        if owned and not blank and (lines or line.strip()):
            begin = begin if lines else offset
            lines.append(line)
            size += len(line)
    if lines:
        yield begin, b"".join(lines), begins


def _file(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
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
        yield offset, piece[:size], offset == 0
        if room > 0:
            return
        offset += size


def _last_character(raw: bytes) -> int:
    """Length of ``raw`` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if needed > back else len(raw)
        if byte < 0x80:
            break
    return len(raw)
