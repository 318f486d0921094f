"""Compares one model's answers with the labels and with another model's answers.

Letters: n examples, C classes.
"""

from __future__ import annotations

import numpy as np


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of examples to which two models give the same answer; of numbers, their Pearson correlation.

    Floating-point numbers count as numbers; everything else is compared as it is.
    """
    if np.issubdtype(first.dtype, np.floating):
        from evaluation.measures.metrics import pearson

        return pearson(first, second)
    return float(np.mean(first == second))


def confusion(predicted: np.ndarray, expected: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: how many examples of class i (row) are predicted as class j (column)."""
    cells = np.bincount(expected * classes + predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def label_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 (float64 [C]) and support (int64 [C]) of each class, from a confusion matrix.

    0 where a denominator is 0.
    """
    right, predicted, support = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    return {
        "precision": right / np.maximum(predicted, 1),
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(predicted + support, 1),
        "support": support,
    }


def worst(distance: np.ndarray, count: int) -> list[int]:
    """The ``count`` examples of largest distance [n], the largest first; those of distance 0 or less are left
    out."""
    order = np.argsort(-distance, kind="stable")[:count]
    return [int(place) for place in order if distance[place] > 0]
