"""Whether a classifier's probabilities mean what they say: calibration error and Brier score.

Letters: n examples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
"""Bins of equal width, as in Guo et al. 2017 (arXiv 1706.04599), section 5."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, bin by bin; float64 [bins] each, 0 in an empty bin.

    Bin b holds the confidences in (b / bins, (b + 1) / bins].
    """

    count: np.ndarray
    confidence: np.ndarray
    """Mean probability of the predicted class."""
    accuracy: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [n, C] of logits [n, C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Of probabilities [n, C] and class ids int64 [n]. The predicted class is the first of the largest."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidence, side="left")
    count, sums, hits = (
        np.bincount(place, weights, bins).astype(np.float64) for weights in (None, confidence, right)
    )
    filled = np.maximum(count, 1)
    return Reliability(count, sums / filled, hits / filled)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): |accuracy - confidence|, averaged over
    examples."""
    found = reliability(probabilities, labels, bins)
    return float(found.count @ np.abs(found.accuracy - found.confidence) / len(labels))


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Squared distance of probabilities [n, C] from the truth, summed over classes (Brier 1950, Monthly
    Weather Review 78:1): 0 at best, 2 at worst."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())
