"""Measures how well a classifier's probabilities match its accuracy: calibration error and Brier score.

Dimensions of arrays: n examples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Number of bins of equal width, as in Guo et al. 2017 (arXiv 1706.04599), section 5."""


@dataclass(frozen=True)
class Reliability:
    """Number, mean confidence and accuracy of the examples in each bin, float64 [bins]; 0 in an empty bin.

    Confidence is the probability of the predicted class; it is in (b / bins, (b + 1) / bins] in bin b.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities, float64 [n, C], of logits [n, C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Sorts examples into bins by confidence. probabilities: [n, C]; labels: class ids, int64 [n]."""
    confidence = probabilities.max(axis=1)
    is_correct = probabilities.argmax(axis=1) == labels  # of equal probabilities, the first counts
    bin_numbers = np.searchsorted(np.arange(1, bins) / bins, confidence, side="left")
    count, confidence_sum, correct = (
        np.bincount(bin_numbers, weights, bins).astype(np.float64)
        for weights in (None, confidence, is_correct)
    )
    divisor = np.maximum(count, 1)
    return Reliability(count, confidence_sum / divisor, correct / divisor)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Returns |accuracy - confidence| of the bins, averaged over examples (Guo et al. 2017, equation 3)."""
    per_bin = reliability(probabilities, labels, bins)
    return float(per_bin.count @ np.abs(per_bin.accuracy - per_bin.confidence) / len(labels))


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean squared distance from one-hot labels, in [0, 2] (Brier 1950, Mon Weather Rev 78:1)."""
    one_hot = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - one_hot) ** 2).sum(axis=1).mean())
