"""Packs texts into sequences of L token ids, with numpy.

``packed``: documents are concatenated with a [SEP] between them, and cut into sequences of L tokens, each of
which is [CLS] tokens [SEP] (similar to FULL-SENTENCES of RoBERTa, arXiv 1907.11692, section 4.2).
``document``: each document is one sequence, truncated to L tokens. Axes: n sequences, L length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from infra.settings.sections import Sequences
from offline_teacher.sequences.tokenizer import Encoder

Rows = tuple[np.ndarray, np.ndarray]
"""input_ids uint16|uint32 [n, L], with the pad token from token_count on; token_count uint16 [n]."""
BATCH_CHARACTERS = 1 << 17
"""Number of characters per call of the tokenizer. Larger batches do not fit into the processor's cache."""


@dataclass
class TextStatistics:
    """Counts and digest of a part's texts. Only ``cut_*`` (see `Problems`) depend on the tokenizer."""

    documents: int = 0
    text_bytes: int = 0
    cut_documents: int = 0
    cut_tokens: int = 0
    digest: Any = field(default_factory=xxhash.xxh3_128)

    @property
    def xxh3(self) -> str:
        return f"xxh3-128:{self.digest.hexdigest()}"

    def add(self, text: str) -> None:
        data = text.encode()
        self.documents += 1
        self.text_bytes += len(data)
        self.digest.update(data)
        self.digest.update(b"\0\n")  # so that the digest changes if text moves to the next document


def _batched(texts: Iterable[str], statistics: TextStatistics) -> Iterator[list[str]]:
    """Yields batches of about ``BATCH_CHARACTERS``, and adds each text to ``statistics``."""
    batch: list[str] = []
    room = BATCH_CHARACTERS
    for text in texts:
        statistics.add(text)
        batch.append(text)
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], BATCH_CHARACTERS
    if batch:
        yield batch


def pack(
    texts: Iterable[str], encoder: Encoder, settings: Sequences, statistics: TextStatistics
) -> Iterator[Rows]:
    """Yields the texts as rows, batch by batch, and adds the texts to ``statistics``."""
    encoded = (encoder.encode(batch) for batch in _batched(texts, statistics))
    if settings.packing == "packed":
        return _packed(encoded, encoder, settings.length)
    return _one_per_document(encoded, encoder, settings.length, statistics)


def _packed(encoded: Iterator[list[list[int]]], encoder: Encoder, length: int) -> Iterator[Rows]:
    body = length - 2
    rest = np.empty(0, encoder.dtype)
    for ids_of_texts in encoded:
        concatenated: list[int] = []
        for ids in ids_of_texts:
            if ids:
                concatenated += ids
                concatenated.append(encoder.sep_id)
        rest = np.concatenate([rest, np.array(concatenated, encoder.dtype)])
        # The part's last separator never enters a body, because the sequence's own [SEP] replaces it.
        full = max(len(rest) - 1, 0) // body
        if full:
            yield _with_special_tokens(rest[: full * body].reshape(full, body), encoder, length)
            rest = rest[full * body :]
    if len(rest) > 1:
        yield _with_special_tokens(rest[None, :-1], encoder, length)


def _with_special_tokens(bodies: np.ndarray, encoder: Encoder, length: int) -> Rows:
    """Returns [CLS] body [SEP] padded to L, and the token counts, of bodies [n, at most L - 2]."""
    count, body = bodies.shape
    rows = np.full((count, length), encoder.pad_id, encoder.dtype)
    rows[:, 0] = encoder.cls_id
    rows[:, 1 : body + 1] = bodies
    rows[:, body + 1] = encoder.sep_id
    return rows, np.full(count, body + 2, np.uint16)


def _one_per_document(
    encoded: Iterator[list[list[int]]], encoder: Encoder, length: int, statistics: TextStatistics
) -> Iterator[Rows]:
    for ids_of_texts in encoded:
        truncated = [ids[: length - 2] for ids in ids_of_texts if ids]
        left_out = [len(ids) - (length - 2) for ids in ids_of_texts if len(ids) > length - 2]
        statistics.cut_documents += len(left_out)
        statistics.cut_tokens += sum(left_out)
        if not truncated:
            continue
        body = np.array([len(ids) for ids in truncated])
        rows = np.full((len(truncated), length), encoder.pad_id, encoder.dtype)
        rows[:, 0] = encoder.cls_id
        rows[:, 1:][np.arange(length - 1) < body[:, None]] = np.array(
            [token for ids in truncated for token in ids], encoder.dtype
        )
        rows[np.arange(len(truncated)), body + 1] = encoder.sep_id
        yield rows, (body + 2).astype(np.uint16)
