"""Metrics against independent naive definitions, on random and on degenerate vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.kinds.predictions import task_score
from evaluation.measures import metrics, squad
from evaluation.sources.catalogue import find_task

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
REAL = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=40)


def counts(pairs: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    both = sum(p == 1 and e == 1 for p, e in pairs)
    false_positive = sum(p == 1 and e == 0 for p, e in pairs)
    false_negative = sum(p == 0 and e == 1 for p, e in pairs)
    return both, false_positive, false_negative, len(pairs) - both - false_positive - false_negative


def columns(pairs: list) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray([p for p, _ in pairs]), np.asarray([e for _, e in pairs])


@given(BINARY)
def test_accuracy_f1_matthews(pairs: list[tuple[int, int]]) -> None:
    tp, fp, fn, tn = counts(pairs)
    predicted, expected = columns(pairs)
    assert metrics.accuracy(predicted, expected) == pytest.approx((tp + tn) / len(pairs))
    assert metrics.f1(predicted, expected) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    naive = (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
    assert metrics.matthews(predicted, expected) == pytest.approx(naive, abs=1e-12)


def naive_pearson(first: list[float], second: list[float]) -> float:
    a, b = sum(first) / len(first), sum(second) / len(second)
    x = math.sqrt(math.fsum((value - a) ** 2 for value in first))
    y = math.sqrt(math.fsum((value - b) ** 2 for value in second))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return math.fsum((p - a) * (q - b) for p, q in zip(first, second, strict=True)) / (x * y)


def ranks(values: list[float]) -> list[float]:
    """Mean rank of ties, by counting."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


@given(REAL)
def test_correlations_with_ties_and_constants(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(p) for p, _ in pairs], [float(e) for _, e in pairs]
    predicted, expected = np.asarray(first, np.float32), np.asarray(second, np.float32)
    assert metrics.pearson(predicted, expected) == pytest.approx(naive_pearson(first, second), abs=1e-9)
    assert metrics.spearman(predicted, expected) == pytest.approx(
        naive_pearson(ranks(first), ranks(second)), abs=1e-9
    )


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
@pytest.mark.parametrize(
    ("predicted", "expected"),
    [([0, 0, 0], [0, 1, 0]), ([0, 0, 0], [0, 0, 0]), ([0, 1, 0], [0, 0, 0]), ([0], [1])],
)
def test_constants_score_zero(name: str, predicted: list[int], expected: list[int]) -> None:
    assert metrics.METRICS[name](np.asarray(predicted), np.asarray(expected)) == 0.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown fox!", "quick brown fox"),
        ("a an the", ""),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("the-end", "theend"),  # punctuation goes before articles, as published
        ("", ""),
    ],
)
def test_answer_normalisation(text: str, normal: str) -> None:
    assert squad.normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "f1"),
    [
        ("the red car", ["Red car."], 1.0, 1.0),
        ("red", ["the red car"], 0.0, 2 / 3),
        ("blue", ["red"], 0.0, 0.0),
        ("", ["red"], 0.0, 0.0),
        ("red red", ["red"], 0.0, 2 / 3),
        ("green", ["red", "dark green"], 0.0, 2 / 3),
        ("the", ["a"], 1.0, 0.0),  # both empty once normalised: the official script's token F1 is 0
    ],
)
def test_answers(predicted: str, answers: list[str], exact: float, f1: float) -> None:
    assert squad.answer_exact(predicted, answers) == exact
    assert squad.answer_f1(predicted, answers) == pytest.approx(f1)


def test_glue_macro_is_a_mean_of_task_means() -> None:
    mrpc = task_score(find_task("MRPC"), {"accuracy": 0.8, "f1": 0.9})
    mnli = task_score(find_task("MNLI"), {"accuracy_matched": 0.7, "accuracy_mismatched": 0.8})
    assert metrics.macro_score({"MRPC": mrpc, "MNLI": mnli, "CoLA": 0.5}) == pytest.approx(
        (0.85 + 0.75 + 0.5) / 3
    )
    assert metrics.macro_score({}) == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_precision_recall_and_f1_of_sums(pairs: list[tuple[bool, bool]]) -> None:
    predicted, expected = (np.asarray(column)[:, None] for column in zip(*pairs, strict=True))
    right = sum(p and e for p, e in pairs)
    named, wanted = sum(p for p, _ in pairs), sum(e for _, e in pairs)
    of = metrics.class_counts(predicted, expected)
    each = np.ones((len(pairs), 1))
    assert metrics.of_sums(metrics.precision_of, of, each) == [right / named if named else 0.0]
    assert metrics.of_sums(metrics.recall_of, of, each) == [right / wanted if wanted else 0.0]
    both = named + wanted
    assert metrics.of_sums(metrics.f1_of, of, each) == [2 * right / both if both else 0.0]


def test_a_question_without_any_answer_has_no_f1() -> None:
    assert squad.answer_f1("red", []) == 0.0
