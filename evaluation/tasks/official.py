"""Official task files as their publishers wrote them: tab-separated tables and review directories.

The tables are not CSV: a quote is text, a field never spans lines, and only "\\n" ends a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from evaluation.tasks.rows import Rows, read_text
from infra.errors import UserError
from infra.files import storage

# A task's files lie in a folder of its name (GLUE) or directly in the directory (IMDb, SQuAD); a
# directory that collects several benchmarks has one more level.
_COLLECTIONS = ("", "glue", "GLUE", "imdb", "squad")
_MNLI_LABELS = ("entailment", "neutral", "contradiction")
_OTHER_RATINGS = {"neg": range(7, 11), "pos": range(1, 5)}
"""Of IMDb: the ratings that a folder cannot have."""


def find(task: str, file: str, data: str) -> str | None:
    """Path of an official file under ``data``, or None."""
    for collection in _COLLECTIONS:
        base = storage.join(data, collection) if collection else data
        for path in (storage.join(base, task, file), storage.join(base, file)):
            # A bare train.tsv would be anybody's, so it counts only inside a folder named after the task.
            if (path.endswith(storage.join(task, file)) or not file.endswith(".tsv")) and _present(path):
                return path
    return None


def require_file(task: str, file: str, data: str) -> str:
    path = find(task, file, data)
    if path is None:
        expected = f"{task}/{file}" if file.endswith(".tsv") else file
        raise UserError(f"{task}: {data} has no {expected}; name the directory of official files with --data")
    return path


def _present(path: str) -> bool:
    return storage.exists(path) or bool(storage.list_names(path))


def classes(rows: Rows, name: str, labels: Sequence[str]) -> list[int]:
    """A column as class ids; UserError naming the line of a label not among ``labels``."""
    ids = {label: position for position, label in enumerate(labels)}
    for row, value in enumerate(rows.column(name)):
        if value not in ids:
            raise UserError(
                f"{rows.place(row)}: label {value!r} is out of range; they are {', '.join(labels)}"
            )
    return [ids[value] for value in rows.column(name)]


def numbers(rows: Rows, name: str, low: float, high: float) -> list[float]:
    """A column as numbers; UserError naming the line of a value that is no number in [low, high]."""
    found = []
    for row, value in enumerate(rows.column(name)):
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"{rows.place(row)}: score {value!r} is not a number") from None
        if not low <= number <= high:
            raise UserError(
                f"{rows.place(row)}: score {value} is out of range; it must be {low:g} to {high:g}"
            )
        found.append(number)
    return found


def require_marks(rows: Rows) -> None:
    """UserError for a sentence of CoLA that its author marks as wrong (``*``) and its label calls right."""
    for row, (label, mark) in enumerate(zip(rows.column("label"), rows.column("mark"), strict=True)):
        if label == "1" and "*" in mark:
            raise UserError(f"{rows.place(row)}: label 1 contradicts the mark {mark!r} of the same row")


def require_majority(rows: Rows) -> None:
    """UserError for a label of MNLI that fewer of its annotators (``label1``, ...) chose than another one."""
    voters = [values for name, values in rows.columns.items() if re.fullmatch(r"label\d", name)]
    gold = rows.column("gold_label")
    for row, votes in enumerate(zip(*voters, strict=True)):
        counts = Counter(vote for vote in votes if vote in _MNLI_LABELS)
        if counts and counts[gold[row]] < max(counts.values()):
            raise UserError(
                f"{rows.place(row)}: label {gold[row]!r} contradicts {', '.join(votes)} of the same row"
            )


def read_tsv(path: str, headerless: Sequence[str] = (), skip_short_rows: bool = False) -> tuple[Rows, int]:
    """(rows, number of rows left out because they have too few columns) of a tab-separated file.

    The names of its columns are put in lower case.

    ``headerless``: the names of the columns where the file has no header line. UserError: invalid UTF-8 or a
    wrong column count, with the line number; an empty file.
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
    columns = {name: [row[place] for _, row in kept] for place, name in enumerate(header)}
    return Rows(path, columns, [number for number, _ in kept]), len(numbered) - len(kept)


def read_reviews(directory: str, labels: Sequence[str]) -> tuple[list[tuple[str, ...]], list[int]]:
    """``<directory>/<label>/*.txt``, one review a file, in name order; UserError for a missing folder.

    The names are ``<number>_<rating>.txt``; UserError for a rating that contradicts the folder.
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
    """Line breaks are the only markup of IMDb's reviews."""
    return review.replace("<br />", " ").strip()


def _require_rating(path: str, label: str) -> None:
    """Of 10 stars; 1 to 4 are negative, 7 to 10 positive (the data set's README)."""
    rated = re.fullmatch(r".*/\d+_(\d+)\.txt", path)
    if rated and int(rated[1]) in _OTHER_RATINGS.get(label, ()):
        raise UserError(
            f"{path}: the rating {rated[1]} in its name contradicts its folder {label}; move or rename it"
        )
