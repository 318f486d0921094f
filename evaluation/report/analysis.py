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
from evaluation.finetuning.scores import Plan
from evaluation.measures import calibration, comparison, predictions
from evaluation.measures.metrics import answer_f1, normalise_answer
from evaluation.measures.predictions import Answers, Predictions
from evaluation.tasks.task import Split, Task

SHOWN = 5
"""Disagreements of one model and task in the report."""
LONGEST = 300
"""Characters of an example's text in the report."""
MOST_LABELS = 40
"""A task with more has no confusion matrix in the report."""

Seeds = dict[int, Predictions]
"""Seed -> predictions."""


def analyse(
    plan: Plan, teacher: str, students: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """``details.<row>.<task>`` and ``disagreements.<student>.<task>`` of report.json."""
    seeds = _read(plan)
    results = {
        key: [plan.results[job] or {} for job in plan.chosen if (job.candidate.name, job.task_name) == key]
        for key in seeds
    }
    tasks = {job.task_name: job.task for job in plan.chosen}
    details: dict[str, dict[str, Any]] = {}
    different: dict[str, dict[str, Any]] = {}
    for (name, task_name), found in seeds.items():
        task, reference = tasks[task_name], seeds.get((teacher, task_name))
        middle = found[median_seed(results[name, task_name])]
        row = details.setdefault(name, {})[task_name] = of_labels(task, found, middle)
        row["agreement"] = None if reference is None else _agreement(task, found, reference)
        if name in students and reference is not None:
            expert = reference[median_seed(results[teacher, task_name])]
            different.setdefault(name, {})[task_name] = disagreements(
                task, plan.splits[task_name], middle, expert
            )
    return details, different


def _read(plan: Plan) -> dict[tuple[str, str], Seeds]:
    found: dict[tuple[str, str], Seeds] = {}
    for job in plan.chosen:
        result = plan.results[job]
        assert result is not None
        read = predictions.read(job.predictions_path, job.task, result["predictions"])
        found.setdefault((job.candidate.name, job.task_name), {})[job.seed] = read
    return found


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
    return float(np.median([comparison.agreement(*pair) for pair in pairs])) if pairs else None


def of_labels(task: Task, found: Seeds, middle: Predictions) -> dict[str, Any]:
    """Calibration, scores of each label and confusion of a classification; {} for other kinds."""
    if task.kind != "classification":
        return {}
    answers = [joined(parts) for parts in found.values()]
    pairs = [(calibration.softmax(one.outputs), np.asarray(one.labels)) for one in answers]
    classes = len(task.labels)
    scores = [
        comparison.label_scores(comparison.confusion(one.argmax(axis=1), labels, classes))
        for one, labels in pairs
    ]
    medians = {name: np.median([one[name] for one in scores], axis=0) for name in scores[0]}
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
        row["confusion"] = comparison.confusion(shown.argmax(axis=1), labels, classes).tolist()
    return row


def disagreements(
    task: Task, splits: Mapping[str, Split], student: Predictions, teacher: Predictions
) -> list[dict[str, Any]]:
    """The ``SHOWN`` examples on which student and teacher are furthest apart, the furthest first."""
    rows: list[dict[str, Any]] = []
    for part, answers in student.items():
        apart = distance(task, answers, teacher[part])
        for place in comparison.worst(apart, SHOWN):
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
