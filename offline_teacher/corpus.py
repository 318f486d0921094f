"""Documents of a corpus: text, JSON lines, Parquet files or a hub data set, split into units of work.

``parts`` lists, ``documents`` reads. A part is a deterministic piece of about ``part_bytes``: byte ranges
of plain text and JSON lines, row groups of Parquet, whole compressed files, rows of a hub data set; small
neighbours share a part. A document belongs to the part in which it starts, and ends there: packing never
crosses parts, so that parts can be built in any order by any worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import IO, Any

from infra import storage
from infra.errors import DamagedFile, UserError
from infra.sections import Corpus
from offline_teacher.parquet import ParquetRows

EXAMPLES_PER_KIND = 20
LONGEST_DOCUMENT = 4 << 20
"""Bytes of text; a longer document is cut there, so that one line without an end cannot fill memory."""
JUNK_SHARE = 0.1
"""A document with more replaced or NUL characters than this is not text and is left out."""
COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """One stretch of one file: bytes (text, jsonl), row groups (parquet), rows or shards (hub)."""

    path: str
    start: int
    stop: int | None
    """None: to the end."""
    stamp: str
    """Size of the file (of a hub data set: rows and bytes), so that most changes are seen without reading."""


@dataclass(frozen=True)
class Part:
    """A unit of work: some spans, in corpus order. ``split`` is of a hub data set."""

    spans: tuple[Span, ...]
    split: str | None = None


@dataclass(frozen=True)
class Example:
    """Where a problem is: a line of text (counted from the byte ``offset`` when needed) or a row."""

    kind: str
    file: str
    offset: int | None = None
    row: int | None = None

    def place(self) -> str:
        if self.row is not None:
            return f"{self.file}, row {self.row}"
        return f"{self.file}, line {line_number(self.file, self.offset or 0)}"


@dataclass
class Problems:
    """What was wrong with the corpus: a count of each kind, and where the first of each kind are."""

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(self, kind: str, file: str, *, offset: int | None = None, row: int | None = None) -> None:
        """Count one; under ``strict``, raises UserError with file and line instead."""
        example = Example(kind, file, offset, row)
        if self.strict:
            raise UserError(
                f"{example.place()}: {kind}; mend it, or set corpus.strict: false to count and go on"
            )
        if self.counts.get(kind, 0) < EXAMPLES_PER_KIND:
            self.examples.append(example)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "examples": [vars(example) for example in self.examples]}

    @staticmethod
    def merged(found: Iterable[dict[str, Any]]) -> Problems:
        """The problems of all parts, in part order; keeps the first examples of each kind."""
        total = Problems()
        for problems in found:
            for kind in sorted(problems["counts"]):
                room = EXAMPLES_PER_KIND - total.counts.get(kind, 0)
                of_kind = [Example(**example) for example in problems["examples"] if example["kind"] == kind]
                total.examples += of_kind[: max(room, 0)]
                total.counts[kind] = total.counts.get(kind, 0) + problems["counts"][kind]
        return total

    def summary(self) -> str:
        """One clause, e.g. ``2 x invalid UTF-8 (first: a.txt, line 7)``; empty where there are none."""
        first = {example.kind: example for example in reversed(self.examples)}
        return ", ".join(
            f"{count} x {kind} (first: {first[kind].place()})" for kind, count in sorted(self.counts.items())
        )


def line_number(path: str, offset: int) -> int:
    """1 + the newlines before byte ``offset`` of the (decompressed) file, as far as it can be read."""
    newlines = 0
    with contextlib.suppress(DamagedFile), storage.open_binary(path) as stream:
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            newlines += block.count(b"\n")
            offset -= len(block)
    return newlines + 1


# Listing


def parts(corpus: Corpus, part_bytes: int, validation: bool = False) -> list[Part]:
    """The corpus (or its held-out text) as units of about ``part_bytes``; reads names and footers only.

    Deterministic in the files' sorted paths and sizes. Raises UserError where a glob matches nothing or
    a Parquet file or hub data set cannot be opened.
    """
    if corpus.source == "hub":
        split = corpus.validation_split if validation else corpus.split
        return [Part((span,), split) for span in _hub_spans(corpus, split, part_bytes)] if split else []
    paths = storage.expand(corpus.validation_path if validation else corpus.path)
    spans = _parquet_spans if corpus.source == "parquet" else _text_spans
    grouped: list[list[Span]] = []
    room = 0
    with ThreadPoolExecutor(16) as pool:  # a size or a footer of a remote file is a round trip
        listed = list(pool.map(lambda path: list(spans(corpus, path, part_bytes)), paths))
    if not any(size for _, size in chain.from_iterable(listed)):
        name = "validation_path" if validation else "path"
        raise UserError(f"corpus.{name}: no usable document, the files are empty: {', '.join(paths[:3])}")
    for span, size in chain.from_iterable(listed):
        if not grouped or size > room:
            grouped.append([])
            room = part_bytes
        grouped[-1].append(span)
        room -= size
    return [Part(tuple(group)) for group in grouped]


def modified(part: Part) -> float:
    """When the newest local file of the part was last written (seconds); 0 where there is none."""
    local = [span.path for span in part.spans if part.split is None and not storage.is_remote(span.path)]
    return max((os.stat(path).st_mtime for path in local), default=0.0)


def _text_spans(corpus: Corpus, path: str, part_bytes: int) -> Iterator[tuple[Span, int]]:
    size = storage.size(path)
    stamp = str(size)
    whole = path.endswith(COMPRESSED) or (corpus.source == "text" and corpus.document == "file")
    pieces = 1 if whole else max(1, round(size / part_bytes))
    for piece in range(pieces):
        start, stop = size * piece // pieces, size * (piece + 1) // pieces
        yield Span(path, start, stop if piece + 1 < pieces else None, stamp), stop - start


def _parquet_spans(corpus: Corpus, path: str, part_bytes: int) -> Iterator[tuple[Span, int]]:
    stamp = str(storage.size(path))
    with storage.open_binary(path) as stream:
        sizes = ParquetRows(path, stream).group_bytes
    start = filled = 0
    for group, size in enumerate(sizes):
        filled += size
        if filled >= part_bytes or group + 1 == len(sizes):
            yield Span(path, start, group + 1, stamp), filled
            start, filled = group + 1, 0


def _hub_spans(corpus: Corpus, split: str, part_bytes: int) -> Iterator[Span]:
    name = corpus.path[0]
    data = _load_hub(name, corpus.config, split, corpus.streaming)
    if corpus.streaming:  # rows cannot be sought in a stream: one part for each of its files
        yield from (
            Span(name, shard, shard + 1, f"{data.num_shards} files") for shard in range(data.num_shards)
        )
        return
    rows = len(data)
    pieces = max(1, min(rows, round(data.data.nbytes / part_bytes)))
    for piece in range(pieces):
        yield Span(name, rows * piece // pieces, rows * (piece + 1) // pieces, f"{rows}:{data.data.nbytes}")


def parquet_rows(path: str) -> int:
    """Rows of a Parquet file, from its footer."""
    with storage.open_binary(path) as stream:
        return sum(ParquetRows(path, stream).group_rows)


def hub_rows(corpus: Corpus) -> int | None:
    """Rows of a hub data set's split as its card counts them; None where the card does not."""
    data = _load_hub(corpus.path[0], corpus.config, corpus.split, corpus.streaming)
    counted = (data.info.splits or {}).get(corpus.split)
    return counted.num_examples or None if counted is not None else None


@lru_cache(maxsize=2)
def _load_hub(name: str, config: str | None, split: str, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # noqa: BLE001 - datasets and huggingface_hub raise a dozen unrelated types here
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"corpus.path: cannot load data set {name!r} (config {config!r}, split {split!r}): {reason}"
        ) from None


# Reading


def documents(part: Part, corpus: Corpus, problems: Problems) -> Iterator[str]:
    """The part's documents in order, never empty, valid Unicode. Holds one document (or batch) at a time."""
    for span in part.spans:
        for text in _READERS[corpus.source](span, corpus, part.split, problems):
            for start in range(0, len(text), LONGEST_DOCUMENT):
                yield text[start : start + LONGEST_DOCUMENT]


def _read_text(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    cut = {"line": _lines, "block": _blocks, "file": _file}[corpus.document]
    for offset, raw in _pieces(cut, span, problems):
        text = _decode(raw, span.path, offset, problems)
        if text is not None:
            yield text


def _read_jsonl(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    for offset, raw in _pieces(_lines, span, problems):
        try:
            row = json.loads(raw.removeprefix(BYTE_ORDER_MARK)) if raw.strip() else {corpus.text_column: ""}
        except UnicodeDecodeError:
            problems.add("invalid UTF-8", span.path, offset=offset)
            continue
        except (ValueError, RecursionError):
            problems.add("broken JSON", span.path, offset=offset)
            continue
        value = row.get(corpus.text_column, _MISSING) if isinstance(row, dict) else _MISSING
        text = _field(value, corpus.text_column, problems, span.path, offset=offset)
        if text is not None:
            yield text


def _read_parquet(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    column = corpus.text_column
    assert span.stop is not None
    with storage.open_binary(span.path) as stream:
        table = ParquetRows(span.path, stream)
        row = 1 + sum(table.group_rows[: span.start])
        if column not in table.columns:
            problems.add(f"missing column {column!r}", span.path, row=row)
            return
        try:
            for number, value in table.cells(column, span.start, span.stop):
                row = number
                text = _field(value, column, problems, span.path, row=row)
                if text is not None:
                    yield text
        except DamagedFile:
            problems.add("damaged Parquet data, the rows behind it are lost", span.path, row=row)


def _read_hub(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    assert split is not None
    assert span.stop is not None
    data = _load_hub(span.path, corpus.config, split, corpus.streaming)
    if corpus.streaming:
        rows, first, name = (
            data.shard(data.num_shards, span.start),
            1,
            f"{span.path}[{split}, file {span.start + 1}]",
        )
    else:
        rows = (data[row] for row in range(span.start, span.stop))
        first, name = span.start + 1, f"{span.path}[{split}]"
    for number, row in enumerate(rows, start=first):
        value = row.get(corpus.text_column, _MISSING)
        text = _field(value, corpus.text_column, problems, name, row=number)
        if text is not None:
            yield text


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
_MISSING = object()


# Cutting bytes into documents. Each yields (byte offset, bytes).


def _pieces(cut: Any, span: Span, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """What ``cut`` makes of the span; counts over-long documents, and a compressed file's lost end."""
    offset = span.start
    try:
        with storage.open_binary(span.path) as stream:
            for offset, raw in cut(stream, span):
                if len(raw) > LONGEST_DOCUMENT - 4:
                    problems.add(f"document cut at {LONGEST_DOCUMENT >> 20} MiB", span.path, offset=offset)
                yield offset, raw
    except DamagedFile:
        problems.add("damaged compressed data, the rest of the file is lost", span.path, offset=offset)


def _lines(stream: IO[bytes], span: Span) -> Iterator[tuple[int, bytes]]:
    """Lines that start in [start, stop), newline included, in pieces of at most LONGEST_DOCUMENT."""
    stop = _end(span)
    offset = span.start
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


def _blocks(stream: IO[bytes], span: Span) -> Iterator[tuple[int, bytes]]:
    """Runs of non-blank lines. A block belongs to the range in which the blank line before it starts.

    That rule needs no look back: a range skips to its first blank line, and goes on past its end until
    a blank line starts there.
    """
    stop = _end(span)
    owned = span.start == 0
    lines: list[bytes] = []
    size = begin = 0
    for offset, line in _lines(stream, replace(span, stop=None)):
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


def _file(stream: IO[bytes], span: Span) -> Iterator[tuple[int, bytes]]:
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


def _end(span: Span) -> float:
    return float("inf") if span.stop is None else span.stop


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


# From bytes or a field to a text


def _decode(raw: bytes, path: str, offset: int, problems: Problems) -> str | None:
    """UTF-8 with what is invalid replaced by U+FFFD (and counted); None where no text is left."""
    if offset == 0:
        raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        problems.add("invalid UTF-8", path, offset=offset + error.start)
        text = raw.decode(errors="replace")
    return _usable(text, problems, path, offset=offset)


def _field(value: Any, column: str, problems: Problems, path: str, **place: int) -> str | None:
    """A cell's text; None, and a problem counted, where it has none."""
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
    return _usable(value, problems, path, **place)


def _usable(text: str, problems: Problems, path: str, **place: int) -> str | None:
    text = text.strip()
    if not text:
        problems.add("empty document", path, **place)
        return None
    if text.count("\ufffd") + text.count("\0") > JUNK_SHARE * len(text):
        problems.add("not text", path, **place)
        return None
    return text
