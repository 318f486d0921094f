"""Scores as the benchmarks define them, as fractions; a degenerate vector scores 0.0, never NaN.

GLUE (arXiv 1804.07461, section 3): CoLA Matthews correlation, STS-B Pearson and Spearman, MRPC and QQP
accuracy and F1 of class 1, the others accuracy. A task's score is the mean of its metrics (MNLI: of
matched and mismatched), the macro score the mean over tasks. SQuAD (arXiv 1606.05250, section 6.1):
exact match and token F1 after normalisation, best over the annotators' answers.
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


def task_score(values: Mapping[str, float]) -> float:
    """The one number of a task: the mean of its metrics."""
    return float(np.mean(list(values.values())))


def macro_score(scores: Mapping[str, float]) -> float:
    """The mean over tasks; 0.0 of none."""
    return float(np.mean(list(scores.values()))) if scores else 0.0


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and extra white space, in the published order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_exact(predicted: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction equals any of the annotators' answers, normalised."""
    return float(any(normalise_answer(predicted) == normalise_answer(answer) for answer in answers))


def answer_f1(predicted: str, answers: Sequence[str]) -> float:
    """Token F1 against the best of the annotators' answers, normalised; 0.0 without common tokens."""
    return max((_token_f1(predicted, answer) for answer in answers), default=0.0)


def _token_f1(predicted: str, answer: str) -> float:
    first, second = normalise_answer(predicted).split(), normalise_answer(answer).split()
    common = sum((Counter(first) & Counter(second)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)


def squad_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions, as fractions."""
    pairs = list(zip(predicted, answers, strict=True))
    return {
        "exact_match": float(np.mean([answer_exact(*pair) for pair in pairs])),
        "f1": float(np.mean([answer_f1(*pair) for pair in pairs])),
    }
