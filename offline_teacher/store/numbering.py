"""Location of every sample of a split, computed from the number of rows of each part.

Memory is O(parts + tasks of one masking epoch): no array has an entry for each block or each sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from offline_teacher.store.schema import MAX_COUNT, Plan, is_count, require

PART_SHIFT = 32
"""The id of a sequence is ``part * 2**PART_SHIFT + row``."""

_TASK_NAME = re.compile(r"e(\d{3,9})-p(\d{5,10})-(\d{4,10})")


@dataclass(frozen=True)
class Task:
    """Consecutive rows of one part in one masking epoch. Tasks are computed, retried and published whole."""

    number: int
    """Number of the task in its split, whose tasks are ordered by masking epoch, then part, then piece."""
    epoch: int
    part: int
    piece: int
    """Number of the task among those of its part and masking epoch."""
    rows: range
    """Numbers of the rows in the part."""

    @property
    def name(self) -> str:
        """``eEPOCH-pPART-PIECE``, with at least 3, 5 and 4 digits: ``e000-p00000-0000``."""
        return f"e{self.epoch:03d}-p{self.part:05d}-{self.piece:04d}"

    @property
    def samples(self) -> int:
        return len(self.rows)

    def sequence_ids(self) -> np.ndarray:
        """Ids of the task's sequences: int64 [samples], ascending."""
        return (self.part << PART_SHIFT) + np.arange(self.rows.start, self.rows.stop, dtype=np.int64)


class BlockLocation(NamedTuple):
    """Numbers of the task in the split, the shard in the task, the block in the shard; number of samples."""

    task: int
    shard: int
    block: int
    samples: int


@dataclass(frozen=True)
class SplitPlan:
    """The tasks, shards and blocks of one split. Raises ValueError if a number of rows is out of range."""

    rows: tuple[int, ...]
    """Number of rows of each part."""
    masking_epochs: int
    plan: Plan

    def __post_init__(self) -> None:
        require(len(self.rows) < 2**31, "rows: has too many parts")
        require(all(is_count(count, 0, 2**32) for count in self.rows), "rows: each must be 0 to 2^32")
        require(is_count(self.masking_epochs, 1), "masking_epochs: must be a whole number >= 1")
        total = sum(self.rows) * self.masking_epochs
        require(is_count(total, 1), f"rows: rows * masking_epochs must be 1 to {MAX_COUNT}, not {total}")

    @classmethod
    def of(cls, split: str, rows: tuple[int, ...], plan: Plan) -> SplitPlan:
        """Returns the plan of the split of this name, whose parts have these numbers of ``rows``."""
        return cls(rows, plan.epochs(split), plan)

    # --- tasks ---

    @cached_property
    def _first_task(self) -> np.ndarray:
        """int64 [parts + 1]: the number, in the masking epoch, of the first task of each part."""
        rows = np.array(self.rows, np.int64)
        return _starts(-(-rows // self.plan.task_sequences))

    @cached_property
    def _task_samples(self) -> np.ndarray:
        """int64 [tasks of one masking epoch]: number of samples of each task."""
        size = self.plan.task_sequences
        parts = np.repeat(np.arange(len(self.rows)), np.diff(self._first_task))
        pieces = np.arange(len(parts)) - self._first_task[parts]
        return np.minimum(size, np.array(self.rows, np.int64)[parts] - pieces * size)

    @cached_property
    def _first_block(self) -> np.ndarray:
        """int64 [tasks of one masking epoch + 1]: the number, in the epoch, of each task's first block."""
        return _starts(-(-self._task_samples // self.plan.block_samples))

    @property
    def tasks_per_epoch(self) -> int:
        return int(self._first_task[-1])

    @property
    def task_count(self) -> int:
        """Number of tasks of all masking epochs together."""
        return self.tasks_per_epoch * self.masking_epochs

    def task(self, number: int) -> Task:
        """Returns the task with this number. Raises IndexError if the split has no such task."""
        if not 0 <= number < self.task_count:
            raise IndexError(f"there is no task {number}; the split has {self.task_count} tasks")
        epoch, in_epoch = divmod(number, self.tasks_per_epoch)
        part = int(np.searchsorted(self._first_task, in_epoch, side="right")) - 1
        piece = in_epoch - int(self._first_task[part])
        start = piece * self.plan.task_sequences
        rows = range(start, min(start + self.plan.task_sequences, self.rows[part]))
        return Task(number, epoch, part, piece, rows)

    def tasks(self) -> Iterator[Task]:
        return map(self.task, range(self.task_count))

    def number_of(self, name: str) -> int | None:
        """Returns the number of the task with this name, or None if the split has no such task."""
        match = _TASK_NAME.fullmatch(name)
        if match is None:
            return None
        epoch, part, piece = map(int, match.groups())
        if epoch >= self.masking_epochs or part >= len(self.rows):
            return None
        in_epoch = int(self._first_task[part]) + piece
        number = epoch * self.tasks_per_epoch + in_epoch
        return number if number < self.task_count and self.task(number).name == name else None

    # --- samples and blocks ---

    @property
    def samples_per_epoch(self) -> int:
        return sum(self.rows)

    @property
    def samples(self) -> int:
        """Number of samples of all masking epochs together."""
        return self.samples_per_epoch * self.masking_epochs

    @property
    def blocks_per_epoch(self) -> int:
        """Number of blocks of one masking epoch. They are numbered from 0, in the order of tasks."""
        return int(self._first_block[-1])

    @property
    def block_samples(self) -> int:
        """Number of samples of a full block; only the last block of a task may have fewer."""
        return self.plan.block_samples

    def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers in the masking epoch, and the numbers of samples, of the s blocks that are not
        full: two arrays, int64 [s]."""
        samples = (self._task_samples - 1) % self.plan.block_samples + 1  # of each task's last block
        short = samples < self.plan.block_samples
        return self._first_block[1:][short] - 1, samples[short]

    def locate(self, epoch: int, block: int) -> BlockLocation:
        """Returns the location of a block of a masking epoch. Raises IndexError if there is no such block."""
        if not (0 <= epoch < self.masking_epochs and 0 <= block < self.blocks_per_epoch):
            raise IndexError(f"no block {block} of masking epoch {epoch}")
        task = int(np.searchsorted(self._first_block, block, side="right")) - 1
        in_task, size = block - int(self._first_block[task]), self.plan.block_samples
        samples = min(size, int(self._task_samples[task]) - in_task * size)
        shard, in_shard = divmod(in_task, self.plan.shard_blocks)
        return BlockLocation(task + epoch * self.tasks_per_epoch, shard, in_shard, samples)

    def blocks(self, task: Task) -> range:
        """Returns the numbers, in the task's masking epoch, of its blocks."""
        in_epoch = task.number % self.tasks_per_epoch
        return range(int(self._first_block[in_epoch]), int(self._first_block[in_epoch + 1]))

    def sequence_ids(self, block: int) -> np.ndarray:
        """Returns the ids of a block's sequences: int64 [samples of the block]."""
        location = self.locate(0, block)
        start = (location.shard * self.plan.shard_blocks + location.block) * self.plan.block_samples
        return self.task(location.task).sequence_ids()[start : start + self.plan.block_samples]


def shards_of(task: Task, plan: Plan) -> list[list[int]]:
    """Returns, for each shard of a task, a list of the numbers of samples of the shard's blocks."""
    size, blocks = plan.block_samples, -(-task.samples // plan.block_samples)
    counts = [size] * (blocks - 1) + [task.samples - (blocks - 1) * size]
    return [counts[start : start + plan.shard_blocks] for start in range(0, blocks, plan.shard_blocks)]


def _starts(counts: np.ndarray) -> np.ndarray:
    """Cumulative sums from 0: [0, c_0, c_0 + c_1, ...]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
