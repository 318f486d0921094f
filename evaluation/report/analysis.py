"""Analyses predictions beyond their scores: agreement, calibration, labels, confusion, disagreements.

Every number of a model and task is the median over its seeds. Single examples, reliability and confusion are
those of the median run, that is, of the seed whose score is the median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.finetuning.jobs import median_seed
from evaluation.finetuning.scores import Plan, Seeds
from evaluation.kinds import predictions
from evaluation.kinds.predictions import Answers, Predictions
from evaluation.measures import calibration
from evaluation.measures.metrics import pearson
from evaluation.measures.squad import answer_f1, normalise_answer
from evaluation.tasks.task import Split, Task

MAX_EXAMPLES = 5
"""Largest number of disagreements per student and task in the report."""
MAX_CHARACTERS = 300
"""Largest number of characters of an example in the report; a longer text is cut."""
MAX_LABELS = 40
"""A task with more labels has no confusion matrix in the report."""


def analyse(
    plan: Plan, seeds: Mapping[tuple[str, str], Seeds], teacher: str, students: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns ``details.<row>.<task>`` and ``disagreements.<student>.<task>`` of report.json.

    seeds: (row, task) -> predictions of each seed, from ``read_answers``.
    """
    results = {
        key: [plan.results[job] or {} for job in plan.chosen if (job.candidate.name, job.task_name) == key]
        for key in seeds
    }
    details: dict[str, dict[str, Any]] = {}
    all_disagreements: dict[str, dict[str, Any]] = {}
    for (name, task_name), row_seeds in seeds.items():
        task, teacher_seeds = plan.tasks[task_name], seeds.get((teacher, task_name))
        median_run = row_seeds[median_seed(results[name, task_name])]
        detail = details.setdefault(name, {})[task_name] = classification_details(task, row_seeds, median_run)
        detail["agreement"] = None if teacher_seeds is None else _agreement(task, row_seeds, teacher_seeds)
        if name in students and teacher_seeds is not None:
            teacher_run = teacher_seeds[median_seed(results[teacher, task_name])]
            all_disagreements.setdefault(name, {})[task_name] = disagreements(
                task, plan.splits[task_name], median_run, teacher_run
            )
    return details, all_disagreements


def join_splits(parts: Predictions) -> Answers:
    """Returns the answers to all scored splits of a task as one, in the order of the splits."""
    splits = list(parts.values())
    if len(splits) == 1:
        return splits[0]
    labels, outputs = ([getattr(split, name) for split in splits] for name in ("labels", "outputs"))
    is_array = isinstance(outputs[0], np.ndarray)
    merge = np.concatenate if is_array else (lambda lists: [value for one in lists for value in one])
    return Answers(merge(labels), merge(outputs), [example for split in splits for example in split.ids])


def comparable(task: Task, answers: Answers) -> np.ndarray:
    """Returns the decisions as an array in which equal elements are equal answers; floats for numbers.

    There is one element per example, except for tokens (one per word) and several labels (one per example
    and label). Retrieval is represented by its best document.
    """
    if task.kind == "spans":
        return np.asarray([normalise_answer(text) for text in answers.outputs])
    decided = predictions.decide(task, answers)
    if task.kind == "tokens":
        return np.concatenate([np.asarray(class_ids) for class_ids in decided])
    if task.kind == "retrieval":
        return np.asarray([documents[0] if documents else "" for documents in decided])
    return np.asarray(decided)


def _agreement(task: Task, row_seeds: Seeds, teacher_seeds: Seeds) -> float | None:
    """Returns the median agreement of a row with the teacher, over runs with the same seed.

    For the teacher itself it is the median over all pairs of its seeds; None if there is only one.
    """
    answers = {seed: comparable(task, join_splits(parts)) for seed, parts in row_seeds.items()}
    if row_seeds is teacher_seeds:
        pairs = list(combinations(answers.values(), 2))
    else:
        pairs = [(answers[seed], comparable(task, join_splits(teacher_seeds[seed]))) for seed in answers]
    return float(np.median([agreement(*pair) for pair in pairs])) if pairs else None


def classification_details(task: Task, seeds: Seeds, median_run: Predictions) -> dict[str, Any]:
    """Returns the details of a classification from ``calibration`` to ``confusion``; {} for other kinds."""
    if task.kind != "classification":
        return {}
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    answers = [join_splits(parts) for parts in seeds.values()]
    pairs = [(calibration.softmax(one.outputs), np.asarray(one.labels)) for one in answers]
    classes = len(task.labels)
    scores = [
        precision_recall_fscore_support(labels, one.argmax(axis=1), labels=range(classes), zero_division=0.0)
        for one, labels in pairs
    ]
    names = ("precision", "recall", "f1", "support")
    medians = dict(zip(names, np.median(scores, axis=0), strict=True))
    median_answers = join_splits(median_run)
    probabilities, labels = calibration.softmax(median_answers.outputs), np.asarray(median_answers.labels)
    bins = calibration.reliability(probabilities, labels)
    details: dict[str, Any] = {
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
            label: {name: float(values[class_id]) for name, values in medians.items()}
            for class_id, label in enumerate(task.labels)
        },
    }
    if classes <= MAX_LABELS:
        predicted = probabilities.argmax(axis=1)
        details["confusion"] = confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    return details


def disagreements(
    task: Task, splits: Mapping[str, Split], student: Predictions, teacher: Predictions
) -> list[dict[str, Any]]:
    """Returns at most ``MAX_EXAMPLES`` examples with the largest ``distance`` > 0, the largest first."""
    examples: list[dict[str, Any]] = []
    for part, answers in student.items():
        distances = distance(task, answers, teacher[part])
        for row in largest(distances, MAX_EXAMPLES):
            text = splits[part].text_of(row)
            example = {
                "split": part,
                "example": answers.ids[row],
                "text": text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…",
                "label": _value_text(task, answers.labels[row]),
                "teacher": _answer_text(task, teacher[part], row),
                "student": _answer_text(task, answers, row),
                "distance": float(distances[row]),
            }
            examples.append(example)
    return sorted(examples, key=lambda example: -example["distance"])[:MAX_EXAMPLES]


def distance(task: Task, student: Answers, teacher: Answers) -> np.ndarray:
    """Returns the distance between two models' answers to each example, float64 [n]; 0 for equal answers.

    Classes: total variation distance of the probabilities. Numbers: absolute difference. Answer spans:
    1 - token F1. Several labels or tokens: share of labels or words that differ. Retrieval: 1 -
    intersection / union of the ten best documents.
    """
    if task.kind == "spans":
        pairs = zip(student.outputs, teacher.outputs, strict=True)
        return np.asarray([1 - answer_f1(text, [other]) if text != other else 0.0 for text, other in pairs])
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


def _answer_text(task: Task, answers: Answers, row: int) -> str:
    """Returns the model's answer to an example as text; of a classification with its probability."""
    one = Answers([answers.labels[row]], answers.outputs[row : row + 1], [answers.ids[row]])
    if task.kind == "classification":
        probabilities = calibration.softmax(one.outputs)[0]
        chosen = int(probabilities.argmax())
        return f"{task.labels[chosen]} ({100 * probabilities[chosen]:.0f} %)"
    return _value_text(task, one.outputs[0] if task.kind == "spans" else predictions.decide(task, one)[0])


def _value_text(task: Task, value: Any) -> str:
    """Returns a gold value or a decision as text."""
    if task.kind == "classification":
        return task.labels[int(value)]
    if task.kind in ("regression", "similarity"):
        return f"{float(value):.3g}"
    if task.kind == "tokens":
        return " ".join(task.labels[int(class_id)] for class_id in value)
    if task.kind == "multilabel":
        return ", ".join(label for label, is_set in zip(task.labels, value, strict=True) if is_set) or "none"
    if task.kind == "retrieval":
        ids = [str(one["id"]) if isinstance(one, dict) else str(one) for one in value]
        return ", ".join(ids[:3]) or "none"
    if isinstance(value, str):
        return value
    return str(value[0]) if len(value) else "no answer"


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the share of equal answers of two models; of floating-point answers, Pearson's correlation."""
    if np.issubdtype(first.dtype, np.floating):
        return pearson(first, second)
    return float(np.mean(first == second))


def largest(distances: np.ndarray, count: int) -> list[int]:
    """Returns the rows of at most ``count`` distances [n] that are above 0, the largest first."""
    order = np.argsort(-distances, kind="stable")[:count]
    return [int(row) for row in order if distances[row] > 0]
