"""nDCG and recall by hand, and entities as CoNLL's script finds them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.kinds.embeddings import Retrieval
from evaluation.measures.entities import entities, entity_counts
from evaluation.measures.ranking import ndcg, recall
from evaluation.tasks.task import Split


def test_ndcg_by_hand() -> None:
    grades = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0}
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(["a", "b", "c", "d"], grades, 10) == pytest.approx(1)
    assert ndcg(["x", "b", "d", "a"], grades, 10) == pytest.approx(
        (2 / math.log2(3) + 3 / math.log2(5)) / ideal
    )
    assert ndcg(["c", "x", "a"], grades, 2) == pytest.approx(1 / (3 + 2 / math.log2(3)))
    assert ndcg(["d", "x"], grades, 10) == 0.0
    assert ndcg(["a"], {"a": 0.0}, 10) == 0.0
    assert ndcg(["a", "b"], {"a": -1.0, "b": 1.0}, 10) == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize(
    ("judged", "expected"), [({"d1": 1.0}, ["d1", "d2"]), ({"q1": 1.0}, ["q1", "d1", "d2"])]
)
def test_a_query_does_not_find_itself(
    judged: dict[str, float], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the document with its id is judged for it."""
    vectors = {"query": [1.0, 0.0], "near": [0.8, 0.6], "far": [0.0, 1.0]}
    monkeypatch.setattr(
        Retrieval, "embeddings", lambda *arguments: np.array([vectors[text] for text in arguments[4]])
    )
    corpus = {"q1": "query", "d1": "near", "d2": "far"}
    split = Split([("query",)], [judged], ["q1"], corpus=corpus)
    answers = Retrieval().answers(None, None, None, split, 8)  # type: ignore[arg-type]
    assert Retrieval().decide(answers.outputs) == [expected]


def test_recall_by_hand() -> None:
    grades = {"a": 3.0, "b": 1.0, "c": 0.0}
    assert recall(["a", "c", "b"], grades, 100) == 1.0
    assert recall(["a", "c", "b"], grades, 2) == 0.5
    assert recall(["c"], grades, 100) == 0.0
    assert recall(["c"], {"c": 0.0}, 100) == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", [("PER", 1, 2)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-PER B-LOC", [("PER", 0, 1), ("LOC", 2, 2)]),  # I- starts one, too
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),  # another type
        ("B-PER E-PER I-PER", [("PER", 0, 1), ("PER", 2, 2)]),  # E- ends one
        ("S-LOC S-LOC O", [("LOC", 0, 0), ("LOC", 1, 1)]),
        ("I-LOC S-LOC I-LOC I-LOC", [("LOC", 0, 0), ("LOC", 1, 1), ("LOC", 2, 3)]),  # S- is one on its own
        ("O O", []),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
        ("", []),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_an_entity_is_right_with_type_and_both_ends() -> None:
    gold = ["B-PER", "I-PER", "O", "B-LOC"]
    assert entity_counts(gold, gold) == [2, 2, 2]
    assert entity_counts(["B-PER", "O", "O", "B-LOC"], gold) == [1, 2, 2]
    assert entity_counts(["B-LOC", "I-LOC", "O", "O"], gold) == [0, 1, 2]
