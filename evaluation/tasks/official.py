"""Reads official task files: GLUE's tab-separated tables and IMDb's directories of reviews.

The tables are not CSV: a quote is an ordinary character, no field spans lines, and only "\\n" ends a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from evaluation.tasks.row_files import Rows, read_text
from infra.errors import UserError
from infra.files import storage

_COLLECTIONS = ("", "glue", "GLUE", "imdb", "squad")
"""Folders of ``evaluation.data`` that are searched; "" is the directory itself. Within such a folder, files
are in a folder named after the task (GLUE) or directly (IMDb, SQuAD)."""
_MNLI_LABELS = ("entailment", "neutral", "contradiction")
_WRONG_RATINGS = {"neg": range(7, 11), "pos": range(1, 5)}
"""Folder of IMDb's reviews -> ratings that contradict the folder."""


def find(task: str, file: str, data: str) -> str | None:
    """Returns the path of an official file below ``data``, or None."""
    for collection in _COLLECTIONS:
        base = storage.join(data, collection) if collection else data
        for path in (storage.join(base, task, file), storage.join(base, file)):
            # Many tasks have a train.tsv, so a .tsv counts only within a folder named after the task.
            if (path.endswith(storage.join(task, file)) or not file.endswith(".tsv")) and _exists(path):
                return path
    return None


def require_file(task: str, file: str, data: str) -> str:
    """Returns the path of an official file below ``data``; raises UserError if there is none."""
    path = find(task, file, data)
    if path is None:
        expected = f"{task}/{file}" if file.endswith(".tsv") else file
        raise UserError(f"{task}: {data} has no {expected}; name the directory of official files with --data")
    return path


def _exists(path: str) -> bool:
    return storage.exists(path) or bool(storage.list_names(path))


def classes(rows: Rows, name: str, labels: Sequence[str]) -> list[int]:
    """Returns a column as class ids. Raises UserError, with the line, for a label not among ``labels``."""
    ids = {label: position for position, label in enumerate(labels)}
    for row, value in enumerate(rows.column(name)):
        if value not in ids:
            raise rows.error(row, f"label {value!r} is out of range; it must be {' or '.join(labels)}")
    return [ids[value] for value in rows.column(name)]


def numbers(rows: Rows, name: str, low: float, high: float) -> list[float]:
    """Returns a column as numbers. Raises UserError, with the line, for a value not in [low, high]."""
    parsed = []
    for row, value in enumerate(rows.column(name)):
        try:
            number = float(value)
        except ValueError:
            raise rows.error(row, f"score {value!r} is not a number") from None
        if not low <= number <= high:
            raise rows.error(row, f"score {value} is out of range; it must be {low:g} to {high:g}")
        parsed.append(number)
    return parsed


def require_marks(rows: Rows) -> None:
    """Raises UserError if a sentence of CoLA has the label 1 (correct) and the mark ``*`` (wrong)."""
    for row, (label, mark) in enumerate(zip(rows.column("label"), rows.column("mark"), strict=True)):
        if label == "1" and "*" in mark:
            raise rows.error(row, f"label 1 contradicts the mark {mark!r} of the same row; fix one")


def require_majority(rows: Rows) -> None:
    """Raises UserError if fewer annotators of MNLI (``label1``, ...) chose the gold label than another."""
    annotators = [values for name, values in rows.columns.items() if re.fullmatch(r"label\d", name)]
    gold = rows.column("gold_label")
    for row, votes in enumerate(zip(*annotators, strict=True)):
        counts = Counter(vote for vote in votes if vote in _MNLI_LABELS)
        if counts and counts[gold[row]] < max(counts.values()):
            problem = f"label {gold[row]!r} contradicts {', '.join(votes)} of the same row"
            raise rows.error(row, f"{problem}; fix one of them")


def read_tsv(path: str, headerless: Sequence[str] = (), skip_short_rows: bool = False) -> tuple[Rows, int]:
    """Reads a tab-separated file; returns its rows and the number of rows that were left out.

    Column names are in lower case. ``headerless``: the column names of a file without a header line.
    ``skip_short_rows``: leave out rows with too few columns. Raises UserError if the file is empty and, with
    the line, for invalid UTF-8 or a wrong number of columns.
    """
    text = read_text(path)
    if not text:
        raise UserError(f"{path}: is empty")
    numbered = [
        (number, line.removesuffix("\r").split("\t"))
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1)
    ]
    header = [name.lower() for name in headerless or numbered.pop(0)[1]]
    kept = [(number, row) for number, row in numbered if len(row) >= len(header) or not skip_short_rows]
    for number, row in kept:
        if len(row) != len(header):
            raise UserError(f"{path}: line {number}: {len(row)} columns instead of {len(header)}")
    columns = {name: [row[index] for _, row in kept] for index, name in enumerate(header)}
    return Rows(path, columns, [number for number, _ in kept]), len(numbered) - len(kept)


def read_reviews(directory: str, labels: Sequence[str]) -> tuple[list[tuple[str, ...]], list[int]]:
    """Returns the reviews in ``<directory>/<label>/<number>_<rating>.txt``, in name order, with class ids.

    Raises UserError for a missing folder, and for a rating that contradicts its folder.
    """
    texts: list[tuple[str, ...]] = []
    ids: list[int] = []
    for label_id, label in enumerate(labels):
        folder = storage.join(directory, label)
        names = [name for name in storage.list_names(folder) if name.endswith(".txt")]
        if not names:
            raise UserError(f"IMDb: {folder} has no .txt files; the layout is aclImdb/train/pos/*.txt")
        for name in names:
            path = storage.join(folder, name)
            _require_rating(path, label)
            texts.append((without_markup(read_text(path)),))
            ids.append(label_id)
    return texts, ids


def without_markup(review: str) -> str:
    """Returns the review without line breaks, the only markup of IMDb's reviews."""
    return review.replace("<br />", " ").strip()


def _require_rating(path: str, label: str) -> None:
    """Raises UserError unless the rating fits: 1 to 4 stars of 10 are negative, 7 to 10 positive (README)."""
    rated = re.fullmatch(r".*/\d+_(\d+)\.txt", path)
    if rated and int(rated[1]) in _WRONG_RATINGS.get(label, ()):
        problem = f"the rating {rated[1]} in its name contradicts its folder {label}"
        raise UserError(f"{path}: {problem}; move or rename it")
