"""Size and reading speed of BERT-base shards on one core; opening and resuming a store of a million
shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from infra.files import storage
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import MAX_SHARD_OVERHEAD
from offline_teacher.store.index import Frame, PartIndex, ShardIndex, TaskIndex
from offline_teacher.store.manifest import Manifest, Spec, SplitRecord
from offline_teacher.store.numbering import SplitPlan, Task, shards_of
from offline_teacher.store.paths import part_path, task_path
from offline_teacher.store.schema import Layout, Plan
from offline_teacher.store.store import Store
from offline_teacher.store.unfinished import finished_parts, finished_tasks, read_parts, read_spec
from tests.benchmarks.timing import interleave
from tests.s3_server import FaultyProxy, free_port, wait_for_port
from tests.store.synthetic import Columns, make_spec, make_store, recorded_slots

SAMPLES, REPEATS = 512, 9
SHAPE: dict[str, Any] = {"length": 128, "masked": 20, "vocab_size": 30_522, "hidden_size": 768}
TARGETS: dict[str, Any] = {"top_k": 64, "temperatures": (1.0, 2.0)}
PARTS, PIECES, TASK_SHARDS, LATENCY = 1000, 10, 100, 0.02


def run() -> list[dict[str, Any]]:
    topk = Layout(**SHAPE, **TARGETS, hidden_states="none", positions="all")
    hidden = Layout(**SHAPE, top_k=0, temperatures=(), hidden_states="float16", positions="all")
    both = Layout(**SHAPE, **TARGETS, hidden_states="float16", positions="all")
    with tempfile.TemporaryDirectory() as directory:
        stores = {
            name: make_store(
                f"{directory}/{name}",
                layout,
                {"train": (SAMPLES,)},
                Plan.from_bytes(layout, 1, SAMPLES),
                teacher=plausible_teacher,
                weights={"none": np.zeros(1, np.float32)},
            )
            for name, layout in (("topk", topk), ("hidden", hidden), ("both", both))
        }
        seconds = interleave(
            {
                "topk": _reading(stores["topk"], ["topk_ids", "topk_logits", "logsumexp"]),
                "hidden": _reading(stores["hidden"], ["hidden_states"]),
                "topk of both": _reading(stores["both"], ["topk_ids", "topk_logits", "logsumexp"]),
            },
            REPEATS,
            clock=time.process_time,
        )
        measured = _bytes_of(stores["both"]) / (SAMPLES * 128)
        expected = both.bytes_per_sample() / both.length
    return [
        _row(
            "store.bytes_per_token",
            measured,
            "bytes",
            "within 2 % of FORMAT.md",
            abs(measured / expected - 1) <= 0.02,
            f"top-64, T=1 and 2, float16 hidden states, shards and indices; the formula gives {expected:.1f}",
        ),
        *_speeds(seconds),
        *_opening(),
        _resume_scan(),
    ]


def _speeds(seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    where = (
        f"L=128, V=30,522, D=768, {SAMPLES} samples, page cache, CPU time of one thread, medians "
        f"of {REPEATS}; every sample of every block checked against its digest and returned as a view"
    )
    tokens = SAMPLES * 128
    for name, what in (("topk", "a store of it alone"), ("topk of both", "beside hidden states")):
        rate, end = tokens / seconds[name], "" if name == "topk" else "_beside_hidden"
        yield _row(
            f"store.read_tokens_per_s{end}",
            rate,
            "tokens/s",
            ">= 2e+07",
            rate >= 20e6,
            f"top-64 with logsumexp, {what}; {where}",
        )
    rate = tokens * 768 * 2 / seconds["hidden"] / 1e9
    yield _row("store.read_hidden_bytes_per_s", rate, "GB/s", ">= 4", rate >= 4, f"float16; {where}")


def _row(
    name: str, value: float, unit: str, goal: str | None, holds: bool | None, where: str
) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": goal, "holds": holds, "conditions": where}


def plausible_teacher(layout: Layout, columns: Columns, random: np.random.Generator) -> None:
    """Fills the teacher's columns with random numbers that pass the store's checks."""
    used = recorded_slots(layout, columns)[..., None]
    if layout.top_k:
        first = random.integers(1000, 20_000, (*used.shape[:2], 1))
        columns["topk_ids"][:] = (first + np.arange(layout.top_k)) * used
        columns["topk_logits"][:] = (12 - np.arange(layout.top_k) / 8) * used
        columns["logsumexp"][:] = (12 / np.array(layout.temperatures) + 2) * used
    if layout.hidden_states != "none":
        shape = columns["hidden_states"].shape
        columns["hidden_states"][:] = np.where(used, random.standard_normal(shape, np.float32), 0)


def _reading(store: Store, columns: list[str]) -> Callable[[], None]:
    reader = BlockReader(store, "train", columns)
    blocks = store.splits["train"].plan.blocks_per_epoch

    def read() -> None:
        for block in range(blocks):
            reader.rows(0, block)

    return read


def _bytes_of(store: Store) -> int:
    """Returns the bytes of all shards and task indices."""
    folders = (Path(store.root, "shards"), Path(store.root, "tasks"))
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


# --- a store of 1,000,000 shards in 10,000 tasks, without the shards ---

OPEN = """
import json, re, sys, time
from offline_teacher.store.store import open_store
started = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter() - started
index = store.task_index("train", 0)
plan = store.splits["train"].plan
locations = [plan.locate(0, block) for block in range(plan.blocks_per_epoch)[-1000:]]
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
shards = store.splits["train"].plan.task_count * len(index.shards)
print(json.dumps({"seconds": opened, "megabytes": peak, "shards": shards}))
"""


def _opening() -> Iterator[dict[str, Any]]:
    root_dir = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as directory:
        for name, data in large_store().items():
            storage.publish_bytes(f"{directory}/{name}", data)
        command = [sys.executable, "-c", OPEN, directory]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root_dir)
    opened = json.loads(done.stdout)
    where = f"{opened['shards']:,} shards in {PARTS * PIECES:,} tasks, JSON alone, local disk"
    seconds, megabytes = opened["seconds"], opened["megabytes"]
    yield _row("store.open_seconds", seconds, "s", "<= 2", seconds <= 2, where)
    words = f"{where}; the whole process, an index of a task read too"
    yield _row("store.open_megabytes", megabytes, "MB", "<= 200", megabytes <= 200, words)


def large_spec() -> Spec:
    layout = Layout(**SHAPE, **TARGETS, hidden_states="float16", positions="all")
    plan = Plan.from_bytes(layout, 1, 1)
    blocks = Plan.from_bytes(layout, 1, 1 << 20)
    task = TASK_SHARDS * blocks.shard_blocks * blocks.block_samples
    plan = Plan(1, task, blocks.block_samples, blocks.shard_blocks)
    return make_spec(layout, plan)


def large_store() -> dict[str, bytes]:
    """Returns path in the store -> content, for the spec, the manifest and the index of the first task."""
    spec = large_spec()
    plan = SplitPlan.of("train", (PIECES * spec.plan.task_sequences,) * PARTS, spec.plan)
    index = index_of(spec, plan.task(0)).to_bytes()
    tasks = (storage.digest_bytes(index), *(digest_of(number) for number in range(1, plan.task_count)))
    parts = tuple(digest_of(number) for number in range(PARTS))
    record = SplitRecord(plan.rows, parts, tasks, plan.samples * 128, plan.samples * 20)
    files = {"teacher/config.json": digest_of(0), "tokenizer/vocab.txt": digest_of(1)}
    manifest = Manifest(spec.digest, files, {"train": record})
    name = task_path("", "train", plan.task(0).name).lstrip("/")
    return {"spec.json": spec.to_bytes(), "manifest.json": manifest.to_bytes(), name: index}


def digest_of(number: int) -> str:
    return storage.digest_bytes(number.to_bytes(8, "little"))


def index_of(spec: Spec, task: Task) -> TaskIndex:
    """Returns the index of a task with invented digests."""
    rows, offsets, at = spec.plan.block_samples, {}, 1024
    for name, column in spec.layout.columns().items():
        offsets[name] = at
        at += -(-rows * column.bytes // 8) * 8
    shards = tuple(
        ShardIndex(
            f"{number:032x}.arrow",
            len(sizes) * at + MAX_SHARD_OVERHEAD,
            sum(sizes),
            1200,
            "0f" * 8 * len(sizes),
        )
        for number, sizes in enumerate(shards_of(task, spec.plan))
    )
    samples = task.samples
    return TaskIndex(
        "train", task.name, spec.digest, samples, samples * 128, 0, {}, {rows: Frame(at, offsets)}, shards
    )


# --- the files of an object store that a resumed pass reads ---

SERVER = """
import importlib, sys, threading
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
module, _, function = sys.argv[2].partition(":")
s3 = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
s3.create_bucket("bench", "us-east-1")
for name, data in getattr(importlib.import_module(module), function)():
    s3.put_object("bench", f"store/{name}", data)
ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False).start()
threading.Event().wait()
"""


def unfinished_store() -> Iterator[tuple[str, bytes]]:
    """Yields path in the store and content of the spec, 1,000 parts, and 9,999 of 10,000 task indices. The
    task indices are empty, because resuming only lists them."""
    spec = large_spec()
    yield "spec.json", spec.to_bytes()
    plan = SplitPlan.of("train", (PIECES * spec.plan.task_sequences,) * PARTS, spec.plan)
    digest = digest_of(0)
    for part, rows in enumerate(plan.rows):
        index = PartIndex("train", part, 1, digest, digest, digest, rows, 1, 1, 1, {})
        yield part_path("", "train", part, ".json").lstrip("/"), index.to_bytes()
    for number in range(plan.task_count - 1):
        yield task_path("", "train", plan.task(number).name).lstrip("/"), b"{}"


def _resume_scan() -> dict[str, Any]:
    with loaded_server(f"{__name__}:unfinished_store") as root:
        started = time.perf_counter()
        spec = read_spec(root)
        rows = [index.rows for index, _ in read_parts(root, "train", finished_parts(root, "train"))]
        plan = SplitPlan.of("train", tuple(rows), spec.plan)
        finished = finished_tasks(root, "train")
        missing = [task.name for task in plan.tasks() if task.name not in finished]
        seconds = time.perf_counter() - started
    assert missing == [plan.task(plan.task_count - 1).name]
    where = (
        f"S3 server (moto), {LATENCY * 1000:g} ms more for each request: spec, {PARTS:,} indices of parts, "
        f"the names of {len(finished):,} finished tasks, what is missing"
    )
    return _row("store.resume_scan_seconds", seconds, "s", "<= 30", seconds <= 30, where)


@contextmanager
def loaded_server(content: str) -> Iterator[str]:
    """Runs an S3 server with added latency, and yields the URL of a store in it. ``content``:
    ``module:function`` of a function that yields path in the store and content of each object."""
    port, root_dir = free_port(), Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port), content],
        cwd=root_dir,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process, seconds=600)
        with FaultyProxy(f"http://127.0.0.1:{port}") as proxy:
            proxy.latency = LATENCY
            os.environ |= {
                "AWS_ENDPOINT_URL": proxy.endpoint,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield "s3://bench/store"
    finally:
        process.kill()
        process.wait()
