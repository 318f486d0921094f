"""Tasks of a finished store as arrays."""

from __future__ import annotations

import random

import numpy as np

from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.numbering import Task
from offline_teacher.store.reader import Store

Columns = dict[str, np.ndarray]


def all_tasks(store: Store) -> int:
    """How many tasks the splits have."""
    return sum(split.plan.task_count for split in store.splits.values())


def task_of(store: Store, number: int) -> tuple[str, Task]:
    """The split and the task of a number below ``all_tasks``; training text comes first."""
    for name, split in store.splits.items():
        if number < split.plan.task_count:
            return name, split.plan.task(number)
        number -= split.plan.task_count
    raise IndexError(number)


def random_tasks(store: Store, count: int) -> list[tuple[str, Task]]:
    """At most ``count`` different ones, in the order of the store."""
    total = all_tasks(store)
    return [task_of(store, number) for number in sorted(random.sample(range(total), min(count, total)))]


def read_rows(reader: BlockReader, store: Store, split: str, task: Task, rows: np.ndarray) -> Columns:
    """The columns [n, ...] of some rows of a task, ascending, counted from its first."""
    plan, pieces = store.splits[split].plan, []
    for place, block in enumerate(plan.blocks(task)):
        start = place * plan.block_samples
        here = rows[(rows >= start) & (rows < start + plan.block_samples)] - start
        if len(here):
            pieces.append(reader.rows(task.epoch, block, here))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
