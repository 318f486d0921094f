"""What an exported model answers in Python, for the browser page to compare itself with (golden.json).

ONNX Runtime computes every row alone and with one thread, as a device does. Ids and windows come from
``evaluation.tasks.squad``. Keys of an example: texts, ids (one list a row), and ``span`` (best answer:
window, first and last token, score, text, noAnswer), ``logits``, or ``cosines`` of the first text with the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.devices.onnx_model import open_session, run_session
from evaluation.tasks import squad
from infra.control_tokens import tokenize

Texts = tuple[str, ...]

_TEXT = (
    "The lighthouse on the northern cape was built in 1874 by two sisters, Ada and Ruth Marlow. In the "
    "winter of 1912 the keeper, Tom Hale, kept the lamp burning for nine nights with fish oil. "
)
QUESTIONS: tuple[Texts, ...] = (
    ("Who kept the lamp burning?", _TEXT),
    ("When was the lighthouse built?", _TEXT * 12),  # several windows
    ("Wann wurde Zürichs Straßenbahn eröffnet?", "Zürichs Straßenbahn fährt seit 1882, sagt Jürg Ångström."),
    ("متى بني البرج؟", "بني البرج سنة 1874 على يد أختين. שלום עולם."),
    ("谁点亮了灯？", "1912年冬天，汤姆·黑尔点亮了灯塔的灯。𠀀𠮷 한국어 텍스트"),
    (
        "What [SEP] is [MASK]?",
        "Text with [CLS] and [SEP], \u0000\u200b\ufeff\ufffd or e\u0301\u0327 and \ufb01\ufb02. İSTANBUL ΣΑΣ",
    ),
    ("🙂 who? 👩🏽‍🚀", "The 🚢 arrived at 10:45 — with “Ms. O’Neill”… and $3,000.50!\t\r\n" + "x" * 150),
    ("why " * 120, _TEXT),  # longer than a question may be
)
"""Texts that are hard to tokenize, beside ordinary ones."""
SENTENCES: tuple[Texts, ...] = tuple((context[:400],) for _, context in QUESTIONS)


def golden(model: str, kind: str, tokenizer: Any, texts: Sequence[Texts], length: int) -> dict[str, Any]:
    """The content of golden.json for the ONNX file ``model``. Texts: questions with contexts, or others."""
    session = open_session(model)
    if kind == "spans":
        examples = [_answered(session, tokenizer, pair, length) for pair in texts]
    elif kind == "encoder":
        groups = [(texts[place][0], *(row[0] for row in texts)) for place in range(min(3, len(texts)))]
        examples = [_compared(session, tokenizer, group, length) for group in groups]
    else:
        examples = [_scored(session, tokenizer, row, length) for row in texts]
    return {"examples": examples}


def rows_alone(session: Any, ids: Sequence[list[int]], types: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Outputs of rows that are run one after the other, without padding: arrays [L, ...] by name."""
    found = []
    for row, segments in zip(ids, types, strict=True):
        inputs = {
            "input_ids": np.asarray([row], np.int64),
            "token_type_ids": np.asarray([segments], np.int64),
            "attention_mask": np.ones((1, len(row)), np.int64),
        }
        found.append({name: array[0] for name, array in run_session(session, inputs).items()})
    return found


def _answered(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    question = squad.Question("", texts[0], texts[1], ("",), (0,))
    windows = squad.encode(tokenizer, [question], length)
    outputs = rows_alone(session, windows.encoded.input_ids, windows.encoded.token_type_ids)
    best: dict[str, Any] | None = None
    for number, (row, offsets) in enumerate(zip(outputs, windows.offsets, strict=True)):
        span = squad.best_span(row["start_logits"], row["end_logits"], offsets[:, 0] >= 0)
        if span is not None and (best is None or span[0] > best["score"]):
            score, first, last = span
            text = question.context[offsets[first, 0] : offsets[last, 1]]
            best = {"window": number, "first": first, "last": last, "score": score, "text": text}
    if best is not None:
        best["noAnswer"] = min(float(row["start_logits"][0] + row["end_logits"][0]) for row in outputs)
    return {"texts": list(texts), "ids": [list(row) for row in windows.encoded.input_ids], "span": best}


def _scored(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    row = tokenize(tokenizer, *([text] for text in texts), truncation=True, max_length=length)
    (output,) = rows_alone(session, row["input_ids"], row["token_type_ids"])
    return {"texts": list(texts), "ids": row["input_ids"], "logits": [float(x) for x in output["logits"]]}


def _compared(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    rows = tokenize(tokenizer, list(texts), truncation=True, max_length=length)
    outputs = rows_alone(session, rows["input_ids"], rows["token_type_ids"])
    vectors = np.stack([row["last_hidden_state"].astype(np.float64).mean(axis=0) for row in outputs])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return {"texts": list(texts), "ids": rows["input_ids"], "cosines": (vectors[1:] @ vectors[0]).tolist()}
