"""Reads the documents of one part of a corpus (text, JSON lines, Parquet files or a hub dataset)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from infra.errors import DamagedFile
from infra.settings.sections import Corpus
from offline_teacher.corpus import cuts, hub
from offline_teacher.corpus.parquet import open_parquet
from offline_teacher.corpus.partition import Part, Span
from offline_teacher.corpus.problems import Problems

JUNK_SHARE = 0.1
"""A document is skipped as "not text" if more than this share of its characters is U+FFFD or NUL."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def documents(part: Part, corpus: Corpus, problems: Problems) -> Iterator[str]:
    """Yields the part's documents in order: not empty, valid Unicode, at most `cuts.LONGEST_DOCUMENT` long.
    Only one document, or one batch of rows, is in memory at a time."""
    for text in row_texts(part, corpus, problems):
        if text is not None:
            yield from cut_text(text) if _is_long(text) else (text,)


def row_texts(part: Part, corpus: Corpus, problems: Problems) -> Iterator[str | None]:
    """Yields the texts of the part before ``cut_text``; None for a row or piece of text that is unusable."""
    for span in part.spans:
        yield from _READERS[corpus.source](span, corpus, part.split, problems)


def cut_text(text: str) -> list[str]:
    longest = cuts.LONGEST_DOCUMENT
    return [text[start : start + longest] for start in range(0, len(text), longest)]


def _read_text(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    document_start, counted = span.start, False
    for offset, raw, begins in cuts.cut(corpus.document, span.path, span.start, span.stop, problems):
        if begins:
            document_start, counted = offset, False
        elif not raw.strip():  # the rest of a cut document is only its last newline
            continue
        text = _decode(raw, span.path, offset, problems)
        if not counted and (not begins or _is_long(text)):
            _count_cut(problems, span.path, offset=document_start)
            counted = True
        yield text


def _read_jsonl(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    for offset, raw in cuts.rows(span.path, span.start, span.stop, problems):
        raw = raw.removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():  # a blank line is no row
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
        yield _cell_text(value, corpus.text_column, problems, span.path, offset=offset)


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
        rows_read = 0
        if column not in table.columns:
            if count:
                problems.add(f"missing column {column!r}", span.path, row=first, count=count)
        else:
            try:
                for row, value in table.cells(column, span.start, span.stop):
                    rows_read += 1
                    yield _cell_text(value, column, problems, span.path, row=row)
            except DamagedFile:
                kind = "damaged Parquet data, the rows after it are lost"
                problems.add(kind, span.path, row=first + rows_read)
        yield from repeat(None, count - rows_read)


def _read_hub(span: Span, corpus: Corpus, split: str | None, problems: Problems) -> Iterator[str | None]:
    assert split is not None
    assert span.stop is not None
    name = hub.piece_name(corpus, split, span.start)
    number = 0 if corpus.streaming else span.start
    try:
        for number, row in hub.rows(corpus, split, span.start, span.stop):
            value = row.get(corpus.text_column, _MISSING)
            yield _cell_text(value, corpus.text_column, problems, name, row=number)
    except DamagedFile:
        problems.add("damaged data, the rest of the file is lost", name, row=number + 1)


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub}
_MISSING = object()


# From bytes or a cell to a text


def _decode(raw: bytes, path: str, offset: int, problems: Problems) -> str | None:
    """Returns the text of UTF-8 bytes; None if unusable. Invalid bytes are counted and become U+FFFD."""
    if offset == 0 and raw.startswith(BYTE_ORDER_MARK):
        offset = len(BYTE_ORDER_MARK)
        raw = raw[offset:]
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        problems.add("invalid UTF-8", path, offset=offset + error.start)
        text = raw.decode(errors="replace")
    return _usable_text(text, problems, path, offset=offset)


def _cell_text(value: Any, column: str, problems: Problems, path: str, **location: int) -> str | None:
    """Returns a cell's text, or counts the problem and returns None if the cell has no usable text."""
    if value is _MISSING:
        problems.add(f"missing column {column!r}", path, **location)
        return None
    if not isinstance(value, str):
        problems.add(f"column {column!r} is not a string", path, **location)
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # escapes in JSON can encode lone surrogates, which tokenizers refuse
        problems.add("invalid UTF-8", path, **location)
        value = re.sub("[\ud800-\udfff]", "\ufffd", value)
    text = _usable_text(value, problems, path, **location)
    if _is_long(text):
        _count_cut(problems, path, **location)
    return text


def _usable_text(text: str, problems: Problems, path: str, **location: int) -> str | None:
    text = text.strip()
    if not text:
        problems.add("empty document", path, **location)
        return None
    if text.count("\ufffd") + text.count("\0") > JUNK_SHARE * len(text):
        problems.add("not text", path, **location)
        return None
    return text


def _is_long(text: str | None) -> bool:
    return text is not None and len(text) > cuts.LONGEST_DOCUMENT


def _count_cut(problems: Problems, path: str, **location: int) -> None:
    problems.add(f"document cut at {cuts.LONGEST_DOCUMENT >> 20} MiB", path, **location)
