"""A fine-tuned teacher's outputs on a task's training set: predictions from which a student learns.

    train.predictions.parquet    split, row, output (list<float32>: a row's logits, one axis after the other)
    train.json                   key: what the numbers depend on; predictions: the digest of the file

One row is one of the model's inputs; a question of SQuAD has one for each of its windows. The JSON file is
written last and marks the outputs as complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from evaluation.finetuning.jobs import Job, Lesson
from evaluation.kinds.registry import kind_of
from evaluation.models import Candidate, load_model, load_tokenizer
from evaluation.tasks.task import Split, Task
from infra import console
from infra.errors import UserError
from infra.files import storage

if TYPE_CHECKING:
    from evaluation.finetuning.training import Encoded

BATCH_SIZE = 64
AGAIN = "run the same command again to store it again"


def store_outputs(job: Job, train: Split) -> None:
    """Store what ``job`` learns from beside the labels; what is stored already is not run again.

    Raises UserError if an output is not finite.
    """
    lesson, task = job.lesson, job.task
    assert lesson is not None
    tokenizer = load_tokenizer(lesson.model)
    data = kind_of(task).encode(tokenizer, task, train, job.setting.max_length)
    key = _key(task, train, data, lesson, job.settings.dtype)
    if _is_stored(lesson, key):
        return
    with console.progress(len(data), "rows", f"teacher's outputs for {task.name}") as shown:
        rows = _predict(job, lesson, data, tokenizer.pad_token_id)
        shown.advance(len(data))
    if not all(np.isfinite(row).all() for row in rows):
        raise UserError(
            f"{lesson.outputs}: the teacher's outputs are not finite; lower evaluation.learning_rate"
        )
    columns = {
        "split": pa.array(["train"] * len(rows)),
        "row": pa.array(range(len(rows)), pa.int64()),
        "output": pa.array([row.ravel() for row in rows], pa.list_(pa.float32())),
    }
    with storage.publishing(_table(lesson)) as draft:
        parquet.write_table(pa.table(columns), draft)
        digest = storage.digest_file(draft)
    storage.publish_json(_mark(lesson), {"key": key, "predictions": digest})


def _predict(job: Job, lesson: Lesson, data: Encoded, pad_id: int) -> list[np.ndarray]:
    """Logits of every row, without its padding."""
    from evaluation.finetuning import finetune, training

    kind = kind_of(job.task)
    model = load_model(Candidate("teacher", lesson.model), job.task, seed=0).to(finetune.device())
    found = training.predict(model, data, BATCH_SIZE, job.settings.dtype, pad_id, kind.select_outputs)
    shapes = _shapes(job.task, data)
    return [row[tuple(map(slice, shape))] for row, shape in zip(found, shapes, strict=True)]


def read_outputs(task: Task, train: Split, data: Encoded, lesson: Lesson, dtype: str) -> np.ndarray:
    """float32 [rows, ...], 0 in the padding. UserError: missing, damaged, or outputs of something else."""
    path = _table(lesson)
    if not _is_stored(lesson, _key(task, train, data, lesson, dtype)):
        raise UserError(f"{path}: is missing, damaged, or of another teacher or other rows; {AGAIN}")
    table = parquet.read_table(pa.BufferReader(storage.read_bytes(path)))
    column = table["output"].combine_chunks()
    values = column.flatten().to_numpy()
    shapes = _shapes(task, data)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    found = np.zeros((len(shapes), *np.max(shapes, axis=0)), np.float32)
    for row, (shape, (start, end)) in enumerate(zip(shapes, itertools.pairwise([0, *ends]), strict=True)):
        found[row][tuple(map(slice, shape))] = values[start:end].reshape(shape)
    return found


def _shapes(task: Task, data: Encoded) -> Sequence[tuple[int, ...]]:
    return [kind_of(task).output_shape(task, int(length)) for length in data.lengths()]


def _key(task: Task, train: Split, data: Encoded, lesson: Lesson, dtype: str) -> dict[str, Any]:
    """What the outputs depend on; where they belong to tokens, the tokens too."""
    tokens = repr((data.input_ids, data.token_type_ids)).encode() if kind_of(task).per_token else b""
    return {
        "task": task.name,
        "teacher": lesson.digest,
        "data": train.digest(),
        "tokens": storage.digest_bytes(tokens),
        "rows": len(data),
        "dtype": dtype,
    }


def _is_stored(lesson: Lesson, key: dict[str, Any]) -> bool:
    """Whether the outputs with this key are there and whole."""
    if not storage.exists(_mark(lesson)) or not storage.exists(_table(lesson)):
        return False
    try:
        content = storage.read_json(_mark(lesson))
    except UserError:  # damaged
        return False
    return content == {"key": key, "predictions": storage.digest_file(_table(lesson))}


def _table(lesson: Lesson) -> str:
    return f"{lesson.outputs}.predictions.parquet"


def _mark(lesson: Lesson) -> str:
    return f"{lesson.outputs}.json"
