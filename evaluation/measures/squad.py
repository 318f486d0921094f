"""SQuAD's metrics of one question, as fractions: exact match and token F1 of normalised answers.

The best value over the annotators' answers counts (arXiv 1606.05250, section 6.1). SQuAD 2.0
(arXiv 1806.03822) also has questions without an answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

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
