"""Calibration and comparison of answers against definitions written out example by example."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.measures import calibration
from evaluation.report import analysis

CASES = 10_000


def expected_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Guo et al.'s equations 2 and 3, one example after the other."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        place = next(
            number for number in range(bins) if number == bins - 1 or confidence <= (number + 1) / bins
        )
        members[place].append((confidence, int(np.argmax(row)) == label))
    total = 0.0
    for group in filter(None, members):
        gap = math.fsum(confidence for confidence, _ in group) - sum(right for _, right in group)
        total += abs(gap)
    return total / len(labels)


def random_case(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """1 to 12 examples of 2 to 5 classes; confidences often on the edge of a bin, or certain."""
    size, classes = generator.integers(1, 13), generator.integers(2, 6)
    probabilities = generator.dirichlet(np.full(classes, generator.choice([0.05, 0.5, 5.0])), size)
    if generator.random() < 0.3:
        edges = generator.integers(8, 16, size) / 15
        probabilities = np.zeros((size, classes))
        probabilities[np.arange(size), generator.integers(0, classes, size)] = edges
        probabilities[probabilities.max(axis=1) == 0, 0] = 1.0
    return probabilities, generator.integers(0, classes, size)


def test_calibration_error_is_its_definition() -> None:
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        probabilities, labels = random_case(generator)
        found = calibration.calibration_error(probabilities, labels)
        assert found == pytest.approx(expected_error(probabilities, labels, 15), abs=1e-12)


def test_brier_is_its_definition() -> None:
    generator = np.random.default_rng(1)
    for _ in range(1000):
        probabilities, labels = random_case(generator)
        each = [
            sum((p - (label == number)) ** 2 for number, p in enumerate(row))
            for row, label in zip(probabilities, labels, strict=True)
        ]
        assert calibration.brier(probabilities, labels) == pytest.approx(np.mean(each), abs=1e-12)


def test_certain_and_wrong_is_the_worst() -> None:
    certain = np.asarray([[1.0, 0.0], [0.0, 1.0]])
    right, wrong = np.asarray([0, 1]), np.asarray([1, 0])
    assert (calibration.brier(certain, right), calibration.brier(certain, wrong)) == (0.0, 2.0)
    assert calibration.calibration_error(certain, right) == 0.0
    assert calibration.calibration_error(certain, wrong) == 1.0


def test_probabilities_that_mean_what_they_say() -> None:
    """Labels drawn from the model's own probabilities: the error is the noise of the draw alone."""
    generator = np.random.default_rng(2)
    probabilities = calibration.softmax(generator.normal(0, 2, (200_000, 3)))
    labels = (generator.random(len(probabilities))[:, None] > probabilities.cumsum(axis=1)).sum(axis=1)
    assert calibration.calibration_error(probabilities, labels) < 0.005
    sharper = calibration.softmax(3 * np.log(probabilities))
    assert calibration.calibration_error(sharper, labels) > 0.1


def test_softmax_of_large_logits() -> None:
    found = calibration.softmax(np.asarray([[1000.0, 1000.0], [-1000.0, 0.0]], np.float32))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.0, 1.0]], atol=1e-12)


def test_reliability_of_each_bin() -> None:
    confidences = [0.6, 0.7, 0.8, 1.0]
    probabilities = np.asarray([[p, 1 - p] for p in confidences])
    found = calibration.reliability(probabilities, np.asarray([0, 1, 0, 0]), bins=5)
    assert found.count.tolist() == [0, 0, 1, 2, 1]  # 0.6 and 0.8 belong to the bins that end there
    np.testing.assert_allclose(found.confidence, [0, 0, 0.6, 0.75, 1.0])
    assert found.accuracy.tolist() == [0, 0, 1.0, 0.5, 1.0]
    assert len(calibration.reliability(probabilities, np.zeros(4, int)).count) == 15


def test_agreement() -> None:
    assert analysis.agreement(np.asarray([0, 1, 2, 2]), np.asarray([0, 1, 1, 2])) == 0.75
    texts = np.asarray(["red car", "house"])
    assert analysis.agreement(texts, np.asarray(["red car", "a house"])) == 0.5
    numbers = np.asarray([1.0, 2.0, 4.0])
    assert analysis.agreement(numbers, 3 * numbers + 1) == pytest.approx(1.0)
    assert analysis.agreement(numbers, -numbers) == pytest.approx(-1.0)


def test_the_worst_come_first() -> None:
    assert analysis.largest(np.asarray([0.1, 0.9, 0.0, 0.9, -1.0]), 3) == [1, 3, 0]
    assert analysis.largest(np.asarray([0.0, -1.0]), 3) == []
