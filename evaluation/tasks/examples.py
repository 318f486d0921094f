"""Converts rows of a user's data to examples with labels. Every error names the row's file and line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.tasks.answer_spans import Question
from evaluation.tasks.row_files import Rows
from evaluation.tasks.task import Split, Task
from infra.errors import UserError
from infra.recipe_words import with_nearest_name

OUTSIDE = "O"
"""Tag of words outside every entity."""
SEPARATOR = "|"
"""Separator of the labels of one example, if they are one string."""
_TAG = re.compile(r"[BIES]-.+")
_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_CLASSES = 1000


def split_of(task: Task, rows: Rows) -> Split:
    """Returns the examples in ``rows``. Raises UserError for a wrong value."""
    id_column = task.own.id if task.own is not None else None
    index = [] if id_column is None else [str(value) for value in rows.column(id_column)]
    if task.kind == "tokens":
        sentences, notes = _sentences(task, rows)
        ids = {label: number for number, label in enumerate(task.labels)}
        for row, (_, tags) in enumerate(sentences):
            for tag in tags:
                _require_known(tag, ids, rows.location(row))
        labels = [np.asarray([ids[tag] for tag in tags], np.int64) for _, tags in sentences]
        return Split([tuple(words) for words, _ in sentences], labels, index, notes=notes)
    texts = list(zip(*(rows.texts(name) for name in task.texts), strict=True))
    return Split(texts, _labels(task, rows), index)


def _labels(task: Task, rows: Rows) -> np.ndarray:
    values = rows.column(task.label)
    if task.kind in ("regression", "similarity"):
        numbers = [_number(value, rows.location(row)) for row, value in enumerate(values)]
        return np.asarray(numbers, np.float32)
    ids = {label: number for number, label in enumerate(task.labels)}
    if task.kind == "multilabel":
        has_label = np.zeros((len(rows), len(ids)), np.int8)
        for row, value in enumerate(values):
            for label in _label_list(value, rows.location(row)):
                _require_known(label, ids, rows.location(row))
                has_label[row, ids[label]] = 1
        return has_label
    for row, value in enumerate(values):
        _require_known(_label(value, rows.location(row)), ids, rows.location(row))
    return np.asarray([ids[str(value)] for value in values], np.int64)


def _label(value: Any, location: str) -> str:
    """Returns a label of the data as a string. Strings, whole numbers and booleans are labels."""
    if value is None or value == "" or not isinstance(value, str | int):
        raise UserError(f"{location}: label {value!r} is not a text; give every example one label")
    return str(value)


def _label_list(value: Any, location: str) -> list[str]:
    if isinstance(value, str):
        return [label.strip() for label in value.split(SEPARATOR) if label.strip()]
    if not isinstance(value, list):
        remedy = f"write label{SEPARATOR}label"
        raise UserError(f"{location}: labels {value!r} are neither a list nor a text; {remedy}")
    return [_label(label, location) for label in value]


def _number(value: Any, location: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{location}: score {value!r} is not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{location}: score {value!r} is not a finite number")
    return number


def _require_known(label: str, ids: dict[str, int], location: str) -> None:
    if label not in ids:
        raise UserError(with_nearest_name(f"{location}: unknown label {label!r}", label, list(ids)))


def labels_in(task: Task, rows: Rows) -> tuple[str, ...]:
    """Returns all labels of the training examples, in numerical order if all are whole numbers, else sorted.

    For token classification ``O`` comes first. Raises UserError if there are fewer than 2 or more than 1,000.
    """
    if task.kind == "tokens":
        sentences, _ = _sentences(task, rows)
        names = {tag for _, tags in sentences for tag in tags} | {OUTSIDE}
        return (OUTSIDE, *sorted(names - {OUTSIDE}))
    located = [(value, rows.location(row)) for row, value in enumerate(rows.column(task.label))]
    if task.kind == "multilabel":
        names = {label for value in located for label in _label_list(*value)}
    else:
        names = {_label(*value) for value in located}
    if len(names) < 2:
        raise UserError(
            f"{rows.source}: column {task.label!r} must have two or more different labels, not {len(names)}"
        )
    if len(names) > _MAX_CLASSES:
        raise UserError(
            f"{rows.source}: column {task.label!r} has {len(names):,} labels; is it the label"
            f" column? a task may have {_MAX_CLASSES:,} labels"
        )
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in names)
    return tuple(sorted(names, key=lambda label: (int(label) if whole else 0, label)))


def _sentences(task: Task, rows: Rows) -> tuple[list[tuple[list[str], list[str]]], list[str]]:
    """Returns each row's (words, tags), and notes on corrections.

    A row holds either a list of words and a list of tags, or a text and a list of character spans.
    """
    found, widened = [], 0
    texts, labels = rows.column(task.texts[0]), rows.column(task.label)
    for row, (text, tags) in enumerate(zip(texts, labels, strict=True)):
        location = rows.location(row)
        if isinstance(text, str):
            words, tags, row_widened = _from_spans(text, tags, location)
            widened += row_widened
        else:
            words = text
            _require_words(words, tags, location)
        found.append((words, tags))
    notes = [f"{rows.source}: spans that end within a word, widened to it: {widened:,}"] if widened else []
    return found, notes


def _require_words(words: Any, tags: Any, location: str) -> None:
    for name, values in (("words", words), ("tags", tags)):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{location}: the {name} are not a list of texts")
    if not words:
        raise UserError(f"{location}: has no words; leave the row out")
    if len(words) != len(tags):
        raise UserError(f"{location}: has {len(words)} words but {len(tags)} tags; give each word one tag")
    wrong = next((tag for tag in tags if tag != OUTSIDE and not _TAG.fullmatch(tag)), None)
    if wrong is not None:
        raise UserError(f"{location}: tag {wrong!r} is not O, B-TYPE or I-TYPE")


def _from_spans(text: str, spans: Any, location: str) -> tuple[list[str], list[str], int]:
    """Returns words, IOB2 tags, and the number of spans that were widened to whole words.

    ``spans``: list of {start, end, label}, with positions in characters.
    """
    spans = _parsed_spans(spans, location)
    words = list(_WORD.finditer(text))
    if not words:
        raise UserError(f"{location}: has no words; leave the row out")
    tags, widened = [OUTSIDE] * len(words), 0
    for start, end, label in spans:
        if not 0 <= start < end <= len(text):
            problem = f"is not within the text of {len(text)} characters"
            raise UserError(f"{location}: span {start} to {end} {problem}")
        inside = [number for number, word in enumerate(words) if word.end() > start and word.start() < end]
        if not inside:
            raise UserError(f"{location}: span {start} to {end} holds no word; leave it out")
        if any(tags[number] != OUTSIDE for number in inside):
            raise UserError(f"{location}: span {start} to {end} overlaps another span; keep one of them")
        widened += words[inside[0]].start() < start or words[inside[-1]].end() > end
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{label}"
    return [word[0] for word in words], tags, widened


def _parsed_spans(spans: Any, location: str) -> list[tuple[int, int, str]]:
    if isinstance(spans, str):  # in a CSV file
        try:
            spans = json.loads(spans)
        except ValueError:
            spans = None
    names = ("start", "end", "label")
    if not isinstance(spans, list) or not all(
        isinstance(span, dict) and set(names) <= span.keys() for span in spans
    ):
        raise UserError(f"{location}: the spans are not a list of {{start, end, label}}")
    for span in spans:
        numbers = isinstance(span["start"], int) and isinstance(span["end"], int)
        if not numbers or not isinstance(span["label"], str):
            raise UserError(
                f"{location}: a span has a start and an end in characters, whole numbers, and a text as label"
            )
    return sorted((span["start"], span["end"], span["label"]) for span in spans)


def questions_in(rows: Rows, texts: Sequence[str], id_column: str | None) -> list[Question]:
    """Returns the questions in rows whose ``answers`` are ``{text: [...], answer_start: [...]}``.

    ``texts``: names of the columns of questions and contexts.
    """
    asked, contexts = (rows.texts(name) for name in texts)
    ids = list(map(str, range(len(rows))))
    if id_column is not None or "id" in rows.columns:
        ids = [str(value) for value in rows.column(id_column or "id")]
    found = []
    for row, answers in enumerate(rows.column("answers")):
        answer_texts, starts = _parsed_answers(answers, rows.location(row))
        found.append(Question(ids[row], asked[row], contexts[row], tuple(answer_texts), tuple(starts)))
    return found


def _parsed_answers(answers: Any, location: str) -> tuple[list[str], list[int]]:
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        raise UserError(f"{location}: answers are not {{text: [...], answer_start: [...]}}")
    texts, starts = answers["text"], answers["answer_start"]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UserError(f"{location}: answers need as many texts as starts, each in a list")
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(start, int) for start in starts
    ):
        raise UserError(f"{location}: an answer is a text, and its start a whole number")
    return texts, starts
