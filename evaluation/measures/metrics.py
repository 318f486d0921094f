"""Computes metrics as the benchmarks define them, as fractions; an undefined metric is 0.0, never NaN.

GLUE (arXiv 1804.07461, section 3): Matthews correlation for CoLA, Pearson and Spearman correlation for STS-B,
accuracy and F1 of class 1 for MRPC and QQP, accuracy for the others. A task's score is the mean of its main
metrics (for MNLI, on matched and mismatched), the macro score the mean over tasks. SQuAD (arXiv 1606.05250,
section 6.1): exact match and token F1 of normalised answers, the best over the annotators' answers. SQuAD
2.0 (arXiv 1806.03822) also has questions without an answer. docs/extending.md says how to add a metric.
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


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Returns SQuAD's normal form: lower case, without ASCII punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_exact(predicted: str, answers: Sequence[str], no_answer: bool = False) -> float:
    """Returns 1.0 if the prediction equals any of the annotators' answers after normalisation, otherwise 0.0.

    no_answer: use SQuAD 2.0's definition. Answers whose normal form is empty do not count; if no others are
    left, the empty answer is right.
    """
    correct = _squad_2_answers(answers) if no_answer else answers
    return float(any(normalise_answer(predicted) == normalise_answer(answer) for answer in correct))


def answer_f1(predicted: str, answers: Sequence[str], no_answer: bool = False) -> float:
    """Returns the highest token F1 with any of the annotators' answers, after normalisation.

    no_answer: as in ``answer_exact``; F1 of two empty answers is then 1.0.
    """
    correct = _squad_2_answers(answers) if no_answer else answers
    return max((_token_f1(predicted, answer, no_answer) for answer in correct), default=0.0)


def _squad_2_answers(answers: Sequence[str]) -> Sequence[str]:
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
