"""Which samples a training run reads, and in which order: a pure function of the seed.

An epoch reads the blocks of the store in a permuted order, and so every sequence once, with the masks of
masking epoch (epoch mod masking_epochs). The samples of all epochs, one epoch after the other, are numbered
from 0; the number of a sample is its *ordinal*. A *window* is ``window_batches`` batches with consecutive
ordinals. It is cut into ``batch_size`` equal segments, one per row of a batch. Every batch of the window
takes one sample of each segment, in a random order.

So the rows of a batch come from ``batch_size`` different parts of the window. A rank takes contiguous rows of
every batch, so in a window it reads one contiguous range of ordinals. Apart from the first and the last, the
blocks in this range are read by no other rank.

The order does not depend on the number of ranks. Its memory does not grow with samples or blocks.
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
    """The blocks of one split of a store, in one masking epoch; the store's plan has this interface."""

    @property
    def masking_epochs(self) -> int: ...
    @property
    def samples_per_epoch(self) -> int: ...
    @property
    def blocks_per_epoch(self) -> int: ...
    @property
    def block_samples(self) -> int:
        """Number of samples of every block that is not short."""
        ...

    def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns numbers and sizes of the shorter blocks: int64 [s] each; at most one block per task."""
        ...


@dataclass(frozen=True)
class Locations:
    """Where n samples are in a split; each field is int64 [n]."""

    masking_epoch: np.ndarray
    block: np.ndarray
    """Number of the block within its masking epoch."""
    row: np.ndarray
    """Row within the block."""

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class _Epoch:
    """The permuted order of blocks in one epoch, and where its short blocks are."""

    key: int
    """Key of the permutation."""
    short_ends: np.ndarray
    """Offset in the epoch of the end of each short block, ascending: int64 [s]."""
    missing: np.ndarray
    """Number of samples that the first i short blocks together lack: int64 [s + 1]."""


class SampleOrder:
    """The order of a run's ``samples`` samples, in batches of ``batch_size``; the last batch may be short."""

    def __init__(self, blocks: Blocks, seed: int, batch_size: int, samples: int, window_batches: int) -> None:
        if blocks.samples_per_epoch < 1:
            remedy = "give the corpus some text and run the teacher again"
            raise UserError(f"the store holds no sequences: {remedy}")
        assert min(batch_size, samples, window_batches) >= 1
        self.blocks, self.seed, self.batch_size, self.samples = blocks, seed, batch_size, samples
        self.window_batches = window_batches
        self._short = blocks.short_blocks()
        self._epoch = lru_cache(maxsize=4)(self._permuted_epoch)
        self._window = lru_cache(maxsize=2)(self._window_ordinals)

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Returns the number of rows of the global batch of ``step``."""
        assert 0 <= step < self.steps
        return min(self.batch_size, self.samples - step * self.batch_size)

    def batch(self, step: int, rows: range | None = None) -> Locations:
        """Returns the locations of a global batch's samples, or only of its consecutive ``rows``."""
        window, number = divmod(step, self.window_batches)
        ordinals = self._window(window)[number]
        ordinals = ordinals[ordinals >= 0]  # -1 fills the missing rows of a short batch
        rows = range(self.batch_rows(step)) if rows is None else rows
        return self.locations(ordinals[rows.start : rows.stop])

    def window_locations(self, window: int, rank: int, world: int) -> Locations:
        """Returns the locations of the samples that a rank reads in a window, by ascending ordinal."""
        ordinals = self._window(window)
        first, last = rank * self.batch_size // world, (rank + 1) * self.batch_size // world
        of_rank = ordinals[:, first:last]
        return self.locations(np.sort(of_rank[of_rank >= 0]))

    def locations(self, ordinals: np.ndarray) -> Locations:
        """Returns the locations of the samples with these ordinals, int64 [n]."""
        epochs, offsets = np.divmod(ordinals, self.blocks.samples_per_epoch)
        block, row = np.empty_like(ordinals), np.empty_like(ordinals)
        for number in np.unique(epochs).tolist():
            in_epoch = epochs == number
            block[in_epoch], row[in_epoch] = self._locate(number, offsets[in_epoch])
        return Locations(epochs % self.blocks.masking_epochs, block, row)

    def _locate(self, epoch: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns block and row, int64 [n] each, of the samples at ``offsets`` [n] of an epoch.

        If all blocks had the full size, offset x would be in permuted block x // size. Therefore the number
        of samples that the short blocks before x lack is first added to x.
        """
        permuted = self._epoch(epoch)
        shifted = offsets + permuted.missing[np.searchsorted(permuted.short_ends, offsets, side="right")]
        permuted_block, row = np.divmod(shifted, self.blocks.block_samples)
        return permute(permuted_block, self.blocks.blocks_per_epoch, permuted.key), row

    def _permuted_epoch(self, epoch: int) -> _Epoch:
        numbers, sizes = self._short
        key = mix_int(mix_int(self.seed + 1) ^ mix_int(epoch + 1))
        positions = positions_of(numbers, self.blocks.blocks_per_epoch, key)
        order = np.argsort(positions)
        full_size = self.blocks.block_samples
        missing = np.concatenate([[0], np.cumsum(full_size - sizes[order], dtype=np.int64)])
        short_ends = (positions[order] + 1) * full_size - missing[1:]
        return _Epoch(key, short_ends, missing)

    def _window_ordinals(self, window: int) -> np.ndarray:
        """Returns the ordinals of a window, int64 [batches, batch_size]; -1 fills a short last batch."""
        size = self.window_batches * self.batch_size
        start = window * size
        count = min(size, self.samples - start)
        assert count > 0
        batches = -(-count // self.batch_size)
        # Segment i has the offsets [borders[i], borders[i + 1]) in the window; segments differ by at most 1.
        borders = np.arange(self.batch_size + 1, dtype=np.int64) * count // self.batch_size
        offset = borders[:-1, None] + np.arange(batches)  # [batch_size, batches]
        inside = offset < borders[1:, None]
        key = np.uint64(mix_int(mix_int(self.seed + 1) ^ mix_int(~window & (1 << 63) - 1)))
        draws = mix(offset.astype(np.uint64) ^ key) >> np.uint64(1)
        draws[~inside] = np.uint64(1) << np.uint64(63)  # after all samples of the segment
        order = np.argsort(draws, axis=1, kind="stable")
        real, moved = (np.take_along_axis(values, order, axis=1) for values in (inside, offset))
        return np.ascontiguousarray(np.where(real, start + moved, -1).T)


def run_samples(sequences: int, epochs: float, max_steps: int | None, batch_size: int) -> int:
    """Returns a run's number of samples: ``epochs`` times ``sequences``, but at most ``max_steps``
    batches."""
    samples = max(1, math.floor(epochs * sequences + 0.5))
    return samples if max_steps is None else min(samples, max_steps * batch_size)


def run_order(plan: Blocks, train: Train, steps: int | None = None) -> SampleOrder:
    """Returns the order of a run, or, if ``steps`` is given, of a phase of ``steps`` full batches."""
    if steps is None:
        samples = run_samples(plan.samples_per_epoch, train.epochs, train.max_steps, train.batch_size)
    else:
        samples = steps * train.batch_size
    return SampleOrder(plan, train.seed, train.batch_size, samples, train.window_batches)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Returns the random seed of one step on one rank, so that checkpoints need no generator state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def micro_batch_rows(n: int, micro_batch_size: int, rank: int, world: int) -> list[range]:
    """Returns the rows of a global batch of ``n`` rows that ``rank`` computes, one range per micro-batch.
    Every rank gets the same number of micro-batches, as few as ``micro_batch_size`` allows. Rows are spread
    evenly, so that no rank waits for another. If n is small, some ranges are empty."""
    assert n >= 1
    assert micro_batch_size >= 1
    assert 0 <= rank < world
    micro_batches = -(-n // (micro_batch_size * world))
    parts = micro_batches * world
    return [
        range(part * n // parts, (part + 1) * n // parts)
        for part in range(rank * micro_batches, (rank + 1) * micro_batches)
    ]


def check_world(batch_size: int, world: int, sequences: int, what: str = "the store") -> None:
    """Raises UserError if there are more ranks than sequences in the store or rows in a batch. ``what``: the
    store's name in the message."""
    if world > sequences:
        raise UserError(
            f"{world} ranks are too many for {what} of {sequences} sequences: start at most {sequences}"
            " ranks, or use more text"
        )
    if world > batch_size:
        raise UserError(
            f"train.batch_size: {batch_size} sequences cannot be shared by {world} ranks; "
            f"raise it to at least {world}, or start fewer ranks"
        )


def chained_digest(before: str, locations: Locations) -> str:
    """Returns the digest of all samples up to this batch; ``before``: the digest up to the previous batch."""
    batch = np.stack([locations.masking_epoch, locations.block, locations.row]).astype("<i8").tobytes()
    return xxhash.xxh3_128_hexdigest(before.encode() + batch)
