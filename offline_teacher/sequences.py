"""The finished sequences of a store: numbered rows of L token ids, read by permanent id.

``sequence_building`` makes them. Shapes: n sequences, L length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from infra import storage
from infra.cache import Cache
from infra.errors import UserError
from offline_teacher.store.sealed import read_sealed

FORMAT_VERSION = 2
OPEN_PARTS = 64


def folder(store_dir: str) -> str:
    return storage.join(store_dir, "sequences")


def part_file(store_dir: str, index: int, suffix: str) -> str:
    return storage.join(folder(store_dir), f"part-{index:05d}{suffix}")


@dataclass(frozen=True)
class Index:
    """``sequences/index.json``. ``sequence_id`` counts through the parts in order, from 0."""

    format_version: int
    length: int
    packing: str
    vocab_size: int
    part_sequences: list[int]
    part_digests: list[str]
    corpus_digest: str
    """Over the text of all parts in order: free of file names, tokenizer and workers."""
    token_counts_digest: str
    documents: int
    text_bytes: int
    tokens: int
    """Special tokens included, padding not."""
    problems: dict[str, Any]

    @property
    def count(self) -> int:
        return sum(self.part_sequences)


def read_index(store_dir: str) -> Index | None:
    """None unless ``finish_index`` has run. UserError where the file is damaged."""
    path = storage.join(folder(store_dir), "index.json")
    if not storage.exists(path):
        return None
    try:
        index = Index(**read_sealed(path, "delete it and run again"))
    except TypeError:
        raise UserError(f"{path}: is of another version; delete it and run again") from None
    return index


def read_token_counts(store_dir: str) -> np.ndarray:
    """How often each id occurs in the corpus, special tokens 0: [V] int64. UserError where damaged."""
    index = read_index(store_dir)
    path = storage.join(folder(store_dir), "token_counts.arrow")
    data = storage.read_bytes(path)
    if index is None or storage.digest_bytes(data) != index.token_counts_digest:
        raise UserError(f"{path}: does not match index.json; delete both and run again")
    counts: np.ndarray = pa.ipc.open_file(data).read_all()["count"].to_numpy()
    return counts


class SequenceStore:
    """The finished sequences of a store, by permanent id; maps files as they are needed."""

    def __init__(self, store_dir: str, index: Index, cache: Cache | None) -> None:
        self.store_dir = store_dir
        self.index = index
        self._cache = cache
        self._starts = np.concatenate([[0], np.cumsum(index.part_sequences, dtype=np.int64)])
        self._part = lru_cache(OPEN_PARTS)(self._open_part)
        self._checked: set[int] = set()

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def rows(self, ids: range) -> tuple[np.ndarray, np.ndarray]:
        """input_ids [n, L] uint16|uint32 and token_count [n] uint16 of consecutive ids, read-only."""
        if not (ids.step == 1 and 0 <= ids.start <= ids.stop <= self.count):
            raise IndexError(f"{ids} is not a range of the {self.count} sequences of {self.store_dir}")
        first = int(np.searchsorted(self._starts, ids.start, side="right")) - 1
        inputs, counts = [], []
        at = ids.start
        for part in range(first, len(self.index.part_sequences)):
            if at >= ids.stop:
                break
            start, stop = int(self._starts[part]), int(self._starts[part + 1])
            table = self._part(part).slice(at - start, min(ids.stop, stop) - at)
            inputs += [chunk.flatten().to_numpy() for chunk in table["input_ids"].chunks]
            counts += [chunk.to_numpy() for chunk in table["token_count"].chunks]
            at = min(ids.stop, stop)
        if not inputs:
            dtype = np.uint16 if self.index.vocab_size <= 1 << 16 else np.uint32
            return np.empty((0, self.index.length), dtype), np.empty(0, np.uint16)
        return np.concatenate(inputs).reshape(-1, self.index.length), np.concatenate(counts)

    def _open_part(self, part: int) -> pa.Table:
        path, digest = part_file(self.store_dir, part, ".arrow"), self.index.part_digests[part]
        damaged = UserError(f"{path}: is damaged or missing; delete it and run again to make it anew")
        if self._cache is not None:
            path = self._cache.local(path, digest)
        elif part not in self._checked:
            if not storage.exists(path) or storage.digest_file(path) != digest:
                raise damaged
            self._checked.add(part)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def open_sequences(store_dir: str, cache: Cache | None = None) -> SequenceStore:
    """The finished sequences of a store; each file's digest is checked when it is first opened.

    A remote store needs a cache. UserError where ``finish_index`` has not run.
    """
    index = read_index(store_dir)
    if index is None:
        raise UserError(f"{folder(store_dir)}: has no index.json; run the teacher stage on it first")
    return SequenceStore(store_dir, index, cache)
