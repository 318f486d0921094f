"""What one worker does: build a part of the sequences, capture a shard. No Ray in here.

Everything a shard holds follows from the store's declaration, its sequences and the teacher's weights,
so that any worker makes the same bytes, any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from infra import storage
from infra.cache import Cache
from infra.errors import UserError
from infra.recipe import Recipe
from offline_teacher.corpus import Part
from offline_teacher.masking import MaskVocab, mask_sequences, mask_vocab
from offline_teacher.packing import load_encoder
from offline_teacher.sequence_building import build_part
from offline_teacher.sequences import open_sequences, read_token_counts
from offline_teacher.shard_memory import Heap, ShardMemory
from offline_teacher.store.manifest import Declaration
from offline_teacher.store.writer import read_declaration, write_shard

TEXT_COLUMNS = ("sequence_id", "token_count", "input_ids", "masked_positions", "masked_labels")
"""Those that need no teacher."""
CACHE_BYTES = 4 << 30
"""Sequences of a remote store kept on a worker's disk."""


class ShardWorker:
    """Holds the teacher (loaded when first needed) and does one computation at a time.

    Two threads may call `capture`: while one masks or writes its shard, the other's is computed. All
    computing is done by a thread of its own, so that torch keeps one set of threads and one heap warm.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self._loaded: Any = None
        self._passes: dict[str, _Pass] = {}
        self._heap = Heap()
        self._computing = ThreadPoolExecutor(1, "compute", self._set_threads)
        self._compute(bool)  # starts the thread: the next one has the heap's main arena

    def build_part(self, root: str, index: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences; returns ``{tokens}`` of it."""
        sidecar = self._compute(build_part, root, index, part, self.recipe.corpus, self.recipe.sequences)
        return {"tokens": sidecar["tokens"]}

    def capture(self, root: str, replica: int, index: int) -> dict[str, Any]:
        """Publishes one shard; returns ``{tokens, bytes}`` of it. ValueError where the teacher gives NaN."""
        one = self._compute(self._pass, root)
        masked = one.masked(replica, index)
        with one.memory.lent() as memory:
            columns = masked | self._compute(one.outputs, masked, memory)
            sidecar = write_shard(root, one.declaration, replica, index, columns)
        self._heap.shrink()
        return {"tokens": int(masked["token_count"].sum()), "bytes": sidecar.bytes}

    def columns(self, root: str, replica: int, index: int) -> dict[str, np.ndarray]:
        """All columns [n, ...] of a shard, made anew; publishes nothing."""
        one = self._compute(self._pass, root)
        masked = one.masked(replica, index)
        return masked | self._compute(one.outputs, masked, one.memory.new())

    def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._computing.submit(function, *arguments).result()

    def _set_threads(self) -> None:
        import torch

        torch.set_num_threads(self.recipe.teacher.cpu_threads)  # of this thread: OpenMP counts them apart

    def _teacher(self) -> Any:
        from offline_teacher.teacher import load_teacher

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


class _Pass:
    """One store being made: its sequences, its masking, and the teacher set up for its layout."""

    def __init__(self, recipe: Recipe, root: str, declaration: Declaration, loaded: Any) -> None:
        from offline_teacher.capture import Capture

        self.declaration, self.recipe = declaration, recipe
        cache = Cache(None, CACHE_BYTES) if storage.is_remote(root) else None
        self.sequences = open_sequences(root, cache)
        self.vocab = store_vocab(root, recipe, declaration.special.mask)
        self.capture = Capture(loaded, declaration.layout)
        made = {n: c for n, c in declaration.layout.columns().items() if n not in TEXT_COLUMNS}
        self.memory = ShardMemory(len(declaration.plan.sequence_range(0)), made)

    def masked(self, replica: int, index: int) -> dict[str, np.ndarray]:
        """The columns [n, ...] of a shard that need no teacher."""
        ids = self.declaration.plan.sequence_range(index)
        return masked_columns(self.sequences, self.vocab, self.recipe, self.declaration, replica, ids)

    def outputs(self, masked: dict[str, np.ndarray], memory: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns [n, ...] that need it, in ``memory``. Batches are of like lengths, and depend on the
        shard alone; every row is of one of them."""
        count = len(masked["token_count"])
        out = {name: array[:count] for name, array in memory.items()}
        longest_first = np.argsort(-masked["token_count"].astype(np.int64), kind="stable")
        size = self.recipe.teacher.batch_size
        for start in range(0, count, size):
            rows = longest_first[start : start + size]
            batch = self.capture.batch(
                masked["input_ids"][rows], masked["token_count"][rows], masked["masked_positions"][rows]
            )
            for name, values in batch.items():
                out[name][rows] = values
        return out


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
        tokenizer=encoder.content() if masking.whole_word else None,
    )
