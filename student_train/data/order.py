"""Which samples a training run reads, in which order: a pure function of (seed, samples seen). numpy only.

An epoch reads every sequence once, as it was masked in masking epoch (epoch mod R). Its blocks come in a
permuted order; the epochs' samples, one epoch after the other, are the *stream*. A *window* is the next
``window_batches`` batches of the stream. It is cut into ``batch_size`` equal segments, and every batch of
the window takes one sample of each segment, in an order drawn for the segment.

So the samples of a batch come from as many places of the corpus as it has rows, and one row of all the
window's batches comes from one place. Ranks take contiguous rows of a batch. Therefore a rank reads, for
a whole window, one contiguous piece of the stream: whole blocks that no other rank reads.

Nothing here depends on the number of ranks, and nothing grows with samples or blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import xxhash

from infra.errors import UserError
from infra.settings.sections import Train
from student_train.data.permutation import mix, mix_int, permute, positions_of


class Blocks(Protocol):
    """What the order needs of one split of a store, in one masking epoch."""

    @property
    def masking_epochs(self) -> int: ...
    @property
    def samples_per_epoch(self) -> int: ...
    @property
    def blocks_per_epoch(self) -> int: ...
    @property
    def block_samples(self) -> int:
        """Samples of every block that is not short."""
        ...

    def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and sizes of the blocks with fewer samples: int64 [s] each; at most one a task."""
        ...


@dataclass(frozen=True)
class Places:
    """Where samples are: each int64 [n]."""

    masking_epoch: np.ndarray
    block: np.ndarray
    """Number of the block within its masking epoch."""
    row: np.ndarray
    """Row within the block."""

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class _Epoch:
    """The permuted blocks of one epoch: where its short blocks are, and what they lack."""

    key: int
    ends: np.ndarray
    """Offset in the epoch behind each short block, ascending: int64 [s]."""
    lacking: np.ndarray
    """Samples that the first i short blocks lack together: int64 [s + 1]."""


class SampleOrder:
    """The samples of a run: ``samples`` in all, in batches of ``batch_size``; the last one may be short."""

    def __init__(self, blocks: Blocks, seed: int, batch_size: int, samples: int, window_batches: int) -> None:
        if blocks.samples_per_epoch < 1:
            raise UserError(
                "the store holds no sequences: give the corpus some text and run the teacher again"
            )
        assert min(batch_size, samples, window_batches) >= 1
        self.blocks, self.seed, self.batch_size, self.samples = blocks, seed, batch_size, samples
        self.window_batches = window_batches
        self._short = blocks.short_blocks()
        self._epoch = lru_cache(maxsize=4)(self._permuted_epoch)
        self._window = lru_cache(maxsize=2)(self._offsets)

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch of this step."""
        assert 0 <= step < self.steps
        return min(self.batch_size, self.samples - step * self.batch_size)

    def batch(self, step: int, rows: range | None = None) -> Places:
        """The samples of a global batch, or of some consecutive rows of it."""
        window, within = divmod(step, self.window_batches)
        offsets = self._window(window)  # [batches, batch_size]
        wanted = rows if rows is not None else range(self.batch_rows(step))
        present = np.flatnonzero(offsets[within] >= 0)  # a short batch lacks some rows
        return self.places(offsets[within][present[wanted.start : wanted.stop]])

    def window_places(self, window: int, rank: int, world: int) -> Places:
        """What a rank reads for a whole window, in the order of the stream."""
        offsets = self._window(window)
        first, last = rank * self.batch_size // world, (rank + 1) * self.batch_size // world
        mine = offsets[:, first:last]
        return self.places(np.sort(mine[mine >= 0]))

    def places(self, positions: np.ndarray) -> Places:
        """Where the samples at these positions of the stream are: int64 [n] -> Places of n."""
        epochs, offsets = np.divmod(positions, self.blocks.samples_per_epoch)
        block, row = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs).tolist():
            here = epochs == number
            block[here], row[here] = self._locate(number, offsets[here])
        return Places(epochs % self.blocks.masking_epochs, block, row)

    def _locate(self, epoch: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and row of the samples at offsets [n] of an epoch.

        If all blocks were full, sample x would be in permuted block x // size. Every short block before it
        shifts it by the samples that this block lacks.
        """
        permuted = self._epoch(epoch)
        full = offsets + permuted.lacking[np.searchsorted(permuted.ends, offsets, side="right")]
        position, row = np.divmod(full, self.blocks.block_samples)
        return permute(position, self.blocks.blocks_per_epoch, permuted.key), row

    def _permuted_epoch(self, epoch: int) -> _Epoch:
        numbers, sizes = self._short
        key = mix_int(mix_int(self.seed + 1) ^ mix_int(epoch + 1))
        positions = positions_of(numbers, self.blocks.blocks_per_epoch, key)
        order = np.argsort(positions)
        full = self.blocks.block_samples
        lacking = np.concatenate([[0], np.cumsum(full - sizes[order], dtype=np.int64)])
        ends = (positions[order] + 1) * full - lacking[1:]
        return _Epoch(key, ends, lacking)

    def _offsets(self, window: int) -> np.ndarray:
        """Positions in the stream of a window: int64 [batches, rows]; -1 where the last batch is short."""
        size = self.window_batches * self.batch_size
        start = window * size
        count = min(size, self.samples - start)
        assert count > 0
        batches = -(-count // self.batch_size)
        borders = np.arange(self.batch_size + 1, dtype=np.int64) * count // self.batch_size
        position = borders[:-1, None] + np.arange(batches)  # [batch_size, batches]
        inside = position < borders[1:, None]
        key = np.uint64(mix_int(mix_int(self.seed + 1) ^ mix_int(~window & (1 << 63) - 1)))
        drawn = mix(position.astype(np.uint64) ^ key) >> np.uint64(1)
        drawn[~inside] = np.uint64(1) << np.uint64(63)  # last
        order = np.argsort(drawn, axis=1, kind="stable")
        shuffled = np.where(
            np.take_along_axis(inside, order, axis=1), start + np.take_along_axis(position, order, axis=1), -1
        )
        return np.ascontiguousarray(shuffled.T)


def run_samples(sequences: int, epochs: float, max_steps: int | None, batch_size: int) -> int:
    """Samples a run reads: ``epochs`` (or a fraction) of the corpus, cut at ``max_steps`` full batches."""
    samples = max(1, math.floor(epochs * sequences + 0.5))
    return samples if max_steps is None else min(samples, max_steps * batch_size)


def run_order(plan: Blocks, train: Train, steps: int | None = None) -> SampleOrder:
    """The samples of a run with these settings, or of a phase of ``steps`` full batches."""
    if steps is None:
        samples = run_samples(plan.samples_per_epoch, train.epochs, train.max_steps, train.batch_size)
    else:
        samples = steps * train.batch_size
    return SampleOrder(plan, train.seed, train.batch_size, samples, train.window_batches)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the random numbers of one step on one rank, so that no generator state is kept."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def micro_batch_rows(n: int, micro_batch_size: int, rank: int, world: int) -> list[range]:
    """The rows of a global batch of ``n`` that ``rank`` computes, one range for each micro-step.

    Every rank gets the same number of micro-steps, the fewest that keep each within ``micro_batch_size``,
    and rows are spread evenly, so that no rank waits for another. Where n is small some ranges are empty.
    """
    assert n >= 1
    assert micro_batch_size >= 1
    assert 0 <= rank < world
    micro_steps = -(-n // (micro_batch_size * world))
    parts = micro_steps * world
    return [
        range(part * n // parts, (part + 1) * n // parts)
        for part in range(rank * micro_steps, (rank + 1) * micro_steps)
    ]


def check_world(batch_size: int, world: int, sequences: int, what: str = "the store") -> None:
    """Raises UserError if a rank could never get a sample."""
    if world > sequences:
        raise UserError(
            f"{world} ranks for {what} of {sequences} sequences: start at most {sequences} ranks, "
            "or use more text"
        )
    if world > batch_size:
        raise UserError(
            f"train.batch_size: {batch_size} sequences cannot be shared by {world} ranks; "
            f"raise it to at least {world}, or start fewer ranks"
        )


def chained_digest(before: str, places: Places) -> str:
    """Digest of all samples up to and with this batch: equal digests mean equal samples in equal order."""
    batch = np.stack([places.masking_epoch, places.block, places.row]).astype("<i8").tobytes()
    return xxhash.xxh3_128_hexdigest(before.encode() + batch)
