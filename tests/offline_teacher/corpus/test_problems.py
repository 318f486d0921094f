"""What is wrong with a document is counted and located, and fatal only under ``corpus.strict``."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from infra.errors import UserError
from infra.settings.sections import Corpus
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import EXAMPLES_PER_KIND, Problems, line_number
from tests.offline_teacher.corpus.reading import flat, parquet_bytes, read


def with_window(frame: zstandard.ZstdCompressionObj, log: int) -> bytes:
    data = bytearray(frame.compress(b"good\n") + frame.flush())
    data[5] = (log - 10) << 3  # RFC 8878, 3.1.1.1.2
    return bytes(data)


# name, settings, file, bytes, the kind counted, its place, the documents that remain
BAD = [
    ("latin-1", {}, "a.txt", b"good\ncaf\xe9 au lait please\n", "invalid UTF-8", "line 2", 2),
    (
        "cut character",
        {},
        "a.txt",
        "good\nthe caf\u00e9 of ours\u00e9".encode()[:-1],
        "invalid UTF-8",
        "line 2",
        2,
    ),
    ("blank line", {}, "a.txt", b"good\n\nmore\n", "empty document", "line 2", 2),
    ("blank file", {"document": "file"}, "a.txt", b" \n", "empty document", "line 1", 0),
    ("binary", {}, "a.txt", bytes(range(128, 256)) + b"\ngood\n", "not text", "line 1", 1),
    (
        "truncated gz",
        {},
        "a.txt.gz",
        gzip.compress(b"good\n" * 9)[:-8],
        "damaged compressed data",
        "line 10",
        9,
    ),
    (
        "garbage behind gz",
        {},
        "a.txt.gz",
        gzip.compress(b"good\n") + b"garbage",
        "damaged compressed data",
        "line 2",
        1,
    ),
    (
        "garbage behind zst",
        {},
        "a.txt.ZST",
        zstandard.compress(b"good\n") + b"garbage",
        "damaged compressed data",
        "line 2",
        1,
    ),
    (
        "zst --long=28",
        {},
        "a.txt.zst",
        with_window(zstandard.ZstdCompressor().compressobj(), 28),
        "zstd window above 128 MiB (recompress without --long), the file is left out",
        "line 1",
        0,
    ),
    (
        "truncated zst",
        {},
        "a.txt.zst",
        zstandard.compress(b"good\n" * 9)[:-4],
        "damaged compressed data",
        "line",
        None,
    ),
    (
        "broken JSON",
        {"source": "jsonl"},
        "a.jsonl",
        b'{"text": "a"}\n{"text": \n',
        "broken JSON",
        "line 2",
        1,
    ),
    ("deep JSON", {"source": "jsonl"}, "a.jsonl", b"[" * 200_000 + b"\n", "broken JSON", "line 1", 0),
    ("JSON bytes", {"source": "jsonl"}, "a.jsonl", b'{"text": "\xff"}\n', "invalid UTF-8", "line 1", 0),
    ("JSON column", {"source": "jsonl"}, "a.jsonl", b'{"txt": "a"}\n', "missing column 'text'", "line 1", 0),
    ("JSON list", {"source": "jsonl"}, "a.jsonl", b"[1]\n", "missing column 'text'", "line 1", 0),
    (
        "JSON number",
        {"source": "jsonl"},
        "a.jsonl",
        b'{"text": 3}\n',
        "column 'text' is not a string",
        "line 1",
        0,
    ),
    ("JSON empty", {"source": "jsonl"}, "a.jsonl", b'{"text": ""}\n', "empty document", "line 1", 0),
    (
        "JSON surrogate",
        {"source": "jsonl"},
        "a.jsonl",
        b'{"text": "a good word \\ud800 more"}',
        "invalid UTF-8",
        "line 1",
        1,
    ),
    (
        "Parquet column",
        {"source": "parquet"},
        "a.parquet",
        parquet_bytes(pa.table({"x": ["a"]})),
        "missing column 'text'",
        "row 1",
        0,
    ),
    (
        "Parquet number",
        {"source": "parquet"},
        "a.parquet",
        parquet_bytes(pa.table({"text": [1]})),
        "column 'text' is not a string",
        "row 1",
        0,
    ),
    (
        "Parquet null",
        {"source": "parquet"},
        "a.parquet",
        parquet_bytes(pa.table({"text": ["a", None]})),
        "column 'text' is not a string",
        "row 2",
        1,
    ),
    (
        "Parquet empty beside other bytes",
        {"source": "parquet"},
        "a.parquet",
        parquet_bytes(pa.table({"text": pa.array([b"a", b"", b"\xff"], pa.binary()).view(pa.string())})),
        "empty document",
        "row 2",
        1,
    ),
]


@pytest.mark.parametrize(
    ("settings_", "name", "data", "kind", "place", "remain"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_counted_and_located_and_fatal_only_under_strict(
    tmp_path: Path,
    settings_: dict[str, Any],
    name: str,
    data: bytes,
    kind: str,
    place: str,
    remain: int | None,
) -> None:
    (tmp_path / name).write_bytes(data)
    texts, problems = read(Corpus(path=(str(tmp_path / name),), **settings_))
    assert [found for found in problems.counts if kind in found]
    assert re.search(rf"{re.escape(kind)}.* \(first: .*{name}, {place}", problems.summary())
    assert remain is None or len(flat(texts)) == remain
    with pytest.raises(UserError, match=rf"{name}, {place}.*: .*corpus\.strict"):
        read(Corpus(path=(str(tmp_path / name),), strict=True, **settings_))


def test_a_name_that_is_not_utf8_can_be_stored_and_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"one\n\ntwo\n")
    _, problems = read(Corpus(path=(f"{tmp_path}/*.txt",)))
    assert json.dumps(problems.to_json(), ensure_ascii=False).encode()
    assert problems.summary().endswith("caf\\xe9.txt, line 2)")


def test_the_line_of_an_invalid_byte_behind_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb\xff" + b"b" * 20 + b"\n")
    _, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document="file"))
    assert problems.summary().endswith("a.txt, line 2)")


def test_problems_keep_the_first_examples_of_each_kind_over_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n" * 300 + "word\n" * 300)
    corpus = Corpus(path=(str(tmp_path / "a.txt"),))
    found = []
    for part in parts(corpus, 100):
        problems = Problems()
        list(documents(part, corpus, problems))
        found.append(json.loads(json.dumps(problems.to_json())))
    merged = Problems.merged(found)
    assert merged.counts == {"empty document": 300}
    offsets = [(example.file, example.offset) for example in merged.examples]
    lines = [line_number(file, offset) for file, offset in offsets if offset is not None]
    assert lines == list(range(1, EXAMPLES_PER_KIND + 1))
