"""Makes the documents of each part into sequences of L token ids, one Arrow file per part.

Sequences are numbered by (part, row), so any worker can build any part. Axes: L length, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import fingerprinted_settings
from infra.settings.sections import Corpus, Sequences
from offline_teacher.corpus.documents import documents
from offline_teacher.corpus.partition import Part, last_modified, refuse_other_file
from offline_teacher.corpus.problems import Problems
from offline_teacher.sequences.packing import TextStatistics, pack
from offline_teacher.sequences.tokenizer import Encoder, load_encoder
from offline_teacher.store.index import PartIndex
from offline_teacher.store.parts import publish_part, read_counts
from offline_teacher.store.paths import SEQUENCES, part_name, part_path
from offline_teacher.store.schema import SPLITS, Layout
from offline_teacher.store.unfinished import finished_tasks, map_in_order, read_part_index, read_parts

VERSION = 3
"""Version of tokenising and packing. Parts that another version built are built again."""


@dataclass(frozen=True)
class Tokenising:
    """Builds the parts of a store's text. A pickled copy is all that a text worker needs."""

    root: str
    """Directory or URL of the store, which contains the tokenizer."""
    layout: Layout
    corpus: Corpus
    sequences: Sequences
    prompt: str = ""
    """Prompt that is put before every document."""
    counted: bool = False
    """Whether to publish token counts, which masking by frequency needs."""

    @property
    def encoder(self) -> Encoder:
        return load_encoder(storage.join(self.root, "tokenizer"))

    def outstanding(self, split: str, parts: Sequence[Part]) -> list[int]:
        """Returns the numbers of the parts that must be built; reads only the indices of finished parts."""
        sizes = storage.list_sizes(storage.join(self.root, SEQUENCES, split))
        is_current = partial(self._is_current, split, self.encoder.digest, sizes)
        current = map_in_order(lambda numbered: is_current(*numbered), enumerate(parts))
        return [number for number, done in enumerate(current) if not done]

    def build(self, split: str, number: int, part: Part) -> PartIndex:
        """Publishes the sequences of a part, which depend only on the arguments and this object, and returns
        its index. Raises UserError if the store has tasks that were computed from other text. Raises
        NodeError if a file no longer has its size in ``part``."""
        for span in part.spans if self.corpus.source != "hub" else ():
            refuse_other_file(span)
        encoder, problems, statistics = self.encoder, Problems(self.corpus.strict), TextStatistics()
        texts = (self.prompt + document for document in documents(part, self.corpus, problems))
        rows = list(pack(texts, encoder, self.sequences, statistics))
        problems.cut_documents, problems.cut_tokens = statistics.cut_documents, statistics.cut_tokens
        self._refuse_other_digest(split, number, statistics.xxh3)
        ids = np.concatenate([ids for ids, _ in rows] or [np.empty((0, self.sequences.length))])
        columns = {
            "input_ids": ids.astype(self.layout.id_dtype, copy=False),
            "token_count": np.concatenate([count for _, count in rows] or [np.empty(0, np.uint16)]),
        }
        facts: dict[str, Any] = {
            "text": statistics.xxh3,
            "made_from": self._made_from(part, encoder.digest),
            "documents": statistics.documents,
            "text_bytes": statistics.text_bytes,
            "problems": problems.to_json(),
        }
        counts = _counts(columns["input_ids"], encoder) if self.counted else None
        return publish_part(self.root, self.layout, split, number, columns, facts, counts)

    def refuse_other_text(self, split: str, number: int, part: Part) -> None:
        """Reads a part's documents. Raises UserError if the store's tasks were computed from other text."""
        statistics = TextStatistics()
        for document in documents(part, self.corpus, Problems(strict=False)):
            statistics.add(self.prompt + document)
        self._refuse_other_digest(split, number, statistics.xxh3)

    def _refuse_other_digest(self, split: str, number: int, digest: str) -> None:
        try:
            index, _ = read_part_index(self.root, split, number)
        except UserError:  # the index is absent or damaged
            return
        if index.text != digest and any(finished_tasks(self.root, name) for name in SPLITS):
            raise UserError(
                f"corpus: the text of part {number} of {split} has changed since the tasks in {self.root}"
                " were made: restore the text, or choose another store.path"
            )

    def _made_from(self, part: Part, tokenizer: str) -> str:
        """Returns a digest of everything that decides a part's content, except the bytes of its files, and
        their names, so that they may be moved."""
        recipe = [fingerprinted_settings(section) for section in (self.corpus, self.sequences)]
        spans = [(span.start, span.stop, span.stamp) for span in part.spans]
        content = [VERSION, recipe, part.split, spans, tokenizer]
        return storage.digest_bytes(json.dumps(content, sort_keys=True).encode())

    def _is_current(self, split: str, digest: str, sizes: Mapping[str, int], number: int, part: Part) -> bool:
        """Whether a published part need not be built again. ``digest``: of the tokenizer. ``sizes``: name ->
        bytes of the published files.

        Compares settings, tokenizer and sizes of files. As in make, a local file must be older than the part.
        """
        name, path = part_name(number), part_path(self.root, split, number, ".json")
        if f"{name}.json" not in sizes:
            return False
        try:
            index, _ = read_part_index(self.root, split, number)
        except UserError:  # the index is damaged
            return False
        return (
            index.made_from == self._made_from(part, digest)
            and not (self.corpus.strict and index.problems["counts"])  # built while strict was false
            and sizes.get(f"{name}.arrow") == index.bytes
            and (index.counts is None or f"{name}.counts.arrow" in sizes)
            and (storage.is_remote(path) or last_modified(part) < os.stat(path).st_mtime)
        )


def text_digest(parts: Sequence[Part]) -> str:
    """Returns a digest of the ranges of all parts and the sizes of their files, but not of their names."""
    ranges = [[part.split, [(span.start, span.stop, span.stamp) for span in part.spans]] for part in parts]
    return storage.digest_bytes(json.dumps(ranges).encode())


def _counts(input_ids: np.ndarray, encoder: Encoder) -> dict[str, np.ndarray]:
    """Returns the ids that occur, without special tokens, and how often each occurs."""
    count = np.bincount(input_ids.ravel().astype(np.int64), minlength=encoder.vocab_size)
    count[list(encoder.special_ids)] = 0
    (token,) = np.nonzero(count)
    return {"token": token.astype(np.uint32), "count": count[token].astype(np.int64)}


def token_counts(root: str, split: str, vocab_size: int, cache: Cache) -> np.ndarray:
    """Returns how often each id occurs in all parts of a split: int64 [V], 0 for special tokens."""
    total = np.zeros(vocab_size, np.int64)
    for index, _ in read_parts(root, split):
        counts = read_counts(root, index, cache)
        total[counts["token"]] += counts["count"]
    return total


def part_indices(root: str, split: str, parts: int) -> list[PartIndex]:
    """Returns the indices of the ``parts`` parts. Raises UserError if all are empty."""
    indices = [index for index, _ in read_parts(root, split, parts)]
    if not any(index.rows for index in indices):
        problems = Problems.merged(dict(index.problems) for index in indices).summary()
        raise UserError(f"the corpus has no usable document: {problems or 'its files are empty'}")
    return indices


def problem_summary(root: str, split: str, parts: int) -> str:
    """Returns the problems of a split's text as one phrase; "" if there are none."""
    return Problems.merged(dict(index.problems) for index, _ in read_parts(root, split, parts)).summary()
