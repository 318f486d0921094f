"""Documents of a corpus: text, JSON lines, Parquet files or a hub dataset, split into units of work.

``parts`` lists units of work, ``documents`` reads one. A part is a deterministic piece of about
``part_bytes``: byte ranges of (decompressed) text or JSON lines, row groups of Parquet, or rows of a hub
dataset. Small neighbouring files share a part. A document belongs to the part in which it starts. Sequences
never cross parts, so any worker can build any part in any order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from infra.errors import DamagedFile, UserError
from infra.files import storage
from infra.files.paths import find_files
from infra.files.streams import compression, expansion_ratio
from infra.settings.sections import Corpus
from offline_teacher.corpus import cuts, hub
from offline_teacher.corpus.file_format import require_kind
from offline_teacher.corpus.parquet import open_parquet
from offline_teacher.corpus.problems import Problems

JUNK_SHARE = 0.1
"""A document with more replaced or NUL characters than this is not text and is left out."""
MOST_PIECES = 64
"""Most pieces of one compressed file. For each piece, half of the file is decompressed on average."""
SAMPLED_BYTES = 1 << 20
"""Bytes of a compressed file from which the size of its text is estimated."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """One stretch of one file: bytes (text, jsonl), row groups (parquet), rows or shards (hub)."""

    path: str
    start: int
    stop: int | None
    """None: to the end."""
    stamp: str
    """Size of the file (for a hub dataset, rows and bytes); shows most changes without reading the file."""


@dataclass(frozen=True)
class Part:
    """A unit of work: some spans, in corpus order. ``split``: the name of a hub dataset's split."""

    spans: tuple[Span, ...]
    split: str | None = None


# Listing


def parts(corpus: Corpus, part_bytes: int, validation: bool = False) -> list[Part]:
    """The corpus (or its held-out text) as units of about ``part_bytes``; reads names and footers only.

    The result depends only on the files' sorted paths and sizes. Raises UserError if a glob matches nothing,
    if the first block of a file is not of the expected format, if a hub dataset cannot be opened, or if
    nothing can be read; with ``strict`` also if a Parquet file is damaged.
    """
    name, globs = ("validation_path", corpus.validation_path) if validation else ("path", corpus.path)
    if "" in globs:
        raise UserError(
            f"corpus.{name}: one of the paths is empty; give files or globs, for example data/*.txt"
        )
    if corpus.source == "hub":
        split = corpus.validation_split if validation else corpus.split
        pieces = hub.pieces(corpus, split, part_bytes) if split else []
        return [Part((Span(corpus.path[0], *piece),), split) for piece in pieces]
    paths = find_files(globs)
    grouped: list[list[Span]] = []
    room = 0
    with ThreadPoolExecutor(16) as pool:  # each question about a remote file is a round trip
        listed = list(pool.map(lambda path: _file_spans(corpus, path, part_bytes), paths))
    if not any(size for _, size in chain.from_iterable(listed)):
        for path in paths if corpus.source == "parquet" else ():
            with open_parquet(path):  # raises an error that says what is damaged
                pass
        raise UserError(f"corpus.{name}: no usable document, the files are empty: {', '.join(paths[:3])}")
    for span, size in chain.from_iterable(listed):
        if not grouped or size > room:
            grouped.append([])
            room = part_bytes
        grouped[-1].append(span)
        room -= size
    return [Part(tuple(group)) for group in grouped]


def size_of(part: Part, part_bytes: int) -> float:
    """The part's work relative to a part of usual size; an upper bound where the size is unknown."""
    packed = [span for span in part.spans if compression(span.path) is not None]
    # text is seldom compressed better than 4 to 1
    size = sum((span.stop or 4 * int(span.stamp)) - span.start for span in packed)
    return max(1.0, size / part_bytes)


def modified(part: Part) -> float:
    """When the newest local file of the part was last written (seconds); 0 where there is none."""
    local = [span.path for span in part.spans if part.split is None and not storage.is_remote(span.path)]
    return max((os.stat(path).st_mtime for path in local), default=0.0)


def _file_spans(corpus: Corpus, path: str, part_bytes: int) -> list[tuple[Span, int]]:
    size = storage.size(path)
    require_kind(path, size, corpus.source)
    spans = _parquet_spans if corpus.source == "parquet" else _text_spans
    return list(spans(corpus, path, size, part_bytes))


def is_whole(corpus: Corpus, path: str) -> bool:
    """Whether a text or JSON lines file can only be read from its start."""
    return compression(path) is not None or (corpus.source == "text" and corpus.document == "file")


def _text_spans(corpus: Corpus, path: str, size: int, part_bytes: int) -> Iterator[tuple[Span, int]]:
    stamp, text, pieces = str(size), size, 1
    if corpus.source != "text" or corpus.document != "file":
        if compression(path) is not None and size > part_bytes // 8:  # else its text is small anyway
            text = round(size * expansion_ratio(path, size, SAMPLED_BYTES))
        pieces = max(1, round(text / part_bytes))
        if compression(path) is not None:
            pieces = min(pieces, MOST_PIECES)
    for piece in range(pieces):
        start, stop = text * piece // pieces, text * (piece + 1) // pieces
        yield Span(path, start, stop if piece + 1 < pieces else None, stamp), stop - start


def _parquet_spans(corpus: Corpus, path: str, size: int, part_bytes: int) -> Iterator[tuple[Span, int]]:
    """A damaged file gives a span without row groups; whoever reads the span counts the damage."""
    stamp = str(size)
    try:
        with open_parquet(path) as table:
            sizes = table.group_bytes
    except DamagedFile:
        if corpus.strict:
            raise
        yield Span(path, 0, 0, stamp), 0
        return
    start = filled = 0
    for group, group_size in enumerate(sizes):
        filled += group_size
        last = group + 1 == len(sizes)
        if last or (filled >= part_bytes and compression(path) is None):  # or each part decompresses all
            yield Span(path, start, group + 1, stamp), filled
            start, filled = group + 1, 0


def parquet_rows(path: str, start: int = 0, stop: int | None = None) -> int:
    """Number of rows in these row groups of a Parquet file, from its footer; 0 if it is damaged."""
    with contextlib.suppress(DamagedFile), open_parquet(path) as table:
        return sum(table.group_rows[start:stop])
    return 0


# Reading


def documents(part: Part, corpus: Corpus, problems: Problems) -> Iterator[str]:
    """Yields the part's documents in order, not empty and valid Unicode. Holds one (or a batch) at a time."""
    for text in row_texts(part, corpus, problems):
        if text is not None:
            yield from cut_text(text) if _is_long(text) else (text,)


def row_texts(part: Part, corpus: Corpus, problems: Problems) -> Iterator[str | None]:
    """The texts of ``documents`` before cutting. Each Parquet or hub row gives its text, or None."""
    for span in part.spans:
        yield from _READERS[corpus.source](span, corpus, part.split, problems)


def cut_text(text: str) -> list[str]:
    longest = cuts.LONGEST_DOCUMENT
    return [text[start : start + longest] for start in range(0, len(text), longest)]


def _read_text(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    first, told = span.start, False
    for offset, raw, begins in cuts.cut(corpus.document, span.path, span.start, span.stop, problems):
        if begins:
            first, told = offset, False
        elif not raw.strip():  # only the last newline of a cut document is left
            continue
        text = _decode(raw, span.path, offset, problems)
        if not told and (not begins or _is_long(text)):
            _tell_cut(problems, span.path, offset=first)
            told = True
        yield text


def _read_jsonl(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    for offset, raw in cuts.rows(span.path, span.start, span.stop, problems):
        raw = raw.removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():  # not a row: a file may end with blank lines
            continue
        try:
            row = json.loads(raw)
        except UnicodeDecodeError:
            problems.add("invalid UTF-8", span.path, offset=offset)
            continue
        except (ValueError, RecursionError):
            problems.add("broken JSON", span.path, offset=offset)
            continue
        value = row.get(corpus.text_column, _MISSING) if isinstance(row, dict) else _MISSING
        yield _field(value, corpus.text_column, problems, span.path, offset=offset)


def _read_parquet(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    column = corpus.text_column
    assert span.stop is not None
    with contextlib.ExitStack() as files:
        try:
            table = files.enter_context(open_parquet(span.path))
        except DamagedFile:
            problems.add("damaged Parquet file, left out", span.path, row=1)
            return
        first, count = 1 + sum(table.group_rows[: span.start]), sum(table.group_rows[span.start : span.stop])
        done = 0
        if column not in table.columns:
            if count:
                problems.add(f"missing column {column!r}", span.path, row=first, count=count)
        else:
            try:
                for row, value in table.cells(column, span.start, span.stop):
                    done += 1
                    yield _field(value, column, problems, span.path, row=row)
            except DamagedFile:
                kind = "damaged Parquet data, the rows behind it are lost"
                problems.add(kind, span.path, row=first + done)
        yield from repeat(None, count - done)


def _read_hub(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    assert split is not None
    assert span.stop is not None
    name = hub.piece_name(corpus, split, span.start)
    row = 0 if corpus.streaming else span.start
    try:
        for row, cells in hub.rows(corpus, split, span.start, span.stop):
            value = cells.get(corpus.text_column, _MISSING)
            yield _field(value, corpus.text_column, problems, name, row=row)
    except DamagedFile:
        problems.add("damaged data, the rest of the file is lost", name, row=row + 1)


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
_MISSING = object()


# From bytes or a field to a text


def _decode(raw: bytes, path: str, offset: int, problems: Problems) -> str | None:
    """Decodes UTF-8; invalid bytes become U+FFFD and are counted. None if no text is left."""
    if offset == 0 and raw.startswith(BYTE_ORDER_MARK):
        offset = len(BYTE_ORDER_MARK)
        raw = raw[offset:]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        problems.add("invalid UTF-8", path, offset=offset + error.start)
        text = raw.decode(errors="replace")
    return _usable(text, problems, path, offset=offset)


def _field(value: Any, column: str, problems: Problems, path: str, **place: int) -> str | None:
    """A cell's text. If it has none, the problem is counted and the result is None."""
    if value is _MISSING:
        problems.add(f"missing column {column!r}", path, **place)
        return None
    if not isinstance(value, str):
        problems.add(f"column {column!r} is not a string", path, **place)
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell lone surrogates, which no tokenizer takes
        problems.add("invalid UTF-8", path, **place)
        value = re.sub("[\ud800-\udfff]", "\ufffd", value)
    text = _usable(value, problems, path, **place)
    if _is_long(text):
        _tell_cut(problems, path, **place)
    return text


def _usable(text: str, problems: Problems, path: str, **place: int) -> str | None:
    text = text.strip()
    if not text:
        problems.add("empty document", path, **place)
        return None
    if text.count("\ufffd") + text.count("\0") > JUNK_SHARE * len(text):
        problems.add("not text", path, **place)
        return None
    return text


def _is_long(text: str | None) -> bool:
    return text is not None and len(text) > cuts.LONGEST_DOCUMENT


def _tell_cut(problems: Problems, path: str, **place: int) -> None:
    problems.add(f"document cut at {cuts.LONGEST_DOCUMENT >> 20} MiB", path, **place)
