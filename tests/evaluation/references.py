"""Scores against reference implementations on random cases.

    python -m tests.evaluation.references --cases 10000

References are scikit-learn and scipy for the metrics of GLUE and of several labels, seqeval for entities,
trec_eval (``pytrec_eval-terrier``) for rankings, torchmetrics for the calibration error, and for SQuAD the
official scripts' definitions, written again here. seqeval, pytrec_eval-terrier and torchmetrics are not among
the project's packages; without them their cases are left out.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import re
import string
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from evaluation.kinds.predictions import score_split
from evaluation.kinds.registry import kind_of
from evaluation.measures import calibration
from evaluation.measures.model_outputs import Answers
from evaluation.measures.squad import answer_exact, answer_f1
from evaluation.tasks.task import Task

Generator = np.random.Generator
TOLERANCE = 1e-9


def task_of(
    kind: Any, metrics: tuple[str, ...], labels: tuple[str, ...] = (), no_answer: bool = False
) -> Task:
    return Task(name="t", kind=kind, metrics=metrics, labels=labels, parts={}, no_answer=no_answer)


def require_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) <= TOLERANCE, (name, found[name], value)


def both(task: Task, answers: Answers) -> dict[str, float]:
    """The scores, which must also be those of resamples that hold every example once."""
    scores, weights = score_split(task, answers), np.ones((len(answers), 1))
    again = {
        name: float(metric(weights)[0])
        for name, metric in kind_of(task).weighted_metrics(task, answers).items()
    }
    for name, value in scores.items():
        assert abs(again[name] - value) < 1e-7, (name, again[name], value)
    return scores


def classes(random: Generator) -> None:
    from sklearn import metrics

    count, size = int(random.integers(2, 5)), int(random.integers(2, 40))
    labels = random.integers(0, count, size)
    outputs = random.normal(size=(size, count)).astype(np.float32)
    outputs[np.arange(size), labels] += random.choice([0, 1, 5])
    predicted = outputs.argmax(axis=1)
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(
            labels, predicted, average="macro", labels=range(count), zero_division=0
        ),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
    }
    if count == 2:
        expected["f1"] = metrics.f1_score(labels, predicted, zero_division=0)
    task = task_of("classification", tuple(expected), tuple(map(str, range(count))))
    require_equal(both(task, Answers(labels, outputs)), expected)


def several_labels(random: Generator) -> None:
    from sklearn import metrics

    size, count = int(random.integers(1, 30)), int(random.integers(2, 6))
    labels = (random.random((size, count)) < random.random()).astype(np.int8)
    outputs = (random.normal(size=(size, count)) + labels).astype(np.float32)
    predicted = outputs > 0
    expected = {
        f"{average}_f1": metrics.f1_score(labels, predicted, average=average, zero_division=0)
        for average in ("micro", "macro")
    }
    expected["exact_match"] = metrics.accuracy_score(labels, predicted)
    task = task_of("multilabel", tuple(expected), tuple(map(str, range(count))))
    require_equal(both(task, Answers(labels, outputs)), expected)


def numbers(random: Generator) -> None:
    from scipy import stats

    size = int(random.integers(3, 40))
    labels = random.integers(0, 6, size).astype(np.float32)  # with ties
    labels[0] = labels[1] + 1  # the correlation with a constant is undefined
    outputs = (labels * random.normal() + random.normal(size=size)).astype(np.float32)
    first, second = outputs.astype(np.float64), labels.astype(np.float64)
    expected = {
        "pearson": float(stats.pearsonr(first, second)[0]),
        "spearman": float(stats.spearmanr(first, second)[0]),
    }
    require_equal(both(task_of("regression", tuple(expected)), Answers(labels, outputs)), expected)


def entities(random: Generator) -> None:
    from seqeval import metrics

    labels = ("O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC")))
    lengths = random.integers(1, 12, int(random.integers(1, 6)))
    gold = [random.integers(0, len(labels), length) for length in lengths]
    outputs = []
    for row in gold:
        logits = random.normal(size=(len(row), len(labels))).astype(np.float32)
        logits[np.arange(len(row)), row] += random.choice([0, 3])
        outputs.append(logits)
    right = [[labels[tag] for tag in row] for row in gold]
    found = [[labels[tag] for tag in row.argmax(axis=1)] for row in outputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no entity
        expected = {
            f"entity_{name}": float(getattr(metrics, f"{name}_score")(right, found, zero_division=0))
            for name in ("f1", "precision", "recall")
        }
    require_equal(both(task_of("tokens", tuple(expected), labels), Answers(gold, outputs)), expected)


def rankings(random: Generator) -> None:
    import pytrec_eval

    documents = [f"d{number}" for number in range(int(random.integers(2, 150)))]
    chosen = random.choice(documents, int(random.integers(1, min(20, len(documents)) + 1)), replace=False)
    grades = {str(document): int(random.integers(0, 4)) for document in chosen}
    ranked = [str(document) for document in random.permutation(documents)][:100]
    scores = {document: float(len(ranked) - rank) for rank, document in enumerate(ranked)}
    evaluator = pytrec_eval.RelevanceEvaluator({"q": grades}, {"ndcg_cut.10", "recall.100"})
    reference = evaluator.evaluate({"q": scores})["q"]
    expected = {"ndcg_10": reference["ndcg_cut_10"], "recall_100": reference["recall_100"]}
    floats = {document: float(grade) for document, grade in grades.items()}
    answers = Answers([floats], [list(scores.items())])
    require_equal(both(task_of("retrieval", tuple(expected)), answers), expected)


def calibration_errors(random: Generator) -> None:
    """The reference computes in float32, and has bins that contain their lower edge instead of their upper
    one; random confidences are on no edge."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    size, count = int(random.integers(1, 60)), int(random.integers(2, 6))
    logits = random.normal(size=(size, count)) * random.choice([0.2, 0.5, 1.0, 1.5])
    probabilities, labels = calibration.softmax(logits), random.integers(0, count, size)
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), count, calibration.BINS, "l1"
    )
    assert abs(calibration.calibration_error(probabilities, labels) - float(expected)) < 1e-6


# --- SQuAD: the definitions of evaluate-v1.1.py and evaluate-v2.0.py ---------------------------------------


def _normal(text: str) -> str:
    lowered = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def _overlap(gold: list[str], found: list[str]) -> float:
    same = sum((collections.Counter(gold) & collections.Counter(found)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def official_1(found: str, gold: list[str]) -> tuple[float, float]:
    exact = max(float(_normal(found) == _normal(one)) for one in gold)
    return exact, max(_overlap(_normal(one).split(), _normal(found).split()) for one in gold)


def official_2(found: str, gold: list[str]) -> tuple[float, float]:
    gold = [one for one in gold if _normal(one)] or [""]

    def f1(one: str) -> float:
        right, tokens = _normal(one).split(), _normal(found).split()
        return float(right == tokens) if not right or not tokens else _overlap(right, tokens)

    return max(float(_normal(found) == _normal(one)) for one in gold), max(map(f1, gold))


_WORDS = ("the", "A", "an", "Red", "red", "car!", "car", "of", "(of", "", "Straße", "42", "theme", "a.")


def answers(random: Generator, official: Callable[..., tuple[float, float]], no_answer: bool) -> None:
    def text() -> str:
        return " ".join(random.choice(_WORDS, int(random.integers(0, 5))))

    found = text()
    gold = [text() for _ in range(int(random.integers(0 if no_answer else 1, 4)))]
    exact, f1 = official(found, gold)
    assert answer_exact(found, gold, no_answer) == exact, (found, gold)
    assert abs(answer_f1(found, gold, no_answer) - f1) < TOLERANCE, (found, gold)


CHECKS: dict[str, tuple[str | None, Callable[[Generator], None]]] = {
    "classification": (None, classes),
    "multilabel": (None, several_labels),
    "regression": (None, numbers),
    "tokens": ("seqeval", entities),
    "retrieval": ("pytrec_eval", rankings),
    "calibration error": ("torchmetrics", calibration_errors),
    "SQuAD 1.1": (None, lambda random: answers(random, official_1, no_answer=False)),
    "SQuAD 2.0": (None, lambda random: answers(random, official_2, no_answer=True)),
}
"""Name -> the package that it needs, if that is not one of the project's, and one random case."""


def is_installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    cases = parser.parse_args().cases
    warnings.filterwarnings("ignore", "A single label was found")  # scikit-learn, of constant vectors
    for name, (package, check) in CHECKS.items():
        if not is_installed(package):
            print(f"{name}: left out, {package} is not installed")
            continue
        random, started = np.random.default_rng(0), time.perf_counter()
        for _ in range(cases):
            check(random)
        print(f"{name}: {cases:,} cases equal, {time.perf_counter() - started:.1f} s")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
