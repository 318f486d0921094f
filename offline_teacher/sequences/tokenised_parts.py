"""Documents become sequences of L token ids, one Arrow file a part, in any order by any worker.

A part is tokenised, packed and published on its own; its rows are numbered (part, row), so nothing waits for
the other parts. Shapes: n rows, L length, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import outcome_settings
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import Part, last_modified
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.packing import TextSeen, batched, pack
from offline_teacher.sequences.tokenizer import Encoder, load_encoder
from offline_teacher.store.index import PartIndex
from offline_teacher.store.parts import publish_part, read_counts
from offline_teacher.store.paths import SEQUENCES, part_name, part_path
from offline_teacher.store.pending import (
    finished_parts,
    finished_tasks,
    in_order,
    read_part_index,
    read_parts,
)
from offline_teacher.store.schema import SPLITS, Layout

COUNTS_END = ".counts.arrow"
VERSION = 3
"""Version of the way text becomes sequences. Parts of another version are built again."""


@dataclass(frozen=True)
class Tokenising:
    """How the text of a store becomes sequences; pickled, it is what a text worker needs to know."""

    root: str
    """The store, in which the tokenizer is."""
    layout: Layout
    corpus: Corpus
    sequences: Sequences
    prompt: str = ""
    """The prompt before every text."""
    counted: bool = False
    """Whether to count tokens, because masking is by frequency."""

    @property
    def encoder(self) -> Encoder:
        return load_encoder(storage.join(self.root, "tokenizer"))

    def outstanding(self, split: str, parts: Sequence[Part]) -> list[int]:
        """The parts that ``build`` has to build; reads their indices only."""
        sizes = storage.list_sizes(storage.join(self.root, SEQUENCES, split))
        tokenizer = self.encoder.digest

        def is_there(number: int) -> bool:
            return self._is_current(split, number, parts[number], tokenizer, sizes)

        there = in_order(is_there, range(len(parts)))
        return [number for number, found in enumerate(there) if not found]

    def build(self, split: str, number: int, part: Part) -> PartIndex:
        """Publishes the sequences of a part and returns their index.

        They depend on the arguments and this object alone. UserError where tasks of the store were made of
        other text.
        """
        encoder, problems, text = self.encoder, Problems(self.corpus.strict), TextSeen()
        texts = (self.prompt + document for document in documents(part, self.corpus, problems))
        rows = list(pack(batched(texts, text), encoder, self.sequences, text))
        problems.cut_documents, problems.cut_tokens = text.cut_documents, text.cut_tokens
        self._refuse_other_digest(split, number, text.xxh3)
        ids = np.concatenate([ids for ids, _ in rows] or [np.empty((0, self.sequences.length))])
        columns = {
            "input_ids": ids.astype(self.layout.id_dtype, copy=False),
            "token_count": np.concatenate([count for _, count in rows] or [np.empty(0, np.uint16)]),
        }
        facts: dict[str, Any] = {
            "text": text.xxh3,
            "made_from": self._made_from(part, encoder.digest),
            "documents": text.documents,
            "text_bytes": text.text_bytes,
            "problems": problems.to_json(),
        }
        counts = _counts(columns["input_ids"], encoder) if self.counted else None
        return publish_part(self.root, self.layout, split, number, columns, facts, counts)

    def refuse_other_text(self, split: str, number: int, part: Part) -> None:
        """Raises UserError if tasks of the store were made from other text than the corpus now has; reads one
        part."""
        text = TextSeen()
        for document in documents(part, self.corpus, Problems(strict=False)):
            text.add(self.prompt + document)
        self._refuse_other_digest(split, number, text.xxh3)

    def _refuse_other_digest(self, split: str, number: int, digest: str) -> None:
        try:
            found, _ = read_part_index(self.root, split, number)
        except UserError:  # absent or damaged
            return
        if found.text != digest and any(finished_tasks(self.root, name) for name in SPLITS):
            raise UserError(
                f"corpus: part {number} of the {split} text in {self.root} was made of other text, which has"
                " changed since: restore it, or choose another store.path"
            )

    def _made_from(self, part: Part, tokenizer: str) -> str:
        """Digest of all that decides a part's content but the bytes of its files, and not of their names."""
        recipe = [outcome_settings(section) for section in (self.corpus, self.sequences)]
        spans = [(span.start, span.stop, span.stamp) for span in part.spans]
        content = [VERSION, recipe, part.split, spans, tokenizer]
        return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())

    def _is_current(
        self, split: str, number: int, part: Part, tokenizer: str, sizes: Mapping[str, int]
    ) -> bool:
        """Whether a part need not be built again. ``sizes``: file name -> bytes, of what is there.

        Its recipe and sizes are compared, and, as make does, that no local file of it was written after it.
        """
        name, path = part_name(number), part_path(self.root, split, number, ".json")
        if f"{name}.json" not in sizes:
            return False
        try:
            index, _ = read_part_index(self.root, split, number)
        except UserError:  # damaged
            return False
        return (
            index.made_from == self._made_from(part, tokenizer)
            and not (self.corpus.strict and index.problems["counts"])  # found when it was not strict
            and sizes.get(f"{name}.arrow") == index.bytes
            and (index.counts is None or f"{name}{COUNTS_END}" in sizes)
            and (storage.is_remote(path) or last_modified(part) < os.stat(path).st_mtime)
        )


def text_digest(parts: Sequence[Part]) -> str:
    """Digest of how the text is cut into parts and of the sizes of its files, not of their names."""
    cut = [[part.split, [(span.start, span.stop, span.stamp) for span in part.spans]] for part in parts]
    return storage.digest_bytes(json.dumps(cut).encode())


def _counts(input_ids: np.ndarray, encoder: Encoder) -> dict[str, np.ndarray]:
    """How often each id occurs, special tokens left out."""
    count = np.bincount(input_ids.ravel().astype(np.int64), minlength=encoder.vocab_size)
    count[list(encoder.special_ids)] = 0
    (token,) = np.nonzero(count)
    return {"token": token.astype(np.uint32), "count": count[token].astype(np.int64)}


def token_counts(root: str, split: str, vocab_size: int, cache: Cache) -> np.ndarray:
    """How often each id occurs in all parts of a split, special tokens 0: int64 [V]."""
    total = np.zeros(vocab_size, np.int64)
    for index, _ in read_parts(root, split, finished_parts(root, split)):
        counts = read_counts(root, index, cache)
        total[counts["token"]] += counts["count"]
    return total


def rows_of(root: str, split: str, parts: int) -> tuple[int, ...]:
    """The number of rows of each part. UserError where no part has any."""
    found = list(read_parts(root, split, parts))
    if not any(index.rows for index, _ in found):
        problems = Problems.merged(dict(index.problems) for index, _ in found).summary()
        raise UserError(
            f"the corpus has no usable document{': ' + problems if problems else ', its files are empty'}"
        )
    return tuple(index.rows for index, _ in found)


def problems_of(root: str, split: str, parts: int) -> str:
    """The problems of a split's text as a sentence; empty if there are none."""
    return Problems.merged(dict(index.problems) for index, _ in read_parts(root, split, parts)).summary()
