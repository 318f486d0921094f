"""Which samples a training run reads, in which order: pure arithmetic, nothing that grows with the corpus.

The run reads the endless concatenation of epochs 0, 1, 2, ...; epoch e reads every sequence once, as
masked in replica e mod R. Within an epoch the shards are permuted, each ``window_shards`` consecutive
permuted shards form a window, and the samples of a window are shuffled together. So any slice of the
stream costs time and memory of the windows it touches, and reads stay within one window of shards.

Global batch g is ``samples(g * batch_size, (g + 1) * batch_size)``, whatever the number of ranks,
micro-batches or resumes; batches run on across the end of an epoch.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from infra.errors import UserError

if TYPE_CHECKING:
    from offline_teacher.store.schema import ShardPlan

_ROUNDS = 6
_WORD = (1 << 64) - 1


class SampleOrder:
    """The stream of (replica, sequence id) of a store: a pure function of plan, seed and window."""

    def __init__(self, plan: ShardPlan, seed: int, window_shards: int) -> None:
        if plan.sequences < 1:
            raise UserError(
                "the store holds no sequences: give the corpus some text and run the teacher again"
            )
        assert window_shards >= 1
        self.plan, self.seed, self.window_shards = plan, seed, window_shards
        self._shards = -(-plan.sequences // plan.samples_per_shard)
        self._last_size = plan.sequences - (self._shards - 1) * plan.samples_per_shard
        # Two windows: neighbouring batches share one, and a batch at a border reads both.
        self._window_ids = lru_cache(maxsize=2)(self._shuffled_window)
        self._short_position = lru_cache(maxsize=4)(
            lambda epoch: _permutation_position(self._shards, self._key(epoch, "shards"), self._shards - 1)
        )

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [start, stop) of the stream: replica [n] int64, sequence_id [n] int64."""
        assert 0 <= start <= stop, f"samples({start}, {stop})"
        replicas, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.plan.sequences)
            window, begin = self._locate(epoch, offset)
            part = self._window_ids(epoch, window)[offset - begin :][: stop - position]
            ids.append(part)
            replicas.append(np.full(len(part), epoch % self.plan.replicas, np.int64))
            position += len(part)
        return np.concatenate(replicas), np.concatenate(ids)

    def window(self, position: int) -> int:
        """The running number, over all epochs, of the window that holds ``position``."""
        epoch, offset = divmod(position, self.plan.sequences)
        return epoch * self._windows + self._locate(epoch, offset)[0]

    def window_shard_ids(self, number: int) -> list[tuple[int, int]]:
        """(replica, shard index) of the shards of window ``number`` of the stream."""
        epoch, window = divmod(number, self._windows)
        return [(epoch % self.plan.replicas, int(index)) for index in self._window_shards(epoch, window)]

    @property
    def _windows(self) -> int:
        return -(-self._shards // self.window_shards)

    def _locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """The window of the epoch that holds sample ``offset``, and the offset of its first sample."""
        size = self.plan.samples_per_shard
        missing = size - self._last_size
        # The short last shard lies at some permuted position; all behind it moves up by what it lacks.
        short_at = self._short_position(epoch)
        behind = offset >= short_at * size + self._last_size
        window = (offset + (missing if behind else 0)) // size // self.window_shards
        first = window * self.window_shards
        return window, first * size - (missing if first > short_at else 0)

    def _window_shards(self, epoch: int, window: int) -> np.ndarray:
        positions = np.arange(
            window * self.window_shards, min((window + 1) * self.window_shards, self._shards)
        )
        return _permute(positions, self._shards, self._key(epoch, "shards"))

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        size = self.plan.samples_per_shard
        ranges = (
            np.arange(index * size, min((index + 1) * size, self.plan.sequences))
            for index in self._window_shards(epoch, window).tolist()
        )
        ids = np.concatenate(list(ranges)).astype(np.int64)
        order = np.argsort(
            _mix(ids.astype(np.uint64) ^ np.uint64(self._key(epoch, "samples"))), kind="stable"
        )
        return ids[order]

    def _key(self, epoch: int, purpose: str) -> int:
        key = _mix_int(self.seed + 1)
        for word in (epoch + 1, {"shards": 1, "samples": 2}[purpose]):
            key = _mix_int(key ^ _mix_int(word))
        return key


def run_samples(sequences: int, epochs: float, max_steps: int | None, batch_size: int) -> int:
    """Samples a run reads: ``epochs`` (or a fraction) of the corpus, cut at ``max_steps`` full batches."""
    samples = max(1, math.floor(epochs * sequences + 0.5))
    return samples if max_steps is None else min(samples, max_steps * batch_size)


def run_steps(samples: int, batch_size: int) -> int:
    """Optimiser steps of a run over ``samples``; the last batch may be short."""
    return -(-samples // batch_size)


def micro_batch_rows(n: int, micro_batch_size: int, rank: int, world: int) -> list[range]:
    """The rows of a global batch of ``n`` that ``rank`` computes, one range for each micro step.

    Every rank gets the same number of micro steps, the fewest that keep each within ``micro_batch_size``,
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


def check_world(batch_size: int, world: int, sequences: int) -> None:
    """UserError where some rank could never have a sample to compute."""
    if world > sequences:
        raise UserError(
            f"{world} ranks for a store of {sequences} sequences: start at most {sequences} ranks, "
            "or use more text"
        )
    if world > batch_size:
        raise UserError(
            f"train.batch_size: {batch_size} sequences cannot be shared by {world} ranks; "
            f"raise it to at least {world}, or start fewer ranks"
        )


# --- keyed permutation with random access -----------------------------------------------------------
#
# A balanced Feistel network (Luby and Rackoff 1988) permutes [0, 4^b); applying it again until the
# result falls into [0, n) restricts it to a permutation of [0, n) ("cycle walking", Black and Rogaway,
# Ciphers with Arbitrary Finite Domains, CT-RSA 2002). 4^b < 4 n, so under four walks on average.


def _permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """The elements of a keyed permutation of [0, n) at ``positions`` [m] -> [m] int64."""
    return _walk(positions, n, _round_keys(key), inverse=False)


def _permutation_position(n: int, key: int, element: int) -> int:
    """Where ``element`` stands in the permutation: the inverse of ``_permute``."""
    return int(_walk(np.array([element]), n, _round_keys(key), inverse=True)[0])


def _walk(values: np.ndarray, n: int, keys: list[np.uint64], inverse: bool) -> np.ndarray:
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    result = _feistel(values.astype(np.uint64), half_bits, keys, inverse)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half_bits, keys, inverse)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[np.uint64], inverse: bool) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    if inverse:
        for key in reversed(keys):
            left, right = right ^ (_mix(left ^ key) & mask), left
    else:
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


@lru_cache(maxsize=16)
def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(_mix_int((key + number) & _WORD)) for number in range(_ROUNDS)]


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64 words (Steele, Lea and Flood 2014; https://prng.di.unimi.it/splitmix64.c)."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(word: int) -> int:
    """The same of one Python integer."""
    z = (word + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)
