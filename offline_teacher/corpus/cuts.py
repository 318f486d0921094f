"""Cuts the bytes of a text file into documents: lines, blocks between blank lines, or the whole file."""

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
"""Largest document in bytes. Longer documents are split into pieces of about this size, to limit memory."""
LONGEST_ROW = 256 << 20
"""Largest row of a JSON lines file, in bytes; a longer row is skipped."""

Piece = tuple[int, bytes, bool]
"""(byte offset in the decompressed file, bytes, True if they begin a document, False if they continue it)."""


def cut(unit: str, path: str, start: int, stop: int | None, problems: Problems) -> Iterator[Piece]:
    """Yields the pieces of all documents that belong to bytes [start, stop) of the decompressed file: lines
    that start there, blocks whose preceding blank line starts there.

    ``unit`` is ``line``, ``block`` or ``file``. ``stop`` None means the end of the file. Compressed data is
    always decompressed from the start of the file, about a hundred times as fast as it is tokenised. A
    damaged file is read up to the damage, which is counted in ``problems`` if it lies in the range.
    """
    read_pieces = {"line": _lines, "block": _blocks, "file": _file}[unit]
    end = math.inf if stop is None else stop
    with storage.open_binary(path) as stream:
        source = _UntilDamage(stream, path, problems, start, end)
        for offset, raw, begins in read_pieces(source.buffered(), start, end):
            if source.damaged:
                raw = raw[: _complete_length(raw)]
                if not raw.strip():
                    continue
            yield offset, raw, begins


def rows(path: str, start: int, stop: int | None, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, line) of each complete line that starts in bytes [start, stop). A line longer than
    LONGEST_ROW is counted in ``problems`` and skipped. A line that is cut off by damage is skipped."""
    pieces: list[bytes] = []
    row_start = row_bytes = 0
    end = math.inf if stop is None else stop
    with storage.open_binary(path) as stream:
        source = _UntilDamage(stream, path, problems, start, end)
        for offset, piece, begins in _lines(source.buffered(), start, end):
            if begins and piece.endswith(b"\n"):
                yield offset, piece
                continue
            if begins:
                row_start, row_bytes = offset, 0
            row_bytes += len(piece)
            if row_bytes - len(piece) <= LONGEST_ROW < row_bytes:  # crosses the limit: report the row once
                problems.add(f"row longer than {LONGEST_ROW >> 20} MiB", path, offset=row_start)
                pieces = []
            if row_bytes <= LONGEST_ROW:
                pieces.append(piece)
                if piece.endswith(b"\n"):
                    yield row_start, b"".join(pieces)
                    pieces = []
        if pieces and not source.damaged:
            yield row_start, b"".join(pieces)


class _UntilDamage(io.RawIOBase):
    """A file that ends at the first damaged byte, instead of raising. The damage counts only if it lies in
    [start, stop), because readers of later ranges meet it too: they also decompress from the start."""

    def __init__(self, source: Any, path: str, problems: Problems, start: int, stop: float) -> None:
        self._source, self._path, self._problems = source, path, problems
        self._start, self._stop, self._bytes_read = start, stop, 0
        self.damaged = False

    def buffered(self) -> IO[bytes]:
        """Returns the stream to read from. For an uncompressed file, this is the file itself."""
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
            if not self._start <= self._bytes_read < self._stop:
                return 0
            kind = "damaged compressed data, the rest of the file is lost"
            if isinstance(problem, TooLargeWindow):
                kind = "zstd window above 128 MiB (recompress without --long), the file is left out"
            self._problems.add(kind, self._path, offset=self._bytes_read)
            return 0
        self._bytes_read += count
        return count


def _lines(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
    """Yields the lines that start in [start, stop), newline included, in pieces up to LONGEST_DOCUMENT."""
    offset = start
    if offset > 0:
        # Begin one byte early and drop all up to the first newline: a line that starts at `start` is kept.
        offset -= 1
        _skip(stream, offset)
        piece = stream.readline(LONGEST_DOCUMENT)
        while piece and not piece.endswith(b"\n") and offset + len(piece) < stop:
            offset += len(piece)
            piece = stream.readline(LONGEST_DOCUMENT)
        offset += len(piece)
    line_ended, rest = True, b""  # rest: bytes of an incomplete UTF-8 character
    while offset < stop or not line_ended:
        piece = rest + stream.readline(LONGEST_DOCUMENT - len(rest))
        if not piece:
            return
        begins, line_ended = line_ended, piece.endswith(b"\n")
        size = len(piece) if line_ended or len(piece) < LONGEST_DOCUMENT else _complete_length(piece)
        piece, rest = piece[:size], piece[size:]
        yield offset, piece, begins
        offset += size


def _skip(stream: IO[bytes], offset: int) -> None:
    """Moves the stream, which is at its start, to this byte offset."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (piece := stream.read(min(offset, 1 << 20))):
        offset -= len(piece)


def _blocks(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
    """Yields the blocks of lines between blank lines, in pieces of about LONGEST_DOCUMENT.

    A block belongs to the range that contains the start of its preceding blank line, so a reader needs no
    bytes before its range. It skips to the first blank line, and reads past the end to the next blank line. A
    blank line has only ASCII white space; a block of lines with other white space is an empty document.
    """
    in_range = start == 0
    lines: list[bytes] = []
    size = piece_start = 0
    begins = True
    for offset, line, line_begins in _lines(stream, start, math.inf):
        blank = line_begins and not line.strip()
        if lines and (blank or size >= LONGEST_DOCUMENT):
            yield piece_start, b"".join(lines), begins
            lines, size, begins = [], 0, blank
        if blank:
            in_range = begins = True
        if offset >= stop and (blank or not in_range):
            return
        if in_range and not blank and (lines or line.strip()):
            piece_start = piece_start if lines else offset
            lines.append(line)
            size += len(line)
    if lines:
        yield piece_start, b"".join(lines), begins


def _file(stream: IO[bytes], start: int, stop: float) -> Iterator[Piece]:
    """Yields the file as one document, in pieces up to LONGEST_DOCUMENT; signature as of `_lines`."""
    offset, rest = 0, b""
    while True:
        chunks, room = [rest], LONGEST_DOCUMENT - len(rest)
        while room > 0 and (chunk := stream.read(room)):
            chunks.append(chunk)
            room -= len(chunk)
        piece = b"".join(chunks)
        if offset > 0 and not piece:
            return
        size = len(piece) if room > 0 else _complete_length(piece)
        rest = piece[size:]
        yield offset, piece[:size], offset == 0
        if room > 0:
            return
        offset += size


def _complete_length(raw: bytes) -> int:
    """Returns the length of ``raw`` without an incomplete UTF-8 character at its end."""
    for from_end in range(1, min(4, len(raw)) + 1):
        byte = raw[-from_end]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - from_end if needed > from_end else len(raw)
        if byte < 0x80:
            break
    return len(raw)
