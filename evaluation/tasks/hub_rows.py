"""Converts hub rows of a task to the form of its official files, so that both pass the same checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.tasks.rows import Rows
from evaluation.tasks.squad import Question
from infra.errors import UserError


def questions(rows: Any, where: str) -> list[Question]:
    """Of a data set in SQuAD's form; UserError, naming ``where``, for one without its columns."""
    _require_columns(rows, ("id", "question", "context", "answers"), where)
    return [
        Question(
            row["id"],
            row["question"],
            row["context"],
            tuple(row["answers"]["text"]),
            tuple(row["answers"]["answer_start"]),
        )
        for row in rows
    ]


def table(rows: Any, texts: Sequence[str], other: str, where: str, labels: Sequence[str] = ()) -> Rows:
    """The columns ``texts`` and one ``other``, whose class ids are replaced by the ``labels`` they stand for.

    Raises UserError for a missing column, and for a text that is not a string.
    """
    _require_columns(rows, (*texts, other), where)
    columns = {name: list(rows[name]) for name in texts}
    columns[other] = _written(list(rows[other]), labels, getattr(rows.features[other], "names", None))
    found = Rows(where, columns, range(1, len(columns[other]) + 1), "row")
    for name in texts:
        found.texts(name)
    return found


def _require_columns(rows: Any, names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in rows.column_names:
            raise UserError(f"{where}: no column {name!r} among {', '.join(rows.column_names)}")


def _written(values: list[Any], labels: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """A class id counts the data set's own names where they are the task's labels, else the task's labels."""
    known = names if names is not None and sorted(names) == sorted(labels) else labels
    return [
        known[value] if isinstance(value, int) and 0 <= value < len(known) else str(value) for value in values
    ]
