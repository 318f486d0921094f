"""A fine-tuned model's answers, example by example: every score is computed from them.

One file a fine-tuning run, ``seed-<n>.predictions.parquet`` beside its score file; one row an example:

    split     string     dev, dev_matched, test, ...
    example   string     the example's id (``Split.ids``)
    label     by kind    the gold value; null in a test set without labels
    output    by kind    what the model answers

    kind             label                                    output
    classification   int64, class id                          list<float32>, logits [classes]
    multilabel       list<int8>, 0 or 1 for each class        list<float32>, logits [classes]; > 0: predicted
    regression       float32                                  float32
    similarity       float32                                  float32, the cosine
    tokens           list<int64>, a class id for each word    list<list<float32>>, logits [words][classes]
    spans            list<string>, all right answers;         string; empty: no answer
                     empty: the text has no answer
    retrieval        list<struct<id: string, grade: float>>   list<struct<id: string, score: float>>, the
                     of the relevant documents                best documents first, at most 100

``decide`` turns outputs into decisions: class ids, 0 and 1 for each class, numbers, class ids of words,
texts, or ids of documents. ``score`` and ``resampled_score`` give the task's metrics and their resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from evaluation.measures import intervals, resampling
from evaluation.measures.metrics import METRICS, answer_exact, answer_f1, squad_scores
from evaluation.tasks.task import Task
from infra.errors import UserError
from infra.files import storage


@dataclass(frozen=True)
class Answers:
    """A model's outputs on one split, in the order of its rows."""

    labels: Any
    """int64 [n] class ids, float32 [n] scores, or the n lists of right answers; None: a test set."""
    outputs: Any
    """float32 [n, classes] logits, float32 [n] scores, or n answers as text."""
    ids: Sequence[str] = ()
    """The examples' ids; their rows from 0 if none are given."""

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", [str(row) for row in range(len(self.outputs))])

    def __len__(self) -> int:
        return len(self.outputs)


Predictions = Mapping[str, Answers]
"""Dev set -> answers."""

_TYPES = {
    "classification": (pa.int64(), pa.list_(pa.float32())),
    "regression": (pa.float32(), pa.float32()),
    "spans": (pa.list_(pa.string()), pa.string()),
}
"""Of the columns ``label`` and ``output``."""


def publish(path: str, task: Task, predictions: Predictions) -> str:
    """Write the file, whole or not at all; its digest. UserError where an output is not finite."""
    if task.kind != "spans" and not all(np.isfinite(one.outputs).all() for one in predictions.values()):
        raise UserError(f"{path}: the model's outputs are not finite; lower evaluation.learning_rate")
    names = ("split", "example", "label", "output")
    schema = pa.schema(list(zip(names, (pa.string(), pa.string(), *_TYPES[task.kind]), strict=True)))
    tables = [
        pa.table([[part] * len(one), one.ids, list(one.labels), list(one.outputs)], schema=schema)
        for part, one in predictions.items()
    ]
    with storage.publishing(path) as draft:
        parquet.write_table(pa.concat_tables(tables), draft)
        return storage.digest_file(draft)


def read(path: str, task: Task, digest: str) -> Predictions:
    """The predictions in a file; UserError where its bytes do not have the digest."""
    data = storage.read_bytes(path)
    if storage.digest_bytes(data) != digest:
        raise UserError(
            f"{path}: these predictions are damaged; run the same command again to compute them again"
        )
    table = parquet.read_table(pa.BufferReader(data))
    found = {}
    for part in task.dev_parts:
        rows = table.filter(compute.equal(table["split"], part))
        labels, outputs = rows["label"].to_pylist(), rows["output"].to_pylist()
        if task.kind != "spans":
            labels = np.asarray(labels, np.int64 if task.kind == "classification" else np.float32)
            outputs = np.asarray(outputs, np.float32)
        found[part] = Answers(labels, outputs, rows["example"].to_pylist())
    return found


def decide(task: Task, answers: Answers) -> np.ndarray:
    """Class ids int64 [n], or scores float32 [n]."""
    return answers.outputs if task.kind == "regression" else answers.outputs.argmax(axis=1)


def score(task: Task, predictions: Predictions) -> dict[str, float]:
    """The task's metrics, named with the dev set's suffix where there are two (MNLI)."""
    return {
        name + part.removeprefix("dev"): value
        for part, answers in predictions.items()
        for name, value in score_split(task, answers).items()
    }


def score_split(task: Task, answers: Answers) -> dict[str, float]:
    """The task's metrics of one labelled split, as fractions."""
    if task.kind == "spans":
        return squad_scores(answers.outputs, answers.labels)
    predicted = decide(task, answers)
    return {name: METRICS[name](predicted, answers.labels) for name in task.metrics}


def resampled_score(task: Task, predictions: Predictions) -> intervals.Scorer:
    """The task's score, the mean of what ``score`` gives, as a function of resamples of the examples."""
    metrics = [(part, metric) for part, answers in predictions.items() for metric in _metrics(task, answers)]
    return lambda weights: np.mean([metric(weights[part]) for part, metric in metrics], axis=0)


def _metrics(task: Task, answers: Answers) -> list[partial[np.ndarray]]:
    """The task's metrics of one dev set, each a function of weights [n, R]."""
    if task.kind == "spans":
        pairs = list(zip(answers.outputs, answers.labels, strict=True))
        return [
            partial(resampling.average, np.asarray([metric(*pair) for pair in pairs]))
            for metric in (answer_exact, answer_f1)
        ]
    predicted = decide(task, answers)
    return [partial(resampling.METRICS[name], predicted, answers.labels) for name in task.metrics]
