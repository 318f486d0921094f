"""JSON lines, Parquet and data sets: what is read of them, and what is refused as a whole."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from infra.errors import NodeError, UserError
from infra.files import paths
from infra.settings.recipe import fingerprinted_settings
from infra.settings.sections import Corpus
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems
from tests.offline_teacher.corpus.reading import flat, parquet_bytes, read


def test_blank_lines_of_json_lines_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n \n{"text": "b"}\n\n')
    assert flat(read(Corpus(path=(str(tmp_path / "a.jsonl"),), source="jsonl", strict=True))[0]) == ["a", "b"]


def test_json_lines_and_their_other_column(tmp_path: Path) -> None:
    rows = [{"text": f"t{number}", "body": f"b{number}"} for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = (str(tmp_path / "a.jsonl"),)
    assert flat(read(Corpus(path=path, source="jsonl"), 100)[0]) == [row["text"] for row in rows]
    assert len(parts(Corpus(path=path, source="jsonl"), 100)) > 10
    corpus = Corpus(path=path, source="jsonl", text_column="body")
    assert flat(read(corpus)[0]) == [row["body"] for row in rows]


def test_parquet_row_groups(tmp_path: Path) -> None:
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
def test_a_data_set_by_name_config_split_and_column(tmp_path: Path, streaming: bool) -> None:
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


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_what_save_to_disk_wrote_is_read_as_a_data_set(tmp_path: Path, split: str | None) -> None:
    data = Dataset.from_dict({"text": [str(number) for number in range(100)]})
    (data if split is None else DatasetDict({split: data})).save_to_disk(tmp_path)
    corpus = Corpus(source="hub", path=(str(tmp_path),), split=split or "train")
    assert flat(read(corpus, 64)[0]) == [str(number) for number in range(100)]
    for wrong, sentence in [
        (dataclasses.replace(corpus, split="dev"), "split"),
        (dataclasses.replace(corpus, streaming=True), "set corpus.streaming: false"),
    ]:
        with pytest.raises(UserError, match=rf"cannot load dataset '{tmp_path}'.*{sentence}"):
            parts(wrong, 64)


def test_a_missing_column_is_counted_for_each_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": list(range(100))}), tmp_path / "a.parquet", row_group_size=10)
    _, problems = read(Corpus(path=(str(tmp_path / "*"),), source="parquet"), 1)
    assert problems.counts == {"missing column 'text'": 100}
    assert [example.row for example in problems.examples] == [1, 11]  # each the first of a part of ten


@pytest.mark.parametrize(
    ("corpus", "sentence"),
    [
        (Corpus(path=("absent/*.txt",)), "absent"),
        (Corpus(path=("absent.txt",)), "absent.txt"),
        (Corpus(path=("absent.jsonl",), source="jsonl"), "absent.jsonl"),
        (Corpus(path=("absent",), source="hub"), "absent"),
        (Corpus(path=("",)), r"^corpus\.path: one of the paths is empty; give files or globs"),
        (Corpus(path=("a",), validation_path=("b", "")), "^a: matches no file"),
    ],
)
def test_a_corpus_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        parts(corpus, 1 << 20)


def test_a_file_spelled_in_several_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("one\n")
    names = ["d/a.txt", "./d/a.txt", "d//a.txt", "d/*.txt", str(tmp_path / "d/a.txt"), "~/d/a.txt"]
    for globs in (names, names[::-1]):
        assert paths.find_files(globs) == ["./d/a.txt"]


@pytest.mark.parametrize("data", [b"", b"not parquet", parquet_bytes(pa.table({"text": ["a"]}))[:-3]])
def test_a_file_that_is_not_parquet(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        parts(Corpus(path=(str(tmp_path / "*"),), source="parquet"), 1 << 20)


def test_a_damaged_parquet_file_among_others_is_left_out(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_row_of_a_data_set_is_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n' * 5 + '{"text": \n')
    corpus = Corpus(source="hub", path=(str(tmp_path),), streaming=streaming)
    if not streaming:
        with pytest.raises(UserError, match=f"cannot load dataset '{tmp_path}'.*: JSON parse error"):
            parts(corpus, 64)
        return
    texts, problems = read(corpus)
    assert flat(texts) == []
    assert problems.summary().startswith(
        f"1 x damaged data, the rest of the file is lost (first: {tmp_path}[train, file 1]"
    )
    with pytest.raises(UserError, match=r"\[train, file 1\], row 1: damaged data.*corpus\.strict"):
        read(dataclasses.replace(corpus, strict=True))


def test_a_data_set_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n')
    corpus = Corpus(source="hub", path=(str(tmp_path),), streaming=True)
    listed = parts(corpus, 64)

    def fails(data: object) -> Iterator[object]:
        raise ConnectionError("no route\nto host")
        yield

    monkeypatch.setattr("datasets.IterableDataset.__iter__", fails)
    with pytest.raises(NodeError, match=r"cannot read .*\[train, file 1\], row 1: no route$"):
        list(documents(listed[0], corpus, Problems()))


class ReadError(Exception):
    """Like that of the hub's HTTP library, which is no OSError."""

    __module__ = "httpx2._exceptions"


def test_a_hub_that_fails_is_no_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass, another worker then gets the part."""
    problems: list[tuple[Exception, bool]] = [
        (ConnectionError("503"), True),
        (OSError(28, "No space left on device"), True),
        (ReadError("reset by peer"), True),
        (FileNotFoundError("no such dataset"), False),
        (ValueError("Unknown split"), False),
    ]
    for number, (problem, is_node) in enumerate(problems):
        monkeypatch.setattr("datasets.load_dataset", mock.Mock(side_effect=problem))
        with pytest.raises(UserError, match="cannot load dataset") as caught:
            parts(Corpus(source="hub", path=(f"some/name{number}",)), 64)
        assert isinstance(caught.value, NodeError) == is_node


@pytest.mark.parametrize("other", ['{"text": "b", "id": 2, "more": 3}\n', '{"text": "b", "id": "two"}\n'])
def test_files_of_a_stream_with_other_columns_are_not_lost_without_a_word(tmp_path: Path, other: str) -> None:
    """They are not damaged: datasets takes the columns of the first file for all."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n')
    (tmp_path / "b.jsonl").write_text(other)
    with pytest.raises(UserError, match="the columns or types of .* differ from those"):
        read(Corpus(source="hub", path=(str(tmp_path),), streaming=True))


def test_a_downloaded_data_set_is_read_by_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one take ten times as long."""
    rows = [f"row {number}" for number in range(2_500)]
    Dataset.from_dict({"text": rows, "other": rows}).save_to_disk(tmp_path / "saved")
    asked = []
    original = Dataset.__getitem__

    def counted(self: object, key: object) -> object:
        asked.append(key)
        return original(self, key)

    monkeypatch.setattr(Dataset, "__getitem__", counted)
    texts, _ = read(Corpus(source="hub", path=(str(tmp_path / "saved"),)), 1 << 20)
    assert flat(texts) == rows
    assert len(asked) <= 3


def test_a_stream_and_a_download_of_a_data_set_are_two_corpora() -> None:
    """They are cut at different places, and sequences do not cross a cut."""
    corpora = [Corpus(source="hub", path=("name",), streaming=streaming) for streaming in (False, True)]
    assert fingerprinted_settings(corpora[0]) != fingerprinted_settings(corpora[1])
