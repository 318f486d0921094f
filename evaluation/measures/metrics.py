"""Scores as the benchmarks define them, as fractions; a degenerate vector scores 0.0, never NaN.

GLUE (arXiv 1804.07461, section 3): CoLA Matthews correlation, STS-B Pearson and Spearman, MRPC and QQP
accuracy and F1 of class 1, the others accuracy. A task's score is the mean of its main metrics (MNLI: of
matched and mismatched), the macro score the mean over tasks. SQuAD (arXiv 1606.05250, section 6.1):
exact match and token F1 after normalisation, best over the annotators' answers; 2.0 (arXiv 1806.03822) also
has questions without an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean(predicted == expected))


def f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """F1 of class 1; 0.0 where neither vector has it."""
    from sklearn.metrics import f1_score

    return float(f1_score(expected, predicted, labels=[1], average=None, zero_division=0.0)[0])


def matthews(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Matthews correlation; 0.0 where either vector is constant."""
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return 0.0
    return float(matthews_corrcoef(expected, predicted))


def pearson(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Linear correlation; 0.0 where either vector is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, predicted, expected)


def spearman(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0.0 where either vector is constant."""
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
    """The mean over tasks; 0.0 of none."""
    return float(np.mean(list(scores.values()))) if scores else 0.0


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and extra white space, in the published order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_exact(predicted: str, answers: Sequence[str], no_answer: bool = False) -> float:
    """1.0 where the prediction equals any of the annotators' answers, normalised.

    no_answer: SQuAD 2.0's definition. Answers that are empty when normalised do not count, and where none is
    left, the right answer is the empty one.
    """
    right = _answers_2(answers) if no_answer else answers
    return float(any(normalise_answer(predicted) == normalise_answer(answer) for answer in right))


def answer_f1(predicted: str, answers: Sequence[str], no_answer: bool = False) -> float:
    """Token F1 against the best of the annotators' answers, normalised; 0.0 without common tokens.

    no_answer: as in ``answer_exact``; two empty answers then agree.
    """
    right = _answers_2(answers) if no_answer else answers
    found = (_token_f1(predicted, answer, no_answer) for answer in right)
    return max(found, default=0.0)


def _answers_2(answers: Sequence[str]) -> Sequence[str]:
    return [answer for answer in answers if normalise_answer(answer)] or [""]


def _token_f1(predicted: str, answer: str, no_answer: bool) -> float:
    first, second = normalise_answer(predicted).split(), normalise_answer(answer).split()
    if no_answer and not (first and second):
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


# --- metrics of sums over examples ----------------------------------------------------------------------
# Counts are float64 [n, 3 G], for G groups (classes): right, predicted and expected of each. A metric is a
# function of their sums [R, 3 G], so resamples of the examples need only weighted sums.


def of_sums(
    metric: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The metric [R] of examples with weights [n, R]."""
    return metric(weights.T @ counts)


def class_counts(predicted: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[n, 3 G] of two bool arrays [n, G]."""
    return np.concatenate([predicted & expected, predicted, expected], axis=1).astype(np.float64)


def f1_of(sums: np.ndarray) -> np.ndarray:
    """F1 [R] of sums [R, 3]; 0.0 where nothing is predicted or expected."""
    return _ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])


def precision_of(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[:, 0], sums[:, 1])


def recall_of(sums: np.ndarray) -> np.ndarray:
    return _ratio(sums[:, 0], sums[:, 2])


def macro_f1_of(sums: np.ndarray) -> np.ndarray:
    """The mean of the classes' F1 [R] of sums [R, 3 C]; a class without any example has 0.0."""
    right, predicted, expected = np.split(sums, 3, axis=1)
    return _ratio(2 * right, predicted + expected).mean(axis=1)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
