"""A user's mistakes in tasks of their own: one clear line that names the file and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.finetuning.jobs import load_splits
from evaluation.sources.catalogue import find_tasks
from infra.errors import UserError
from infra.settings.recipe_file import load_recipe

CSV = "text,label\nthe car,a\nthe house,b\nred,a\nday,b\n"
TASK = "name: t\nkind: classification\ntrain: t.csv\ndev: t.csv\ntext: text\nlabel: label\n"
NER = "name: t\nkind: tokens\ntrain: t.conll\ndev: t.conll\n"
JSON_NER = "name: t\nkind: tokens\ntrain: t.jsonl\ndev: t.jsonl\ntext: words\nlabel: tags\n"
MANY = TASK.replace("classification", "multilabel")
SCORES = TASK.replace("classification", "regression")
ASKED = "name: t\nkind: spans\ntrain: t.jsonl\ndev: t.jsonl\n"
SEARCH = "name: t\nkind: retrieval\ncorpus: corpus.jsonl\nqueries: queries.jsonl\ntest: t.tsv\n"
CORPUS: dict[str, str | bytes] = {
    "corpus.jsonl": '{"_id": "d", "text": "red"}\n',
    "queries.jsonl": '{"_id": "q", "text": "red"}\n',
}
QRELS = "query-id\tcorpus-id\tscore\n"


def without(text: str, field: str) -> str:
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith(f"{field}:"))


def row(**fields: object) -> str:
    return json.dumps(fields) + "\n"


ANSWERED = {"id": "1", "question": "who ?", "context": "the red car"}

CASES: dict[str, tuple[str, dict[str, str | bytes], str]] = {
    # the task file
    "not YAML": ("name: [", {}, "t.yaml: not a task in YAML"),
    "no mapping": ("- name", {}, "a task is a mapping of settings"),
    "a misspelt key": (TASK + "epoch: 3\n", {}, "unknown key epoch; did you mean epochs?"),
    "no name": (without(TASK, "name"), {}, "name: is required"),
    "a name that is no folder": (TASK.replace("name: t", "name: a/b"), {}, "name: must be letters"),
    "a built-in name": (
        TASK.replace("name: t", "name: rte"),
        {},
        "rte is a built-in task; choose another name",
    ),
    "an unknown kind": (TASK.replace("classification", "ner"), {}, "kind: expected one of classification"),
    "data without a kind": (without(TASK, "kind"), {}, "needs a kind, for example kind: classification"),
    "no training data": (without(TASK, "train"), {}, "train: is required, for example train: train.csv"),
    "no label": (without(TASK, "label"), {}, "label: is required"),
    "no text": (without(TASK, "text"), {}, "text: classification takes 1 or 2 columns of text, not 0"),
    "three texts": (TASK.replace("text: text", "text: [a, b, c]"), {}, "takes 1 or 2 columns of text, not 3"),
    "an unknown metric": (TASK + "metrics: acuracy\n", {}, "has no metric 'acuracy'; did you mean accuracy?"),
    "a metric of another kind": (TASK + "metrics: entity_f1\n", {}, "no metric 'entity_f1'"),
    "F1 of three labels": (
        TASK + "metrics: f1\n",
        {"t.csv": CSV + "x,c\n"},
        "there are 3; write macro_f1",
    ),
    "a learning rate below zero": (
        TASK + "learning_rate: -1.0e-5\n",
        {},
        "learning_rate: must be > 0, not -1e-05",
    ),
    "an empty grid": (TASK + "learning_rate: []\n", {}, "learning_rate: the list is empty"),
    "a text as a number": (TASK + "epochs: many\n", {}, "epochs: expected a number or a list of numbers"),
    "rows too short": (TASK + "max_length: 4\n", {}, "max_length: must be >= 8, not 4"),
    "a fraction above half": (TASK + "dev_fraction: 0.9\n", {}, "dev_fraction: must be > 0 and <= 0.5"),
    "one class": (TASK + "labels: [a]\n", {}, "labels: names one class"),
    "a class twice": (TASK + "labels: [a, b, a]\n", {}, "labels: 'a' is named twice"),
    "classes of numbers": (SCORES + "labels: [a, b]\n", {}, "labels: regression has no classes"),
    "a revision of a file": (TASK + "revision: v1\n", {}, "revision: is for a hub dataset"),
    "a format of the hub": (
        TASK + "hub: some/set\nformat: csv\n",
        {},
        "format: is for files, not for a hub dataset",
    ),
    "a corpus to classify": (TASK + "corpus: c.jsonl\n", {}, "corpus: is for kind: retrieval"),
    "a search without queries": (without(SEARCH, "queries"), {}, "queries: is required"),
    "a trained search": (SEARCH + "train: t.csv\n", {}, "scores a model without training"),
    "a search without judgements": (without(SEARCH, "test"), {}, "test: dev or test is required"),
    # its data
    "a missing file": (TASK.replace("train: t.csv", "train: no.csv"), {}, "no.csv: there is no such file"),
    "an unknown ending": (
        TASK.replace("train: t.csv", "train: t.txt"),
        {"t.txt": "x"},
        "unknown ending; known are .csv",
    ),
    "an empty file": (TASK, {"t.csv": ""}, "t.csv: is empty"),
    "a header alone": (TASK, {"t.csv": "text,label\n"}, "t.csv: has no rows"),
    "a missing column": (
        TASK.replace("label: label", "label: lable"),
        {},
        "no column 'lable'; did you mean label?",
    ),
    "a column twice": (TASK, {"t.csv": "text,text\na,b\n"}, "line 1: column 'text' occurs twice"),
    "a cell too many": (TASK, {"t.csv": CSV + "a,b,c\n"}, "t.csv: line 6: 3 columns instead of 2"),
    "an open quote": (TASK, {"t.csv": CSV + '"a,b\n'}, "t.csv: line 6:"),
    "another encoding": (TASK, {"t.csv": CSV.encode() + b"caf\xe9,a\n"}, "t.csv: line 6: not valid UTF-8"),
    "another encoding of the first line": (TASK, {"t.csv": b"caf\xe9,a\n"}, "t.csv: line 1: not valid UTF-8"),
    "a binary file": (TASK, {"t.csv": b"PK\x03\x04" + bytes(99)}, "not UTF-8 text"),
    "an unknown label": (TASK + "labels: [a, c]\n", {}, "t.csv: line 3: unknown label 'b'"),
    "an empty label": (TASK, {"t.csv": CSV + "x,\n"}, "t.csv: line 6: label '' is not a text"),
    "one label in all rows": (
        TASK,
        {"t.csv": "text,label\nx,a\ny,a\n"},
        "column 'label' must have two or more different labels, not 1",
    ),
    "too few rows to split": (without(TASK, "dev"), {"t.csv": "text,label\nx,a\ny,b\n"}, "too few examples"),
    "a score that is none": (SCORES, {}, "t.csv: line 2: score 'a' is not a number"),
    "a score that is not finite": (
        SCORES,
        {"t.csv": "text,label\nx,nan\n"},
        "score 'nan' is not a finite number",
    ),
    "labels that are a number": (
        MANY.replace("t.csv", "t.jsonl"),
        {"t.jsonl": row(text="x", label=3)},
        "line 1: labels 3 are neither",
    ),
    "not JSON": (TASK.replace("t.csv", "t.jsonl"), {"t.jsonl": "{\n"}, "t.jsonl: line 1: not JSON"),
    "a list in JSON lines": (TASK.replace("t.csv", "t.jsonl"), {"t.jsonl": "[1]\n"}, "line 1: not an object"),
    "fields that differ": (
        TASK.replace("t.csv", "t.jsonl"),
        {"t.jsonl": row(text="x", label="a") + row(text="x")},
        "line 2: field 'label' is not in every line",
    ),
    "a text that is a number": (
        TASK.replace("t.csv", "t.jsonl"),
        {"t.jsonl": row(text=1, label="a") + row(text="x", label="b")},
        "line 1: column 'text': 1 is not a text",
    ),
    "no Parquet file": (
        TASK.replace("t.csv", "t.parquet"),
        {"t.parquet": "x"},
        "t.parquet: not a Parquet file",
    ),
    "SQuAD's file to classify": (
        TASK.replace("t.csv", "t.json"),
        {"t.json": "{}"},
        "for JSON lines write format: jsonl",
    ),
    "a word without a tag": (NER, {"t.conll": "Ann B-PER\nran\n"}, "t.conll: line 2: a word without a tag"),
    "a tag that is none": (
        NER,
        {"t.conll": "Ann PERSON\n"},
        "line 1: tag 'PERSON' is not O, B-TYPE or I-TYPE",
    ),
    "fewer tags than words": (JSON_NER, {"t.jsonl": row(words=["a", "b"], tags=["O"])}, "2 words but 1 tags"),
    "a span outside": (
        JSON_NER,
        {"t.jsonl": row(words="Ann", tags=[{"start": 0, "end": 9, "label": "P"}])},
        "span 0 to 9 is not within",
    ),
    "spans that overlap": (
        JSON_NER,
        {
            "t.jsonl": row(
                words="Ann Lee",
                tags=[{"start": 0, "end": 7, "label": "P"}, {"start": 4, "end": 7, "label": "P"}],
            )
        },
        "span 4 to 7 overlaps another span",
    ),
    "spans without ends": (
        JSON_NER,
        {"t.jsonl": row(words="Ann", tags=[1])},
        "not a list of {start, end, label}",
    ),
    "no answers column": (ASKED, {"t.jsonl": row(**ANSWERED)}, "no column 'answers'"),
    "answers without starts": (
        ASKED,
        {"t.jsonl": row(**ANSWERED, answers={"text": ["red"], "answer_start": []})},
        "as many texts as starts",
    ),
    "answers as a text": (
        ASKED,
        {"t.jsonl": row(**ANSWERED, answers="red")},
        "line 1: answers are not {text",
    ),
    "an unknown query": (
        SEARCH,
        CORPUS | {"t.tsv": QRELS + "x\td\t1\n"},
        "t.tsv: line 2: query 'x' is not in",
    ),
    "an unknown document": (
        SEARCH,
        CORPUS | {"t.tsv": QRELS + "q\tx\t1\n"},
        "document 'x' is not in the corpus",
    ),
    "a grade that is none": (
        SEARCH,
        CORPUS | {"t.tsv": QRELS + "q\td\thigh\n"},
        "score 'high' is not a whole",
    ),
    "nothing relevant": (SEARCH, CORPUS | {"t.tsv": QRELS + "q\td\t0\n"}, "no query has a relevant document"),
    "a document twice": (
        SEARCH,
        CORPUS | {"corpus.jsonl": CORPUS["corpus.jsonl"] * 2, "t.tsv": QRELS + "q\td\t1\n"},
        "corpus.jsonl: line 2: document 'd' occurs twice",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_mistake_is_one_clear_line(case: str, tmp_path: Path) -> None:
    task, files, says = CASES[case]
    for name, content in ({"t.yaml": task, "t.csv": CSV} | files).items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load_splits(find_tasks([str(tmp_path / "t.yaml")])[0], None)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_the_good_task_is_good(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK)
    (tmp_path / "t.csv").write_text(CSV)
    assert len(load_splits(find_tasks([str(tmp_path / "t.yaml")])[0], None)["train"]) == 4


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (lambda path: [str(path / "no.yaml")], "no.yaml: there is no such file"),
        (lambda path: [str(path / "t.yaml"), str(path / "t.yaml")], "t is named twice"),
    ],
)
def test_a_wrong_entry_of_the_list(tasks: Callable[[Path], list[str]], says: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK)
    (tmp_path / "t.csv").write_text(CSV)
    with pytest.raises(UserError, match=says):
        find_tasks(tasks(tmp_path))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{name: t, knd: tokens}", r"r.yaml: evaluation.tasks\[1\]: unknown key knd; did you mean kind\?"),
        ("{kind: tokens}", r"evaluation.tasks\[1\]: name: is required"),
        ("{name: t, epochs: a}", r"evaluation.tasks\[1\]: epochs: expected a number"),
        ("3", "evaluation.tasks: expected a list of texts"),
    ],
)
def test_a_mistake_in_a_recipe_is_found_when_it_is_read(entry: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nevaluation:\n  tasks: [RTE, {entry}]\n")
    with pytest.raises(UserError, match=says):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.learning_rate=[]", "evaluation.learning_rate: the list is empty"),
        ("evaluation.epochs=[1, 0]", "evaluation.epochs: must be > 0, not 0"),
        ("evaluation.batch_size=[8, 0]", "evaluation.batch_size: must be >= 1, not 0"),
    ],
)
def test_a_wrong_grid_of_a_recipe(override: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\n")
    with pytest.raises(UserError, match=says):
        load_recipe(str(path), [override])


def test_a_recipe_with_tasks_in_place_comes_back_from_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nevaluation:\n  tasks: [RTE, {name: t, kind: tokens, train: t.conll}]\n")
    recipe = load_recipe(str(path))
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe
    assert recipe.fingerprinted_settings("evaluation")["evaluation"]["tasks"][1]["kind"] == "tokens"
