"""Stores and reads a fine-tuned teacher's outputs on a task's training set, from which a student learns.

    train.predictions.parquet    columns split, row, output (list<float32>: the row's logits, flattened)
    train.json                   key: everything on which the outputs depend; predictions: digest of the
                                 Parquet file

A row is one input of the model; a question of SQuAD has one row per window. The JSON file is written last and
marks the outputs as complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from evaluation.candidates.models import Candidate, load_model, load_tokenizer, local_directory
from evaluation.finetuning.jobs import Job, SoftLabels
from evaluation.kinds.registry import kind_of
from evaluation.tasks.task import Split, Task
from infra import console
from infra.errors import UserError
from infra.files import storage

if TYPE_CHECKING:
    from evaluation.tasks.encoded import Encoded

BATCH_SIZE = 64
"""Batch size of the teacher's predictions."""


def store_outputs(job: Job, train: Split) -> None:
    """Stores the teacher's outputs that ``job`` learns from, unless they are stored already.

    ``train``: the task's training split. Raises UserError if an output is not finite.
    """
    soft_labels, task = job.soft_labels, job.task
    assert soft_labels is not None
    with local_directory(soft_labels.model) as directory:
        tokenizer = load_tokenizer(directory)
        data = kind_of(task).encode(tokenizer, task, train, job.hyper_parameters.max_length)
        key = _key(task, train, data, soft_labels, job.settings.dtype)
        if _is_stored(soft_labels, key):
            return
        with console.progress(len(data), "rows", f"teacher's outputs for {task.name}") as shown:
            rows = _predict(job, directory, data, tokenizer.pad_token_id)
            shown.advance(len(data))
    if not all(np.isfinite(row).all() for row in rows):
        problem = "the teacher's outputs are not finite; lower evaluation.learning_rate"
        raise UserError(f"{soft_labels.outputs}: {problem}")
    columns = {
        "split": pa.array(["train"] * len(rows)),
        "row": pa.array(range(len(rows)), pa.int64()),
        "output": pa.array([row.ravel() for row in rows], pa.list_(pa.float32())),
    }
    with storage.publishing(_table_path(soft_labels)) as draft:
        parquet.write_table(pa.table(columns), draft)
        digest = storage.digest_file(draft)
    storage.publish_json(_summary_path(soft_labels), {"key": key, "predictions": digest})


def _predict(job: Job, teacher: str, data: Encoded, pad_id: int) -> list[np.ndarray]:
    """Returns the logits of the model in the directory ``teacher``, one float32 array per row, without
    padding."""
    from evaluation.finetuning import finetune, training

    kind = kind_of(job.task)
    model = load_model(Candidate("teacher", teacher), job.task, seed=0).to(finetune.device())
    padded = training.predict(model, data, BATCH_SIZE, job.settings.dtype, pad_id, kind.select_outputs)
    shapes = _shapes(job.task, data)
    return [row[tuple(map(slice, shape))] for row, shape in zip(padded, shapes, strict=True)]


def read_outputs(task: Task, train: Split, data: Encoded, soft_labels: SoftLabels, dtype: str) -> np.ndarray:
    """Returns the teacher's logits float32 [rows, ...], padded with 0.

    Raises UserError if they are missing, damaged, or belong to another teacher or other rows.
    """
    path = _table_path(soft_labels)
    if not _is_stored(soft_labels, _key(task, train, data, soft_labels, dtype)):
        problem = "is missing, damaged, or of another teacher or other rows"
        raise UserError(f"{path}: {problem}; run the same command again")
    table = parquet.read_table(pa.BufferReader(storage.read_bytes(path)))
    values = table["output"].combine_chunks().flatten().to_numpy()
    shapes = _shapes(task, data)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    padded = np.zeros((len(shapes), *np.max(shapes, axis=0)), np.float32)
    for row, (shape, (start, end)) in enumerate(zip(shapes, itertools.pairwise([0, *ends]), strict=True)):
        padded[row][tuple(map(slice, shape))] = values[start:end].reshape(shape)
    return padded


def _shapes(task: Task, data: Encoded) -> Sequence[tuple[int, ...]]:
    """Returns the shape of each row's logits, without padding."""
    return [kind_of(task).output_shape(task, int(length)) for length in data.lengths()]


def _key(task: Task, train: Split, data: Encoded, soft_labels: SoftLabels, dtype: str) -> dict[str, Any]:
    """Returns everything on which the outputs depend; the token ids too, if there are outputs per token."""
    tokens = repr((data.input_ids, data.token_type_ids)).encode() if kind_of(task).per_token else b""
    return {
        "task": task.name,
        "teacher": soft_labels.digest,
        "data": train.digest(),
        "tokens": storage.digest_bytes(tokens),
        "rows": len(data),
        "dtype": dtype,
    }


def _is_stored(soft_labels: SoftLabels, key: dict[str, Any]) -> bool:
    """Returns whether outputs with this key are stored and undamaged."""
    summary, path = storage.read_object(_summary_path(soft_labels)), _table_path(soft_labels)
    if summary.get("key") != key or not storage.exists(path):
        return False
    return bool(summary.get("predictions") == storage.digest_file(path))


def _table_path(soft_labels: SoftLabels) -> str:
    return f"{soft_labels.outputs}.predictions.parquet"


def _summary_path(soft_labels: SoftLabels) -> str:
    return f"{soft_labels.outputs}.json"
