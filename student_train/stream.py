"""From the shards of a store to the batches of one rank: read and collated ahead of the step by threads.

Axes: n samples of a batch, L length, M masked positions, P recorded positions (L or M), K top-k,
T temperatures, D hidden size.

A stream has no state but the number of its next step: a new one started there goes on identically.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from infra.errors import UserError
from student_train.order import SampleOrder, check_world, micro_batch_rows, run_steps

if TYPE_CHECKING:
    from infra.cache import Cache
    from offline_teacher.store.schema import Layout, ShardPlan

IDS = ("input_ids", "token_count", "masked_positions", "masked_labels")
"""Columns every batch holds; with ``topk_ids`` they come out as int64."""
TEACHER = ("topk_ids", "topk_logits", "logsumexp", "hidden_states", "hidden_scale")
"""Columns a loss may ask for, where the store has them; all but ``topk_ids`` in the store's dtype."""
_THREADS = 2
"""One collates while the other waits for a disk or an object store."""


class Shard(Protocol):
    @property
    def columns(self) -> dict[str, np.ndarray]: ...


class Store(Protocol):
    """What the stream needs of ``offline_teacher.store.reader.Store``."""

    @property
    def layout(self) -> Layout: ...
    @property
    def plan(self) -> ShardPlan: ...
    def shard(self, replica: int, index: int, cache: Cache | None = None) -> Shard: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. A column that was not asked for is None."""

    input_ids: torch.Tensor  # int64 [n, L], masked
    token_count: torch.Tensor  # int64 [n]; position i is real where i < token_count
    masked_positions: torch.Tensor  # int64 [n, M], ascending; unused slots -1
    masked_labels: torch.Tensor  # int64 [n, M]; unused slots 0
    sequence_ids: torch.Tensor  # int64 [n]
    replica: torch.Tensor  # int64 [n]
    topk_ids: torch.Tensor | None = None  # int64 [n, P, K]
    topk_logits: torch.Tensor | None = None  # float16 [n, P, K]
    logsumexp: torch.Tensor | None = None  # float32 [n, P, T]
    hidden_states: torch.Tensor | None = None  # float16 or int8 [n, P, D]
    hidden_scale: torch.Tensor | None = None  # float32 [n, P]; int8 only
    weight: float = 1.0
    """0.0 marks a batch that only keeps this rank in step: one sample of the global batch, computed
    by another rank, whose loss must be multiplied by 0."""

    def __len__(self) -> int:
        return len(self.token_count)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; copies of pinned tensors do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            k: function(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """What one rank computes in one optimiser step."""

    step: int
    micro_batches: list[Batch]
    """This rank's share; as many on every rank."""
    tokens: int
    """Non-pad tokens of the whole global batch, over all ranks."""
    masked: int
    """Masked tokens of the whole global batch, over all ranks."""
    sequence_ids: np.ndarray  # int64 [batch], the whole global batch in order
    replicas: np.ndarray  # int64 [batch]


class Stream:
    """Iterates the steps [start_step, stop_step) of a run for one rank.

    ``samples`` is the length of the run (``order.run_samples``): the batch that reaches it is cut there.
    ``columns`` names the columns of ``TEACHER`` the loss needs; None: all that the store has.
    ``prefetch`` is in micro-batches, at least one whole step. With device "cuda" tensors are pinned.
    Iterating raises ``DamagedShard`` (a ``UserError``) at the step that needs the shard.
    Use it as a context manager, or ``close`` it: its threads end with the micro-batch they are at.
    """

    def __init__(
        self,
        store: Store,
        order: SampleOrder,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        start_step: int,
        stop_step: int,
        prefetch: int = 4,
        device: str | torch.device = "cpu",
        *,
        samples: int | None = None,
        columns: Collection[str] | None = None,
        cache: Cache | None = None,
    ) -> None:
        samples = stop_step * batch_size if samples is None else samples
        check_world(batch_size, world, store.plan.sequences)
        assert start_step >= 0
        assert stop_step <= run_steps(samples, batch_size)
        self._order, self._batch_size, self._micro_batch_size = order, batch_size, micro_batch_size
        self._rank, self._world, self._samples = rank, world, samples
        self._next, self._stop = start_step, stop_step
        self._layout = store.layout
        self._names = (*IDS, *_teacher_columns(store.layout, columns))
        self._pin = torch.device(device).type == "cuda"
        micro_steps = len(micro_batch_rows(batch_size, micro_batch_size, rank, world))
        self._steps_ahead = max(1, -(-prefetch // micro_steps))
        window_samples = order.window_shards * store.plan.samples_per_shard
        # Those of the steps in flight, one more at either end, and one opened ahead and not yet used.
        windows = -(-(self._steps_ahead + 1) * batch_size // window_samples) + 3
        self._shards = _OpenShards(store, cache, windows * order.window_shards)
        self._warmed = -1
        self._last_window = order.window(max(0, min(samples, stop_step * batch_size) - 1))
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="stream")
        self._pending: deque[_PendingStep] = deque()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._submit_ahead()
        if not self._pending:
            self.close()
            raise StopIteration
        pending = self._pending.popleft()
        self._submit_ahead()
        try:
            tokens, masked = pending.counts.result()
            batches = [batch.result() for batch in pending.batches]
        except BaseException:
            self.close()
            raise
        return Step(pending.step, batches, tokens, masked, pending.sequence_ids, pending.replicas)

    def close(self) -> None:
        """Ends the threads and lets go of the shards; iteration is over."""
        self._closing.set()
        self._next = self._stop
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._shards.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _submit_ahead(self) -> None:
        while self._next < self._stop and len(self._pending) < self._steps_ahead:
            self._pending.append(self._submit(self._next))
            self._next += 1

    def _submit(self, step: int) -> _PendingStep:
        start = step * self._batch_size
        stop = min(start + self._batch_size, self._samples)
        replicas, ids = self._order.samples(start, stop)
        counts = self._pool.submit(self._count, replicas, ids)
        batches = []
        for rows in micro_batch_rows(len(ids), self._micro_batch_size, self._rank, self._world):
            weight = 1.0 if rows else 0.0
            part = slice(rows.start, rows.stop) if rows else slice(0, 1)
            batches.append(self._pool.submit(self._collate, replicas[part], ids[part], weight))
        self._warm(self._order.window(stop - 1) + 1)
        return _PendingStep(step, counts, batches, ids, replicas)

    def _warm(self, window: int) -> None:
        """Opens the shards of the next window, so that no step waits for all of them at once."""
        if self._warmed < window <= self._last_window:
            self._warmed = window
            self._pool.submit(self._open_all, self._order.window_shard_ids(window))

    def _open_all(self, shards: list[tuple[int, int]]) -> None:
        for replica, index in shards:
            if self._closing.is_set():
                return
            try:
                self._shards.columns(replica, index)
            except Exception:
                return  # whatever it is, the step that needs the shard will raise it

    def _count(self, replicas: np.ndarray, ids: np.ndarray) -> tuple[int, int]:
        """Non-pad and masked tokens of a whole global batch, from two small columns of every sample."""
        tokens = masked = 0
        for columns, rows, _ in self._by_shard(replicas, ids):
            tokens += int(columns["token_count"][rows].sum(dtype=np.int64))
            masked += int((columns["masked_positions"][rows] >= 0).sum())
        return tokens, masked

    def _collate(self, replicas: np.ndarray, ids: np.ndarray, weight: float) -> Batch:
        described = self._layout.columns()
        arrays = {
            name: np.empty((len(ids), *described[name].shape), _batch_dtype(name, described[name].dtype))
            for name in self._names
        }
        for columns, rows, places in self._by_shard(replicas, ids):
            for name, array in arrays.items():
                column = columns[name]
                for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                    array[place] = column[row]  # one contiguous copy from the mapped file
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = Batch(
            **tensors,
            sequence_ids=torch.from_numpy(ids.copy()),
            replica=torch.from_numpy(replicas.copy()),
            weight=weight,
        )
        return batch.pinned() if self._pin else batch

    def _by_shard(
        self, replicas: np.ndarray, ids: np.ndarray
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        """(columns of the shard, rows in it, places in the batch) for every shard the samples lie in."""
        indices = ids // self._order.plan.samples_per_shard
        for replica, index in sorted(set(zip(replicas.tolist(), indices.tolist(), strict=True))):
            places = np.flatnonzero((replicas == replica) & (indices == index))
            rows = ids[places] - index * self._order.plan.samples_per_shard
            columns = self._shards.columns(replica, index)
            assert np.array_equal(columns["sequence_id"][rows], ids[places]), (
                f"shard r{replica:03d}-{index:08d}"
            )
            yield columns, rows, places


@dataclass(frozen=True)
class _PendingStep:
    step: int
    counts: Future[tuple[int, int]]
    batches: list[Future[Batch]]
    sequence_ids: np.ndarray
    replicas: np.ndarray


class _OpenShards:
    """The shards in use, checked and mapped, the least recently used dropped beyond ``capacity``.

    A shard two threads want at once is opened by one of them. One that failed is not remembered.
    """

    def __init__(self, store: Store, cache: Cache | None, capacity: int) -> None:
        self._store, self._cache, self._capacity = store, cache, capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[int, int], Future[dict[str, np.ndarray]]] = OrderedDict()

    def columns(self, replica: int, index: int) -> dict[str, np.ndarray]:
        key = (replica, index)
        with self._lock:
            known = self._open.get(key)
            if known is None:
                mine: Future[dict[str, np.ndarray]] = Future()
                self._open[key] = mine
                while len(self._open) > self._capacity:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(key)
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._store.shard(replica, index, self._cache).columns)
        except BaseException as problem:
            with self._lock:
                self._open.pop(key, None)
            mine.set_exception(problem)
        return mine.result()

    def clear(self) -> None:
        with self._lock:
            self._open.clear()


def _teacher_columns(layout: Layout, wanted: Collection[str] | None) -> list[str]:
    present = layout.columns()
    if wanted is None:
        return [name for name in TEACHER if name in present]
    for name in wanted:
        assert name in IDS or name in TEACHER, name
        if name not in present:
            raise UserError(
                f"the store has no column {name}: run the teacher with store.top_k > 0 for top-k, or "
                "store.hidden_states: float16 for hidden states"
            )
    names = [name for name in TEACHER if name in wanted]
    # An int8 vector is worthless without its scale.
    scaled = "hidden_states" in names and "hidden_scale" in present and "hidden_scale" not in names
    return [*names, "hidden_scale"] if scaled else names


def _batch_dtype(name: str, stored: np.dtype) -> np.dtype:
    """int64 for ids and counts (torch indexes with nothing smaller), the store's dtype for the rest."""
    return np.dtype(np.int64) if name in (*IDS, "topk_ids") else stored.newbyteorder("=")
