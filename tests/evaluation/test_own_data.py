"""What rows become: labels, tags, spans, questions, judgements, and a split for validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.sources.catalogue import find_tasks
from evaluation.sources.loading import load
from evaluation.sources.own import divide, own_task
from evaluation.tasks.beir import read_corpus, read_queries
from evaluation.tasks.examples import questions_in
from evaluation.tasks.row_files import read_rows
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.settings.sections.task_settings import TaskSettings


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def task_of(path: str, kind: Any, label: str = "label", **more: Any) -> Task:
    settings = TaskSettings(name="t", kind=kind, train=path, dev=path, text=("text",), label=label, **more)
    return own_task(settings, "here")


def read(path: str, kind: Any, label: str = "label", **more: Any) -> tuple[Task, Split]:
    task = task_of(path, kind, label, **more)
    return task, load(task, "train", None)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["7", "07", "007", "6"], ("6", "007", "07", "7")),  # equal numbers: an order of their own
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9", "a"], ("10", "9", "a")),
        (["1" * 18, "2", "30"], ("2", "30", "1" * 18)),
        (["1" * 19, "2", "30"], ("1" * 19, "2", "30")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_are_sorted_as_numbers_or_as_texts(values: list[Any], labels: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": "x", "label": value} for value in values])
    task, split = read(path, "classification")
    assert task.labels == labels
    assert [task.labels[label] for label in split.labels] == list(map(str, values))


def test_a_thousand_classes_are_the_most(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": f"c{number}"} for number in range(1001)]
    assert len(task_of(lines(tmp_path / "t.jsonl", rows[:1000]), "classification").labels) == 1000
    with pytest.raises(UserError, match="column 'label' has 1,001 labels; is it the label"):
        task_of(lines(tmp_path / "more.jsonl", rows), "classification")


@pytest.mark.parametrize("values", [["b | a", "", "c|"], [["b", "a"], [], ["c"]]])
def test_several_labels_are_a_row_of_zeros_and_ones(values: list[Any], tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"text": "x", "label": value} for value in values])
    task, split = read(path, "multilabel")
    assert task.labels == ("a", "b", "c")
    assert (split.labels.dtype, split.labels.tolist()) == (np.int8, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    with pytest.raises(UserError, match=r"t\.jsonl: line 3: unknown label 'c'"):
        read(path, "multilabel", labels=("a", "b"))


def test_numbers_and_ids_are_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl", [{"text": "x", "label": "1.5", "n": 7}, {"text": "y", "label": 2, "n": "b"}]
    )
    _, split = read(path, "regression", id="n")
    assert (split.labels.dtype, split.labels.tolist(), split.ids) == (np.float32, [1.5, 2.0], ["7", "b"])
    assert read(path, "regression")[1].ids == ["0", "1"]
    pairs = TaskSettings(name="t", kind="similarity", test=path, text=("text", "text"), label="label")
    split = load(own_task(pairs, "here"), "test", None)
    assert (split.texts, split.labels.tolist()) == ([("x", "x"), ("y", "y")], [1.5, 2.0])


PERSON = {"start": 0, "end": 3, "label": "PER"}


@pytest.mark.parametrize(
    ("text", "tags", "says"),
    [
        ([], [], "line 1: has no words"),
        (["Ann", 3], ["O", "O"], "the words are not a list of texts"),
        (["Ann"], "O", "the tags are not a list of texts"),
        (["Ann"], ["B-"], "tag 'B-' is not O, B-TYPE or I-TYPE"),
        (["Ann"], ["X-PER"], "tag 'X-PER' is not O, B-TYPE or I-TYPE"),
        (" ", [], "line 1: has no words"),
        ("Ann", [PERSON | {"end": 4}], "span 0 to 4 is not within the text of 3 characters"),
        ("Ann", [PERSON | {"start": -1}], "span -1 to 3 is not within the text"),
        ("Ann", [PERSON | {"start": 3}], "span 3 to 3 is not within the text"),
        ("a  b", [PERSON | {"start": 1, "end": 3}], "span 1 to 3 holds no word"),
        ("Ann", [PERSON | {"label": 1}], "a span has a start and an end in characters"),
        ("Ann", [PERSON | {"start": "0"}], "a span has a start and an end in characters"),
        ("Ann", [PERSON | {"end": 3.0}], "a span has a start and an end in characters"),
        ("Ann", [{"start": 0, "end": 3}], "the spans are not a list of {start, end, label}"),
        ("Ann", "[", "the spans are not a list of {start, end, label}"),
    ],
)
def test_words_and_spans_that_cannot_be_right(text: Any, tags: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        task_of(lines(tmp_path / "t.jsonl", [{"text": text, "label": tags}]), "tokens")
    assert says in str(caught.value)


def test_spans_may_be_written_in_a_cell(tmp_path: Path) -> None:
    """As JSON, in any order; a span that ends within a word is widened to it."""
    spans = [{"start": 8, "end": 10, "label": "LOC"}, PERSON]
    path = lines(tmp_path / "t.jsonl", [{"text": "Ann, in Oslo", "label": json.dumps(spans)}])
    task, split = read(path, "tokens")
    assert task.labels == ("O", "B-LOC", "B-PER")
    assert split.texts == [("Ann", ",", "in", "Oslo")]
    assert [task.labels[tag] for tag in split.labels[0]] == ["B-PER", "O", "O", "B-LOC"]
    assert split.notes == [f"t train: {path}: spans that end within a word, widened to it: 1"]
    marks = [{"text": ["a", "b"], "label": ["S-X", "E-Y"]}, {"text": ["c"], "label": ["I-X"]}]
    path = lines(tmp_path / "marks.jsonl", marks)
    task, split = read(path, "tokens")
    assert task.labels == ("O", "E-Y", "I-X", "S-X")
    assert ([row.tolist() for row in split.labels], split.notes) == ([[3, 1], [2]], [])
    with pytest.raises(UserError, match="line 2: unknown label 'I-X'"):
        read(path, "tokens", labels=("O", "E-Y", "S-X"))


def test_character_spans_become_tags(tmp_path: Path) -> None:
    people = [{"start": 0, "end": 3, "label": "PER"}, {"start": 8, "end": 15, "label": "PER"}]
    places = [{"start": 3, "end": 6, "label": "LOC"}]
    rows = [{"text": "Ann met Bob-Lee.", "spans": people}, {"text": "in Oslo", "spans": places}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = TaskSettings(
        name="t", kind="tokens", train=str(tmp_path / "t.jsonl"), dev=str(tmp_path / "t.jsonl"),
        text=("text",), label="spans",
    )  # fmt: skip
    (task,) = find_tasks([settings])
    split = load(task, "train", None)
    assert split.texts == [("Ann", "met", "Bob", "-", "Lee", "."), ("in", "Oslo")]
    tags = [[task.labels[label] for label in row] for row in split.labels]
    assert tags == [["B-PER", "O", "B-PER", "I-PER", "I-PER", "O"], ["O", "B-LOC"]]
    assert "widened to it: 1" in split.notes[0]


def test_questions_of_rows(tmp_path: Path) -> None:
    rows = [
        {
            "id": 5,
            "q": "who ?",
            "c": "the red car",
            "answers": {"text": ["red", "car"], "answer_start": [4, 8]},
        },
        {"id": 6, "q": "why ?", "c": "a house", "answers": {"text": [], "answer_start": []}},
    ]
    path = lines(tmp_path / "t.jsonl", rows)
    found = questions_in(read_rows(path), ("q", "c"), None)
    assert [(one.id, one.question, one.context) for one in found] == [
        ("5", "who ?", "the red car"), ("6", "why ?", "a house")
    ]  # fmt: skip
    assert [(one.answers, one.starts) for one in found] == [(("red", "car"), (4, 8)), ((), ())]
    assert [one.id for one in questions_in(read_rows(path), ("q", "c"), "q")] == ["who ?", "why ?"]
    unnamed = lines(
        tmp_path / "u.jsonl", [{name: row[name] for name in ("q", "c", "answers")} for row in rows]
    )
    assert [one.id for one in questions_in(read_rows(unnamed), ("q", "c"), None)] == ["0", "1"]
    settings = TaskSettings(name="t", kind="spans", train=path, dev=path, text=("q", "c"))
    task = own_task(settings, "here")
    assert (task.no_answer, task.texts, task.metrics) == (True, ("q", "c"), ("exact_match", "f1"))
    assert [one.id for one in load(task, "dev", None).questions] == ["5", "6"]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"text": ["red"]}, "line 1: answers are not {text: [...], answer_start: [...]}"),
        ({"text": "red", "answer_start": [4]}, "answers need as many texts as starts"),
        ({"text": ["red"], "answer_start": 4}, "answers need as many texts as starts"),
        ({"text": [1], "answer_start": [4]}, "an answer is a text, and its start a whole number"),
        ({"text": ["red"], "answer_start": ["4"]}, "an answer is a text, and its start a whole number"),
    ],
)
def test_answers_that_cannot_be_right(answers: Any, says: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"question": "?", "context": "the red car", "answers": answers}])
    with pytest.raises(UserError) as caught:
        questions_in(read_rows(path), ("question", "context"), None)
    assert says in str(caught.value)


def test_a_context_and_its_questions_are_in_one_part(tmp_path: Path) -> None:
    rows = [
        {
            "id": number,
            "question": "?",
            "context": f"red {number // 3}",
            "answers": {"text": [], "answer_start": []},
        }
        for number in range(30)
    ]
    path = lines(tmp_path / "t.jsonl", rows)
    task = own_task(TaskSettings(name="t", kind="spans", train=path, dev_fraction=0.2), "here")
    parts = {part: load(task, part, None).questions for part in ("train", "dev")}
    contexts = {part: {one.context for one in found} for part, found in parts.items()}
    assert (len(parts["train"]), len(parts["dev"])) == (24, 6)
    assert not contexts["train"] & contexts["dev"]


def test_a_search_is_read_as_beir_has_it(tmp_path: Path) -> None:
    documents = [{"_id": "d1", "title": "Cars", "text": "red"}, {"_id": "d2", "title": "", "text": "a house"}]
    corpus = read_corpus(lines(tmp_path / "corpus.jsonl", documents))
    assert corpus == {"d1": "Cars red", "d2": "a house"}
    queries = lines(
        tmp_path / "queries.jsonl", [{"_id": f"q{number}", "text": f"t{number}"} for number in range(4)]
    )
    judged = tmp_path / "test.tsv"
    judged.write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t2\nq2\td1\t0\nq0\td1\t0\n")
    split = read_queries(queries, str(judged), corpus)
    assert (split.texts, split.ids) == ([("t2",), ("t1",)], ["q2", "q1"])
    assert split.labels == [{"d2": 1.0, "d1": 0.0}, {"d1": 2.0}]
    assert split.corpus == corpus
    assert split.notes == [f"{judged}: queries without a relevant document, left out: 2"]
    judged.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{number}\td1\t1\n" for number in range(4)))
    assert read_queries(queries, str(judged), corpus).notes == []
    with pytest.raises(UserError, match=r"queries\.jsonl: line 2: query 'q0' occurs twice"):
        twice = lines(tmp_path / "queries.jsonl", [{"_id": "q0", "text": "x"}] * 2)
        read_queries(twice, str(judged), corpus)


def test_the_split_depends_on_its_seed_alone() -> None:
    settings = TaskSettings(name="t", split_seed=0)
    groups = ["a"] * 50 + ["b"] * 30
    first, again = divide(groups, settings), divide(groups, settings)
    other = divide(groups, TaskSettings(name="t", split_seed=1))
    assert first == again != other
    assert sorted(first["train"] + first["dev"]) == list(range(80))
    assert [sum(groups[row] == name for row in first["dev"]) for name in "ab"] == [5, 3]


def test_a_rare_label_has_an_example_in_training() -> None:
    found = divide(["common"] * 20 + ["rare"], TaskSettings(name="t"))
    assert 20 in found["train"]
    found = divide(["common"] * 20 + ["rare"] * 2, TaskSettings(name="t"))
    assert len({20, 21} & set(found["dev"])) == 1
