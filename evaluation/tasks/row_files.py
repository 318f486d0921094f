"""Reads a user's data as columns: a CSV, TSV, JSON-lines, Parquet or CoNLL file, or a hub dataset.

No type is guessed, so ``NA`` and ``007`` remain strings. Errors name the line. A file may be a URL; ``.gz``
and ``.zst`` are decompressed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from infra.errors import UserError, first_line
from infra.files import storage
from infra.files.content import BLOCK, binary_format
from infra.recipe_words import with_nearest_name

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".conll": "conll", ".bio": "conll", ".iob": "conll", ".json": "squad",
}  # fmt: skip
"""Ending of a file's name, before ``.gz`` or ``.zst`` -> format."""
WORDS, TAGS = "words", "tags"
"""Names of the two columns of a CoNLL file that are read, the first and the last; one list per sentence."""


@dataclass(frozen=True)
class Rows:
    """Columns of equal length, with the location of every row."""

    source: str
    """Path or name of the data, for error messages."""
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    """Line or row number of each row in the source, from 1, for error messages."""
    unit: str = "line"
    """What ``lines`` counts."""

    def __len__(self) -> int:
        return len(self.lines)

    def location(self, row: int) -> str:
        """Returns source and line of a row, for error messages."""
        return f"{self.source}: {self.unit} {self.lines[row]}"

    def error(self, row: int, problem: str) -> UserError:
        """Returns the error for a wrong value in a row."""
        return UserError(f"{self.location(row)}: {problem}")

    def column(self, name: str) -> list[Any]:
        """Returns a column. Raises UserError with the most similar name if there is none."""
        if name not in self.columns:
            raise UserError(with_nearest_name(f"{self.source}: no column {name!r}", name, list(self.columns)))
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """Returns a column of strings. Raises UserError, with the line, for any other value."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise self.error(row, f"column {name!r}: {value!r} is not a text")
        return values

    def select(self, chosen: Sequence[int]) -> Rows:
        """Returns the rows with these numbers, from 0."""
        columns = {name: [values[row] for row in chosen] for name, values in self.columns.items()}
        return Rows(self.source, columns, [self.lines[row] for row in chosen], self.unit)


def format_of(path: str, given: str | None) -> str:
    """Returns the given format, or the format of the file name's ending; UserError if that is unknown."""
    if given is not None:
        return given
    name = path.removesuffix(".gz").removesuffix(".zst")
    for ending, found in FORMATS.items():
        if name.endswith(ending):
            return found
    remedy = "give a format, for example format: csv"
    raise UserError(f"{path}: unknown ending; known are {', '.join(FORMATS)}; or {remedy}")


def read_rows(path: str, given: str | None = None) -> Rows:
    """Returns the rows of a file. Raises UserError if it is missing, empty, damaged or not in its format."""
    if not storage.exists(path):
        raise UserError(f"{path}: there is no such file")
    kind = format_of(path, given)
    if kind == "squad":
        reason = "a .json file is read as SQuAD's, for kind: spans"
        raise UserError(f"{path}: {reason}; for JSON lines write format: jsonl")
    if kind == "parquet":
        rows = _parquet(path)
    else:
        text = read_text(path)
        if not text.strip():
            raise UserError(f"{path}: is empty")
        rows = _TEXTS[kind](path, text)
    if len(rows) == 0:
        raise UserError(f"{path}: has no rows")
    return rows


def read_text(path: str) -> str:
    """Returns the text of a UTF-8 file, without a byte-order mark.

    Raises UserError for a file of another type and, with the line, for invalid UTF-8.
    """
    with storage.open_binary(path) as file:
        data = file.read()
    content = binary_format(data[:BLOCK])
    if content is not None:
        raise UserError(f"{path}: is {content}, not UTF-8 text; convert the file or give its format")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not valid UTF-8; convert the file") from None


def _parquet(path: str) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(storage.read_bytes(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file: {first_line(error)}") from None
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return Rows(path, columns, range(1, table.num_rows + 1), "row")


def _separated(separator: str, quoting: int, path: str, text: str) -> Rows:
    csv.field_size_limit(1 << 27)
    lines_of = io.StringIO(text, newline="")
    reader = csv.reader(lines_of, delimiter=separator, quoting=quoting, strict=True)  # type: ignore[arg-type]
    cells: list[list[str]] = []
    lines: list[int] = []
    try:
        header = next(reader)
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            problem = f"column {twice!r} occurs twice; the first line names the columns"
            raise UserError(f"{path}: line 1: {problem}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}: line {line}: {len(row)} columns instead of {len(header)}")
            if row:
                cells.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from None
    columns = {name: [row[index] for row in cells] for index, name in enumerate(header)}
    return Rows(path, columns, lines)


def _json_lines(path: str, text: str) -> Rows:
    objects: list[dict[str, Any]] = []
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: not an object with named fields")
        if objects and row.keys() != objects[0].keys():
            missing = sorted(row.keys() ^ objects[0].keys())
            raise UserError(f"{path}: line {number}: field {missing[0]!r} is not in every line")
        objects.append(row)
        lines.append(number)
    names = list(objects[0]) if objects else []
    return Rows(path, {name: [row[name] for row in objects] for name in names}, lines)


def _conll(path: str, text: str) -> Rows:
    """Returns sentences as lists of words and of tags, without lines of comments and of document starts."""
    sentences = list(_sentences(path, text))
    columns = {
        WORDS: [[word for _, word, _ in sentence] for sentence in sentences],
        TAGS: [[tag for _, _, tag in sentence] for sentence in sentences],
    }
    return Rows(path, columns, [sentence[0][0] for sentence in sentences])


def _sentences(path: str, text: str) -> Iterator[list[tuple[int, str, str]]]:
    """Yields sentences as lists of (line number, word, tag).

    A line that begins with ``# `` is a comment. Exception: in a file without tabs, such a line within a
    sentence is the word ``#``.
    """
    sentence: list[tuple[int, str, str]] = []
    tabs = "\t" in text
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        comment = line.startswith("# ") and (tabs or not sentence)
        if not line.strip() or fields[0] == "-DOCSTART-" or comment:
            if sentence:
                yield sentence
            sentence = []
        elif len(fields) < 2:
            raise UserError(f"{path}: line {number}: a word without a tag; write both, with a space between")
        else:
            sentence.append((number, fields[0], fields[-1].strip()))
    if sentence:
        yield sentence


_TEXTS: dict[str, Callable[[str, str], Rows]] = {
    "csv": partial(_separated, ",", csv.QUOTE_MINIMAL),
    "tsv": partial(_separated, "\t", csv.QUOTE_NONE),  # quotes are ordinary characters, as in GLUE's files
    "jsonl": _json_lines,
    "conll": _conll,
}


def read_hub(name: str, config: str | None, split: str, revision: str | None) -> Rows:
    """Returns a split of a hub dataset, with names of classes instead of class ids."""
    rows = load_hub(name, (name, config) if config else (name,), split, revision)
    columns = {}
    for column in rows.column_names:
        feature = rows.features[column]
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        columns[column] = [_named(value, names) for value in rows[column]]
    return Rows(f"{name} {split}", columns, range(1, len(rows) + 1), "row")


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [names[item] for item in value]
    return names[value] if value >= 0 else None


def hub_url(name: str, revision: str | None) -> str:
    """Returns the dataset's URL in the form of the hub's own library."""
    return f"hf://datasets/{name}" + (f"@{revision}" if revision else "")


def load_hub(title: str, arguments: Sequence[str], split: str, revision: str | None) -> Any:
    """Returns a split of a hub dataset, a ``datasets.Dataset``; raises UserError if it cannot be loaded.

    ``title``: name of the task, for error messages. ``arguments``: those of ``datasets.load_dataset``.
    """
    import datasets

    try:
        return datasets.load_dataset(*arguments, split=split, revision=revision)
    except Exception as error:  # the library raises many unrelated types
        raise UserError(
            f"{title}: cannot load {'/'.join(arguments)} from the hub ({first_line(error)}); "
            "name a directory of official files with evaluation.data or --data, or files of your own"
        ) from error
