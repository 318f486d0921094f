"""Where every sample of a split is: computed only from how many rows each part has.

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
"""A sequence's permanent number is ``part * 2**32 + row``."""

_TASK_NAME = re.compile(r"e(\d{3,9})-p(\d{5,10})-(\d{4,10})")


@dataclass(frozen=True)
class Task:
    """Consecutive rows of one part in one masking epoch: the unit of work, retry and commit."""

    number: int
    """Its place in the order of a split's tasks: by masking epoch, then part, then piece."""
    epoch: int
    part: int
    piece: int
    """Number of the task in its part."""
    rows: range
    """Rows of the part."""

    @property
    def name(self) -> str:
        """``e000-p00000-0000``; numbers with more digits make the name longer."""
        return f"e{self.epoch:03d}-p{self.part:05d}-{self.piece:04d}"

    @property
    def samples(self) -> int:
        return len(self.rows)

    def sequence_ids(self) -> np.ndarray:
        """int64 [samples], the permanent numbers of its sequences, ascending."""
        return (self.part << PART_SHIFT) + np.arange(self.rows.start, self.rows.stop, dtype=np.int64)


class Place(NamedTuple):
    """Where one block is."""

    task: int
    """Number of the task in the split."""
    shard: int
    block: int
    """Number of the block in its shard."""
    samples: int


@dataclass(frozen=True)
class SplitPlan:
    """The tasks, shards and blocks of one split. ValueError if a number of rows is out of range."""

    rows: tuple[int, ...]
    """Number of rows of each part."""
    masking_epochs: int
    plan: Plan

    def __post_init__(self) -> None:
        require(len(self.rows) < 2**31, "rows: has too many parts")
        require(all(is_count(count, 0, 2**32) for count in self.rows), "rows: must be 0 to 2^32 for a part")
        require(is_count(self.masking_epochs, 1), "masking_epochs: must be a whole number >= 1")
        total = sum(self.rows) * self.masking_epochs
        require(is_count(total, 1), f"rows: must give 1 to {MAX_COUNT} samples, not {total}")

    @classmethod
    def of(cls, split: str, rows: tuple[int, ...], plan: Plan) -> SplitPlan:
        """The plan of a split: ``train``, or ``validation``, which always has one masking epoch."""
        return cls(rows, plan.epochs(split), plan)

    # --- tasks ---

    @cached_property
    def _first_task(self) -> np.ndarray:
        """int64 [parts + 1]: the number, within a masking epoch, of each part's first task."""
        rows = np.array(self.rows, np.int64)
        return _before(-(-rows // self.plan.task_sequences))

    @cached_property
    def _task_samples(self) -> np.ndarray:
        """int64 [tasks of one masking epoch]: samples of each."""
        size = self.plan.task_sequences
        parts = np.repeat(np.arange(len(self.rows)), np.diff(self._first_task))
        pieces = np.arange(len(parts)) - self._first_task[parts]
        return np.minimum(size, np.array(self.rows, np.int64)[parts] - pieces * size)

    @cached_property
    def _first_block(self) -> np.ndarray:
        """int64 [tasks of one masking epoch + 1]: the number, within a masking epoch, of each task's first
        block."""
        return _before(-(-self._task_samples // self.plan.block_samples))

    @property
    def tasks_per_epoch(self) -> int:
        return int(self._first_task[-1])

    @property
    def task_count(self) -> int:
        """Tasks of all masking epochs."""
        return self.tasks_per_epoch * self.masking_epochs

    def task(self, number: int) -> Task:
        """The task of this number. IndexError if the split has no such task."""
        if not 0 <= number < self.task_count:
            raise IndexError(f"task {number} is not below {self.task_count}")
        epoch, in_epoch = divmod(number, self.tasks_per_epoch)
        part = int(np.searchsorted(self._first_task, in_epoch, side="right")) - 1
        piece = in_epoch - int(self._first_task[part])
        start = piece * self.plan.task_sequences
        rows = range(start, min(start + self.plan.task_sequences, self.rows[part]))
        return Task(number, epoch, part, piece, rows)

    def tasks(self) -> Iterator[Task]:
        """All tasks, in order."""
        return map(self.task, range(self.task_count))

    def number_of(self, name: str) -> int | None:
        """The number of the task of this name; None if the split has no such task."""
        found = _TASK_NAME.fullmatch(name)
        if found is None:
            return None
        epoch, part, piece = map(int, found.groups())
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
        """Samples of all masking epochs."""
        return self.samples_per_epoch * self.masking_epochs

    @property
    def blocks_per_epoch(self) -> int:
        """Blocks of one masking epoch; they are numbered from 0, in the order of tasks."""
        return int(self._first_block[-1])

    @property
    def block_samples(self) -> int:
        """Samples of a full block; only the last block of a task may have fewer."""
        return self.plan.block_samples

    def short_blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """For each short block: its number within a masking epoch, and its samples; int64 [s] each."""
        last = self._first_block[1:] - 1
        samples = self.sizes(last)
        short = samples < self.plan.block_samples
        return last[short], samples[short]

    def place(self, epoch: int, block: int) -> Place:
        """Where a block of a masking epoch is. IndexError if it is out of range."""
        if not (0 <= epoch < self.masking_epochs and 0 <= block < self.blocks_per_epoch):
            raise IndexError(f"no block {block} of masking epoch {epoch}")
        task = int(np.searchsorted(self._first_block, block, side="right")) - 1
        within, size = block - int(self._first_block[task]), self.plan.block_samples
        samples = min(size, int(self._task_samples[task]) - within * size)
        shard, in_shard = divmod(within, self.plan.shard_blocks)
        return Place(task + epoch * self.tasks_per_epoch, shard, in_shard, samples)

    def blocks(self, task: Task) -> range:
        """The numbers, within its masking epoch, of the blocks of a task."""
        in_epoch = task.number % self.tasks_per_epoch
        return range(int(self._first_block[in_epoch]), int(self._first_block[in_epoch + 1]))

    def sizes(self, blocks: np.ndarray) -> np.ndarray:
        """int64 [n]: samples of the blocks [n], the same in every masking epoch."""
        tasks, within = self._within(blocks)
        size = self.plan.block_samples
        return np.minimum(size, self._task_samples[tasks] - within * size)

    def sequence_ids(self, block: int) -> np.ndarray:
        """int64 [samples of the block]: the permanent numbers of its sequences."""
        tasks, within = self._within(np.array([block]))
        task = self.task(int(tasks[0]))
        start = int(within[0]) * self.plan.block_samples
        return task.sequence_ids()[start : start + self.plan.block_samples]

    def _within(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each block: the number of its task within a masking epoch, and its own number in that task."""
        blocks = np.asarray(blocks, np.int64)
        if blocks.size and (blocks.min() < 0 or blocks.max() >= self.blocks_per_epoch):
            raise IndexError(f"blocks must be 0 to {self.blocks_per_epoch - 1}")
        tasks = np.searchsorted(self._first_block, blocks, side="right") - 1
        return tasks, blocks - self._first_block[tasks]


def shards_of(task: Task, plan: Plan) -> list[list[int]]:
    """For each shard of a task, how many samples each of its blocks has."""
    size, blocks = plan.block_samples, -(-task.samples // plan.block_samples)
    counts = [size] * (blocks - 1) + [task.samples - (blocks - 1) * size]
    return [counts[start : start + plan.shard_blocks] for start in range(0, blocks, plan.shard_blocks)]


def _before(counts: np.ndarray) -> np.ndarray:
    """[0, c_0, c_0 + c_1, ...]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
