"""Computes metrics as the benchmarks define them, as fractions; an undefined metric is 0.0, never NaN.

GLUE (arXiv 1804.07461, section 3): Matthews correlation for CoLA, Pearson and Spearman correlation for STS-B,
accuracy and F1 of class 1 for MRPC and QQP, accuracy for the others. A task's score is the mean of its main
metrics (for MNLI, on matched and mismatched), the macro score the mean over tasks. Those of SQuAD are in
`squad`. docs/extending.md says how to add a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean(predicted == expected))


def f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns F1 of class 1; 0.0 if neither vector contains class 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(expected, predicted, labels=[1], average=None, zero_division=0.0)[0])


def matthews(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the Matthews correlation; 0.0 if either vector is constant."""
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return 0.0
    return float(matthews_corrcoef(expected, predicted))


def pearson(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the linear correlation; 0.0 if either vector is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, predicted, expected)


def spearman(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Returns the rank correlation, with mean ranks for ties; 0.0 if either vector is constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, predicted, expected)


def _correlation(function: Callable, predicted: np.ndarray, expected: np.ndarray) -> float:
    first, second = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    value = float(function(first, second)[0])
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def macro_score(scores: Mapping[str, float]) -> float:
    """Returns the mean over tasks; 0.0 if there are no tasks."""
    return float(np.mean(list(scores.values()))) if scores else 0.0


# --- metrics that are functions of sums over examples ---------------------------------------------------
# Counts are float64 [n, 3 C]: how often each of C classes is correctly predicted, predicted, and expected.
# A metric is a function of their sums [R, 3 C], so resamples of the examples need only weighted sums.


def of_sums(
    metric: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Returns the metric [R] of each resample; weights [n, R] are those of ``resampling``."""
    return metric(weights.T @ counts)


def class_counts(predicted: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Returns counts [n, 3 C] of two bool arrays [n, C]."""
    return np.concatenate([predicted & expected, predicted, expected], axis=1).astype(np.float64)


def f1_of(sums: np.ndarray) -> np.ndarray:
    """Returns F1 [R] of sums [R, 3]; 0.0 if nothing is predicted or expected."""
    return _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def precision_of(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[:, 0], sums[:, 1])


def recall_of(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[:, 0], sums[:, 2])


def macro_f1_of(sums: np.ndarray) -> np.ndarray:
    """Returns macro F1 [R] of sums [R, 3 C]; F1 of a class that is never predicted or expected is 0.0."""
    correct, predicted, expected = np.split(sums, 3, axis=1)
    return _ratio(2 * correct, predicted + expected).mean(axis=1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
