"""Writes and reads the predictions of a fine-tuned model, from which all its scores are computed.

docs/evaluation.md lists the columns of such a file, and the labels and outputs of every kind of task.

``decide`` turns outputs into decisions: class ids, 0 or 1 for each class, numbers, class ids of words, texts,
or ids of documents. ``score`` returns a task's metrics, and ``resampled_score`` its score on resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from evaluation.kinds.registry import kind_of
from evaluation.measures import intervals
from evaluation.measures.model_outputs import Answers, Predictions
from evaluation.tasks.task import Task
from infra.errors import UserError
from infra.files import storage

__all__ = ["Answers", "Predictions"]


def publish(path: str, task: Task, predictions: Predictions) -> str:
    """Writes the file atomically and returns its digest. Raises UserError if an output is not finite."""
    kind = kind_of(task)
    if not all(kind.all_finite(answers.outputs) for answers in predictions.values()):
        raise UserError(f"{path}: the model's outputs are not finite; lower evaluation.learning_rate")
    text = pa.string()
    schema = pa.schema({"split": text, "example": text, "label": kind.label_type, "output": kind.output_type})
    tables = []
    for part, answers in predictions.items():
        labels = [None] * len(answers) if answers.labels is None else kind.to_arrow(answers.labels)
        columns = [[part] * len(answers), list(answers.ids), labels, kind.to_arrow(answers.outputs)]
        tables.append(pa.table(columns, schema=schema))
    with storage.publishing(path) as draft:
        parquet.write_table(pa.concat_tables(tables), draft)
        return storage.digest_file(draft)


def read(path: str, task: Task, digest: str, parts: list[str] | None = None) -> Predictions:
    """Returns predictions of the scored splits, or of ``parts``; raises UserError if ``digest`` differs."""
    kind = kind_of(task)
    data = storage.read_bytes(path)
    if storage.digest_bytes(data) != digest:
        raise UserError(f"{path}: these predictions are damaged; run the same command again")
    table = parquet.read_table(pa.BufferReader(data))
    predictions = {}
    for part in task.scored_parts if parts is None else parts:
        rows = table.filter(compute.equal(table["split"], part))
        labels = rows["label"]
        predictions[part] = Answers(
            None if labels.null_count else kind.labels_from_arrow(labels.to_pylist()),
            kind.outputs_from_arrow(rows["output"].to_pylist()),
            [str(example) for example in rows["example"].to_pylist()],
        )
    return predictions


def decide(task: Task, answers: Answers) -> Any:
    """Returns the decisions, for example class ids, int64 [n]; the module's docstring lists them by kind."""
    return kind_of(task).decide(answers.outputs)


def score(task: Task, predictions: Predictions) -> dict[str, float]:
    """Returns the task's metrics by name; names get the split's suffix if there are two splits (MNLI)."""
    return {
        name + task.suffix(part): value
        for part, answers in predictions.items()
        for name, value in score_split(task, answers).items()
    }


def score_split(task: Task, answers: Answers) -> dict[str, float]:
    """Returns the task's metrics on one labelled split, as fractions."""
    return kind_of(task).score(task, answers)


def task_score(task: Task, metrics: dict[str, float]) -> float:
    """Returns the score of a task: the mean of its main metrics. metrics: those that ``score`` returns."""
    return float(np.mean([metrics[key] for key in task.keys_of(task.main_metrics)]))


def resampled_score(task: Task, predictions: Predictions) -> intervals.Scorer:
    """Returns the function that computes the task's score on resamples of the examples."""
    metrics = [
        (part, metric)
        for part, answers in predictions.items()
        for name, metric in kind_of(task).weighted_metrics(task, answers).items()
        if name in task.main_metrics
    ]
    return lambda weights: np.mean([metric(weights[part]) for part, metric in metrics], axis=0)
