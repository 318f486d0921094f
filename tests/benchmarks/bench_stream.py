"""Samples a second of the stream alone, for a store of BERT-base's dimensions.

The shards are real files, mapped, in the page cache; nothing is computed with the batches.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offline_teacher.store.shard_file import open_file, write_file

from offline_teacher.store.schema import Layout, ShardPlan
from student_train.data.order import SampleOrder, run_steps
from student_train.data.stream import Stream

LAYOUT = Layout(
    length=128,
    masked=20,
    vocab_size=30522,
    top_k=64,
    temperatures=(1.0, 2.0),
    hidden_size=768,
    hidden_states="float16",
    positions="all",
)
PLAN = ShardPlan(sequences=2000, replicas=1, samples_per_shard=256)
BATCH, MICRO = 256, 32
GOAL = 5000.0
"""Ten times what two CPU cores train, and about 640,000 tokens/s: more than one large GPU consumes."""


class MappedStore:
    """The part of a store the stream reads, over shard files written here."""

    def __init__(self, directory: str) -> None:
        self.layout, self.plan, self._directory = LAYOUT, PLAN, directory
        generator = np.random.default_rng(0)
        for index in range(PLAN.shards_per_replica):
            ids = np.array(PLAN.sequence_range(index))
            columns = {
                name: generator.integers(0, 100, (len(ids), *column.shape)).astype(column.dtype)
                for name, column in LAYOUT.columns().items()
            }
            columns["sequence_id"] = ids
            columns["token_count"] = np.full(len(ids), LAYOUT.length, np.uint16)
            write_file(self._path(index), LAYOUT, {}, columns)

    def _path(self, index: int) -> str:
        return f"{self._directory}/{index}.arrow"

    def shard(self, replica: int, index: int, cache: Any = None) -> Any:
        return SimpleNamespace(columns=open_file(self._path(index), LAYOUT)[1])


def run() -> list[dict[str, Any]]:
    """One row for each set of columns: name, value, unit, goal, holds, conditions."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        store = MappedStore(directory)
        for name, columns in (
            ("exact", ["hidden_states"]),
            ("topk", ["topk_ids", "topk_logits", "logsumexp"]),
        ):
            rate = max(samples_per_second(store, columns) for _ in range(3))
            rows.append(
                {
                    "name": f"stream.samples_per_second.{name}",
                    "value": round(rate, 1),
                    "unit": "samples/s",
                    "goal": GOAL,
                    "holds": rate >= GOAL,
                    "conditions": f"L=128 D=768 float16 K=64, batch {BATCH}, micro-batch {MICRO}, "
                    f"{PLAN.sequences} samples in the page cache, 2 threads",
                }
            )
    return rows


def samples_per_second(store: MappedStore, columns: list[str]) -> float:
    steps = run_steps(PLAN.sequences, BATCH)
    stream = Stream(
        store, SampleOrder(PLAN, 0, 4), BATCH, MICRO, 0, 1, 0, steps, samples=PLAN.sequences, columns=columns
    )
    started = time.perf_counter()
    with stream:
        samples = sum(len(batch) for step in stream for batch in step.micro_batches)
    return samples / (time.perf_counter() - started)


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
