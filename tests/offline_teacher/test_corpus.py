from __future__ import annotations

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.sections import Corpus
from offline_teacher import corpus as module
from offline_teacher import document_cuts
from offline_teacher.corpus import Part, documents, parts
from offline_teacher.corpus_problems import EXAMPLES_PER_KIND, Problems, line_number


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
    monkeypatch.setattr(document_cuts, "LONGEST_DOCUMENT", 10)
    (tmp_path / "a.txt").write_text("\u4e2d" * 7 + "\nshort\n")
    for document in ("line", "file"):
        texts, problems = read(Corpus(path=(str(tmp_path / "a.txt"),), document=document))
        assert "".join(flat(texts)).replace("\n", "") == "\u4e2d" * 7 + "short"
        assert max(len(text.encode()) for text in flat(texts)) <= 10
        assert problems.counts.keys() == {"document cut at 0 MiB"}


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
    ("UTF-16", {"document": "file"}, "a.txt", "words".encode("utf-16"), "not text", "line 1", 0),
    (
        "truncated gz",
        {},
        "a.txt.gz",
        gzip.compress(b"good\n" * 9)[:-9],
        "damaged compressed data",
        "line",
        None,
    ),
    ("not gz", {}, "a.txt.gz", b"plain\n", "damaged compressed data", "line 1", 0),
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
