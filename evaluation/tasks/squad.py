"""SQuAD 1.1 and 2.0: questions, overlapping windows over long contexts, answer spans.

Windows and n-best search follow BERT's published recipe (arXiv 1810.04805, section 4.2): windows overlap
so that every answer is whole in one of them, a window without the answer points at [CLS], and the
predicted span is the best start + end logit over all windows of the question. In 2.0 (section 4.3) the answer
is "none" where the smallest start + end logit of [CLS] over the windows is above that of the best span.
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
    from evaluation.finetuning.training import Encoded

MAX_ANSWER_TOKENS = 30
N_BEST = 20


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    """Character offset of each answer in the context, as the file says; right after `place_answers`."""


def read_questions(path: str, no_answer: bool = False) -> list[Question]:
    """Questions of an official file; UserError names the place of anything that is not in its form.

    no_answer: a v2.0 file, whose impossible questions have no answers.
    """
    content = storage.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path}: no list 'data'; this is not a SQuAD v1.1 file")
    questions = []
    for article_number, article in enumerate(content["data"]):
        for paragraph_number, paragraph in enumerate(
            _field(article, "paragraphs", list, path, f"data[{article_number}]")
        ):
            where = f"data[{article_number}].paragraphs[{paragraph_number}]"
            context = _field(paragraph, "context", str, path, where)
            for number, row in enumerate(_field(paragraph, "qas", list, path, where)):
                questions.append(_question(row, context, path, f"{where}.qas[{number}]", no_answer))
    return questions


def _question(row: Any, context: str, path: str, where: str, no_answer: bool) -> Question:
    answers = _field(row, "answers", list, path, where)
    if not answers and not no_answer:
        raise UserError(f"{path}: {where}: no answers; v1.1 has at least one (is this a v2.0 file?)")
    texts = tuple(_field(answer, "text", str, path, where) for answer in answers)
    starts = tuple(_field(answer, "answer_start", int, path, where) for answer in answers)
    return Question(
        _field(row, "id", str, path, where), _field(row, "question", str, path, where), context, texts, starts
    )


def _field(value: Any, name: str, kind: type, path: str, where: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{path}: {where}: no field {name!r}")
    if not isinstance(value[name], kind):
        raise UserError(f"{path}: {where}: field {name!r} is not a {_JSON[kind]}")
    return value[name]


_JSON = {str: "text", int: "whole number", list: "list"}


def place_answers(
    questions: Sequence[Question], where: str, no_answer: bool = False
) -> tuple[list[Question], list[str]]:
    """The questions with corrected answer positions, and notes on the corrections.

    If the context does not have the answer at ``answer_start``, its nearest occurrence is used. An answer
    that does not occur in the context is left out, and so is a question without another answer. Raises
    UserError, which names ``where``, for a question without answers (unless ``no_answer``), or if no question
    is left.
    """
    kept: list[Question] = []
    moved, absent = [], []
    for item in questions:
        if not item.answers and no_answer:
            kept.append(item)
            continue
        if not item.answers:
            raise UserError(f"{where}: question {item.id}: no answers; v1.1 has at least one (is this v2.0?)")
        found = []
        for answer, start in zip(item.answers, item.starts, strict=True):
            text = answer.strip()  # no token has the space around it
            wanted = start + answer.find(text)
            place = _nearest(item.context, text, wanted)
            if place is None:
                absent.append(item.id)
                continue
            if place != wanted:
                moved.append(item.id)
            found.append((text, place))
        if found:
            texts, starts = zip(*found, strict=True)
            kept.append(Question(item.id, item.question, item.context, texts, starts))
    if questions and not kept:
        raise UserError(f"{where}: no answer occurs in its context (first: question {absent[0]})")
    notes = []
    if moved:
        notes.append(
            f"answers that do not stand at their answer_start, looked for nearest to it: {len(moved):,}"
            f" (first: question {moved[0]} of {where})"
        )
    if absent:
        notes.append(
            f"answers that do not occur in their context, left out: {len(absent):,}, questions that have no"
            f" other, left out: {len(questions) - len(kept):,} (first: question {absent[0]} of {where})"
        )
    return kept, notes


def _nearest(context: str, text: str, start: int) -> int | None:
    """Where the context has ``text``, as near to ``start`` as can be; None where it is empty or nowhere."""
    if not text or context.startswith(text, max(start, 0)):
        return max(start, 0) if text else None
    places = []
    place = context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return min(places, key=lambda place: abs(place - start), default=None)


@dataclass(frozen=True)
class Windows:
    """Windows of some questions. ``encoded.targets``: start, end int64 [n], token positions."""

    encoded: Encoded
    question: list[int]
    """[n] index of the question a window belongs to."""
    offsets: list[np.ndarray]
    """[n] of int64 [L, 2]: characters of each context token, -1 for question and special tokens."""


def encode(tokenizer: Any, questions: Sequence[Question], max_length: int) -> Windows:
    """Tokenize into windows of at most ``max_length`` tokens overlapping by a third (at most 128)."""
    from evaluation.finetuning.training import Encoded

    texts = [_shorten(tokenizer, item.question, min(64, max_length // 4)) for item in questions]
    output = tokenize(
        tokenizer,
        texts,
        [item.context for item in questions],
        truncation="only_second",
        max_length=max_length,
        stride=min(128, max_length // 3),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
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
    """The question cut to a token budget (BERT: 64), so that the context always has room."""
    text = text.lstrip()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]


def _answer_tokens(spans: np.ndarray, question: Question) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), the [CLS], where the window does not hold it."""
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
    """The answer text of every question; empty for none. logits: one float [2, L] (start, end) a window."""
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    none = np.full(len(questions), np.inf)
    for owner, spans, scores in zip(windows.question, windows.offsets, logits, strict=True):
        none[owner] = min(none[owner], scores[0][0] + scores[1][0])
        found = best_span(scores[0], scores[1], spans[:, 0] >= 0)
        if found is not None and found[0] > best[owner][0]:
            score, start, end = found
            best[owner] = (score, questions[owner].context[spans[start, 0] : spans[end, 1]])
    return [
        "" if no_answer and other > value else text for (value, text), other in zip(best, none, strict=True)
    ]


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray) -> tuple[float, int, int] | None:
    """(score, first, last) with the largest start + end logit among the n-best of each, or None.

    start, end: float [L]; allowed: bool [L], the context tokens. A span has 1 to 30 tokens.
    """
    positions = np.flatnonzero(allowed)
    if len(positions) == 0:
        return None
    starts = positions[np.argsort(-start[positions], kind="stable")[:N_BEST]]
    ends = positions[np.argsort(-end[positions], kind="stable")[:N_BEST]]
    length = ends[None, :] - starts[:, None] + 1
    scores = np.where(
        (length >= 1) & (length <= MAX_ANSWER_TOKENS), start[starts][:, None] + end[ends][None, :], -np.inf
    )
    row, column = np.unravel_index(int(np.argmax(scores)), scores.shape)
    if not np.isfinite(scores[row, column]):
        return None
    return float(scores[row, column]), int(starts[row]), int(ends[column])
