"""Converts a task's hub rows to the form of its official files, so that both pass the same checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.tasks.answer_spans import Question
from evaluation.tasks.examples import questions_in
from evaluation.tasks.row_files import Rows
from infra.errors import UserError


def questions(rows: Any, where: str) -> list[Question]:
    """Returns the questions of a hub dataset in SQuAD's form. Raises UserError for a missing column.

    ``where``: what error messages call the dataset.
    """
    names = ("id", "question", "context", "answers")
    _require_columns(rows, names, where)
    columns = {name: list(rows[name]) for name in names}
    return questions_in(Rows(where, columns, range(1, len(rows) + 1), "row"), ("question", "context"), "id")


def table(rows: Any, texts: Sequence[str], column: str, where: str, labels: Sequence[str] = ()) -> Rows:
    """Returns the columns ``texts`` and ``column``, which holds labels or ids.

    A class id in ``column`` is replaced by its label among the task's ``labels``. Raises UserError for a
    missing column, and for a text that is not a string.
    """
    _require_columns(rows, (*texts, column), where)
    columns = {name: list(rows[name]) for name in texts}
    columns[column] = _label_names(list(rows[column]), labels, getattr(rows.features[column], "names", None))
    converted = Rows(where, columns, range(1, len(columns[column]) + 1), "row")
    for name in texts:
        converted.texts(name)
    return converted


def _require_columns(rows: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise UserError(f"{where}: no column {name!r} among {', '.join(rows.column_names)}")


def _label_names(values: list[Any], labels: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Replaces class ids by labels.

    An id is an index of the dataset's ``names`` of classes if these are the task's ``labels`` in any order,
    else an index of ``labels``.
    """
    known = names if names is not None and sorted(names) == sorted(labels) else labels
    label_of = dict(enumerate(known))
    return [label_of.get(value, str(value)) if isinstance(value, int) else str(value) for value in values]
