"""Official files with each quirk, small enough to be checked by eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel

from evaluation.tasks.catalogue import GLUE, TASKS, find_task, find_tasks
from evaluation.tasks.loading import load
from evaluation.tasks.task import Split
from infra.errors import UserError

PARSES = "binary1\tbinary2\tparse1\tparse2"
MNLI_TRAIN = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
    "\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label"
)
MNLI_DEV = MNLI_TRAIN.replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")
STS = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
STS_ROW = "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA dog.\tA cat.\t"


def write(data: Path, file: str, content: str | bytes) -> str:
    path = data / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(data)


# file, content, part, expected texts, expected labels
QUIRKS = [
    (
        "CoLA/train.tsv",
        'gj04\t1\t\tHe "left\ngj04\t0\t*\tLeft he.',
        "train",
        [('He "left',), ("Left he.",)],
        [1, 0],
    ),
    ("CoLA/dev.tsv", "\ufeffgj04\t1\t\tHe left.\r\n", "dev", [("He left.",)], [1]),
    ("CoLA/test.tsv", "index\tsentence\n7\tHe left.\n", "test", [("He left.",)], None),
    (
        "SST-2/train.tsv",
        "sentence\tlabel\nfine film \t1\nbad\t0\n",
        "train",
        [("fine film ",), ("bad",)],
        [1, 0],
    ),
    (
        "MRPC/dev.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\t"Yes, he said.\t"Yes," he said.\n',
        "dev",
        [('"Yes, he said.', '"Yes," he said.')],
        [1],
    ),
    (
        "STS-B/dev.tsv",
        f"{STS}\n{STS_ROW}2.500\n{STS_ROW}0",
        "dev",
        [("A dog.", "A cat."), ("A dog.", "A cat.")],
        [2.5, 0.0],
    ),
    (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tHow?\t0\n4\t5\ttorn\n6\t7\t8\tWho?\tWho is?\t1\n",
        "train",
        [("Why?", "How?"), ("Who?", "Who is?")],
        [0, 1],
    ),
    (
        "MNLI/train.tsv",
        f"{MNLI_TRAIN}\n0\t1\t1e\tfiction\t{PARSES}\tHe left.\tHe is gone.\tentailment\tentailment\n",
        "train",
        [("He left.", "He is gone.")],
        [0],
    ),
    (
        "MNLI/dev_mismatched.tsv",
        f"{MNLI_DEV}\n0\t1\t1n\tverbatim\t{PARSES}\tHe left.\tShe sang.\tn\tn\tn\tn\tn\tneutral\n",
        "dev_mismatched",
        [("He left.", "She sang.")],
        [1],
    ),
    (
        "MNLI/dev_matched.tsv",
        MNLI_DEV.replace("sentence1\t", "Sentence1\t")
        + f"\n0\t1\t1c\tfiction\t{PARSES}\tHe left.\tHe stayed.\tc\tc\tc\tc\tc\tcontradiction\n",
        "dev_matched",
        [("He left.", "He stayed.")],
        [2],
    ),
    (
        "QNLI/dev.tsv",
        "index\tquestion\tsentence\tlabel\n"
        '0\tWho "won?\tIt was "Ann.\tnot_entailment\n1\tWho?\tAnn.\tentailment\n',
        "dev",
        [('Who "won?', 'It was "Ann.'), ("Who?", "Ann.")],
        [1, 0],
    ),
    (
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tHe left.\tHe is gone.\tentailment",
        "train",
        [("He left.", "He is gone.")],
        [0],
    ),
    ("WNLI/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", "dev", [("A.", "B.")], [1]),
    (
        "SST-2/dev.tsv",
        "sentence\tlabel\nnext line\u2028and\x85one \x0b\t1\n",
        "dev",
        [("next line\u2028and\x85one \x0b",)],
        [1],
    ),
]


@pytest.mark.parametrize(
    ("file", "content", "part", "texts", "labels"), QUIRKS, ids=[quirk[0] for quirk in QUIRKS]
)
def test_quirk(
    tmp_path: Path,
    file: str,
    content: str,
    part: str,
    texts: list[tuple[str, ...]],
    labels: list[float] | None,
) -> None:
    split = load(find_task(file.partition("/")[0]), part, write(tmp_path, file, content))
    assert split.texts == texts
    assert (None if split.labels is None else split.labels.tolist()) == labels


def test_a_test_part_keeps_the_servers_index(tmp_path: Path) -> None:
    data = write(tmp_path, "CoLA/test.tsv", "index\tsentence\n7\tHe left.\n9\tHe ran.\n")
    assert load(find_task("CoLA"), "test", data).index == ["7", "9"]


def test_torn_rows_and_row_counts_are_reported(tmp_path: Path) -> None:
    data = write(tmp_path, *QUIRKS[6][:2])
    assert load(find_task("QQP"), "train", data).notes == [
        "QQP train: 1 torn rows left out",
        "QQP train: 2 rows, the official set has 363,846",
    ]


def test_imdb_reviews_in_name_order(tmp_path: Path) -> None:
    for file, text in {
        "neg/1_2.txt": "Dull.",
        "pos/0_9.txt": "Great.<br /><br />Fun.",
        "pos/.keep": "",
    }.items():
        write(tmp_path, f"imdb/aclImdb/train/{file}", text)
    split = load(find_task("imdb"), "train", str(tmp_path))
    assert split.texts == [("Dull.",), ("Great.  Fun.",)]
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1]


def test_collections_of_benchmarks_are_searched(tmp_path: Path) -> None:
    write(tmp_path, "glue/SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n")
    assert len(load(find_task("SST-2"), "dev", str(tmp_path))) == 1


def test_names_whatever_the_case() -> None:
    assert [task.name for task in find_tasks(["sst-2", "cola", "SQUAD"])] == ["SST-2", "CoLA", "SQuAD"]


def test_digest_depends_on_texts_and_labels() -> None:
    splits = [
        Split([("a", "b")], np.asarray([1])),
        Split([("ab", "")], np.asarray([1])),
        Split([("a", "b")], np.asarray([0])),
        Split([("a",), ("b",)], np.asarray([1, 1])),
    ]
    assert len({split.digest() for split in splits}) == len(splits)


SST, RTE = "sentence\tlabel\n", "index\tsentence1\tsentence2\tlabel\n"
SQUAD_START = (
    '{"data": [{"paragraphs": [{"context": "It is red.", "qas": [{"id": "1", "question": "What?", "answers": '
)
# task, part, file (None: nothing is written), content, what the one line must say
BAD = [
    ("SST-2", "train", None, "", "has no SST-2/train.tsv"),
    ("SST-2", "dev", "SST-2/train.tsv", SST + "fine\t1\n", "has no SST-2/dev.tsv"),
    ("SST-2", "train", "SST-2/train.tsv", "", "is empty"),
    ("SST-2", "train", "SST-2/train.tsv", SST, "has no rows"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\nbad\n", "line 3: 1 columns instead of 2"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\nso\tso\t1\n", "line 3: 3 columns instead of 2"),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\t1\n\nbad\t0\n", "line 3: 1 columns instead of 2"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        SST + "fine\t2\n",
        "line 2: label '2' is out of range; they are 0, 1",
    ),
    ("SST-2", "train", "SST-2/train.tsv", SST + "fine\tgood\n", "line 2: label 'good' is out of range"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        "text\tlabel\nfine\t1\n",
        "line 1: no column 'sentence' among text, label",
    ),
    ("SST-2", "train", "SST-2/train.tsv", b"sentence\tlabel\nfine\t1\nf\xff\t1\n", "line 3: not valid UTF-8"),
    ("SST-2", "train", "SST-2/train.tsv", "sentence,label\nfine,1\n", "no column 'sentence'"),
    ("CoLA", "train", "CoLA/train.tsv", "gj04\t1\tHe left.\n", "line 1: 3 columns instead of 4"),
    (
        "CoLA",
        "train",
        "CoLA/train.tsv",
        "gj04\t1\t\tHe.\nsource\tlabel\tm\ts\n",
        "line 2: label 'label' is out of range",
    ),
    ("RTE", "dev", "RTE/dev.tsv", RTE + "0\tA.\tB.\tneutral\n", "they are entailment, not_entailment"),
    ("MNLI", "dev_matched", "MNLI/dev.tsv", "x", "has no MNLI/dev_matched.tsv"),
    (
        "STS-B",
        "dev",
        "STS-B/dev.tsv",
        f"{STS}\n{STS_ROW}5.1\n",
        "line 2: score 5.1 is out of range; it must be 0 to 5",
    ),
    ("STS-B", "dev", "STS-B/dev.tsv", f"{STS}\n{STS_ROW}nan\n", "line 2: score nan is out of range"),
    ("STS-B", "dev", "STS-B/dev.tsv", f"{STS}\n{STS_ROW}high\n", "line 2: score 'high' is not a number"),
    (
        "QQP",
        "train",
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\n",
        "has no rows",
    ),
    ("IMDb", "train", "aclImdb/train/pos/0_9.txt", "Great.", "neg has no .txt files"),
    ("IMDb", "train", None, "", "has no aclImdb/train"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": [', "is not JSON"),
    ("SQuAD", "dev", "dev-v1.1.json", '[{"question": "What?"}]', "no list 'data'"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": []}', "has no rows"),
    ("SQuAD", "dev", "dev-v1.1.json", '{"data": [{"title": "x"}]}', "data[0]: no field 'paragraphs'"),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + "[]}]}]}]}", "qas[0]: no answers"),
    (
        "SQuAD",
        "dev",
        "dev-v1.1.json",
        SQUAD_START + '[{"text": "blue", "answer_start": 6}]}]}]}]}',
        "dev-v1.1.json: no answer occurs in its context (first: question 1)",
    ),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + '[{"text": " ", "answer_start": 2}]}]}]}]}', "no answer"),
    (
        "CoLA",
        "train",
        "CoLA/train.tsv",
        "gj04\t1\t\tHe left.\ngj04\t1\t*\tLeft he.\n",
        "CoLA/train.tsv: line 2: label 1 contradicts the mark '*' of the same row",
    ),
    (
        "MNLI",
        "dev_matched",
        "MNLI/dev_matched.tsv",
        f"{MNLI_DEV}\n0\t1\t1c\tfiction\t{PARSES}\tHe left.\tHe stayed."
        + "\tneutral" * 2
        + "\tcontradiction" * 3
        + "\tneutral\n",
        "line 2: label 'neutral' contradicts neutral, neutral, contradiction, contradiction, contradiction",
    ),
    (
        "IMDb",
        "train",
        "aclImdb/train/neg/7_9.txt",
        "Great.",
        "neg/7_9.txt: the rating 9 in its name contradicts its folder neg",
    ),
    ("SST-2", "train", "SST-2/train.tsv", SST + " \t1\n\t0\n", "every row has an empty text"),
    (
        "SST-2",
        "train",
        "SST-2/train.tsv",
        (SST + "fine\t1\n").encode("utf-16-le"),
        "is UTF-16, not UTF-8 text",
    ),
    ("SST-2", "train", "SST-2/train.tsv", b"PAR1\x15" + bytes(99), "is Parquet, not UTF-8 text"),
    ("SQuAD", "dev", "dev-v1.1.json", SQUAD_START + '[{"text": "red"}]}]}]}]}', "no field 'answer_start'"),
]


@pytest.mark.parametrize(("task", "part", "file", "content", "says"), BAD)
def test_bad_file(
    tmp_path: Path, task: str, part: str, file: str | None, content: str | bytes, says: str
) -> None:
    if file is not None:
        write(tmp_path, file, content)
    with pytest.raises(UserError) as caught:
        load(find_task(task), part, str(tmp_path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["SST2"], "did you mean SST-2?"),
        (["STSB"], "did you mean STS-B?"),
        (["zzzz"], "known are CoLA"),
        (["RTE", "rte"], "RTE is named twice"),
    ],
)
def test_bad_task(names: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        find_tasks(names)


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: object, **more: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot load nyu-mll/glue/mnli from the hub \(no route\)"):
        load(find_task("MNLI"), "dev_matched", None)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def give(*names: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((*names, split, revision))
        return datasets.Dataset.from_dict({"premise": ["A."], "hypothesis": ["B."], "label": [2], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", give)
    split = load(find_task("MNLI"), "dev_mismatched", None)
    assert (split.texts, split.labels.tolist()) == ([("A.", "B.")], [2])
    assert load(find_task("MNLI"), "test_matched", None).labels is None
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_mismatched", None),
        ("nyu-mll/glue", "mnli", "test_matched", None),
    ]


HUB_CLASSES = ClassLabel(
    names=["not_entailment", "entailment"]
)  # GLUE's own RTE has them the other way round


def hub_split(monkeypatch: pytest.MonkeyPatch, task: str, **columns: list[Any]) -> Split:
    """The training set of the task, as ``load`` makes it of a data set of these columns."""
    import datasets

    data = datasets.Dataset.from_dict(columns)
    if task == "RTE":
        data = data.cast_column("label", HUB_CLASSES)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split, revision: data)
    return load(find_task(task), "train", None)


def test_hub_labels_are_those_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"sentence1": ["A.", "B."], "sentence2": ["C.", "D."]}
    named = hub_split(monkeypatch, "RTE", **pair, label=[0, 1])
    assert named.labels is not None
    assert named.labels.tolist() == [1, 0]
    scored = hub_split(monkeypatch, "STS-B", **pair, label=[2.5, 5.0])
    assert scored.labels is not None
    assert scored.labels.tolist() == [2.5, 5.0]
    review = hub_split(monkeypatch, "IMDb", text=["Great.<br /><br />Fun.", "Dull."], label=[1, 0])
    assert review.texts == [("Great.  Fun.",), ("Dull.",)]


PAIR: dict[str, list[Any]] = {"sentence1": ["a"], "sentence2": ["b"]}
UNANSWERED: dict[str, list[Any]] = {
    "id": ["7"],
    "question": ["What?"],
    "context": ["Red."],
    "answers": [{"text": [], "answer_start": []}],
}


@pytest.mark.parametrize(
    ("task", "columns", "says"),
    [
        ("SST-2", {"sentence": ["a", "b"], "label": [1, -1]}, "train: row 2: label '-1' is out of range"),
        ("SST-2", {"sentence": ["a", "b"], "label": [1, 2]}, "row 2: label '2' is out of range"),
        ("SST-2", {"sentence": ["a", "b"], "label": [1, None]}, "row 2: label 'None' is out of range"),
        ("SST-2", {"sentence": ["a", None], "label": [1, 0]}, "row 2: sentence is None, not a text"),
        ("SST-2", {"text": ["a"], "label": [1]}, "no column 'sentence' among text, label"),
        ("STS-B", {**PAIR, "label": [-1.0]}, "row 1: score -1.0 is out of range; it must be 0 to 5"),
        ("STS-B", {**PAIR, "label": [float("nan")]}, "row 1: score nan is out of range"),
        ("SQuAD", {"id": ["7"], "question": ["?"], "context": ["Red."]}, "no column 'answers'"),
        ("SQuAD", UNANSWERED, "question 7: no answers"),
    ],
)  # fmt: skip
def test_hub_rows_that_cannot_be_right(
    monkeypatch: pytest.MonkeyPatch, task: str, columns: dict[str, list[Any]], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        hub_split(monkeypatch, task, **columns)
    assert says in str(caught.value)


WRONG_STARTS = [
    # context, answer, answer_start, where it stands
    ("It is red.", "red", 7, 6),
    ("red, red and red", "red", 6, 5),
    ("It is red.", "red", 60, 6),
    ("It is red.", "red", -2, 6),
    ("It is red.", " red", 5, 6),
]


@pytest.mark.parametrize("source", ["file", "hub"])
def test_an_answer_is_looked_for_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Nearest to its answer_start; one that the context does not have is left out, and counted."""
    rows = [*WRONG_STARTS, ("It is red.", "blue", 6, None), ("It is red.", "red", 6, 6)]
    columns: dict[str, list[Any]] = {
        "id": [f"q{number}" for number in range(len(rows))],
        "question": ["What?"] * len(rows),
        "context": [context for context, *_ in rows],
        "answers": [{"text": [answer], "answer_start": [start]} for _, answer, start, _ in rows],
    }
    if source == "hub":
        split = hub_split(monkeypatch, "SQuAD", **columns)
    else:
        paragraphs = [
            {
                "context": context,
                "qas": [
                    {"id": id_, "question": question, "answers": [dict(zip(answers, cells, strict=True))]}
                    for cells in zip(*answers.values(), strict=True)
                ],
            }
            for id_, question, context, answers in zip(*columns.values(), strict=True)
        ]
        write(tmp_path, "train-v1.1.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
        split = load(find_task("SQuAD"), "train", str(tmp_path))
    kept = [row for row in rows if row[3] is not None]
    assert [item.starts for item in split.questions] == [(place,) for *_, place in kept]
    for item in split.questions:
        assert item.context[item.starts[0] :].startswith(item.answers[0])
    moved, absent = split.notes[:2]
    assert moved.startswith(
        "SQuAD train: answers that do not stand at their answer_start, looked for nearest to it: 4 (first: "
    )
    assert absent.startswith("SQuAD train: answers that do not occur in their context, left out: 1, ")
    assert "left out: 1 (first: question q5 of " in absent


def test_an_answer_that_does_not_occur_leaves_the_others(tmp_path: Path) -> None:
    answers = '[{"text": "blue", "answer_start": 6}, {"text": "red", "answer_start": 6}]}]}]}]}'
    split = load(find_task("SQuAD"), "dev", write(tmp_path, "dev-v1.1.json", SQUAD_START + answers))
    assert [(item.answers, item.starts) for item in split.questions] == [(("red",), (6,))]


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    data = write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel\nfine\t1\n \t0\n\t1\n")
    notes = load(find_task("SST-2"), "dev", data).notes
    assert notes[0] == "SST-2 dev: rows with an empty text: 2 (first: row 2)"


@pytest.mark.parametrize("name", ["CoLA", "SST-2", "MRPC", "STS-B", "WNLI"])
def test_shared_data_have_the_official_counts(shared_dir: Path, name: str) -> None:
    task = TASKS[name]
    for part in ("train", "dev"):
        assert load(task, part, str(shared_dir / "data")).notes == []


@pytest.mark.parametrize(
    ("name", "part", "rows"),
    [("MNLI", "train", 48), ("MNLI", "dev_matched", 48), ("QQP", "train", 32), ("QQP", "dev", 32),
     ("IMDb", "train", 2000), ("IMDb", "dev", 1000), ("SQuAD", "train", 839), ("SQuAD", "dev", 351),
     ("CoLA", "test", 1063), ("MRPC", "test", 1725), ("WNLI", "test", 146)],
)  # fmt: skip
def test_shared_samples_are_read(shared_dir: Path, name: str, part: str, rows: int) -> None:
    assert len(load(TASKS[name], part, str(shared_dir / "data"))) == rows


def test_only_the_benchmarks_own_tasks_make_its_macro_score() -> None:
    assert sorted(GLUE) == sorted(["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"])
    assert all(TASKS[name].test_parts for name in GLUE)
