"""What fuzzing found, kept: each of these once ended in a traceback or in a line nobody reads to its end."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.tasks.answer_spans import read_questions
from infra.errors import LONGEST_MESSAGE, UserError
from infra.settings.sections import Corpus
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import parts
from offline_teacher.corpus.problems import Problems
from tests.fuzz.readers import READERS


def squad(path: Path, **changes: Any) -> Path:
    answer = {"answer_start": 0, "text": "Paris"} | changes.pop("answer", {})
    row = {"id": "1", "question": "What?", "answers": [answer]} | changes.pop("row", {})
    paragraph = {"context": "Paris is big.", "qas": [row]} | changes.pop("paragraph", {})
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]} | changes]}))
    return path


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"paragraphs": 7}, "paragraphs"),
        ({"paragraph": {"qas": 1}}, "qas"),
        ({"paragraph": {"context": None}}, "context"),
        ({"row": {"answers": 0.5}}, "answers"),
        ({"row": {"question": []}}, "question"),
        ({"row": {"id": {}}}, "id"),
        ({"answer": {"text": 1e308}}, "text"),
        ({"answer": {"answer_start": "0"}}, "answer_start"),
    ],
)
def test_squad_fields_of_another_kind(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    assert len(read_questions(str(squad(tmp_path / "whole.json")))) == 1
    with pytest.raises(UserError, match=field):
        read_questions(str(squad(tmp_path / "train.json", **changes)))


def test_a_message_quotes_no_more_than_can_be_read() -> None:
    message = str(UserError("file: " + "x" * 100_000))
    assert len(message) == LONGEST_MESSAGE
    assert message.endswith("...")


def test_a_long_safetensors_header_is_refused_in_short(tmp_path: Path) -> None:
    (whole,), read = READERS["weights"].prepare(tmp_path)
    header = json.dumps({"a": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(UserError, match=r"model\.safetensors do not make a teacher") as caught:
        read(len(header).to_bytes(8, "little") + header + whole[-4:])
    assert len(str(caught.value)) <= LONGEST_MESSAGE


def test_a_teacher_without_end_is_refused_at_once(tmp_path: Path) -> None:
    (whole,), read = READERS["configuration"].prepare(tmp_path)
    for depth in (65536, 10**40, "deep"):
        with pytest.raises(UserError, match=r"teacher/config\.json: num_hidden_layers is"):
            read(json.dumps({**json.loads(whole), "num_hidden_layers": depth}).encode())


def parquet(path: Path, texts: pa.Array, groups: int = 1) -> bytes:
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=len(texts) // groups,
        compression="none",
        use_dictionary=False,
    )
    return path.read_bytes()


def read(path: Path, source: str) -> tuple[list[str], dict[str, int]]:
    corpus, problems = Corpus(path=(str(path),), source=source), Problems()  # type: ignore[arg-type]
    texts = [text for part in parts(corpus, 1 << 20) for text in documents(part, corpus, problems)]
    return texts, problems.counts


def test_a_damaged_parquet_page_costs_the_rows_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = parquet(path, pa.array(["first", "second", "third", "fourth"]), groups=2)
    at = whole.index(b"third") - 4  # the length of a string
    path.write_bytes(whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :])
    texts, counts = read(path, "parquet")
    assert texts == ["first", "second"]
    assert counts == {"damaged Parquet data, the rows after it are lost": 1}


@pytest.mark.parametrize("keep", [0, 10, -9, -1])
def test_a_damaged_parquet_footer_is_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    whole = bytearray(parquet(path, pa.array(["first", "second"])))
    path.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file, or a damaged one|are empty"):
        read(path, "parquet")
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    whole[footer : footer + 4] = b"\xff" * 4
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file, or a damaged one"):
        read(path, "parquet")


def test_a_parquet_string_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"first", b"the second one \xff", None, b"\xc3\xbc"])
    parquet(path, pa.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0]))
    texts, counts = read(path, "parquet")
    assert texts == ["first", "the second one \ufffd", "\u00fc"]
    assert counts == {"invalid UTF-8": 1, "column 'text' is not a string": 1}


def test_damaged_compressed_files_leave_no_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"One line.\n" * 50)[:30])

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    _, counts = read(path, "text")
    assert sum(counts.values()) == 1
    before = pages()
    for _ in range(200):
        read(path, "text")
    assert (pages() - before) * resource.getpagesize() < 100 << 20, "once 1 MiB each"
