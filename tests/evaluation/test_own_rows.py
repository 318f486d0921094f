"""Rows of a user's own data: every format of a file, and the hub."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from evaluation.sources.catalogue import find_tasks
from evaluation.sources.loading import load
from evaluation.tasks.row_files import read_hub, read_rows
from infra.settings.sections.task_settings import TaskSettings

ROWS = {"text": ["NA", 'the "red" car', "Straße", "x" * 200_000], "label": ["007", "a", "b", ""]}


@pytest.mark.parametrize(
    ("name", "place"),
    [("t.csv", "line 3"), ("t.csv.gz", "line 3"), ("t.tsv", "line 3"), ("t.jsonl", "line 2"),
     ("t.ndjson.zst", "line 2"), ("t.parquet", "row 2")],
)  # fmt: skip
def test_rows_are_the_same_in_every_format(name: str, place: str, tmp_path: Path) -> None:
    path, kind = tmp_path / name, name.split(".")[1]
    table = pa.table(ROWS)
    if kind == "parquet":
        parquet.write_table(table, path)
    else:
        if kind in ("jsonl", "ndjson"):
            text = "\n".join(map(json.dumps, table.to_pylist()))
        else:
            buffer = io.StringIO()
            writer = (
                csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
                if kind == "tsv"
                else csv.writer(buffer, quoting=csv.QUOTE_ALL)
            )
            writer.writerows([list(ROWS), *zip(*ROWS.values(), strict=True)])
            text = buffer.getvalue()
        with pa.output_stream(path, compression="zstd" if name.endswith("zst") else "detect") as file:
            file.write(text.encode())
    rows = read_rows(str(path))
    assert rows.columns == ROWS
    assert (len(rows), rows.location(1)) == (4, f"{path}: {place}")
    some = rows.select([3, 1])
    assert some.columns == {"text": [ROWS["text"][3], ROWS["text"][1]], "label": ["", "a"]}
    assert (len(some), some.location(1)) == (2, f"{path}: {place}")


@pytest.mark.parametrize("ending", ["conll", "bio", "iob.gz"])
def test_sentences_of_a_conll_file(ending: str, tmp_path: Path) -> None:
    """Columns with tabs or spaces; the first is the word, the last its tag."""
    path = tmp_path / f"t.{ending}"
    text = "-DOCSTART- -X- O\n\n# a comment\nNew York\tNNP\tB-LOC\n.\t.\tO \n\n\n#\tO\nAnn NNP B-PER"
    with pa.output_stream(path) as file:
        file.write(text.encode())
    rows = read_rows(str(path))
    assert rows.columns == {
        "words": [["New York", "."], ["#", "Ann"]], "tags": [["B-LOC", "O"], ["O", "B-PER"]]
    }  # fmt: skip
    assert [rows.location(row) for row in (0, 1)] == [f"{path}: line 4", f"{path}: line 8"]


def test_a_hash_is_a_word_within_a_sentence_of_columns_with_spaces(tmp_path: Path) -> None:
    """In CoNLL-2000 it is the sign of the pound; before a sentence it begins a comment."""
    path = tmp_path / "t.conll"
    path.write_text("# text = We paid\nWe O\npaid O\n# B-MONEY\n5 I-MONEY\n\n# another\nWe O\n")
    assert read_rows(str(path)).columns["words"] == [["We", "paid", "#", "5"], ["We"]]
    path.write_text("We\tO\n# a comment\n\n5\tO\n")
    assert read_rows(str(path)).columns["words"] == [["We"], ["5"]]


def test_numbers_and_empty_cells_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\nNA,007\nnull,7\n1.0,007\ntrue,7\n")
    settings = TaskSettings(
        name="t", kind="classification", train=str(tmp_path / "t.csv"), text=("text",), label="label",
        dev=str(tmp_path / "t.csv"),
    )  # fmt: skip
    (task,) = find_tasks([settings])
    split = load(task, "train", None)
    assert split.texts == [("NA",), ("null",), ("1.0",), ("true",)]
    assert set(task.labels) == {"007", "7"}
    assert [task.labels[label] for label in split.labels] == ["007", "7", "007", "7"]


def test_hub_rows_come_with_the_revision_and_the_names_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    data = datasets.Dataset.from_dict({"words": [["Ann", "ran"], ["no"]], "tags": [[1, 0], [0]]}).cast_column(
        "tags", datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    )

    def give(*names: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((*names, split, revision))
        return data

    monkeypatch.setattr(datasets, "load_dataset", give)
    settings = TaskSettings(
        name="ner", kind="tokens", hub="some/ner", config="en", revision="abc", train="train",
        dev="validation", text=("words",), label="tags",
    )  # fmt: skip
    (task,) = find_tasks([settings])
    split = load(task, "dev", None)
    assert task.labels == ("O", "B-PER")
    assert [row.tolist() for row in split.labels] == [[1, 0], [0]]
    assert asked == [("some/ner", "en", "train", "abc"), ("some/ner", "en", "validation", "abc")]
    names = datasets.ClassLabel(names=["a", "b"])
    data = datasets.Dataset.from_dict({"label": [1, 0, -1, None]}).cast_column("label", names)
    rows = read_hub("some/set", None, "train", None)
    assert rows.columns == {"label": ["b", "a", None, None]}
    assert (len(rows), rows.location(3)) == (4, "some/set train: row 4")
    del asked[:]
    with pytest.raises(Exception, match="."):
        load(find_tasks([TaskSettings(name="RTE", revision="v1")])[0], "dev", None)
    assert asked == [("nyu-mll/glue", "rte", "validation", "v1")]
