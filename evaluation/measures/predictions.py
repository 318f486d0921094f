"""A fine-tuned model's answers on the dev sets, example by example: every score is computed from them.

One file a fine-tuning run, ``seed-<n>.predictions.parquet`` beside its score file; one row an example:

    split     string                  dev, dev_matched, ...
    example   int64                   the example's row in its split as it was read, from 0
    label     int64                   class id; of a regression float32; of answer spans list<string>
    output    list<float32>           logits [classes]; of a regression float32; of answer spans string
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from evaluation.measures import intervals
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
    schema = pa.schema(list(zip(names, (pa.string(), pa.int64(), *_TYPES[task.kind]), strict=True)))
    tables = [
        pa.table([[part] * len(one), np.arange(len(one)), list(one.labels), list(one.outputs)], schema=schema)
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
        found[part] = Answers(labels, outputs)
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
            partial(intervals.average, np.asarray([metric(*pair) for pair in pairs]))
            for metric in (answer_exact, answer_f1)
        ]
    predicted = decide(task, answers)
    return [partial(intervals.METRICS[name], predicted, answers.labels) for name in task.metrics]
