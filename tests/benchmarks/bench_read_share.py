"""Bytes that simulated ranks read in an epoch, divided by the bytes of the columns that they use.

The store has BERT-base's dimensions, both top-k and hidden states, and the samples of one shuffle window.
Every rank reads its share with the trainer's stream and a separate cache, as on a separate machine. On a
local disk, the bytes are those that Linux read after the page cache was emptied; on S3, those that the server
sent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.files import storage
from infra.settings.sections import Train
from offline_teacher.store.schema import Layout, Plan
from offline_teacher.store.store import Store, open_store
from student_train.data.collate import TEXT_COLUMNS
from student_train.data.order import SampleOrder
from student_train.data.reading import open_stream
from student_train.engine.world import World
from tests.benchmarks.bench_store import SHAPE, TARGETS
from tests.benchmarks.full_sequences import full_teacher
from tests.benchmarks.results import Row, row
from tests.s3_server import FaultyProxy, s3_server
from tests.store.synthetic import make_store

LAYOUT = Layout(**SHAPE, **TARGETS, hidden_states="float16", positions="all")
SEQUENCES, TASK_SEQUENCES, BATCH = 16_384, 1024, 256
SHARD_BYTES = 16 << 20
"""Small, because the test server reads the whole shard for every range request."""
RANKS = (1, 2, 8, 32)
USED = {"hidden": ["hidden_states"], "topk": ["topk_ids", "topk_logits", "logsumexp"]}
SHARE_GOAL, REQUEST_GOAL = "<= 1.1", ">= 1e+06"

Count = Callable[[], tuple[int, int]]
"""Returns the bytes read so far, and the number of range requests (0 for a disk)."""


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as directory, s3_server() as server, FaultyProxy(server) as proxy:
        plan = Plan.from_bytes(LAYOUT, 1, TASK_SEQUENCES, shard_bytes=SHARD_BYTES)
        weights = {"none": np.zeros(1, np.float32)}
        local = make_store(
            directory, LAYOUT, {"train": (SEQUENCES,)}, plan, teacher=full_teacher, weights=weights
        )
        rows = [r for name, used in USED.items() for r in _on_disk(local, name, used)]
        remote = _uploaded(local, proxy)
        return rows + [r for name, used in USED.items() for r in _on_server(remote, proxy, name, used)]


def _on_disk(store: Store, name: str, used: Sequence[str]) -> Iterator[Row]:
    for world in RANKS:
        share, _ = _epoch(store, used, world, _fetched, lambda: _forget(store))
        yield row(
            f"store.read_share.local.{name}.{world}_ranks", share, "ratio", SHARE_GOAL, _where(name, world)
        )


def _on_server(store: Store, proxy: FaultyProxy, name: str, used: Sequence[str]) -> Iterator[Row]:
    for world in RANKS:
        share, request = _epoch(store, used, world, lambda: (proxy.sent, _ranges(proxy)), lambda: None)
        where = _where(name, world)
        yield row(f"store.read_share.s3.{name}.{world}_ranks", share, "ratio", SHARE_GOAL, where)
        yield row(f"store.request_bytes.s3.{name}.{world}_ranks", request, "bytes", REQUEST_GOAL, where)


def _where(name: str, world: int) -> str:
    return (
        f"{name} of a store of top-64 and float16 hidden states, L=128 D=768, {SEQUENCES:,} sequences in "
        f"blocks of the default size, batches of {BATCH}, {world} simulated ranks, one epoch"
    )


def _epoch(
    store: Store, used: Sequence[str], world: int, count: Count, forget: Callable[[], None]
) -> tuple[float, float]:
    """Returns the bytes read by all ranks divided by those of the columns, and the mean bytes per request."""
    columns = store.layout.columns()
    needed = SEQUENCES * sum(columns[name].bytes for name in {*TEXT_COLUMNS, *used} if name in columns)
    total = requests = 0
    for rank in range(world):
        forget()
        before = count()
        _read(open_store(store.root), used, rank, world)
        after = count()
        total, requests = total + after[0] - before[0], requests + after[1] - before[1]
    return total / needed, total / max(1, requests)


def _read(store: Store, used: Sequence[str], rank: int, world: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        train = Train(batch_size=BATCH, micro_batch_size=32, cache_dir=cache)
        order = SampleOrder(store.splits["train"].plan, 0, BATCH, SEQUENCES, train.window_batches)
        alone = World(rank, world, torch.device("cpu"))
        with open_stream(store, "train", used, order, train, alone) as stream:
            for _ in stream:
                pass


def _ranges(proxy: FaultyProxy) -> int:
    return sum(method == "GET" and path.endswith(".arrow") for method, path, _ in proxy.seen)


def _fetched() -> tuple[int, int]:
    """Returns the bytes that Linux has read from the disk for this process, and 0 requests."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"]), 0


def _forget(store: Store) -> None:
    """Removes the store's files from the page cache."""
    for path in Path(store.root).rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _uploaded(store: Store, proxy: FaultyProxy) -> Store:
    import boto3

    settings: dict[str, Any] = {
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ |= settings
    boto3.client("s3").create_bucket(Bucket="share")
    root = "s3://share/store"
    for path in sorted(Path(store.root).rglob("*")):
        if path.is_file() and path.name != storage.LOCK:
            with storage.publishing(storage.join(root, str(path.relative_to(store.root)))) as draft:
                os.link(path, draft)
    return open_store(root)
