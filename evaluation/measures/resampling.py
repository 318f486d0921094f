"""Resamples of the dev sets, and metrics computed for many resamples at a time.

Letters: R resamples, n examples of a dev set. Weights [n, R] say how often each example occurs in each
resample; a column of ones is the dev set itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

RESAMPLES = 1000
CELLS = 1 << 21
"""Weights held in memory at a time."""

Weights = Mapping[str, np.ndarray]
"""Dev set -> float64 [n, R]."""


def resamples(sizes: Mapping[str, int], count: int = RESAMPLES, seed: int = 0) -> Iterator[Weights]:
    """Weights of ``count`` resamples, some at a time. Each dev set is resampled on its own."""
    generator = np.random.default_rng(seed)
    most = max(1, CELLS // max(sizes.values()))
    for start in range(0, count, most):
        number = min(most, count - start)
        yield {part: _occurrences(generator, number, size) for part, size in sizes.items()}


def _occurrences(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    drawn = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    found = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
    return np.ascontiguousarray(found.T, dtype=np.float64)


# --- metrics of resamples: (predicted [n], expected [n], weights [n, R]) -> [R] -----------------------------


def accuracy(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return average(predicted == expected, weights)


def average(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means [R] of one number per example, [n]."""
    return values.astype(np.float64) @ weights / weights.sum(axis=0)


def f1(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of class 1 from the counts of a resample."""
    found, there = predicted == 1, expected == 1
    both, sizes = (found & there).astype(np.float64) @ weights, (0.0 + found + there) @ weights
    return _divide(2 * both, sizes)


def matthews(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From a resample's counts, for any number of classes (Gorodkin 2004, Comput. Biol. Chem. 28:367)."""
    classes = np.union1d(predicted, expected)[:, None]
    found, there = ((vector == classes).astype(np.float64) @ weights for vector in (predicted, expected))
    right, total = (predicted == expected).astype(np.float64) @ weights, weights.sum(axis=0)
    spreads = (total**2 - (counts**2).sum(axis=0) for counts in (found, there))
    return _divide(right * total - (found * there).sum(axis=0), np.sqrt(math.prod(spreads)))


def pearson(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """From a resample's sums of x, y, x^2, y^2 and x y, each vector centred first."""
    x, y = (vector.astype(np.float64) - vector.mean(dtype=np.float64) for vector in (predicted, expected))
    sums, squares, total = np.stack([x, y]) @ weights, np.stack([x * x, y * y]) @ weights, weights.sum(axis=0)
    spreads = squares - sums**2 / total
    spreads[spreads < 1e-12 * squares] = 0  # a constant vector but for rounding
    return _divide((x * y) @ weights - sums[0] * sums[1] / total, np.sqrt(spreads[0] * spreads[1]))


def spearman(predicted: np.ndarray, expected: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's of the ranks within the resample itself, not of the ranks in the dev set."""
    x, y = _centred_ranks(predicted, weights), _centred_ranks(expected, weights)
    covariance, *spreads = (
        np.einsum("nr,nr,nr->r", weights, one, other) for one, other in ((x, y), (x, x), (y, y))
    )
    return _divide(covariance, np.sqrt(spreads[0] * spreads[1]))


def _centred_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks within each resample minus their mean, [n, R]; ties and repeats share their mean rank."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    sizes = np.add.reduceat(weights[order], starts, axis=0)  # [distinct values, R]
    return (np.cumsum(sizes, axis=0) - (sizes + weights.sum(axis=0)) / 2)[group]


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """The quotient; 0 where the denominator is 0, so a constant vector scores 0."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""By the names of ``evaluation.measures.metrics.METRICS``."""
