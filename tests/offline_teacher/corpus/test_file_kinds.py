"""The reader recognises by its content whether a file is text or of another kind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from infra.errors import UserError
from infra.settings.sections import Corpus, CorpusSource
from offline_teacher.corpus.partition import parts
from tests.offline_teacher.corpus.reading import WORDS, flat, parquet_bytes, read


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
def test_a_file_of_another_kind_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, data: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    sources: tuple[CorpusSource, ...] = ("text", "jsonl")
    for source in sources:
        with pytest.raises(UserError, match=f"{name}: {sentence}"):
            parts(Corpus(path=(str(tmp_path / "*"),), source=source), 1 << 20)


def arrow_bytes(
    open_writer: Callable[[pa.BufferOutputStream, pa.Schema], pa.ipc.RecordBatchFileWriter],
) -> bytes:
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
def test_a_binary_file_is_told_from_text_by_its_content(tmp_path: Path, name: str) -> None:
    file, data, sentence = BINARY_FILES[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    sources: tuple[CorpusSource, ...] = ("text", "jsonl")
    for source in sources:
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
def test_an_odd_text_is_a_text(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "good.txt").write_text("a\n")
    assert sum(len(part.spans) for part in parts(Corpus(path=(f"{tmp_path}/*.txt",)), 1 << 20)) == 2


def test_a_text_that_begins_like_another_kind_is_a_text(tmp_path: Path) -> None:
    for number, text in enumerate(("BZh9 is a flight", "PAR1 of the book", "PK is a name", "%PDF-1")):
        (tmp_path / f"{number}.txt").write_text(text)
    assert len(flat(read(Corpus(path=(str(tmp_path / "*"),)))[0])) == 4
