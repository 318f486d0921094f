"""What one worker does: build a part of the sequences, capture a shard. No Ray in here.

Everything a shard holds follows from the store's declaration, its sequences and the teacher's weights,
so that any worker makes the same bytes, any number of times.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from infra import storage
from infra.cache import Cache
from infra.errors import UserError
from infra.recipe import Recipe
from offline_teacher.corpus import Part
from offline_teacher.masking import MaskVocab, mask_sequences, mask_vocab
from offline_teacher.packing import load_encoder
from offline_teacher.sequences import build_part, open_sequences, read_token_counts
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.writer import read_declaration, write_head, write_shard

CACHE_BYTES = 4 << 30
"""Sequences of a remote store kept on a worker's disk."""


class ShardWorker:
    """Holds the teacher (loaded when first needed) and does one computation at a time.

    Two threads may call `capture`: while one writes its shard, the other computes the next.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self._computing = threading.Lock()
        self._loaded: Any = None
        self._passes: dict[str, _Pass] = {}

    def build_part(self, root: str, index: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences; returns ``{tokens}`` of it."""
        with self._computing:
            sidecar = build_part(root, index, part, self.recipe.corpus, self.recipe.sequences)
        return {"tokens": sidecar["tokens"]}

    def write_head(self, root: str) -> dict[str, Any]:
        with self._computing:
            write_head(root, self._teacher().head)
        return {}

    def capture(self, root: str, replica: int, index: int) -> dict[str, Any]:
        """Publishes one shard; returns ``{tokens, bytes}`` of it. ValueError where the teacher gives NaN."""
        columns = self.columns(root, replica, index)
        sidecar = write_shard(root, self._passes[root].declaration, replica, index, columns)
        tokens = int(columns["token_count"].sum())
        del columns
        _return_free_memory()
        return {"tokens": tokens, "bytes": sidecar.bytes}

    def columns(self, root: str, replica: int, index: int) -> dict[str, np.ndarray]:
        """All columns [n, ...] of a shard, made anew; publishes nothing."""
        with self._computing:
            return self._pass(root).columns(replica, index)

    def _teacher(self) -> Any:
        import torch

        from offline_teacher.teacher import load_teacher

        torch.set_num_threads(self.recipe.teacher.cpu_threads)  # of this thread: OpenMP counts them apart
        if self._loaded is None:
            self._loaded = load_teacher(self.recipe.teacher, self.device, self.recipe.sequences.length)
        return self._loaded

    def _pass(self, root: str) -> _Pass:
        loaded = self._teacher()
        if root not in self._passes:
            declaration = read_declaration(root)
            if declaration.fingerprint["teacher"] != loaded.weight_digest:
                raise UserError(
                    f"teacher.model: {self.recipe.teacher.model} has other weights here than where {root}"
                    " was begun; every node must see the same model"
                )
            self._passes[root] = _Pass(self.recipe, root, declaration, loaded)
        return self._passes[root]


def _return_free_memory() -> None:
    """Batches of many shapes leave holes in the C library's heap, more with every shard: to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class _Pass:
    """One store being made: its sequences, its masking, and the teacher set up for its layout."""

    def __init__(self, recipe: Recipe, root: str, declaration: Declaration, loaded: Any) -> None:
        from offline_teacher.capture import Capture

        self.declaration, self.recipe = declaration, recipe
        cache = Cache(None, CACHE_BYTES) if storage.is_remote(root) else None
        self.sequences = open_sequences(root, cache)
        self.vocab = store_vocab(root, recipe, declaration.special.mask)
        self.capture = Capture(loaded, declaration.layout)

    def columns(self, replica: int, index: int) -> dict[str, np.ndarray]:
        """All columns [n, ...] of a shard. Batches are of like lengths, and depend on the shard alone."""
        layout, ids = self.declaration.layout, self.declaration.plan.sequence_range(index)
        columns = masked_columns(self.sequences, self.vocab, self.recipe, self.declaration, replica, ids)
        out = {
            n: np.zeros((len(ids), *c.shape), c.dtype)
            for n, c in layout.columns().items()
            if n not in columns
        }
        longest_first = np.argsort(-columns["token_count"].astype(np.int64), kind="stable")
        size = self.recipe.teacher.batch_size
        for start in range(0, len(ids), size):
            rows = longest_first[start : start + size]
            batch = self.capture.batch(
                columns["input_ids"][rows], columns["token_count"][rows], columns["masked_positions"][rows]
            )
            for name, values in batch.items():
                out[name][rows] = values
        return {**columns, **out}


def masked_columns(
    sequences: Any, vocab: MaskVocab, recipe: Recipe, declaration: Declaration, replica: int, ids: range
) -> dict[str, np.ndarray]:
    """The columns of a shard that need no teacher: ids, counts, masked text, positions and labels."""
    columns = declaration.layout.columns()
    input_ids, token_count = sequences.rows(ids)
    sequence_id = np.arange(ids.start, ids.stop, dtype=np.int64)
    masked = mask_sequences(input_ids, token_count, sequence_id, replica, recipe.masking, vocab)
    values = {
        "sequence_id": sequence_id,
        "token_count": token_count,
        "input_ids": masked.input_ids,
        "masked_positions": masked.positions,
        "masked_labels": masked.labels,
    }
    return {name: value.astype(columns[name].dtype, copy=False) for name, value in values.items()}


def store_vocab(root: str, recipe: Recipe, mask_id: int) -> MaskVocab:
    """What masking must know of the store's tokenizer, and of its token counts where it is by frequency."""
    encoder, masking = load_encoder(storage.join(root, "tokenizer")), recipe.masking
    return mask_vocab(
        masking,
        mask_id,
        encoder.special_ids,
        encoder.vocab_size,
        token_counts=read_token_counts(root) if masking.sampling == "frequency" else None,
        tokens=[encoder.backend.id_to_token(i) or "" for i in range(encoder.vocab_size)]
        if masking.whole_word
        else None,
    )
