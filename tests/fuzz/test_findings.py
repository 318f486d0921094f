"""What fuzzing found, kept: each of these once ended in a traceback or in a line nobody reads to its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.squad import read_questions
from infra.errors import LONGEST_MESSAGE, UserError
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
    (whole,), read = READERS["head"].prepare(tmp_path)
    header = json.dumps(
        {"dense_weight": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    with pytest.raises(UserError, match="mlm_head") as caught:
        read(len(header).to_bytes(8, "little") + header + whole[-4:])
    assert len(str(caught.value)) <= LONGEST_MESSAGE
