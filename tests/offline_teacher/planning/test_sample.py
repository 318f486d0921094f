"""What ``plan`` extrapolates from a part of the corpus."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.packing import Encoder, TextStatistics, pack
from offline_teacher.sequences.sample import sample_corpus
from tests.offline_teacher.tiny_teacher import write_text


def write_corpus(directory: Path, kind: str) -> Corpus:
    """About 800 kB in three files of unequal size, in one of the forms a corpus may have."""
    texts = [write_text(directory / f"{i}.txt", lines, seed=i) for i, lines in enumerate((1000, 6000, 3000))]
    if kind in ("line", "block", "file"):
        return Corpus(path=tuple(map(str, texts)), document=kind)  # type: ignore[arg-type]
    if kind == "gz":
        for path in texts:
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        return Corpus(path=(f"{directory}/*.gz",))
    lines = [line for path in texts for line in path.read_text().splitlines()]
    if kind == "jsonl":
        (directory / "all.jsonl").write_text(
            "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(lines))
        )
        return Corpus(source="jsonl", path=(f"{directory}/all.jsonl",))
    pq.write_table(pa.table({"text": lines}), directory / "all.parquet", row_group_size=200)
    if kind == "hub":
        (directory / "hub").mkdir()
        (directory / "all.parquet").rename(directory / "hub/train.parquet")
        return Corpus(source="hub", path=(f"{directory}/hub",))
    return Corpus(source="parquet", path=(f"{directory}/all.parquet",))


@pytest.mark.parametrize(
    ("kind", "packing"),
    [(kind, "packed") for kind in ("line", "file", "gz", "jsonl", "parquet", "hub")]
    + [(kind, "document") for kind in ("line", "gz", "parquet", "hub")],
)
def test_tokens_are_extrapolated_from_a_part(
    tmp_path: Path, encoder: Encoder, kind: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline_teacher.sequences.sample.PLACE_BYTES", 1 << 12)
    corpus = write_corpus(tmp_path, kind)
    settings = Sequences(length=16, packing=packing, part_bytes=1 << 14)  # type: ignore[arg-type]
    tokens = sequences = 0
    for part in parts(corpus, settings.part_bytes):
        for _, count in pack(documents(part, corpus, Problems()), encoder, settings, TextStatistics()):
            tokens, sequences = tokens + int(count.sum()), sequences + len(count)
    sample = sample_corpus(corpus, settings, encoder)
    assert not sample.exact
    assert len(sample.input_ids) < sequences / 2
    assert sample.tokens == pytest.approx(tokens, rel=0.1)
    assert sample.sequences == pytest.approx(sequences, rel=0.1)


def test_a_small_corpus_is_read_whole(tmp_path: Path, encoder: Encoder) -> None:
    corpus = Corpus(path=(str(write_text(tmp_path / "a.txt", 50)), str(write_text(tmp_path / "b.txt", 9))))
    sample = sample_corpus(corpus, Sequences(length=16, packing="document"), encoder)
    assert sample.exact
    assert sample.sequences == 59
    assert sample.tokens == int(sample.token_count.sum())


def test_what_is_wrong_with_the_sample_is_told(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "empty.txt").write_text("\n\n\n")
    with pytest.raises(UserError, match=r"no usable document.*empty\.txt"):
        sample_corpus(Corpus(path=(str(tmp_path / "empty.txt"),)), Sequences(), encoder)
    (tmp_path / "bad.txt").write_bytes(b"ba do\n\xff ki lu me no ru sa ba do ki lu me no\n")
    sample = sample_corpus(Corpus(path=(str(tmp_path / "bad.txt"),)), Sequences(), encoder)
    assert sample.problems.counts == {"invalid UTF-8": 1}


@pytest.mark.parametrize("wrong", ["invalid bytes", "no column", "damaged"])
def test_rows_with_something_wrong_count_once(tmp_path: Path, encoder: Encoder, wrong: str) -> None:
    lines = write_text(tmp_path / "lines.txt", 6000).read_text().splitlines()
    good, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    raw = pa.array([line.encode() + b" \xff" * (wrong == "invalid bytes") for line in lines])
    texts = pa.StringArray.from_buffers(len(lines), *raw.buffers()[1:])
    pq.write_table(pa.table({"text": texts}), good, row_group_size=200)
    if wrong == "no column":
        pq.write_table(pa.table({"other": lines}), other, row_group_size=200)
    if wrong == "damaged":
        other.write_bytes(good.read_bytes()[:-9])
    corpus = Corpus(source="parquet", path=(f"{tmp_path}/*.parquet",))
    settings = Sequences(length=16, part_bytes=1 << 14)
    tokens = 0
    for part in parts(corpus, settings.part_bytes):
        for _, count in pack(documents(part, corpus, Problems()), encoder, settings, TextStatistics()):
            tokens += int(count.sum())
    sample = sample_corpus(corpus, settings, encoder)
    assert not sample.exact
    assert sample.tokens == pytest.approx(tokens, rel=0.1)
