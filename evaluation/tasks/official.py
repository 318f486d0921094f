"""Official task files as their publishers wrote them: tab-separated tables and review directories.

The tables are not CSV: a quote is text, a field never spans lines, and only "\\n" ends a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from infra.errors import UserError
from infra.files import storage
from infra.files.content import BLOCK, content_of

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


@dataclass(frozen=True)
class Table:
    """Rows of a tab-separated file, or of a hub data set, with their numbers (1-based) for error messages."""

    path: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    skipped: int = 0
    unit: str = "line"
    """What ``lines`` counts."""

    def place(self, row: int) -> str:
        return f"{self.path}: {self.unit} {self.lines[row]}"

    def column(self, name: str) -> list[str]:
        """Values of the column of that name, whatever its case; UserError when there is none."""
        names = [title.lower() for title in self.header]
        if name.lower() not in names:
            raise UserError(f"{self.path}: line 1: no column {name!r} among {', '.join(self.header)}")
        position = names.index(name.lower())
        return [row[position] for row in self.rows]

    def classes(self, name: str, labels: Sequence[str]) -> list[int]:
        """The column as class ids; UserError naming the line of a label not among ``labels``."""
        ids = {label: position for position, label in enumerate(labels)}
        found = []
        for row, value in enumerate(self.column(name)):
            if value not in ids:
                raise UserError(
                    f"{self.place(row)}: label {value!r} is out of range; they are {', '.join(labels)}"
                )
            found.append(ids[value])
        return found

    def numbers(self, name: str, low: float, high: float) -> list[float]:
        """The column as numbers; UserError naming the line of one that is outside [low, high]."""
        found = []
        for row, value in enumerate(self.column(name)):
            try:
                number = float(value)
            except ValueError:
                raise UserError(f"{self.place(row)}: score {value!r} is not a number") from None
            if not low <= number <= high:
                raise UserError(
                    f"{self.place(row)}: score {value} is out of range; it must be {low:g} to {high:g}"
                )
            found.append(number)
        return found


def require_marks(table: Table) -> None:
    """UserError for a sentence of CoLA that its author marks as wrong (``*``) and its label calls right."""
    for row, (label, mark) in enumerate(zip(table.column("label"), table.column("mark"), strict=True)):
        if label == "1" and "*" in mark:
            raise UserError(f"{table.place(row)}: label 1 contradicts the mark {mark!r} of the same row")


def require_majority(table: Table) -> None:
    """UserError for a label of MNLI that fewer of its annotators (``label1``, ...) chose than another one."""
    voters = [name for name in table.header if re.fullmatch(r"label\d", name)]
    gold = table.column("gold_label")
    for row, votes in enumerate(zip(*(table.column(name) for name in voters), strict=True)):
        counts = Counter(vote for vote in votes if vote in _MNLI_LABELS)
        if counts and counts[gold[row]] < max(counts.values()):
            raise UserError(
                f"{table.place(row)}: label {gold[row]!r} contradicts {', '.join(votes)} of the same row"
            )


def read_tsv(path: str, headerless: Sequence[str] = (), skip_short_rows: bool = False) -> Table:
    """A tab-separated file. ``headerless``: its column names where the file has no header line.

    UserError: invalid UTF-8 or a wrong column count, with the line number; an empty file.
    """
    numbered = list(enumerate(_lines(path), start=1))
    if not numbered:
        raise UserError(f"{path}: is empty")
    header = list(headerless)
    if not header:
        header = numbered[0][1].split("\t")
        numbered = numbered[1:]
    rows, lines, skipped = [], [], 0
    for number, line in numbered:
        fields = line.split("\t")
        if len(fields) < len(header) and skip_short_rows:
            skipped += 1
            continue
        if len(fields) != len(header):
            raise UserError(f"{path}: line {number}: {len(fields)} columns instead of {len(header)}")
        rows.append(fields)
        lines.append(number)
    return Table(path, header, rows, lines, skipped)


def _lines(path: str) -> list[str]:
    """Lines without their ends; the byte-order mark and a missing final newline make no difference."""
    data = storage.read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if not data:
        return []
    _require_text(path, data)
    lines = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}: line {number}: not valid UTF-8; convert the file") from None
    return lines


def _require_text(path: str, data: bytes) -> None:
    content = content_of(data[:BLOCK])
    if content is not None:
        raise UserError(f"{path}: is {content}, not UTF-8 text; convert the file")


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
            data = storage.read_bytes(path)
            _require_text(path, data)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}: not valid UTF-8; convert the file") from None
            texts.append((without_markup(text),))
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
