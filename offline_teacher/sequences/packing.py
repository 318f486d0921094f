"""Text to rows of L token ids: the tokenizer as packing needs it, and the packing itself, in numpy.

``packed``: every sequence is [CLS] tokens [SEP]. Documents are concatenated with a [SEP] between them and cut
every L tokens (similar to FULL-SENTENCES of RoBERTa, arXiv 1907.11692, section 4.2).
``document``: one document a sequence, cut at L. Shapes: n sequences, L length.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from infra import control_tokens
from infra.control_tokens import ControlIds
from infra.errors import UserError
from infra.files import storage
from infra.settings.sections import Sequences

BATCH_CHARACTERS = 1 << 17
"""Characters of text in one call of the tokenizer. Larger batches do not fit into the cache and are
slower."""


# The tokenizer


@dataclass(frozen=True)
class Encoder:
    """A fast tokenizer as packing needs it: text to bare ids, and the ids of the special tokens."""

    backend: Any
    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int | None
    control: ControlIds
    special_ids: tuple[int, ...]
    """Never masked, and never drawn in the place of a masked token; ids without a token are among them."""
    vocab_size: int
    """The largest id and one; the teacher may have more rows of embeddings."""
    digest: str

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the texts. They contain no control token except the unknown token, whatever the text
        is."""
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.control.replace_in(encoding.ids) for encoding in found]

    def content(self) -> dict[str, Any]:
        """As in a tokenizer.json."""
        content: dict[str, Any] = json.loads(self.backend.to_str())
        return content


@lru_cache(maxsize=2)
def load_encoder(directory: str) -> Encoder:
    """The tokenizer saved in ``directory`` (local or URL). UserError where it is not a fast BERT-like one."""
    from transformers import AutoTokenizer

    files = {
        name: storage.read_bytes(storage.join(directory, name)) for name in storage.list_names(directory)
    }
    digest = xxhash.xxh3_128()
    with tempfile.TemporaryDirectory() as local:
        for name, data in files.items():
            Path(local, name).write_bytes(data)
            digest.update(f"{name}:{len(data)}:".encode() + data)
        try:
            tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory}: no tokenizer can be loaded from it: {error}") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"{directory}: has no tokenizer.json; save a fast tokenizer there")
    for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"{directory}: the tokenizer has no {name}; only BERT-like tokenizers can be used"
            )
    control_tokens.read_as_text(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokens = tokenizer.get_vocab().values()
    vocab_size = max(tokens) + 1
    gaps = set(range(vocab_size)).difference(tokens)
    return Encoder(
        backend=backend,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
        control=ControlIds.of(tokenizer),
        special_ids=tuple(sorted(gaps.union(tokenizer.all_special_ids))),
        vocab_size=vocab_size,
        digest=f"xxh3-128:{digest.hexdigest()}",
    )


# Packing


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
