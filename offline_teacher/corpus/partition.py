"""Splits a corpus (text, JSON lines, Parquet files or a hub dataset) into parts.

A part is a unit of work of about ``part_bytes``: byte ranges of (decompressed) text or JSON lines, row groups
of Parquet, or rows of a hub dataset. Small files that follow one another share a part. A document belongs to
the part in which it starts. Sequences never cross parts, so any worker can build any part in any order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from infra.errors import DamagedFile, NodeError, UserError
from infra.files import storage
from infra.files.paths import find_files
from infra.files.streams import compression, expansion_ratio
from infra.settings.sections import Corpus
from offline_teacher.corpus import hub
from offline_teacher.corpus.file_format import require_format
from offline_teacher.corpus.parquet import open_parquet

MAX_COMPRESSED_SPANS = 64
"""Maximum number of spans of one compressed file. Reading one decompresses half of the file on average."""
SAMPLED_BYTES = 1 << 20
"""Number of bytes of a compressed file from which the size of its text is estimated."""


@dataclass(frozen=True)
class Span:
    """A range [start, stop): bytes of a file, its row groups (parquet), or rows or file numbers (hub)."""

    path: str
    start: int
    stop: int | None
    """End of the range; None for the end of the file."""
    stamp: str
    """Size of the file (hub dataset: see `hub.pieces`); reveals most changes without reading the file."""


@dataclass(frozen=True)
class Part:
    """A unit of work: some spans in corpus order."""

    spans: tuple[Span, ...]
    split: str | None = None
    """Name of the hub dataset's split; None for files."""
    size: int = 0
    """Estimate of its bytes of text; 0 for hub datasets, whose parts have about the same size."""


def parts(corpus: Corpus, part_bytes: int, validation: bool = False) -> list[Part]:
    """Returns the parts of the corpus, or of its held-out text if ``validation`` is true.

    Reads only names, sizes, beginnings of files and Parquet footers, on which alone the parts depend. Raises
    UserError if no text is found or readable; with ``corpus.strict`` also if a Parquet file is damaged.
    """
    name, globs = ("validation_path", corpus.validation_path) if validation else ("path", corpus.path)
    if "" in globs:
        raise UserError(f"corpus.{name}: one of the paths is empty; give files or globs, such as data/*.txt")
    if corpus.source == "hub":
        split = corpus.validation_split if validation else corpus.split
        pieces = hub.pieces(corpus, split, part_bytes) if split else []
        return [Part((Span(corpus.path[0], *piece),), split) for piece in pieces]
    paths = find_files(globs)
    with ThreadPoolExecutor(16) as pool:  # each request about a remote file is a round trip
        by_file = pool.map(lambda path: _file_spans(corpus, path, part_bytes), paths)
        sized_spans = list(chain.from_iterable(by_file))
    if not any(size for _, size in sized_spans):
        for path in paths if corpus.source == "parquet" else ():
            with open_parquet(path):  # raises an error that says what is damaged
                pass
        raise UserError(f"corpus.{name}: no usable document, the files are empty: {', '.join(paths[:3])}")
    groups: list[list[tuple[Span, int]]] = []
    room = 0
    for span, size in sized_spans:
        if not groups or size > room:
            groups.append([])
            room = part_bytes
        groups[-1].append((span, size))
        room -= size
    return [
        Part(tuple(span for span, _ in group), size=sum(_text_bytes(corpus, *sized) for sized in group))
        for group in groups
    ]


def _text_bytes(corpus: Corpus, span: Span, size: int) -> int:
    """Estimates the bytes that are read for a span. A compressed file is decompressed from its start to the
    span's end. If the end is unknown, four times the file's size is assumed, as text is seldom compressed
    better."""
    if compression(span.path) is None:
        return size
    if corpus.source == "parquet":
        return 4 * int(span.stamp)
    return span.stop or max(4 * int(span.stamp), span.start + size)


def relative_size(part: Part, part_bytes: int) -> float:
    """Returns the part's size over ``part_bytes``, at least 1: a large row group of a Parquet file, a large
    file that is one document, and a compressed file can exceed it."""
    return max(1.0, part.size / part_bytes)


def refuse_other_file(span: Span) -> None:
    """Raises NodeError if a file does not have the size that it had when the corpus was split into parts: a
    node may have another copy, or the file has been changed since."""
    size = storage.size(span.path)
    if str(size) != span.stamp:
        raise NodeError(
            f"{span.path}: has {size:,} bytes here, but {int(span.stamp):,} when the pass began; every node"
            " must see the same files"
        )


def last_modified(part: Part) -> float:
    """Returns the latest modification time of the part's local files (Unix seconds); 0 if it has none."""
    local = [span.path for span in part.spans if part.split is None and not storage.is_remote(span.path)]
    return max((os.stat(path).st_mtime for path in local), default=0.0)


def _file_spans(corpus: Corpus, path: str, part_bytes: int) -> list[tuple[Span, int]]:
    """Returns the spans of one file, each with its size in bytes (small compressed files: compressed)."""
    size = storage.size(path)
    require_format(path, size, corpus.source)
    spans = _parquet_spans if corpus.source == "parquet" else _text_spans
    return list(spans(corpus, path, size, part_bytes))


def needs_sequential_read(corpus: Corpus, path: str) -> bool:
    """Whether a text or JSON lines file can only be read from its start."""
    return compression(path) is not None or (corpus.source == "text" and corpus.document == "file")


def _text_spans(corpus: Corpus, path: str, size: int, part_bytes: int) -> Iterator[tuple[Span, int]]:
    stamp, text_bytes, count = str(size), size, 1
    if corpus.source != "text" or corpus.document != "file":
        if compression(path) is not None and size > part_bytes // 8:  # else surely one part
            text_bytes = round(size * expansion_ratio(path, size, SAMPLED_BYTES))
        count = max(1, round(text_bytes / part_bytes))
        if compression(path) is not None:
            count = min(count, MAX_COMPRESSED_SPANS)
    for number in range(count):
        start, stop = text_bytes * number // count, text_bytes * (number + 1) // count
        yield Span(path, start, stop if number + 1 < count else None, stamp), stop - start


def _parquet_spans(corpus: Corpus, path: str, size: int, part_bytes: int) -> Iterator[tuple[Span, int]]:
    """Yields spans of row groups; an empty one for a damaged file, so that the reader counts the damage."""
    stamp = str(size)
    try:
        with open_parquet(path) as table:
            sizes = table.group_bytes
    except DamagedFile:
        if corpus.strict:
            raise
        yield Span(path, 0, 0, stamp), 0
        return
    start = span_bytes = 0
    for group, group_bytes in enumerate(sizes):
        span_bytes += group_bytes
        last = group + 1 == len(sizes)
        # A file that is compressed as a whole is one span, because each span decompresses the whole file.
        if last or (span_bytes >= part_bytes and compression(path) is None):
            yield Span(path, start, group + 1, stamp), span_bytes
            start, span_bytes = group + 1, 0


def parquet_rows(path: str, start: int = 0, stop: int | None = None) -> int:
    """Returns the number of rows in row groups [start, stop) of a Parquet file; 0 if it is damaged."""
    with contextlib.suppress(DamagedFile), open_parquet(path) as table:
        return sum(table.group_rows[start:stop])
    return 0
