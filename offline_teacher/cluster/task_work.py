"""The teacher worker, which runs the teacher on tasks. This module does not import Ray.

The content of a task depends only on the store's spec, its sequences and the teacher's weights. So every
worker in the same environment writes the same bytes, also when a task is repeated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import psutil

from infra.errors import NodeError, UserError
from infra.files import storage
from infra.files.cache import Cache
from infra.settings.recipe import Recipe
from offline_teacher.cluster.worker_base import WorkerBase
from offline_teacher.sequences.masking import MaskVocab, mask_sequences, mask_vocab
from offline_teacher.sequences.tokenised_parts import token_counts
from offline_teacher.sequences.tokenizer import load_encoder
from offline_teacher.store.blocks import BufferPool
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import Task
from offline_teacher.store.parts import read_part
from offline_teacher.store.schema import Columns
from offline_teacher.store.unfinished import read_part_index, read_spec
from offline_teacher.store.writer import TaskWriter

CACHE_BYTES = 4 << 30
"""Largest number of bytes of a remote store's sequences that a worker keeps on its disk."""
GROWTH = 1.05
"""Free memory is returned once resident memory exceeds this multiple of what was left the last time."""
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # C libraries other than glibc have none


class TaskWorker(WorkerBase):
    """Holds the teacher, which is loaded when first needed, and runs one computation at a time.

    Several threads may call ``infer``: while one masks, loads or writes its task, the teacher computes the
    task of another. One more thread runs all computations, so that torch uses only one set of threads."""

    def __init__(self, recipe: Recipe, device: str, root: str) -> None:
        """``root``: path of the store. ``recipe.masking.probability`` must not be None."""
        assert recipe.teacher is not None
        self.recipe, self.settings, self.device, self.root = recipe, recipe.teacher, device, root
        self._buffers, self._least_resident = BufferPool(), 0.0
        self._computing = ThreadPoolExecutor(1, "compute", self._set_threads)

    def prepare(self) -> dict[str, Any]:
        """Loads the teacher, so that a node where this fails is found before it gets a task. Raises NodeError
        then: the driver loaded the same teacher, so the cause is this node."""
        try:
            return {"environment": self.environment()}
        except UserError as error:
            raise NodeError(str(error)) from error

    def infer(self, split: str, task: Task) -> dict[str, Any]:
        """Publishes one task; returns its ``{tokens, bytes}``. Raises ValueError if the teacher gives NaN."""
        environment = self.environment()
        with TaskWriter(self.root, self._spec, split, task, environment, self._buffers) as writer:
            for columns, checked in self._shards(split, task):
                writer.write(columns, checked)
            index = writer.publish()
        self._return_memory()
        return {"tokens": index.tokens, "bytes": sum(shard.bytes for shard in index.shards)}

    def columns(self, split: str, task: Task) -> Iterator[Columns]:
        """Yields all columns of a task, shard by shard, and publishes nothing."""
        return (columns for columns, _ in self._shards(split, task))

    def _shards(self, split: str, task: Task) -> Iterator[tuple[Columns, bool]]:
        """Yields the columns of each shard, and whether the device found the teacher's values possible."""
        inference = self._compute(lambda: self._inference)
        size = self._spec.plan.block_samples * self._spec.plan.shard_blocks
        for start in range(0, task.samples, size):
            masked = self._masked(split, task, task.rows[start : start + size])
            batches = inference.load(masked, self.settings.batch_size)
            pending = self._compute(inference.compute, batches, len(masked["sequence_id"]))
            yield masked | pending.wait(), pending.values_possible()

    def environment(self) -> dict[str, Any]:
        """The facts on which the last bits of this worker's numbers depend."""
        return dict(self._compute(lambda: self._inference.teacher.environment))

    def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._computing.submit(function, *arguments).result()

    def _set_threads(self) -> None:
        import torch

        torch.set_num_threads(self.settings.cpu_threads)  # OpenMP keeps this setting for each thread

    def _return_memory(self) -> None:
        """Batches of many shapes leave holes in the C library's heap, more with every shard."""
        process = psutil.Process()
        if _TRIM is not None and process.memory_info().rss > GROWTH * self._least_resident:
            _TRIM(0)
            self._least_resident = process.memory_info().rss

    @cached_property
    def _spec(self) -> Spec:
        return read_spec(self.root)

    @cached_property
    def _inference(self) -> Any:
        """Used by the computing thread only."""
        from offline_teacher.inference.columns import Inference
        from offline_teacher.inference.teacher import load_teacher

        layout = self._spec.layout
        loaded = load_teacher(self.settings, layout.replay_layers, layout.top_k > 0, self.device)
        if self._spec.fingerprint["teacher"] != loaded.weight_digest:
            raise UserError(
                f"teacher.model: {self.settings.model} has other weights here than when {self.root} was"
                " started; every node must see the same model"
            )
        return Inference(loaded, layout)

    def _masked(self, split: str, task: Task, rows: range) -> Columns:
        """The columns [n, ...] of some rows of a task that are known without the teacher."""
        layout, part = self._spec.layout, self._part(split, task.part)
        input_ids, count = (part[name][rows.start : rows.stop] for name in ("input_ids", "token_count"))
        ids = task.sequence_ids()[rows.start - task.rows.start :][: len(rows)]
        values = {"sequence_id": ids, "token_count": count, "input_ids": input_ids}
        if layout.masked:
            masked = mask_sequences(input_ids, count, ids, task.epoch, self.recipe.masking, self._vocab)
            values |= {"input_ids": masked.input_ids, "masked_positions": masked.positions}
            values["masked_labels"] = masked.labels
        columns = layout.columns()
        return {name: value.astype(columns[name].dtype, copy=False) for name, value in values.items()}

    @cached_property
    def _part(self) -> Callable[[str, int], Columns]:
        """Function of (split, number) that reads a part of the sequences, and keeps the last four."""

        def read(split: str, number: int) -> Columns:
            index, _ = read_part_index(self.root, split, number)
            return read_part(self.root, self._spec.layout, index, self._cache)

        return lru_cache(maxsize=4)(read)

    @cached_property
    def _cache(self) -> Cache:
        return Cache(None, CACHE_BYTES)

    @cached_property
    def _vocab(self) -> MaskVocab:
        """For masking: from the tokenizer and, if masking is by frequency, from the training text."""
        masking, mask = self.recipe.masking, self._spec.special.mask
        encoder = load_encoder(storage.join(self.root, "tokenizer"))
        assert mask is not None
        counts = None
        if masking.sampling == "frequency":
            counts = token_counts(self.root, "train", encoder.vocab_size, self._cache)
        return mask_vocab(masking, mask, encoder, counts)
