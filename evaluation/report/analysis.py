"""What predictions say beyond scores: agreement, calibration, scores of labels, confusion, disagreements.

Everything of one model and task is the median over its seeds, except for what is shown of single examples:
that is of the seed whose score is the median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.finetuning.jobs import median_seed
from evaluation.finetuning.scores import Plan, Seeds
from evaluation.measures import calibration, predictions
from evaluation.measures.metrics import answer_f1, normalise_answer, pearson
from evaluation.measures.predictions import Answers, Predictions
from evaluation.tasks.task import Split, Task

SHOWN = 5
"""Disagreements of one model and task in the report."""
LONGEST = 300
"""Characters of an example's text in the report."""
MOST_LABELS = 40
"""A task with more has no confusion matrix in the report."""


def analyse(
    plan: Plan, seeds: Mapping[tuple[str, str], Seeds], teacher: str, students: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """``details.<row>.<task>`` and ``disagreements.<student>.<task>`` of report.json; ``seeds``: from
    ``read_answers``."""
    results = {
        key: [plan.results[job] or {} for job in plan.chosen if (job.candidate.name, job.task_name) == key]
        for key in seeds
    }
    details: dict[str, dict[str, Any]] = {}
    different: dict[str, dict[str, Any]] = {}
    for (name, task_name), found in seeds.items():
        task, reference = plan.tasks[task_name], seeds.get((teacher, task_name))
        middle = found[median_seed(results[name, task_name])]
        row = details.setdefault(name, {})[task_name] = of_labels(task, found, middle)
        row["agreement"] = None if reference is None else _agreement(task, found, reference)
        if name in students and reference is not None:
            expert = reference[median_seed(results[teacher, task_name])]
            different.setdefault(name, {})[task_name] = disagreements(
                task, plan.splits[task_name], middle, expert
            )
    return details, different


def joined(parts: Predictions) -> Answers:
    """The answers to all scored splits of a task, one after the other."""
    found = list(parts.values())
    if len(found) == 1:
        return found[0]
    labels, outputs = ([getattr(one, name) for one in found] for name in ("labels", "outputs"))
    is_array = isinstance(outputs[0], np.ndarray)
    merge = np.concatenate if is_array else (lambda lists: [value for one in lists for value in one])
    return Answers(merge(labels), merge(outputs), [example for one in found for example in one.ids])


def comparable(task: Task, answers: Answers) -> np.ndarray:
    """Decisions as an array in which equal means the same answer; float for numbers.

    Tokens: one a word. Several labels: one a label. Retrieval: the best document.
    """
    if task.kind == "spans":
        return np.asarray([normalise_answer(text) for text in answers.outputs])
    decided = predictions.decide(task, answers)
    if task.kind == "tokens":
        return np.concatenate([np.asarray(words) for words in decided])
    if task.kind == "retrieval":
        return np.asarray([documents[0] if documents else "" for documents in decided])
    return np.asarray(decided)


def _agreement(task: Task, found: Seeds, reference: Seeds) -> float | None:
    """Median agreement of runs with the same seed; for the teacher itself, of all pairs of its seeds."""
    answers = {seed: comparable(task, joined(parts)) for seed, parts in found.items()}
    if found is reference:
        pairs = list(combinations(answers.values(), 2))
    else:
        pairs = [(answers[seed], comparable(task, joined(reference[seed]))) for seed in answers]
    return float(np.median([agreement(*pair) for pair in pairs])) if pairs else None


def of_labels(task: Task, found: Seeds, middle: Predictions) -> dict[str, Any]:
    """Calibration, scores of each label and confusion of a classification; {} for other kinds."""
    if task.kind != "classification":
        return {}
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    answers = [joined(parts) for parts in found.values()]
    pairs = [(calibration.softmax(one.outputs), np.asarray(one.labels)) for one in answers]
    classes = len(task.labels)
    scores = [
        precision_recall_fscore_support(labels, one.argmax(axis=1), labels=range(classes), zero_division=0.0)
        for one, labels in pairs
    ]
    names = ("precision", "recall", "f1", "support")
    medians = dict(zip(names, np.median(scores, axis=0), strict=True))
    shown, labels = calibration.softmax(joined(middle).outputs), np.asarray(joined(middle).labels)
    bins = calibration.reliability(shown, labels)
    row: dict[str, Any] = {
        "calibration": {
            "error": float(np.median([calibration.calibration_error(*pair) for pair in pairs])),
            "brier": float(np.median([calibration.brier(*pair) for pair in pairs])),
        },
        "reliability": [
            [int(count), float(confidence), float(accuracy)]
            for count, confidence, accuracy in zip(bins.count, bins.confidence, bins.accuracy, strict=True)
            if count
        ],
        "labels": {
            label: {name: float(values[place]) for name, values in medians.items()}
            for place, label in enumerate(task.labels)
        },
    }
    if classes <= MOST_LABELS:
        predicted = shown.argmax(axis=1)
        row["confusion"] = confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    return row


def disagreements(
    task: Task, splits: Mapping[str, Split], student: Predictions, teacher: Predictions
) -> list[dict[str, Any]]:
    """The ``SHOWN`` examples on which student and teacher are furthest apart, the furthest first."""
    rows: list[dict[str, Any]] = []
    for part, answers in student.items():
        apart = distance(task, answers, teacher[part])
        for place in worst(apart, SHOWN):
            text = splits[part].shown(place)
            rows.append(
                {
                    "split": part,
                    "example": answers.ids[place],
                    "text": text if len(text) <= LONGEST else f"{text[:LONGEST]}…",
                    "label": _said(task, answers.labels[place]),
                    "teacher": _answer(task, teacher[part], place),
                    "student": _answer(task, answers, place),
                    "distance": float(apart[place]),
                }
            )
    return sorted(rows, key=lambda row: -row["distance"])[:SHOWN]


def distance(task: Task, student: Answers, teacher: Answers) -> np.ndarray:
    """How far two models' answers are apart, float64 [n], 0 where they give the same answer.

    Classes: total variation between the probabilities. Numbers: the difference. Answer spans:
    1 - token F1. Several labels or words: the share that differs. Retrieval: the share of the best ten
    documents that only one found.
    """
    if task.kind == "spans":
        pairs = zip(student.outputs, teacher.outputs, strict=True)
        return np.asarray(
            [1 - answer_f1(ours, [theirs]) if ours != theirs else 0.0 for ours, theirs in pairs]
        )
    ours, theirs = predictions.decide(task, student), predictions.decide(task, teacher)
    if task.kind == "classification":
        first, second = calibration.softmax(student.outputs), calibration.softmax(teacher.outputs)
        return (ours != theirs) * np.abs(first - second).sum(axis=1) / 2
    if task.kind in ("regression", "similarity"):
        return np.abs(np.asarray(ours, np.float64) - theirs)
    if task.kind == "retrieval":
        return np.asarray([1 - len({*a[:10]} & {*b[:10]}) / max(1, len({*a[:10]} | {*b[:10]}))
                           for a, b in zip(ours, theirs, strict=True)])  # fmt: skip
    return np.asarray([np.mean(np.asarray(a) != np.asarray(b)) for a, b in zip(ours, theirs, strict=True)])


def _answer(task: Task, answers: Answers, place: int) -> str:
    one = Answers([answers.labels[place]], answers.outputs[place : place + 1], [answers.ids[place]])
    if task.kind == "classification":
        probabilities = calibration.softmax(one.outputs)[0]
        chosen = int(probabilities.argmax())
        return f"{task.labels[chosen]} ({100 * probabilities[chosen]:.0f} %)"
    return _said(task, one.outputs[0] if task.kind == "spans" else predictions.decide(task, one)[0])


def _said(task: Task, value: Any) -> str:
    """A gold value or a decision as text."""
    if task.kind == "classification":
        return task.labels[int(value)]
    if task.kind in ("regression", "similarity"):
        return f"{float(value):.3g}"
    if task.kind == "tokens":
        return " ".join(task.labels[int(word)] for word in value)
    if task.kind == "multilabel":
        return ", ".join(label for label, given in zip(task.labels, value, strict=True) if given) or "none"
    if task.kind == "retrieval":
        ids = [str(one["id"]) if isinstance(one, dict) else str(one) for one in value]
        return ", ".join(ids[:3]) or "none"
    if isinstance(value, str):
        return value
    return str(value[0]) if len(value) else "no answer"


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of examples to which two models give the same answer; of numbers, their Pearson correlation.

    Floating-point numbers count as numbers; everything else is compared as it is.
    """
    if np.issubdtype(first.dtype, np.floating):
        return pearson(first, second)
    return float(np.mean(first == second))


def worst(distance: np.ndarray, count: int) -> list[int]:
    """The ``count`` examples of largest distance [n], the largest first; those of distance 0 or less are left
    out."""
    order = np.argsort(-distance, kind="stable")[:count]
    return [int(place) for place in order if distance[place] > 0]
