"""``verify --rerun``: computes some tasks again with the live teacher and compares them with the store.

Within the environment that a task's index records, every byte must be the same. In another one the text, its
masks and its numbers must be the same bytes, and the teacher's numbers must agree within ``TOLERANCE``:

* a logit of a token, the j-th largest logit, and a logsumexp (times T) may move by TOLERANCE of the largest
  logit of their position, or of 1 where that is less: the j-th largest of V numbers moves no further than
  they do;
* a hidden state or an embedding may be off by TOLERANCE of its own length;
* each on top of a step of the format in which it is stored, across which rounding may fall either way.

Measured for an encoder of 6 layers on AVX-512 against AVX2: hidden states by 2.2e-2 and logits by 1.4e-2 in
bfloat16; in float32 by less than the step of float16.
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
from offline_teacher.store.numbering import Task
from offline_teacher.store.paths import SHARDS
from offline_teacher.store.reader import Store
from offline_teacher.store.schema import Columns, Layout
from offline_teacher.store.writer import refuse_other
from offline_teacher.verification.verify_task import Finding

TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""By the teacher's dtype."""
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 1 / 127, "none": 0.0}
"""Of a stored format, relative to the largest number."""


def rerun(store: Store, recipe: Recipe, count: int) -> Iterator[Finding]:
    """Up to ``count`` random tasks. UserError where the recipe or its teacher is not the store's."""
    from offline_teacher.cluster.task_work import TaskWorker
    from offline_teacher.source import find_source, spec_with

    source, recipe = find_source(recipe)
    spec = spec_with(recipe, source, store.fingerprint["corpus"])
    refuse_other(store.root, spec, "give the recipe that the store was made of (--recipe)")
    worker = TaskWorker(recipe, _device(recipe), store.root)
    own = worker.environment()
    columns = list(store.layout.data_columns())
    readers = {split: BlockReader(store, split, columns) for split in store.splits}
    differences: dict[str, set[str]] = {}
    tasks = store.tasks()
    chosen = [tasks[n] for n in sorted(random.sample(range(len(tasks)), min(count, len(tasks))))]
    with progress(len(chosen), "tasks", "rerun") as shown:
        for split, task in chosen:
            pieces = list(worker.columns(split, task))
            made = {name: np.concatenate([piece[name] for piece in pieces]) for name in columns}
            stored = readers[split].task_rows(task, np.arange(task.samples))
            recorded = store.task_index(split, task.number).environment
            other = difference(recorded, own)
            if other:
                differences.setdefault("; ".join(other), set()).add(task.name)
                found = compare_numbers(store.layout, stored, made, str(recorded.get("dtype")))
            else:
                found = compare_bytes(stored, made)
            for column, row, what in found:
                yield _finding(split, task, column, row, what)
            shown.advance()
    same = len(chosen) - sum(map(len, differences.values()))
    print(f"rerun: {same} of {len(chosen)} tasks compared byte for byte")
    for words, names in differences.items():
        print(f"rerun: {len(names)} compared within the tolerance of another environment ({words})")


def compare_bytes(stored: Columns, made: Columns) -> Iterator[tuple[str, int, str]]:
    """(column, first row that differs, in what way), a column each."""
    for name, values in stored.items():
        differs = (_bytes_by_row(values) != _bytes_by_row(made[name])).any(axis=1)
        if differs.any():
            what = f"the teacher now gives other numbers in the same environment ({differs.sum()} samples)"
            yield name, int(differs.argmax()), what


def compare_numbers(
    layout: Layout, stored: Columns, made: Columns, dtype: str
) -> Iterator[tuple[str, int, str]]:
    """The same for numbers of two environments: text byte for byte, the teacher's within ``TOLERANCE``."""
    limit = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    text = [name for name in layout.data_columns() if name not in _teacher_errors(layout, stored, made)]
    yield from compare_bytes({name: stored[name] for name in text}, made)
    for name, error in _teacher_errors(layout, stored, made).items():
        allowed = limit + STEP[layout.hidden_states if name == "hidden_states" else "float16"]
        worst = error.reshape(len(error), -1).max(axis=1)
        if not (worst <= allowed).all():
            row = int((~(worst <= allowed)).argmax())
            yield (
                name,
                row,
                f"the teacher now gives numbers off by {worst[row]:.2g}, allowed is {allowed:.2g}",
            )


def _teacher_errors(layout: Layout, stored: Columns, made: Columns) -> dict[str, np.ndarray]:
    """Relative error [n, ...] of each column of the teacher's; of what has no scale of its own, 0."""
    errors: dict[str, np.ndarray] = {}
    if layout.positions == "pooled":
        errors["embedding"] = _relative(
            stored["embedding"].astype(np.float32), made["embedding"].astype(np.float32)
        )
    if layout.hidden_states != "none":
        errors["hidden_states"] = _relative(hidden_values(layout, stored), hidden_values(layout, made))
        if layout.hidden_states == "int8":
            errors["hidden_scale"] = np.zeros(len(stored["hidden_scale"]))
    if layout.top_k:
        logits, others = (c["topk_logits"].astype(np.float32) for c in (stored, made))
        largest = np.maximum(np.abs(logits).max(axis=-1), 1.0)
        errors["topk_logits"] = np.abs(logits - others).max(axis=-1) / largest
        sums = np.abs(stored["logsumexp"] - made["logsumexp"]) * np.array(layout.temperatures, np.float32)
        errors["logsumexp"] = sums.max(axis=-1) / largest
        errors["topk_ids"] = _displaced(layout, stored, made) / largest
    return errors


def _relative(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|one - other| / |one| over the last axis; 0 where both are 0."""
    size = np.linalg.norm(one, axis=-1)
    error: np.ndarray = np.linalg.norm(one - other, axis=-1) / np.where(size > 0, size, 1.0)
    return error


def _displaced(layout: Layout, stored: Columns, made: Columns) -> np.ndarray:
    """[n, P]: the largest change of a stored id's logit; for an id no longer in the top k, the change to its
    smallest logit."""
    ids, others = (c["topk_ids"].reshape(-1, layout.top_k).astype(np.int64) for c in (stored, made))
    logits, moved = (c["topk_logits"].reshape(-1, layout.top_k).astype(np.float32) for c in (stored, made))
    row = np.arange(len(ids))[:, None] * layout.vocab_size
    order = np.argsort(others, axis=1)
    keys = (np.take_along_axis(others, order, axis=1) + row).ravel()
    values = np.take_along_axis(moved, order, axis=1).ravel()
    place = np.minimum(np.searchsorted(keys, (ids + row).ravel()), len(keys) - 1)
    there = (keys[place] == (ids + row).ravel()).reshape(ids.shape)
    now = np.where(there, values[place].reshape(ids.shape), np.minimum(moved[:, -1:], logits))
    error: np.ndarray = np.abs(np.where(there, logits - now, np.maximum(logits - moved[:, -1:], 0)))
    return error.max(axis=1).reshape(stored["topk_ids"].shape[:2])


def _finding(split: str, task: Task, column: str, row: int, what: str) -> Finding:
    where = f"sample {row} of the task (sequence {task.sequence_ids()[row]})"
    return Finding(f"{SHARDS}/{split}/{task.name}", f"{where}: {what}", split, task.name, column)


def _device(recipe: Recipe) -> str:
    import torch

    assert recipe.teacher is not None
    return "cuda" if recipe.teacher.gpus_per_worker and torch.cuda.is_available() else "cpu"


def _bytes_by_row(column: np.ndarray) -> np.ndarray:
    """The bytes as uint8 [n, ...], so that -0 and 0 differ and a NaN equals itself."""
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)
