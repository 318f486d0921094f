"""Texts to rows of L token ids, in numpy.

``packed``: every sequence is [CLS] tokens [SEP]. Documents are concatenated with a [SEP] between them and cut
every L tokens (similar to FULL-SENTENCES of RoBERTa, arXiv 1907.11692, section 4.2).
``document``: one document a sequence, cut at L. Shapes: n sequences, L length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from infra.settings.sections import Sequences
from offline_teacher.sequences.tokenizer import Encoder

BATCH_CHARACTERS = 1 << 17
"""Characters of text in one call of the tokenizer. Larger batches do not fit into the cache and are
slower."""


@dataclass
class TextSeen:
    """Counts and digest of the texts that passed ``batched``. The corpus digest does not depend on the
    tokenizer."""

    documents: int = 0
    text_bytes: int = 0
    cut_documents: int = 0
    """Longer than a sequence, where each document is one."""
    cut_tokens: int = 0
    """What was left out of them."""
    digest: Any = field(default_factory=xxhash.xxh3_128)

    @property
    def xxh3(self) -> str:
        return f"xxh3-128:{self.digest.hexdigest()}"

    def add(self, text: str) -> None:
        data = text.encode()
        self.documents += 1
        self.text_bytes += len(data)
        self.digest.update(data)
        self.digest.update(b"\0\n")  # so that moving a document's end changes the digest


def batched(texts: Iterator[str], seen: TextSeen) -> Iterator[list[str]]:
    batch: list[str] = []
    room = BATCH_CHARACTERS
    for text in texts:
        seen.add(text)
        batch.append(text)
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], BATCH_CHARACTERS
    if batch:
        yield batch


def pack(
    batches: Iterator[list[str]], encoder: Encoder, settings: Sequences, seen: TextSeen | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of texts to (input_ids [n, L] uint16|uint32, token_count [n] uint16); pad after token_count.

    ``seen`` counts the documents that are cut.
    """
    encoded = (encoder.encode(texts) for texts in batches)
    if settings.packing == "packed":
        return _packed(encoded, encoder, settings.length)
    return _one_each(encoded, encoder, settings.length, seen or TextSeen())


def _packed(
    encoded: Iterator[list[list[int]]], encoder: Encoder, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    body = length - 2
    rest = np.empty(0, encoder.dtype)
    for ids_of_texts in encoded:
        run: list[int] = []
        for ids in ids_of_texts:
            if ids:
                run += ids
                run.append(encoder.sep_id)
        rest = np.concatenate([rest, np.array(run, encoder.dtype)])
        # At least one id stays behind: the part's last separator, which the sequence's own [SEP] replaces.
        full = max(len(rest) - 1, 0) // body
        if full:
            yield _framed(rest[: full * body].reshape(full, body), encoder, length)
            rest = rest[full * body :]
    if len(rest) > 1:
        yield _framed(rest[None, :-1], encoder, length)


def _framed(bodies: np.ndarray, encoder: Encoder, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bodies [n, at most L - 2] between [CLS] and [SEP], padded to L."""
    count, body = bodies.shape
    rows = np.full((count, length), encoder.pad_id, encoder.dtype)
    rows[:, 0] = encoder.cls_id
    rows[:, 1 : body + 1] = bodies
    rows[:, body + 1] = encoder.sep_id
    return rows, np.full(count, body + 2, np.uint16)


def _one_each(
    encoded: Iterator[list[list[int]]], encoder: Encoder, length: int, seen: TextSeen
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for ids_of_texts in encoded:
        cut = [ids[: length - 2] for ids in ids_of_texts if ids]
        left_out = [len(ids) - (length - 2) for ids in ids_of_texts if len(ids) > length - 2]
        seen.cut_documents += len(left_out)
        seen.cut_tokens += sum(left_out)
        if not cut:
            continue
        body = np.array([len(ids) for ids in cut])
        rows = np.full((len(cut), length), encoder.pad_id, encoder.dtype)
        rows[:, 0] = encoder.cls_id
        rows[:, 1:][np.arange(length - 1) < body[:, None]] = np.array(
            [token for ids in cut for token in ids], encoder.dtype
        )
        rows[np.arange(len(cut)), body + 1] = encoder.sep_id
        yield rows, (body + 2).astype(np.uint16)
