"""``verify --rerun``: computes some tasks again with the live teacher and compares them with the store.

In the environment that a task's index records, every byte must be the same. In another environment, columns
of the text must be the same bytes, and columns of the teacher may differ by ``TOLERANCE`` times a scale:

* logits, and logsumexp times T: the scale is the largest |logit| of the position, but at least 1;
* hidden states and embeddings: the scale is the norm of the vector.

One step of the stored number format is added to the tolerance, because rounding may go either way.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from infra.console import progress
from infra.settings.recipe import Recipe
from infra.trees import difference
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import hidden_values
from offline_teacher.store.schema import Columns, Layout
from offline_teacher.store.store import Store
from offline_teacher.store.writer import refuse_different_spec
from offline_teacher.verification.verify_task import Finding

Difference = tuple[str, int, str]
"""Column, first row that differs, problem."""
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Dtype of the teacher -> largest relative difference between two environments."""
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 1 / 127, "none": 0.0}
"""Stored number format -> its step, relative to the largest number."""


def rerun(store: Store, recipe: Recipe, count: int) -> Iterator[Finding]:
    """Computes ``count`` random tasks (or all, if there are fewer) again and yields what differs. Raises
    UserError if the recipe or its teacher is not that of the store."""
    import torch

    from offline_teacher.cluster.task_work import TaskWorker
    from offline_teacher.inputs.source import find_source, spec_with

    source, recipe = find_source(recipe)
    spec = spec_with(recipe, source, store.fingerprint["corpus"])
    refuse_different_spec(store.root, spec, "give the recipe that the store was made of (--recipe)")
    assert recipe.teacher is not None
    device = "cuda" if recipe.teacher.gpus_per_worker and torch.cuda.is_available() else "cpu"
    worker = TaskWorker(recipe, device, store.root)
    own = worker.environment()
    columns = list(store.layout.data_columns())
    readers = {split: BlockReader(store, split, columns) for split in store.splits}
    differences: dict[str, set[str]] = {}
    tasks = store.tasks()
    chosen = [tasks[n] for n in sorted(random.sample(range(len(tasks)), min(count, len(tasks))))]
    with progress(len(chosen), "tasks", "rerun") as shown:
        for split, task in chosen:
            pieces = list(worker.columns(split, task))
            computed = {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}
            stored = readers[split].task_rows(task, np.arange(task.samples))
            recorded = store.task_index(split, task.number).environment
            changes = difference(recorded, own)
            if changes:
                differences.setdefault("; ".join(changes), set()).add(task.name)
                problems = compare_numbers(store.layout, stored, computed, str(recorded.get("dtype")))
            else:
                problems = compare_bytes(stored, computed)
            for column, row, problem in problems:
                where = f"sample {row} of the task (sequence {task.sequence_ids()[row]})"
                yield Finding.of_task(split, task, column, f"{where}: {problem}")
            shown.advance()
    same = len(chosen) - sum(map(len, differences.values()))
    print(f"rerun: {same} of {len(chosen)} tasks compared byte for byte")
    for changed, names in differences.items():
        print(f"rerun: {len(names)} compared within the tolerance of another environment ({changed})")


def compare_bytes(stored: Columns, computed: Columns) -> Iterator[Difference]:
    """Yields each column that differs in any byte."""
    for name, values in stored.items():
        differs = (_bytes_by_row(values) != _bytes_by_row(computed[name])).any(axis=1)
        if differs.any():
            problem = f"the teacher now gives other numbers in the same environment ({differs.sum()} samples)"
            yield name, int(differs.argmax()), problem


def compare_numbers(layout: Layout, stored: Columns, computed: Columns, dtype: str) -> Iterator[Difference]:
    """Like ``compare_bytes``, but columns of the teacher may differ by the tolerance for ``dtype``."""
    limit = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    errors = _teacher_errors(layout, stored, computed)
    text = [name for name in layout.data_columns() if name not in errors]
    yield from compare_bytes({name: stored[name] for name in text}, computed)
    for name, error in errors.items():
        allowed = limit + STEP[layout.hidden_states if name == "hidden_states" else "float16"]
        worst = error.reshape(len(error), -1).max(axis=1)
        if not (worst <= allowed).all():
            row = int((~(worst <= allowed)).argmax())
            problem = f"the teacher now gives numbers off by {worst[row]:.2g}, allowed is {allowed:.2g}"
            yield name, row, problem


def _teacher_errors(layout: Layout, stored: Columns, computed: Columns) -> dict[str, np.ndarray]:
    """Returns the relative error [n, ...] of each column of the teacher."""
    errors: dict[str, np.ndarray] = {}
    if layout.positions == "pooled":
        embedding, other = (c["embedding"].astype(np.float32) for c in (stored, computed))
        errors["embedding"] = _relative_error(embedding, other)
    if layout.hidden_states != "none":
        hidden, other = (hidden_values(layout, c) for c in (stored, computed))
        errors["hidden_states"] = _relative_error(hidden, other)
        if layout.hidden_states == "int8":
            errors["hidden_scale"] = np.zeros(len(hidden))  # that of the hidden states includes it
    if layout.top_k:
        logits, other = (c["topk_logits"].astype(np.float32) for c in (stored, computed))
        largest = np.maximum(np.abs(logits).max(axis=-1), 1.0)
        errors["topk_logits"] = np.abs(logits - other).max(axis=-1) / largest
        sums = np.abs(stored["logsumexp"] - computed["logsumexp"]) * np.array(layout.temperatures, np.float32)
        errors["logsumexp"] = sums.max(axis=-1) / largest
        errors["topk_ids"] = _change_of_logits(layout, stored, computed) / largest
    return errors


def _relative_error(stored: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """Returns |stored - computed| / |stored| over the last axis; |computed| if |stored| is 0."""
    norm = np.linalg.norm(stored, axis=-1)
    error: np.ndarray = np.linalg.norm(stored - computed, axis=-1) / np.where(norm > 0, norm, 1.0)
    return error


def _change_of_logits(layout: Layout, stored: Columns, computed: Columns) -> np.ndarray:
    """Returns [n, P]: the largest change of the logit of any id in the stored top k.

    An id that is not in the computed top k has at most the smallest logit there, which is used instead.
    """
    ids, new_ids = (c["topk_ids"].reshape(-1, layout.top_k).astype(np.int64) for c in (stored, computed))
    logits, new = (c["topk_logits"].reshape(-1, layout.top_k).astype(np.float32) for c in (stored, computed))
    row = np.arange(len(ids))[:, None] * layout.vocab_size
    order = np.argsort(new_ids, axis=1)
    keys = (np.take_along_axis(new_ids, order, axis=1) + row).ravel()  # ascending over all positions
    values = np.take_along_axis(new, order, axis=1).ravel()
    index = np.minimum(np.searchsorted(keys, (ids + row).ravel()), len(keys) - 1)
    present = (keys[index] == (ids + row).ravel()).reshape(ids.shape)
    now = np.where(present, values[index].reshape(ids.shape), np.minimum(new[:, -1:], logits))
    error: np.ndarray = np.abs(np.where(present, logits - now, np.maximum(logits - new[:, -1:], 0)))
    return error.max(axis=1).reshape(stored["topk_ids"].shape[:2])


def _bytes_by_row(column: np.ndarray) -> np.ndarray:
    """Views the column as bytes, uint8 [n, ...], so that -0 and 0 differ and a NaN equals itself."""
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)
