"""Computes golden.json: an exported model's outputs in Python, with which the page compares its outputs.

ONNX Runtime runs each row in a batch of its own with one thread, as the page does. Each example has

    texts     the inputs
    ids       token ids, one list per input row: the windows of a question, or each text of an encoder
    span      best answer to a question (window, first and last token, score, text, noAnswer), or null
    logits    output of a classification or regression
    cosines   for an encoder, cosine similarity of the first text to each of the others
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.devices.onnx_model import open_session, run_session
from evaluation.tasks import answer_spans
from infra.control_tokens import tokenize

Texts = tuple[str, ...]

_TEXT = (
    "The lighthouse on the northern cape was built in 1874 by two sisters, Ada and Ruth Marlow. In the "
    "winter of 1912 the keeper, Tom Hale, kept the lamp burning for nine nights with fish oil. "
)
QUESTIONS: tuple[Texts, ...] = (
    ("Who kept the lamp burning?", _TEXT),
    ("When was the lighthouse built?", _TEXT * 12),  # needs several windows
    ("Wann wurde Zürichs Straßenbahn eröffnet?", "Zürichs Straßenbahn fährt seit 1882, sagt Jürg Ångström."),
    ("متى بني البرج؟", "بني البرج سنة 1874 على يد أختين. שלום עולם."),
    ("谁点亮了灯？", "1912年冬天，汤姆·黑尔点亮了灯塔的灯。𠀀𠮷 한국어 텍스트"),
    (
        "What [SEP] is [MASK]?",
        "Text with [CLS] and [SEP], \u0000\u200b\ufeff\ufffd or e\u0301\u0327 and \ufb01\ufb02. İSTANBUL ΣΑΣ",
    ),
    ("🙂 who? 👩🏽‍🚀", "The 🚢 arrived at 10:45 — with “Ms. O’Neill”… and $3,000.50!\t\r\n" + "x" * 150),
    ("why " * 120, _TEXT),  # longer than the limit of a question
)
"""Questions and contexts, most of them hard to tokenize."""
SENTENCES: tuple[Texts, ...] = tuple((context[:400],) for _, context in QUESTIONS)
"""Inputs of models that do not answer questions."""


def golden(model: str, kind: str, tokenizer: Any, texts: Sequence[Texts], length: int) -> dict[str, Any]:
    """Returns the content of golden.json.

    model: path of the ONNX file; kind: spans, encoder, classification or regression; texts: one tuple per
    input; length: largest number of tokens per row.
    """
    session = open_session(model)
    if kind == "spans":
        examples = [_span_example(session, tokenizer, pair, length) for pair in texts]
    elif kind == "encoder":
        groups = [(first[0], *(row[0] for row in texts)) for first in texts[:3]]
        examples = [_cosine_example(session, tokenizer, group, length) for group in groups]
    else:
        examples = [_logit_example(session, tokenizer, row, length) for row in texts]
    return {"examples": examples}


def run_rows(session: Any, ids: Sequence[list[int]], types: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Runs each row in a batch of its own, without padding; returns its outputs by name, arrays [L, ...]."""
    outputs = []
    for row_ids, row_types in zip(ids, types, strict=True):
        inputs = {
            "input_ids": np.asarray([row_ids], np.int64),
            "token_type_ids": np.asarray([row_types], np.int64),
            "attention_mask": np.ones((1, len(row_ids)), np.int64),
        }
        outputs.append({name: array[0] for name, array in run_session(session, inputs).items()})
    return outputs


def _span_example(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    """Returns the example of texts = (question, context)."""
    question = answer_spans.Question("", texts[0], texts[1], ("",), (0,))
    windows = answer_spans.encode(tokenizer, [question], length)
    outputs = run_rows(session, windows.encoded.input_ids, windows.encoded.token_type_ids)
    best: dict[str, Any] | None = None
    for number, (row, offsets) in enumerate(zip(outputs, windows.offsets, strict=True)):
        span = answer_spans.best_span(row["start_logits"], row["end_logits"], offsets[:, 0] >= 0)
        if span is not None and (best is None or span[0] > best["score"]):
            score, first, last = span
            text = question.context[offsets[first, 0] : offsets[last, 1]]
            best = {"window": number, "first": first, "last": last, "score": score, "text": text}
    if best is not None:
        best["noAnswer"] = min(float(row["start_logits"][0] + row["end_logits"][0]) for row in outputs)
    return {"texts": list(texts), "ids": [list(row) for row in windows.encoded.input_ids], "span": best}


def _logit_example(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    row = tokenize(tokenizer, *([text] for text in texts), truncation=True, max_length=length)
    (output,) = run_rows(session, row["input_ids"], row["token_type_ids"])
    return {"texts": list(texts), "ids": row["input_ids"], "logits": [float(x) for x in output["logits"]]}


def _cosine_example(session: Any, tokenizer: Any, texts: Texts, length: int) -> dict[str, Any]:
    rows = tokenize(tokenizer, list(texts), truncation=True, max_length=length)
    outputs = run_rows(session, rows["input_ids"], rows["token_type_ids"])
    embeddings = np.stack([row["last_hidden_state"].astype(np.float64).mean(axis=0) for row in outputs])
    embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    cosines = (embeddings[1:] @ embeddings[0]).tolist()
    return {"texts": list(texts), "ids": rows["input_ids"], "cosines": cosines}
