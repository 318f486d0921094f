from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from infra import paths, storage
from infra.errors import UserError
from infra.sections import Corpus
from offline_teacher.corpus import documents as module
from offline_teacher.corpus.documents import Part, documents, parts
from offline_teacher.corpus.problems import EXAMPLES_PER_KIND, Problems, line_number


def read(
    corpus: Corpus, part_bytes: int = 1 << 20, validation: bool = False
) -> tuple[list[list[str]], Problems]:
    problems = Problems(corpus.strict)
    return [list(documents(p, corpus, problems)) for p in parts(corpus, part_bytes, validation)], problems


def flat(texts: list[list[str]]) -> list[str]:
    return [text for part in texts for text in part]


TEXT = "one\ntwo a\ntwo b\n\n \nthree\n\nfour\n"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("line", ["one", "two a", "two b", "three", "four"]),
        ("block", ["one\ntwo a\ntwo b", "three", "four"]),
        ("file", [TEXT.strip()]),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_what_a_document_is(tmp_path, document, expected, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    (tmp_path / f"a.txt{ending}").write_bytes(pack(TEXT.encode()))
    texts, _ = read(Corpus(path=(str(tmp_path / "*"),), document=document))
    assert flat(texts) == expected


@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bb", "c" * 9, "\u00e9t\u00e9", "\u4e2d"]), max_size=25),
    last=st.booleans(),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    document=st.sampled_from(["line", "block"]),
    windows=st.booleans(),
)
def test_byte_ranges_split_a_text_without_loss_wherever_they_fall(
    tmp_path_factory, lines, last, cuts, document, windows
):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(("\r\n" if windows else "\n").join([*lines, ""] if last else lines).encode())
    size = path.stat().st_size
    corpus = Corpus(path=(str(path),), document=document)
    edges = sorted({0, *(cut for cut in cuts if cut < size)})
    spans = [module.Span(str(path), a, b, "") for a, b in zip(edges, [*edges[1:], None], strict=True)]
    whole = list(documents(Part((module.Span(str(path), 0, None, ""),)), corpus, Problems()))
    assert [text for span in spans for text in documents(Part((span,)), corpus, Problems())] == whole
    if document == "line":
        assert whole == [line.strip() for line in lines if line.strip()]


def test_a_document_longer_than_the_bound_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", 10)
    (tmp_path / "a.txt").write_text("\u4e2d" * 7 + "\nshort\n")
    for document in ("line", "file"):
        texts, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document=document))
        assert "".join(flat(texts)).replace("\n", "") == "\u4e2d" * 7 + "short"
        assert max(len(text.encode()) for text in flat(texts)) <= 10
        assert problems.counts == {"document cut at 0 MiB": 1}


SHORT = 8
"""A bound on documents that random texts reach."""


@given(
    lines=st.lists(
        st.sampled_from(
            ["", " ", "a", "b" * 7, "c" * 8, "d" * 16, "e" * 17, "\u4e2d" * 3, "f" * 9 + " " * 8]
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 90), max_size=6),
    document=st.sampled_from(["line", "block"]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_byte_ranges_split_lines_of_any_length_without_loss(tmp_path_factory, lines, cuts, document, ending):
    path = str(tmp_path_factory.mktemp("long") / "a.txt")
    data = ending.join(lines).encode()
    storage.publish_bytes(path, data)
    edges = sorted({0, *(cut for cut in cuts if cut < len(data))})
    corpus, whole, ranges = Corpus(path=(path,), document=document), Problems(), Problems()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", SHORT)
        expected = list(documents(Part((module.Span(path, 0, None, ""),)), corpus, whole))
        spans = [module.Span(path, a, b, "") for a, b in zip(edges, [*edges[1:], None], strict=True)]
        found = [text for span in spans for text in documents(Part((span,)), corpus, ranges)]
    assert found == expected
    assert ranges.counts == whole.counts
    assert "".join("".join(found).split()) == "".join("".join(lines).split())
    blank = [
        line for line in data.decode().split("\n")[: None if lines and lines[-1] else -1] if not line.strip()
    ]
    assert whole.counts.get("empty document", 0) == (len(blank) if document == "line" else 0)
    if document == "line":
        assert whole.counts.get("document cut at 0 MiB", 0) == sum(
            len((line + ending[:-1]).encode()) > SHORT and len(line.strip()) != SHORT for line in lines
        )


@pytest.mark.parametrize(
    ("document", "expected"),
    [("line", ["0123456789", "b"]), ("block", ["0123456789", "b"]), ("file", ["01234567"])],
)
def test_a_document_as_long_as_the_bound_is_not_cut(tmp_path, monkeypatch, document, expected):
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", 10)
    text = {"line": "0123456789\nb\n", "block": "0123456789\n\nb\n", "file": "01234567"}[document]
    (tmp_path / "a.txt").write_text(text)
    texts, _ = read(Corpus(path=(str(tmp_path / "*.txt"),), document=document, strict=True))
    assert flat(texts) == expected


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub"])
def test_a_cut_document_is_counted_once_whatever_it_comes_from(tmp_path, monkeypatch, source):
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", 10)
    words = ["short", "0123456789" * 2 + "01", "short"]
    (tmp_path / "a.text").write_text("\n".join(words))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    pq.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"text": words}), tmp_path / "hub/train.parquet")
    texts, problems = read(
        Corpus(path=(str(tmp_path / ("hub" if source == "hub" else f"a.{source}")),), source=source)
    )
    assert flat(texts) == ["short", "0123456789", "0123456789", "01", "short"]
    assert problems.counts == {"document cut at 0 MiB": 1}
    assert re.search(r"(line|row) 2\)", problems.summary())


@pytest.mark.parametrize("part_bytes", [1 << 20, 30])
def test_rows_of_json_lines_are_whole_up_to_a_bound_of_their_own(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", 16)
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_ROW", 64)
    texts = ["a", "b" * (16 * 3 - 12), "c" * 15, "d" * 200, "\u4e2d" * 8, "e"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    assert len(rows[1]) % 16 == 0
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found, problems = read(Corpus(path=(str(tmp_path / "a.jsonl"),), source="jsonl"), part_bytes)
    assert "".join(flat(found)) == "".join(texts).replace("d", "")
    assert problems.counts == {"document cut at 0 MiB": 1, "row longer than 0 MiB": 1}
    assert "row longer than 0 MiB (first: " in problems.summary()
    assert problems.summary().endswith("a.jsonl, line 4)")


def test_blank_lines_of_json_lines_are_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n \n{"text": "b"}\n\n')
    assert flat(read(Corpus(path=(str(tmp_path / "a.jsonl"),), source="jsonl", strict=True))[0]) == ["a", "b"]


def test_a_thousand_small_files_are_few_parts_and_a_large_one_is_many(tmp_path):
    for number in range(1000):
        (tmp_path / f"{number:04d}.txt").write_text("ten bytes\n")
    (tmp_path / "large.txt").write_text("ten bytes\n" * 1000)
    listed = parts(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    assert len(listed) == 20
    assert listed == parts(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    texts, _ = read(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    assert flat(texts) == ["ten bytes"] * 2000


def test_json_lines_and_their_other_column(tmp_path):
    rows = [{"text": f"t{number}", "body": f"b{number}"} for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = (str(tmp_path / "a.jsonl"),)
    assert flat(read(Corpus(path=path, source="jsonl"), 100)[0]) == [row["text"] for row in rows]
    assert len(parts(Corpus(path=path, source="jsonl"), 100)) > 10
    corpus = Corpus(path=path, source="jsonl", text_column="body")
    assert flat(read(corpus)[0]) == [row["body"] for row in rows]


def test_parquet_row_groups(tmp_path):
    for name in "ab":
        table = pa.table({"text": [f"{name} {number}" for number in range(100)], "n": list(range(100))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    corpus = Corpus(path=(str(tmp_path / "*.parquet"),), source="parquet")
    texts, problems = read(corpus, 1)
    assert len(texts) == 20
    assert flat(texts) == [f"{name} {number}" for name in "ab" for number in range(100)]
    assert len(read(corpus, 1 << 20)[0]) == 1
    assert not problems.counts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name_config_split_and_column(tmp_path, streaming):
    folder = tmp_path / "things"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 3)):
        rows = [{"body": f"{split} {number}"} for number in range(count)] + [{"body": None}]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = Corpus(
        source="hub",
        path=(str(folder),),
        text_column="body",
        validation_split="validation",
        streaming=streaming,
    )
    texts, problems = read(corpus, 64)
    assert flat(texts) == [f"train {number}" for number in range(40)]
    assert len(texts) == 1 if streaming else len(texts) > 3
    assert problems.counts == {"column 'body' is not a string": 1}
    assert problems.examples[0].row == 41
    assert flat(read(corpus, 64, validation=True)[0]) == [f"validation {number}" for number in range(3)]
    assert parts(Corpus(source="hub", path=(str(folder),), streaming=streaming), 64, validation=True) == []


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


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
]


@pytest.mark.parametrize(
    ("settings_", "name", "data", "kind", "place", "remain"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_counted_and_located_and_fatal_only_under_strict(
    tmp_path, settings_, name, data, kind, place, remain
):
    (tmp_path / name).write_bytes(data)
    texts, problems = read(Corpus(path=(str(tmp_path / name),), **settings_))
    assert [found for found in problems.counts if kind in found]
    assert re.search(rf"{re.escape(kind)}.* \(first: .*{name}, {place}", problems.summary())
    assert remain is None or len(flat(texts)) == remain
    with pytest.raises(UserError, match=rf"{name}, {place}.*: .*corpus\.strict"):
        read(Corpus(path=(str(tmp_path / name),), strict=True, **settings_))


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        (Corpus(path=("absent/*.txt",)), "absent"),
        (Corpus(path=("absent.txt",)), "absent.txt"),
        (Corpus(path=("absent.jsonl",), source="jsonl"), "absent.jsonl"),
        (Corpus(path=("absent",), source="hub"), "absent"),
        (Corpus(path=("",)), r"^corpus\.path: a name in it is empty; give files or globs"),
        (Corpus(path=("a",), validation_path=("b", "")), "^a: matches no file"),
    ],
)
def test_a_corpus_that_is_not_there(tmp_path, monkeypatch, corpus, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        parts(corpus, 1 << 20)


@pytest.mark.parametrize("data", [b"", b"not parquet", parquet_bytes(pa.table({"text": ["a"]}))[:-3]])
def test_a_file_that_is_not_parquet(tmp_path, data):
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        parts(Corpus(path=(str(tmp_path / "*"),), source="parquet"), 1 << 20)


def test_a_damaged_parquet_file_among_others_is_left_out(tmp_path):
    good = parquet_bytes(pa.table({"text": ["a", "b"]}))
    (tmp_path / "a.parquet").write_bytes(good[:-3])
    (tmp_path / "b.parquet").write_bytes(good)
    corpus = Corpus(path=(str(tmp_path / "*"),), source="parquet")
    texts, problems = read(corpus)
    assert flat(texts) == ["a", "b"]
    assert problems.counts == {"damaged Parquet file, left out": 1}
    assert "a.parquet" in problems.summary()
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read(dataclasses.replace(corpus, strict=True))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.parquet.zst"])
def test_parquet_compressed_as_a_whole(tmp_path, name):
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    table = pa.table({"text": [str(number) for number in range(100)]})
    pq.write_table(table, tmp_path / "a", row_group_size=10)
    packed = pack((tmp_path / "a").read_bytes())
    (tmp_path / name).write_bytes(packed)
    corpus = Corpus(path=(str(tmp_path / name),), source="parquet")
    texts, problems = read(corpus, 1)
    assert texts == [[str(number) for number in range(100)]]
    assert not problems.counts
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(UserError, match=f"{name}: damaged compressed data"):
        parts(corpus, 1)


def test_a_missing_column_is_counted_for_each_row(tmp_path):
    pq.write_table(pa.table({"x": list(range(100))}), tmp_path / "a.parquet", row_group_size=10)
    _, problems = read(Corpus(path=(str(tmp_path / "*"),), source="parquet"), 1)
    assert problems.counts == {"missing column 'text'": 100}
    assert [example.row for example in problems.examples] == [1, 11]  # each the first of a part of ten


WORDS = b"".join(b"%d is a line of the text\n" % number for number in range(40_000))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", gzip.compress(b"a"), r"is compressed with gzip; let its name end in \.gz"),
        ("a.txt", zstandard.compress(b"a"), r"is compressed with zstd; let its name end in \.zst"),
        ("a.txt.bz2", bz2.compress(b"a"), r"is compressed with bzip2; repack it as \.gz or \.zst"),
        ("a.txt.xz", lzma.compress(b"a"), r"is compressed with xz; repack it as \.gz or \.zst"),
        ("a.zip", b"PK\x03\x04" + bytes(40), r"is compressed with zip; repack it as \.gz or \.zst"),
        ("a.txt.gz", b"plain\n", "is not gzip, as its name says; rename it"),
        ("a.txt.zst", gzip.compress(b"a"), "is not zstd, as its name says; rename it"),
        (
            "a.parquet",
            parquet_bytes(pa.table({"text": ["a"]})),
            r"is a Parquet file; set corpus\.source: parquet",
        ),
        ("a.txt", "word".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("a.txt", b"\xfe\xff" + "word".encode("utf-16-be"), "is UTF-16; convert it to UTF-8"),
        ("a.txt", "word".encode("utf-32"), "is UTF-32; convert it to UTF-8"),
    ],
    ids=[
        "gzip",
        "zstd",
        "bzip2",
        "xz",
        "zip",
        "text as gz",
        "gzip as zst",
        "Parquet",
        "UTF-16",
        "UTF-16 big-endian",
        "UTF-32",
    ],
)
def test_a_file_of_another_kind_is_refused_before_anything_is_read(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    for source in ("text", "jsonl"):
        with pytest.raises(UserError, match=f"{name}: {sentence}"):
            parts(Corpus(path=(str(tmp_path / "*"),), source=source), 1 << 20)


def arrow_bytes(open_writer) -> bytes:
    table = pa.table({"text": [f"{number} is a document of some length\n" * 90 for number in range(400)]})
    sink = pa.BufferOutputStream()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def tar_bytes() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(WORDS)
        archive.addfile(entry, io.BytesIO(WORDS))
    return sink.getvalue()


ARROW = r"is an Arrow file; set corpus\.source: hub and corpus\.path to its directory"
INNER = "decompressed, it "
BINARY = "is a binary file; write its documents as UTF-8 text, JSON lines or Parquet"
ENGLISH, THAI = WORDS.decode(), "ภาษาไทยเป็นภาษา ที่สวยงาม\n" * 300
BINARY_FILES = {
    "save_to_disk": ("data-0.arrow", arrow_bytes(pa.ipc.new_stream), ARROW),
    "Arrow file": ("a.txt", arrow_bytes(pa.ipc.new_file), ARROW),
    "pickle": ("a.txt", pickle.dumps(ENGLISH), "is a pickle file; write its documents as UTF-8 text"),
    "PDF": ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "is a PDF file; write"),
    "SQLite": ("a.db", b"SQLite format 3\0" + bytes(84), "is an SQLite database; write"),
    "tar": ("a.tar", tar_bytes(), "is a tar archive; unpack it"),
    "tar.gz": ("a.tar.gz", gzip.compress(tar_bytes()), INNER + "is a tar archive; unpack it"),
    "Arrow in zst": ("a.arrow.zst", zstandard.compress(arrow_bytes(pa.ipc.new_file)), INNER + ARROW),
    "UTF-16 in gz": ("a.txt.gz", gzip.compress(ENGLISH.encode("utf-16")), INNER + "is UTF-16"),
    "UTF-16 without a mark": ("a.txt", ENGLISH.encode("utf-16-le"), "is UTF-16; convert it to UTF-8"),
    "Thai UTF-16": ("a.txt", THAI.encode("utf-16-be"), "is UTF-16; convert it to UTF-8"),
    # of no known kind
    "lengths and texts": ("a.bin", (struct.pack("<q", 99) + b"a line of text\n" * 60) * 3, BINARY),
    "deflated": ("a.bin", zlib.compress(WORDS)[2:], BINARY),
    "lz4": ("a.bin", pa.compress(WORDS, codec="lz4_raw", asbytes=True), BINARY),
    "floats": ("a.bin", np.random.default_rng(0).normal(size=999).astype("<f4").tobytes(), BINARY),
    "zeros": ("a.bin", bytes(100), BINARY),
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY_FILES)
def test_a_binary_file_is_told_from_text_by_its_content(tmp_path, name):
    file, data, sentence = BINARY_FILES[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    for source in ("text", "jsonl"):
        with pytest.raises(UserError, match=f"{file}: {sentence}"):
            parts(Corpus(path=(str(tmp_path / "*"),), source=source), 1 << 20)


ODD_TEXTS = {
    "Thai": THAI.encode(),
    "emoji": "so fine 🎉 today 😀\n".encode() * 300,
    "latin-1": "le café à Noël, où l'hôtel était fermé\n".encode("latin-1") * 300,
    "cp1251": "Привет мир, как дела\n".encode("cp1251") * 300,
    "Shift JIS": "日本語の文章がここにあります\n".encode("shift-jis") * 300,
    "form feeds": WORDS[:9999].replace(b"\n", b"\n\f"),
    "terminal": b"b\bbo\bol\bld\bd \x1b[31mred\x1b[0m\n" * 300,
    "quotes cut to a byte": b"it\x19s \x1ca\x1d quotation in a sentence of the usual length, and on\n" * 300,
    "a few NULs": b"\0\0\0" + WORDS,
    "short": b"a\0b\n",
    "empty": b"",
}


@pytest.mark.parametrize("data", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_an_odd_text_is_a_text(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "good.txt").write_text("a\n")
    assert sum(len(part.spans) for part in parts(Corpus(path=(f"{tmp_path}/*.txt",)), 1 << 20)) == 2


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_what_save_to_disk_wrote_is_read_as_a_data_set(tmp_path, split):
    data = Dataset.from_dict({"text": [str(number) for number in range(100)]})
    (data if split is None else DatasetDict({split: data})).save_to_disk(tmp_path)
    corpus = Corpus(source="hub", path=(str(tmp_path),), split=split or "train")
    assert flat(read(corpus, 64)[0]) == [str(number) for number in range(100)]
    for changes, sentence in [
        ({"split": "dev"}, "split"),
        ({"streaming": True}, "set corpus.streaming: false"),
    ]:
        with pytest.raises(UserError, match=rf"cannot load data set '{tmp_path}'.*{sentence}"):
            parts(dataclasses.replace(corpus, **changes), 64)


def test_a_text_that_begins_like_another_kind_is_a_text(tmp_path):
    for number, text in enumerate(("BZh9 is a flight", "PAR1 of the book", "PK is a name", "%PDF-1")):
        (tmp_path / f"{number}.txt").write_text(text)
    assert len(flat(read(Corpus(path=(str(tmp_path / "*"),)))[0])) == 4


@pytest.mark.parametrize("suffix", ["GZ", "Zst"])
def test_suffixes_may_be_in_capitals(tmp_path, suffix):
    pack = gzip.compress if suffix == "GZ" else zstandard.compress
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"one\n\xff\n"))
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),)), 4)
    assert texts == [["one"]]
    assert "invalid UTF-8 (first: " in problems.summary()
    assert ", line 2)" in problems.summary()


def test_zero_bytes_behind_a_gzip_file_are_padding(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(512))
    assert flat(read(Corpus(path=(str(tmp_path / "*"),), strict=True))[0]) == ["one", "two"]


@pytest.mark.parametrize("document", ["line", "block", "file"])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_text_before_a_damage_is_kept(tmp_path, document, kind):
    """All that another decoder finds before the place where the file is cut; zstd has blocks of 128 KiB."""
    packed = (gzip.compress if kind == "gz" else zstandard.compress)(WORDS)[:-1000]
    if kind == "gz":
        before = zlib.decompressobj(31).decompress(packed)
    else:
        before = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    assert len(before) > len(WORDS) // 2
    (tmp_path / f"a.txt.{kind}").write_bytes(packed)
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),), document=document))
    assert "\n".join(flat(texts)) == before.decode().strip()
    assert problems.counts == {"damaged compressed data, the rest of the file is lost": 1}
    assert problems.summary().endswith(f"line {before.count(10) + 1})")


def test_a_row_that_a_damage_ends_is_not_called_broken(tmp_path):
    row = json.dumps({"text": os.urandom(5000).hex()}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(row * 2)[:-20])
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),), source="jsonl"))
    assert len(flat(texts)) == 1
    assert problems.counts == {"damaged compressed data, the rest of the file is lost": 1}


def test_a_file_spelled_in_several_ways_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("one\n")
    names = ["d/a.txt", "./d/a.txt", "d//a.txt", "d/*.txt", str(tmp_path / "d/a.txt"), "~/d/a.txt"]
    for globs in (names, names[::-1]):
        assert paths.find_files(globs) == ["./d/a.txt"]


def test_a_name_that_is_not_utf8_can_be_stored_and_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"one\n\ntwo\n")
    _, problems = read(Corpus(path=(f"{tmp_path}/*.txt",)))
    assert json.dumps(problems.to_json(), ensure_ascii=False).encode()
    assert problems.summary().endswith("caf\\xe9.txt, line 2)")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_row_of_a_data_set_is_named(tmp_path, streaming):
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n' * 5 + '{"text": \n')
    corpus = Corpus(source="hub", path=(str(tmp_path),), streaming=streaming)
    if not streaming:
        with pytest.raises(UserError, match=f"cannot load data set '{tmp_path}'.*: JSON parse error"):
            parts(corpus, 64)
        return
    texts, problems = read(corpus)
    assert flat(texts) == []
    assert problems.summary().startswith(
        f"1 x damaged data, the rest of the file is lost (first: {tmp_path}[train, file 1]"
    )
    with pytest.raises(UserError, match=r"\[train, file 1\], row 1: damaged data.*corpus\.strict"):
        read(dataclasses.replace(corpus, strict=True))


def test_a_data_set_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n')
    corpus = Corpus(source="hub", path=(str(tmp_path),), streaming=True)
    listed = parts(corpus, 64)

    def fails(data: object) -> Iterator[object]:
        raise ConnectionError("no route\nto host")
        yield

    monkeypatch.setattr("datasets.IterableDataset.__iter__", fails)
    with pytest.raises(UserError, match=r"cannot read .*\[train, file 1\], row 1: no route$"):
        list(documents(listed[0], corpus, Problems()))


def test_the_line_of_an_invalid_byte_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb\xff" + b"b" * 20 + b"\n")
    _, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document="file"))
    assert problems.summary().endswith("a.txt, line 2)")


def test_a_line_of_other_white_space_ends_no_block(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\u3000\nb\n\u00a0\nc\n\n\u3000\n \t\v\f\r\nd\n")
    texts, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document="block"))
    assert flat(texts) == ["a\n\u3000\nb\n\u00a0\nc", "d"]
    assert problems.counts == {"empty document": 1}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert flat(read(Corpus(path=(str(tmp_path / "a.txt"),)))[0]) == ["one"]


def test_problems_keep_the_first_examples_of_each_kind_over_parts(tmp_path):
    (tmp_path / "a.txt").write_text("\n" * 300 + "word\n" * 300)
    corpus = Corpus(path=(str(tmp_path / "a.txt"),))
    found = []
    for part in parts(corpus, 100):
        problems = Problems()
        list(documents(part, corpus, problems))
        found.append(json.loads(json.dumps(problems.to_json())))
    merged = Problems.merged(found)
    assert merged.counts == {"empty document": 300}
    lines = [line_number(example.file, example.offset) for example in merged.examples]
    assert lines == list(range(1, EXAMPLES_PER_KIND + 1))
