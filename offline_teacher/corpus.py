"""Documents of a corpus: text, JSON lines, Parquet files or a hub data set, split into units of work.

``parts`` lists, ``documents`` reads. A part is a deterministic piece of about ``part_bytes``: byte ranges
of plain text and JSON lines, row groups of Parquet, whole compressed files, rows of a hub data set; small
neighbours share a part. A document belongs to the part in which it starts, and ends there: packing never
crosses parts, so that parts can be built in any order by any worker.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from infra import storage
from infra.errors import DamagedFile, UserError
from infra.sections import Corpus
from offline_teacher import document_cuts
from offline_teacher.corpus_problems import Problems
from offline_teacher.parquet import ParquetRows

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
    longest = document_cuts.LONGEST_DOCUMENT
    for span in part.spans:
        for text in _READERS[corpus.source](span, corpus, part.split, problems):
            for start in range(0, len(text), longest):
                yield text[start : start + longest]


def _read_text(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    for offset, raw in document_cuts.cut(corpus.document, span.path, span.start, span.stop, problems):
        text = _decode(raw, span.path, offset, problems)
        if text is not None:
            yield text


def _read_jsonl(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str]:
    for offset, raw in document_cuts.cut("line", span.path, span.start, span.stop, problems):
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
