"""Draws bootstrap resamples of dev sets and computes metrics of many resamples at once, for `intervals`.

Dimensions of arrays: n examples of a dev set, R resamples. Weights [n, R] say how often each example occurs
in each resample; a column of ones represents the dev set itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

RESAMPLES = 1000
"""Number of resamples per interval."""
MAX_WEIGHTS = 1 << 21
"""Number of weights of one dev set that are held in memory at once."""

Weights = Mapping[str, np.ndarray]
"""Name of the dev set -> weights, float64 [n, R]."""


def resamples(sizes: Mapping[str, int], count: int = RESAMPLES, seed: int = 0) -> Iterator[Weights]:
    """Yields the weights of ``count`` resamples in batches that memory can hold.

    sizes: number of examples of each dev set; each dev set is resampled independently of the others.
    """
    generator = np.random.default_rng(seed)
    batch_limit = max(1, MAX_WEIGHTS // max(sizes.values()))
    for start in range(0, count, batch_limit):
        batch_size = min(batch_limit, count - start)
        yield {dev_set: _occurrences(generator, batch_size, size) for dev_set, size in sizes.items()}


def _occurrences(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Draws ``count`` resamples of ``size`` examples; returns their weights, float64 [size, count]."""
    drawn = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    occurrences = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
    return np.ascontiguousarray(occurrences.T, dtype=np.float64)


# --- metrics of resamples: (predicted [n], expected [n], weights [n, R]) -> [R] -----------------------------


def accuracy(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return average(predicted == expected, weights)


def average(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean [R] of ``values`` [n], one number per example, in each resample."""
    return values.astype(np.float64) @ weights / weights.sum(axis=0)


def f1(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns F1 of class 1: 2 TP / (number predicted as 1 + number of label 1)."""
    is_predicted, is_expected = predicted == 1, expected == 1
    true_positives = (is_predicted & is_expected).astype(np.float64) @ weights
    return _divide(2 * true_positives, (0.0 + is_predicted + is_expected) @ weights)


def matthews(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the Matthews correlation for any number of classes (Gorodkin 2004, Comput Biol Chem 28:367)."""
    classes = np.union1d(predicted, expected)[:, None]
    counts = [(ids == classes).astype(np.float64) @ weights for ids in (predicted, expected)]  # [classes, R]
    correct, total = (predicted == expected).astype(np.float64) @ weights, weights.sum(axis=0)
    variances = (total**2 - (one**2).sum(axis=0) for one in counts)
    covariance = correct * total - (counts[0] * counts[1]).sum(axis=0)
    return _divide(covariance, np.sqrt(math.prod(variances)))


def pearson(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the linear correlation, from the sums of x, y, x^2, y^2 and x y over each resample."""
    x, y = (vector.astype(np.float64) - vector.mean(dtype=np.float64) for vector in (predicted, expected))
    sums, squares, total = np.stack([x, y]) @ weights, np.stack([x * x, y * y]) @ weights, weights.sum(axis=0)
    variances = squares - sums**2 / total
    variances[variances < 1e-12 * squares] = 0  # rounding errors of a vector that is constant in a resample
    return _divide((x * y) @ weights - sums[0] * sums[1] / total, np.sqrt(variances[0] * variances[1]))


def spearman(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the rank correlation; examples are ranked anew within each resample."""
    x, y = _centred_ranks(predicted, weights), _centred_ranks(expected, weights)
    covariance, *variances = (
        np.einsum("nr,nr,nr->r", weights, first, second) for first, second in ((x, y), (x, x), (y, y))
    )
    return _divide(covariance, np.sqrt(variances[0] * variances[1]))


def _centred_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns ranks within each resample minus their mean, [n, R]; equal values get their mean rank."""
    distinct, value_number = np.unique(values, return_inverse=True)
    order = np.argsort(value_number, kind="stable")
    starts = np.searchsorted(value_number[order], np.arange(len(distinct)))
    counts = np.add.reduceat(weights[order], starts, axis=0)  # [distinct values, R]
    return (np.cumsum(counts, axis=0) - (counts + weights.sum(axis=0)) / 2)[value_number]


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotients, 0 if the denominator is 0, so that a constant vector scores 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""Forms for resamples of the metrics with the same names in ``evaluation.measures.metrics.METRICS``."""
