"""SQuAD 1.1 and 2.0: questions, overlapping windows over long contexts, answer spans.

Windows and n-best search follow BERT's published recipe (arXiv 1810.04805, section 4.2). Windows overlap, so
that every answer lies completely in at least one window. In a window without the answer, [CLS] is the target.
The predicted span has the largest sum of start and end logit over all windows of a question. In SQuAD 2.0
(section 4.3) there is no answer if the smallest such sum of [CLS] over the windows is above the span's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.control_tokens import tokenize
from infra.errors import UserError
from infra.files import storage

if TYPE_CHECKING:
    from evaluation.tasks.encoded import Encoded

MAX_ANSWER_TOKENS = 30
N_BEST = 20
"""Number of start and of end positions per window that are combined to spans."""


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    """Character offset of each answer in the context, as in the file; ``align_answers`` corrects it."""


def read_questions(path: str, no_answer: bool = False) -> list[Question]:
    """Returns the questions of an official file. Raises UserError, with the field, if its form is wrong.

    ``no_answer``: questions without answers are allowed, as in v2.0 files.
    """
    content = storage.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path}: has no list 'data'; give a file in SQuAD's JSON format")
    questions = []
    for article_number, article in enumerate(content["data"]):
        paragraphs = _field(article, "paragraphs", list, path, f"data[{article_number}]")
        for paragraph_number, paragraph in enumerate(paragraphs):
            where = f"data[{article_number}].paragraphs[{paragraph_number}]"
            context = _field(paragraph, "context", str, path, where)
            for number, row in enumerate(_field(paragraph, "qas", list, path, where)):
                questions.append(_question(row, context, path, f"{where}.qas[{number}]", no_answer))
    return questions


def _question(row: Any, context: str, path: str, where: str, no_answer: bool) -> Question:
    answers = _field(row, "answers", list, path, where)
    if not answers and not no_answer:
        raise UserError(f"{path}: {where}: no answers; for a v2.0 file, name the task SQuAD2")
    texts = tuple(_field(answer, "text", str, path, where) for answer in answers)
    starts = tuple(_field(answer, "answer_start", int, path, where) for answer in answers)
    name, question = (_field(row, field, str, path, where) for field in ("id", "question"))
    return Question(name, question, context, texts, starts)


def _field(value: Any, name: str, kind: type, path: str, where: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{path}: {where}: no field {name!r}")
    if not isinstance(value[name], kind):
        raise UserError(f"{path}: {where}: field {name!r} is not a {_JSON[kind]}")
    return value[name]


_JSON = {str: "text", int: "whole number", list: "list"}
"""Type -> its name in error messages."""


def align_answers(
    questions: Sequence[Question], where: str, no_answer: bool = False
) -> tuple[list[Question], list[str]]:
    """Returns the questions with corrected answer positions, and notes on the corrections.

    If an answer is not at its ``answer_start``, its nearest occurrence in the context is used. An answer that
    does not occur is left out, and so is a question that has no other answer. Raises UserError, which starts
    with ``where``, for a question without answers (unless ``no_answer``), or if no question is left.
    """
    kept: list[Question] = []
    moved, absent = [], []
    for item in questions:
        if not item.answers and no_answer:
            kept.append(item)
            continue
        if not item.answers:
            raise UserError(f"{where}: question {item.id}: no answers; for v2.0, name the task SQuAD2")
        aligned = []
        for answer, start in zip(item.answers, item.starts, strict=True):
            text = answer.strip()  # tokens do not include the spaces around an answer
            stated = start + answer.find(text)
            actual = _nearest(item.context, text, stated)
            if actual is None:
                absent.append(item.id)
                continue
            if actual != stated:
                moved.append(item.id)
            aligned.append((text, actual))
        if aligned:
            texts, starts = zip(*aligned, strict=True)
            kept.append(Question(item.id, item.question, item.context, texts, starts))
    if questions and not kept:
        raise UserError(f"{where}: no answer occurs in its context (first: question {absent[0]})")
    notes = []
    if moved:
        notes.append(
            f"answers that are not at their answer_start, moved to the nearest occurrence:"
            f" {len(moved):,} (first: question {moved[0]} of {where})"
        )
    if absent:
        notes.append(
            f"answers that do not occur in their context, left out: {len(absent):,}, questions without"
            f" another answer, left out: {len(questions) - len(kept):,}"
            f" (first: question {absent[0]} of {where})"
        )
    return kept, notes


def _nearest(context: str, text: str, start: int) -> int | None:
    """Returns the offset of the occurrence of ``text`` nearest to ``start``; None if there is none."""
    if not text or context.startswith(text, max(start, 0)):
        return max(start, 0) if text else None
    offsets = []
    offset = context.find(text)
    while offset >= 0:
        offsets.append(offset)
        offset = context.find(text, offset + 1)
    return min(offsets, key=lambda offset: abs(offset - start), default=None)


@dataclass(frozen=True)
class Windows:
    """The n windows of a list of questions, as tokenized rows."""

    encoded: Encoded
    """Rows with the targets ``start`` and ``end``, token positions of the answer, int64 [n]."""
    question: list[int]
    """Index of each window's question, [n]."""
    offsets: list[np.ndarray]
    """Per window int64 [L, 2]: first and last character + 1 of each context token, -1 for other tokens."""


def encode(tokenizer: Any, questions: Sequence[Question], max_length: int) -> Windows:
    """Tokenizes questions into windows of ``max_length`` tokens that overlap by a third, at most by 128."""
    from evaluation.tasks.encoded import Encoded

    texts = [_shorten(tokenizer, item.question, min(64, max_length // 4)) for item in questions]
    output = tokenize(
        tokenizer, texts, [item.context for item in questions],
        truncation="only_second", max_length=max_length, stride=min(128, max_length // 3),
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    owners = list(output["overflow_to_sample_mapping"])
    offsets, starts, ends = [], [], []
    for window, owner in enumerate(owners):
        spans = np.asarray(output["offset_mapping"][window], dtype=np.int64)
        in_context = np.asarray([segment == 1 for segment in output.sequence_ids(window)])
        spans[~in_context] = -1
        offsets.append(spans)
        start, end = _answer_tokens(spans, questions[owner])
        starts.append(start)
        ends.append(end)
    targets = {"start": np.asarray(starts, np.int64), "end": np.asarray(ends, np.int64)}
    return Windows(Encoded(output["input_ids"], output["token_type_ids"], targets), owners, offsets)


def _shorten(tokenizer: Any, text: str, tokens: int) -> str:
    """Returns the question cut to this number of tokens (BERT: 64), so that there is room for the context."""
    text = text.lstrip()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def _answer_tokens(spans: np.ndarray, question: Question) -> tuple[int, int]:
    """Returns the first and last token of the first answer; (0, 0), [CLS], if the window lacks the answer."""
    if not question.answers:
        return 0, 0
    first = question.starts[0]
    last = first + len(question.answers[0])
    inside = np.flatnonzero((spans[:, 0] >= 0) & (spans[:, 1] > first) & (spans[:, 0] < last))
    if len(inside) == 0 or spans[inside[0], 0] > first or spans[inside[-1], 1] < last:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def best_answers(
    windows: Windows, logits: Sequence[np.ndarray], questions: Sequence[Question], no_answer: bool = False
) -> list[str]:
    """Returns the answer of every question, "" for none. ``logits``: float [2, L] per window (start, end)."""
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    cls_scores = np.full(len(questions), np.inf)
    for owner, spans, scores in zip(windows.question, windows.offsets, logits, strict=True):
        cls_scores[owner] = min(cls_scores[owner], scores[0][0] + scores[1][0])
        span = best_span(scores[0], scores[1], spans[:, 0] >= 0)
        if span is not None and span[0] > best[owner][0]:
            score, start, end = span
            best[owner] = (score, questions[owner].context[spans[start, 0] : spans[end, 1]])
    return [
        "" if no_answer and cls_score > score else text
        for (score, text), cls_score in zip(best, cls_scores, strict=True)
    ]


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray) -> tuple[float, int, int] | None:
    """Returns (score, first token, last token) of the span with the largest start + end logit, or None.

    Only the ``N_BEST`` starts and ends are combined. ``start``, ``end``: logits, float [L]. ``allowed``: bool
    [L], which tokens belong to the context. A span has 1 to 30 tokens.
    """
    positions = np.flatnonzero(allowed)
    if len(positions) == 0:
        return None
    starts = positions[np.argsort(-start[positions], kind="stable")[:N_BEST]]
    ends = positions[np.argsort(-end[positions], kind="stable")[:N_BEST]]
    length = ends[None, :] - starts[:, None] + 1
    scores = start[starts][:, None] + end[ends][None, :]
    scores = np.where((length >= 1) & (length <= MAX_ANSWER_TOKENS), scores, -np.inf)
    row, column = np.unravel_index(int(np.argmax(scores)), scores.shape)
    if not np.isfinite(scores[row, column]):
        return None
    return float(scores[row, column]), int(starts[row]), int(ends[column])
