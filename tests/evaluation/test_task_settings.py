"""What a user's settings become: fields of the task, or an error that names the setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from evaluation.sources.catalogue import find_tasks
from evaluation.sources.loading import has_part, location_of
from evaluation.sources.own import data_fields, own_task
from infra.errors import UserError
from infra.settings.sections.task_settings import TaskSettings

CLASSES: dict[str, Any] = {"train": "t.csv", "text": ("text",), "label": "label", "labels": ("b", "a")}
# kind, settings, parts, texts, label, metrics
TASKS: list[tuple[str, dict[str, Any], list[str], tuple[str, ...], str, tuple[str, ...]]] = [
    ("classification", CLASSES, ["train", "dev"], ("text",), "label", ("accuracy",)),
    (
        "classification", CLASSES | {"test": "x.csv"}, ["train", "dev", "test"], ("text",), "label",
        ("accuracy",),
    ),
    ("multilabel", CLASSES, ["train", "dev"], ("text",), "label", ("micro_f1", "macro_f1", "exact_match")),
    ("regression", CLASSES | {"labels": ()}, ["train", "dev"], ("text",), "label", ("pearson", "spearman")),
    (
        "tokens", {"train": "t.conll", "labels": ("O", "B-PER")}, ["train", "dev"], ("words",), "tags",
        ("entity_f1", "entity_precision", "entity_recall"),
    ),
    (
        "tokens", {"train": "t.conll", "label": "ner", "text": ("tokens",), "labels": ("O", "B-PER")},
        ["train", "dev"], ("tokens",), "ner", ("entity_f1", "entity_precision", "entity_recall"),
    ),
    (
        "similarity", {"dev": "t.csv", "text": ("a", "b"), "label": "score"}, ["dev"], ("a", "b"), "score",
        ("spearman", "pearson"),
    ),
    (
        "retrieval", {"test": "t.tsv", "corpus": "c.jsonl", "queries": "q.jsonl"}, ["test"], (), "",
        ("ndcg_10", "recall_100"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "parts", "texts", "label", "metrics"), TASKS)
def test_settings_become_a_task(
    kind: Any, fields: dict[str, Any], parts: list[str], texts: tuple[str, ...], label: str, metrics: Any
) -> None:
    task = own_task(TaskSettings(name="t", kind=kind, max_length=99, **fields), "here")
    assert (task.name, task.kind, task.max_length) == ("t", kind, 99)
    assert (list(task.parts), task.texts, task.label) == (parts, texts, label)
    assert (task.metrics, task.main_metrics) == (metrics, metrics[:1])
    assert task.labels == fields.get("labels", ())
    assert task.no_answer is False
    assert task.scored_parts == parts[-1:]
    assert [has_part(task, part, None) for part in ("train", "dev", "test")] == [
        part in parts for part in ("train", "dev", "test")
    ]
    assert location_of(task, parts[-1], None) == fields.get(parts[-1], fields.get("train"))


def test_the_first_metric_is_the_score() -> None:
    metrics = ("macro_f1", "accuracy", "f1")
    task = own_task(TaskSettings(name="t", kind="classification", metrics=metrics, **CLASSES), "here")
    assert (task.metrics, task.main_metrics) == (metrics, ("macro_f1",))
    hub = TaskSettings(name="t", kind="classification", hub="a/b", revision="v1", **CLASSES)
    assert location_of(own_task(hub, "here"), "dev", None) == "hf://datasets/a/b@v1"
    newest = dataclasses.replace(hub, revision=None)
    assert location_of(own_task(newest, "here"), "dev", None) == "hf://datasets/a/b"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    (
        "tokens",
        {"train": "t.jsonl", "text": ("a", "b"), "label": "x"},
        "tokens takes 1 columns of text, not 2",
    ),
    ("tokens", {"train": "t.jsonl", "text": ("a",)}, "label: is required, for example tags"),
    ("classification", CLASSES | {"label": None}, "label: is required, for example label"),
    ("similarity", {"test": "t.csv", "text": ("a",), "label": "x"}, "takes 2 columns of text, not 1"),
    ("classification", CLASSES | {"split_seed": -1}, "split_seed: must be >= 0, not -1"),
    ("spans", {"train": "t.json", "text": ("a",)}, "spans takes 0 or 2 columns of text, not 1"),
    ("spans", {"train": "t.json", "label": "x"}, "label: spans has no column of labels"),
    ("retrieval", {"test": "t", "corpus": "c", "queries": "q", "text": ("a",)}, "takes 0 columns of text"),
    ("retrieval", {"test": "t", "corpus": "c", "queries": "q", "label": "a"}, "has no column of labels"),
    ("retrieval", {"test": "t", "queries": "q"}, "corpus: is required, for example corpus: corpus.jsonl"),
    ("classification", CLASSES | {"queries": "q"}, "queries: is for kind: retrieval, not classification"),
    ("classification", CLASSES | {"config": "en"}, "config: is for a hub dataset"),
    ("classification", CLASSES | {"dev_fraction": 0.0}, "dev_fraction: must be > 0 and <= 0.5, not 0.0"),
    ("classification", CLASSES | {"dev_fraction": 0.51}, "dev_fraction: must be > 0 and <= 0.5, not 0.51"),
    ("classification", CLASSES | {"metrics": ("f1",), "labels": ("a", "b", "c")}, "3; write macro_f1"),
]


@pytest.mark.parametrize(("kind", "fields", "says"), WRONG)
def test_settings_that_do_not_go_together(kind: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        own_task(TaskSettings(name="t", kind=kind, **fields), "here")
    assert str(caught.value).startswith("here: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "a b"}, "here.yaml: name: must be letters"),
        ({"name": "-a"}, "name: must be letters"),
        ({"name": "a" * 101}, "name: must be letters"),
        ({"name": "RTE", "epochs": (1.0, 0.0)}, "epochs: must be > 0, not 0"),
        ({"name": "RTE", "batch_size": 0}, "batch_size: must be > 0, not 0"),
        ({"name": "RTE", "max_steps": 0}, "max_steps: must be > 0, not 0"),
        ({"name": "RTE", "max_length": 7}, "max_length: must be >= 8, not 7"),
        ({"name": "RTE", "metrics": ("f1",)}, "metrics: needs a kind"),
        ({"name": "RTE", "corpus": "c"}, "corpus: needs a kind"),
    ],
)
def test_numbers_and_names_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        find_tasks([TaskSettings(**settings)])
    assert says.replace("here.yaml", f"evaluation.tasks: {settings['name']}") in str(caught.value)


def test_the_smallest_numbers_are_taken() -> None:
    (rte,) = find_tasks([TaskSettings(name="RTE", max_length=8, max_steps=1, batch_size=1, epochs=0.1)])
    assert (rte.name, rte.max_length, rte.own) == ("RTE", 8, None)
    (imdb,) = find_tasks([TaskSettings(name="imdb", epochs=1)])
    assert (imdb.name, imdb.max_length) == ("IMDb", 512)
    long = own_task(TaskSettings(name="t" * 100, kind="classification", dev_fraction=0.5, **CLASSES), "here")
    assert (long.name, long.max_length) == ("t" * 100, None)


def test_every_field_of_data_is_one() -> None:
    names = [
        "train", "dev", "test", "corpus", "queries", "hub", "config", "format", "text", "label", "labels",
        "id", "metrics",
    ]  # fmt: skip
    assert data_fields(TaskSettings(name="t", **dict.fromkeys(names, ("x",)))) == names  # type: ignore[arg-type]
    assert data_fields(TaskSettings(name="t", epochs=3, revision="v1")) == []
