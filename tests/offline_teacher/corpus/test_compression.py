"""Compressed files: what is read of them where they are whole, and where they are damaged."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Corpus, CorpusSource, DocumentUnit
from offline_teacher.cluster.worker_base import NODE, cause_of
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts, relative_size
from offline_teacher.corpus.problems import Problems
from tests.offline_teacher.corpus.reading import WORDS, flat, read


@pytest.mark.parametrize("suffix", ["GZ", "Zst"])
def test_suffixes_may_be_in_capitals(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == "GZ" else zstandard.compress
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"one\n\xff\n"))
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),)))
    assert texts == [["one"]]
    assert "invalid UTF-8 (first: " in problems.summary()
    assert ", line 2)" in problems.summary()


def test_zero_bytes_behind_a_gzip_file_are_padding(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(512))
    assert flat(read(Corpus(path=(str(tmp_path / "*"),), strict=True))[0]) == ["one", "two"]


@pytest.mark.parametrize("document", ["line", "block", "file"])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_text_before_a_damage_is_kept(tmp_path: Path, document: DocumentUnit, kind: str) -> None:
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


def test_a_row_that_a_damage_ends_is_not_called_broken(tmp_path: Path) -> None:
    row = json.dumps({"text": os.urandom(5000).hex()}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(row * 2)[:-20])
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),), source="jsonl"))
    assert len(flat(texts)) == 1
    assert problems.counts == {"damaged compressed data, the rest of the file is lost": 1}


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.parquet.zst"])
def test_parquet_compressed_as_a_whole(tmp_path: Path, name: str) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    table = pa.table({"text": [str(number) for number in range(100)]})
    pq.write_table(table, tmp_path / "a", row_group_size=10)
    packed = pack((tmp_path / "a").read_bytes())
    (tmp_path / name).write_bytes(packed)
    corpus = Corpus(path=(str(tmp_path / name),), source="parquet")
    texts, problems = read(corpus, 1)
    assert texts == [[str(number) for number in range(100)]]
    assert not problems.counts
    (part,) = parts(corpus, 100)
    assert relative_size(part, 100) == 4 * len(packed) / 100  # its text is in row groups, not bytes
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(UserError, match=f"{name}: damaged compressed data"):
        parts(corpus, 1)


def test_large_parts_are_known_as_large(tmp_path: Path) -> None:
    """Their deadline is longer: a file that is one document, and a large row group."""
    (tmp_path / "a.txt").write_text("word " * 2000)
    (part,) = parts(Corpus(path=(str(tmp_path / "a.txt"),), document="file"), 100)
    assert relative_size(part, 100) == 100
    pq.write_table(pa.table({"text": [os.urandom(500).hex() for _ in range(100)]}), tmp_path / "a.parquet")
    (part,) = parts(Corpus(path=(str(tmp_path / "a.parquet"),), source="parquet"), 1000)
    assert relative_size(part, 1000) > 90
    (tmp_path / "b.txt").write_text("word\n" * 2000)
    listed = parts(Corpus(path=(str(tmp_path / "b.txt"),)), 100)
    assert {relative_size(part, 100) for part in listed} == {1.0}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_failing_disk_is_no_damage_of_a_compressed_file(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the rest of the file would be lost, and the part be finished without it."""
    lines = [os.urandom(40).hex() for _ in range(20_000)]
    pack = gzip.compress if ending == ".gz" else zstandard.compress
    (tmp_path / f"a.txt{ending}").write_bytes(pack("\n".join(lines).encode()))
    corpus = Corpus(path=(str(tmp_path / "*"),))
    (part,) = parts(corpus, 1 << 30)
    opened = storage._open_raw

    def failing(path: str) -> Any:
        raw, reads = opened(path), []

        def readinto(buffer: Any) -> int:
            reads.append(1)
            if len(reads) > 5:
                raise OSError(errno.EIO, "Input/output error")
            return raw.readinto(buffer)

        stream = io.RawIOBase()
        stream.readable = lambda: True  # type: ignore[method-assign]
        stream.seekable = lambda: True  # type: ignore[method-assign]
        stream.seek = raw.seek  # type: ignore[method-assign]
        stream.readinto = readinto  # type: ignore[method-assign]
        return stream

    monkeypatch.setattr(storage, "_open_raw", failing)
    problems = Problems(strict=False)
    with pytest.raises(OSError, match="Input/output error|a.txt") as caught:
        list(documents(part, corpus, problems))
    assert cause_of(caught.value) == NODE
    assert not problems.counts


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_large_compressed_file_is_cut_like_its_text(
    tmp_path: Path, ending: str, source: CorpusSource
) -> None:
    """Each document is in one part, and no part is much larger than the others."""
    lines = [f"line {number} of the text" for number in range(30_000)]
    rows = [json.dumps({"text": line}) for line in lines] if source == "jsonl" else lines
    pack = gzip.compress if ending == ".gz" else zstandard.compress
    (tmp_path / f"a{ending}").write_bytes(pack("\n".join(rows).encode()))
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),), source=source), 100_000)
    assert flat(texts) == lines
    assert len(texts) >= 5
    assert max(map(len, texts)) <= 2 * len(lines) / len(texts)
    assert not problems.counts


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damage_in_a_compressed_file_of_several_parts_is_counted_once(tmp_path: Path, ending: str) -> None:
    lines = [f"{number * 2_654_435_761 % 2**32:x}" for number in range(60_000)]
    pack = gzip.compress if ending == ".gz" else zstandard.compress
    packed = pack("\n".join(lines).encode())
    (tmp_path / f"a.txt{ending}").write_bytes(packed[: len(packed) * 2 // 3])
    texts, problems = read(Corpus(path=(str(tmp_path / "*"),)), 100_000)
    assert len(texts) >= 3
    assert list(problems.counts.values()) == [1]
    found = flat(texts)
    assert found[:-1] == lines[: len(found) - 1]
    assert len(found) > len(lines) / 3  # zstd decodes whole blocks of 128 KiB
