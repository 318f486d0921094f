"""Tasks whose rows come from the hub: labels, errors, rows that cannot be right."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel

from evaluation.sources.catalogue import TASKS, find_task
from evaluation.sources.loading import load
from evaluation.tasks.task import Split
from infra.errors import UserError


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
        ("SST-2", {"sentence": ["a", None], "label": [1, 0]}, "row 2: column 'sentence': None is not a text"),
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


COUNTS = {
    "cola": (8551, 1043, 1063), "sst2": (67349, 872, 1821), "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379), "qqp": (363846, 40430, 390965), "qnli": (104743, 5463, 5463),
    "mnli": (392702, 9815, 9832, 9796, 9847, 1104), "rte": (2490, 277, 3000), "wnli": (635, 71, 146),
    "stanfordnlp/imdb": (25000, 25000), "rajpurkar/squad": (87599, 10570),
    "rajpurkar/squad_v2": (130319, 11873),
}  # fmt: skip
"""Data set on the hub (``nyu-mll/glue``'s configurations have short names) -> rows of its splits, as its card
has them: train, validation, test; MNLI's are matched, mismatched and the diagnostic set."""
SPLITS = {
    "mnli": (
        "train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched", "test"
    ),
    "stanfordnlp/imdb": ("train", "test"),
}  # fmt: skip
COLUMNS = {
    "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "qqp": ("question1", "question2"),
    "cola": ("sentence",), "sst2": ("sentence",), "stanfordnlp/imdb": ("text",),
    "rajpurkar/squad": ("question", "context"), "rajpurkar/squad_v2": ("question", "context"),
}  # fmt: skip
"""The others have ``sentence1`` and ``sentence2``."""


def test_the_built_in_tasks_are_the_hubs() -> None:
    places = {"/".join(task.hub).removeprefix("nyu-mll/glue/"): task for task in TASKS.values()}
    assert places.keys() == COUNTS.keys()
    for name, task in places.items():
        splits = SPLITS.get(name, ("train", "validation", "test"))
        assert [(part.hub, part.rows) for part in task.parts.values()] == list(
            zip(splits, COUNTS[name], strict=False)
        )
        assert (task.hub_texts or task.texts) == COLUMNS.get(name, ("sentence1", "sentence2"))
        assert task.hub_label == "label"


def test_the_built_in_tasks_are_scored_as_published() -> None:
    """GLUE (arXiv 1804.07461), table 1; the tasks that it does not name have accuracy."""
    metrics = {
        "CoLA": ["matthews"], "MRPC": ["accuracy", "f1"], "QQP": ["accuracy", "f1"],
        "STS-B": ["pearson", "spearman"], "MNLI": ["accuracy_matched", "accuracy_mismatched"],
        "SQuAD": ["exact_match", "f1"], "SQuAD2": ["exact_match", "f1"],
    }  # fmt: skip
    for name, task in TASKS.items():
        assert task.metric_keys == metrics.get(name, ["accuracy"])
        assert task.main_metrics == task.metrics
    lengths = {"IMDb": 512, "SQuAD": 384, "SQuAD2": 384}
    assert {name: task.max_length for name, task in TASKS.items() if task.max_length} == lengths
    assert [name for name, task in TASKS.items() if task.no_answer] == ["SQuAD2"]
    assert [name for name, task in TASKS.items() if task.kind == "spans"] == ["SQuAD", "SQuAD2"]
    assert [name for name, task in TASKS.items() if task.skip_short_rows] == ["QQP"]
