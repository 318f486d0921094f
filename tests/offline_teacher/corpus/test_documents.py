"""What a document is: lines, blocks and files, wherever a part begins, up to the longest."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from infra.files import storage
from infra.settings.sections import Corpus, CorpusSource, DocumentUnit
from offline_teacher.corpus import documents as module
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import Part, parts
from offline_teacher.corpus.problems import Problems
from tests.offline_teacher.corpus.reading import flat, read

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
def test_what_a_document_is(tmp_path: Path, document: DocumentUnit, expected: list[str], ending: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    (tmp_path / f"a.txt{ending}").write_bytes(pack[ending](TEXT.encode()))
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
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    last: bool,
    cuts: list[int],
    document: DocumentUnit,
    windows: bool,
) -> None:
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


def test_a_document_longer_than_the_bound_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_byte_ranges_split_lines_of_any_length_without_loss(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    cuts: list[int],
    document: DocumentUnit,
    ending: str,
) -> None:
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
def test_a_document_as_long_as_the_bound_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: DocumentUnit, expected: list[str]
) -> None:
    monkeypatch.setattr("offline_teacher.corpus.cuts.LONGEST_DOCUMENT", 10)
    text = {"line": "0123456789\nb\n", "block": "0123456789\n\nb\n", "file": "01234567"}[document]
    (tmp_path / "a.txt").write_text(text)
    texts, _ = read(Corpus(path=(str(tmp_path / "*.txt"),), document=document, strict=True))
    assert flat(texts) == expected


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hub"])
def test_a_cut_document_is_counted_once_whatever_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: CorpusSource
) -> None:
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
def test_rows_of_json_lines_are_whole_up_to_a_bound_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
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


def test_a_thousand_small_files_are_few_parts_and_a_large_one_is_many(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number:04d}.txt").write_text("ten bytes\n")
    (tmp_path / "large.txt").write_text("ten bytes\n" * 1000)
    listed = parts(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    assert len(listed) == 20
    assert listed == parts(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    texts, _ = read(Corpus(path=(str(tmp_path / "*.txt"),)), 1000)
    assert flat(texts) == ["ten bytes"] * 2000


def test_a_line_of_other_white_space_ends_no_block(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\u3000\nb\n\u00a0\nc\n\n\u3000\n \t\v\f\r\nd\n")
    texts, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document="block"))
    assert flat(texts) == ["a\n\u3000\nb\n\u00a0\nc", "d"]
    assert problems.counts == {"empty document": 1}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert flat(read(Corpus(path=(str(tmp_path / "a.txt"),)))[0]) == ["one"]
