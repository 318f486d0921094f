"""What a task, its splits and its encoded rows say about themselves."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from evaluation.sources.catalogue import find_task, find_tasks
from evaluation.tasks.answer_spans import Question
from evaluation.tasks.encoded import Encoded
from evaluation.tasks.task import Part, Split, Task
from infra.settings.sections.task_settings import TaskSettings

QUESTION = Question("7", "who ?", "the red car", ("red",), (4,))
DEV = Part("dev.tsv", None, "validation")


def plain_task(**more: Any) -> Task:
    return Task(name="t", metrics=("accuracy", "f1"), parts={"dev": DEV}, **more)


def test_a_task_that_says_nothing_else_has_two_classes() -> None:
    task = plain_task()
    assert (task.kind, task.labels) == ("classification", ("0", "1"))
    assert (task.label, task.hub_label) == ("label", "label")
    assert (task.skip_short_rows, task.no_answer, task.pooling, task.own) == (False, False, "mean", None)


def test_settings_make_a_task_the_users_own_if_they_name_a_kind() -> None:
    own = TaskSettings(name="t", kind="similarity", dev="d.csv", text=("a", "b"), label="x", pooling="cls")
    (similarity,) = find_tasks([own])
    assert (similarity.own, similarity.pooling) == (own, "cls")
    (changed,) = find_tasks([TaskSettings(name="RTE", epochs=3)])
    assert (changed.own, changed.settings) == (None, TaskSettings(name="RTE", epochs=3))
    assert find_task("RTE").settings is None


def test_a_tasks_score_is_the_mean_of_its_main_metrics_on_its_scored_parts() -> None:
    assert plain_task().main_metrics == ("accuracy", "f1")
    main = plain_task(own_main_metrics=("f1",))
    assert (main.main_metrics, main.metric_keys) == (("f1",), ["accuracy", "f1"])
    own = TaskSettings(name="t", kind="similarity", test="t.csv", text=("a", "b"), label="x")
    (tested,) = find_tasks([own])
    assert (tested.scored_parts, tested.test_parts) == (["test"], [])
    assert tested.metric_keys == ["spearman", "pearson"]
    files = {"train": "t.csv", "test": "t.csv", "text": ("a",), "label": "x", "labels": ("0", "1")}
    (tested,) = find_tasks([TaskSettings(name="t", kind="classification", **files)])  # type: ignore[arg-type]
    assert (tested.scored_parts, tested.metric_keys) == (["test"], ["accuracy"])
    mnli = find_task("MNLI")
    assert mnli.dev_parts == mnli.scored_parts == ["dev_matched", "dev_mismatched"]
    assert mnli.metric_keys == ["accuracy_matched", "accuracy_mismatched"]
    assert mnli.test_parts == ["test_matched", "test_mismatched", "test_diagnostic"]
    assert (find_task("RTE").scored_parts, find_task("RTE").test_parts) == (["dev"], ["test"])
    assert (find_task("IMDb").scored_parts, find_task("IMDb").test_parts) == (["dev"], [])
    assert find_task("RTE").metric_keys == ["accuracy"]


def test_every_example_has_an_id_and_a_text_to_read() -> None:
    split = Split([("a", "b"), ("c", "d")], None)
    assert (len(split), split.ids, split.text_of(1)) == (2, ["0", "1"], "c / d")
    assert Split([("a",), ("b",)], None, ["x", "y"]).ids == ["x", "y"]
    asked = Split([], None, questions=[QUESTION])
    assert (len(asked), asked.ids, asked.text_of(0)) == (1, ["7"], "who ? / the red car")


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        (Split([("a", "b"), ("c", "d")], np.asarray([0, 1])), "8c00d1ed7f01fd95291b718076d372e1"),
        (
            Split([("a",)], [np.asarray([0, 2]), {"d": 1.0}], corpus={"d": "x"}),
            "83cdc11a1cad8d406a08bbcc253e8d15",
        ),
        (Split([("\ud800",)], None), "df82ac67a66b752184073a23c20b165a"),
    ],
)
def test_a_digest_stays_the_same(split: Split, digest: str) -> None:
    """Otherwise every score of an earlier version would be computed again."""
    assert split.digest() == f"xxh3-128:{digest}"


def test_a_digest_is_of_texts_labels_questions_and_documents() -> None:
    splits = [
        Split([("a", "b")], None),
        Split([("a",), ("b",)], None),
        Split([("ab",)], None),
        Split([("a", "b")], np.asarray([0])),
        Split([("a", "b")], np.asarray([1])),
        Split([("a", "b")], None, corpus={"d": "x"}),
        Split([], None, questions=[QUESTION]),
    ]
    assert len({split.digest() for split in splits}) == len(splits)


def test_rows_have_their_own_lengths() -> None:
    rows = Encoded([[2, 7, 3], [2, 3]], [[0, 0, 0], [0, 0]])
    assert (len(rows), rows.lengths().tolist(), rows.targets) == (2, [3, 2], {})


@pytest.mark.parametrize(
    "value",
    [plain_task(), DEV, QUESTION, Split([], None), Encoded([], [])],
    ids=lambda one: type(one).__name__,
)
def test_no_attribute_can_be_set(value: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, "x")
