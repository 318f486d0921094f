"""Loads the splits of a task from official files, from the hub, or from a user's own data.

The splits of a built-in task come from official files if ``evaluation.data`` names a directory, else from the
hub. If the number of rows is not the official one, the split gets a note; it is no error, because a task may
be evaluated on a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.sources.own import load_own, own_location
from evaluation.tasks import hub_conversion, official
from evaluation.tasks.answer_spans import Question, align_answers, read_questions
from evaluation.tasks.row_files import Rows, hub_url, load_hub
from evaluation.tasks.task import Split, Task
from infra.errors import UserError


def load(task: Task, part: str, data: str | None) -> Split:
    """Returns one split, from the directory ``data`` of official files, or from the hub if it is None.

    The examples of a user's own task come from the files or the hub dataset that its settings name. The
    split's notes list what was left out or corrected. Raises UserError for a missing or empty file and, with
    the line, for a wrong number of columns, a wrong label, or a label that contradicts the rest of its row.
    """
    if task.own is not None:
        split = load_own(task, part)
    else:
        split = _from_files(task, part, data) if data is not None else _from_hub(task, part)
    official_rows = task.parts[part].rows
    if len(split) == 0:
        raise UserError(f"{task.name} {part}: {task.parts[part].file} has no rows")
    empty = [row for row, texts in enumerate(split.texts) if not all(text.strip() for text in texts)]
    if empty and len(empty) == len(split.texts):
        raise UserError(f"{task.name} {part}: every row has an empty text; give another file or column")
    if empty:
        split.notes.append(f"rows with an empty text: {len(empty):,} (first: row {empty[0] + 1})")
    if official_rows is not None and len(split) != official_rows:
        split.notes.append(f"{len(split):,} rows, the official set has {official_rows:,}")
    split.notes[:] = [f"{task.name} {part}: {note}" for note in split.notes]
    return split


def has_part(task: Task, part: str, data: str | None) -> bool:
    """Returns whether a split can be loaded: whether its official file exists, or always from the hub."""
    if task.own is not None:
        return part in task.parts
    source = task.parts[part]
    return data is None or official.find(source.folder or task.name, source.file, data) is not None


def location_of(task: Task, part: str, data: str | None) -> str:
    """Returns where ``load`` finds a split: a path, a URL, or ``hf://datasets/`` and the hub's name."""
    if task.own is not None:
        return own_location(task.own, part)
    if data is None:
        return hub_url(task.hub[0], None if task.settings is None else task.settings.revision)
    return official.require_file(task.parts[part].folder or task.name, task.parts[part].file, data)


def _from_files(task: Task, part: str, data: str) -> Split:
    path = official.require_file(task.parts[part].folder or task.name, task.parts[part].file, data)
    if task.kind == "spans":
        return _with_questions(read_questions(path, task.no_answer), path, task.no_answer)
    if task.name == "IMDb":
        texts, ids = official.read_reviews(path, task.labels)
        return Split(texts, np.asarray(ids, dtype=np.int64))
    is_test = task.parts[part].submission is not None
    rows, skipped = official.read_tsv(path, () if is_test else task.headerless, task.skip_short_rows)
    names = [name.lower() for name in task.texts]
    if is_test:
        return Split(_columns(rows, names), None, index=next(iter(rows.columns.values())))
    if task.check_labels is not None:
        task.check_labels(rows)
    split = _labelled(task, rows, names, task.label.lower())
    if skipped:
        split.notes.append(f"{skipped} rows with too few columns left out")
    return split


def _with_questions(questions: Sequence[Question], where: str, no_answer: bool) -> Split:
    kept, notes = align_answers(questions, where, no_answer)
    return Split([], None, questions=kept, notes=notes)


def _labelled(task: Task, rows: Rows, texts: Sequence[str], label: str) -> Split:
    """Returns the examples. Raises UserError for a label that the task does not have."""
    columns = _columns(rows, texts)
    if task.kind == "regression":
        low, high = map(float, task.labels)
        labels = np.asarray(official.numbers(rows, label, low, high), dtype=np.float32)
    else:
        labels = np.asarray(official.classes(rows, label, task.labels), dtype=np.int64)
    return Split(columns, labels)


def _columns(rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns one tuple of texts per row."""
    return list(zip(*(rows.column(name) for name in names), strict=True))


def _from_hub(task: Task, part: str) -> Split:
    name, revision = "/".join(task.hub), None if task.settings is None else task.settings.revision
    config = task.parts[part].config
    source = (task.hub[0], config) if config else task.hub
    rows = load_hub(task.name, source, task.parts[part].hub, revision)
    where = f"{name} {task.parts[part].hub}"
    if task.kind == "spans":
        return _with_questions(hub_conversion.questions(rows, where), where, task.no_answer)
    texts = task.hub_texts or task.texts
    if task.parts[part].submission is not None:
        table = hub_conversion.table(rows, texts, "idx", where)
        return Split(_columns(table, texts), None, index=table.column("idx"))
    labels = task.labels if task.kind == "classification" else ()
    table = hub_conversion.table(rows, texts, task.hub_label, where, labels)
    split = _labelled(task, table, texts, task.hub_label)
    if task.name == "IMDb":
        split.texts[:] = [(official.without_markup(text),) for (text,) in split.texts]
    return split
