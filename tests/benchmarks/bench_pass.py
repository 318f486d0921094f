"""Time of a pass's driver per task and for finishing the store: 1,000,000 shards in 10,000 tasks on S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offline_teacher.cluster.worker_base import WorkerBase
from offline_teacher.store.index import PartIndex
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.paths import part_path, task_path
from tests.benchmarks.bench_store import (
    LATENCY,
    PARTS,
    PIECES,
    TASK_SHARDS,
    digest_of,
    index_of,
    large_spec,
    loaded_server,
)
from tests.benchmarks.results import Row, row

ROOT_DIR = Path(__file__).resolve().parents[2]
WORKERS = 2
DRIVE = """
import json, re, sys, time
from offline_teacher.running import teacher_pass
from offline_teacher.cluster.crews import Crew
from offline_teacher.cluster.pool import Cluster
from offline_teacher.store.unfinished import read_spec
from offline_teacher.store.writer import finish_store
from tests.benchmarks.bench_pass import PARTS, WORKERS, Idle, SECTIONS
import yaml, tempfile
from infra.settings.recipe_file import load_recipe

root, what = sys.argv[1:]
if what == "finish":
    begin = time.perf_counter()
    finish_store(root, {"train": PARTS})
    seconds, cpu = time.perf_counter() - begin, time.process_time()
else:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(SECTIONS, file)
        file.flush()
        recipe = load_recipe(file.name)
    with Cluster(recipe) as cluster, cluster.pool(Crew(Idle, (), WORKERS, WORKERS, 1)) as pool:
        pool.run([teacher_pass.Item("first", "infer", ())], lambda item, result: None, print)
        begin, used = time.perf_counter(), time.process_time()
        outcome = teacher_pass._infer(root, read_spec(root), "train", {"train": PARTS}, pool, None)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - used
        assert not outcome.quarantined
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"seconds": seconds, "cpu": cpu, "megabytes": peak}))
""".replace("\\\\\\\\", "\\\\")
SECTIONS = {
    "name": "bench",
    "corpus": {"path": ["text.txt"]},
    "teacher": {"model": "model", "workers": WORKERS},
    "tracking": {"enabled": False},
}


class Idle(WorkerBase):
    """A worker that returns at once, without computing a task."""

    def prepare(self) -> dict[str, Any]:
        return {"environment": {}}

    def infer(self, *task: Any) -> dict[str, Any]:
        return {"tokens": 1, "bytes": 1}


def run() -> list[Row]:
    with loaded_server("tests.benchmarks.bench_pass:sequences") as root:
        driven = _drive(root, "drive")
    with loaded_server("tests.benchmarks.bench_pass:all_tasks") as root:
        finished = _drive(root, "finish")
    tasks = PARTS * PIECES
    shards = tasks * TASK_SHARDS
    where = (
        f"{tasks:,} tasks of {TASK_SHARDS} shards, S3 server (moto) with {LATENCY * 1000:g} ms more a request"
    )
    drive = (
        f"{where}; a real Ray, {WORKERS} workers that answer at once; from the indices of parts to the last"
    )
    drive += f" task, wall time; CPU time of the driver {driven['cpu']:.1f} s of {driven['seconds']:.1f} s"
    done = f"{where}; every index read, the manifest published; CPU time {finished['cpu']:.1f} s"
    peak = max(driven["megabytes"], finished["megabytes"])
    return [
        row("pass.driver_us_per_shard", driven["seconds"] * 1e6 / shards, "us", "<= 500", drive),
        row("pass.driver_us_per_task", driven["seconds"] * 1e6 / tasks, "us", None, drive),
        row("pass.finish_seconds", finished["seconds"], "s", "<= 60", done),
        row("pass.driver_megabytes", peak, "MB", "<= 1000", f"{shards:,} shards; {where}"),
    ]


def _drive(root: str, what: str) -> dict[str, float]:
    command = [sys.executable, "-c", DRIVE, root, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT_DIR, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def sequences() -> Iterator[tuple[str, bytes]]:
    """Yields path in the store and content of the spec and of all parts of a store without tasks."""
    spec, digest = large_spec(), digest_of(0)
    yield "spec.json", spec.to_bytes()
    for part in range(PARTS):
        rows = PIECES * spec.plan.task_sequences
        index = PartIndex("train", part, 1, digest, digest, digest, rows, 1, 1, 1, {})
        yield part_path("", "train", part, ".json").lstrip("/"), index.to_bytes()


def all_tasks() -> Iterator[tuple[str, bytes]]:
    """Yields path in the store and content of spec, parts, all tasks, teacher and tokenizer."""
    yield from sequences()
    yield "teacher/config.json", b"{}"
    yield "tokenizer/vocab.txt", b"a"
    spec = large_spec()
    plan = SplitPlan.of("train", (PIECES * spec.plan.task_sequences,) * PARTS, spec.plan)
    for task in plan.tasks():
        name = task_path("", "train", task.name).lstrip("/")
        yield name, index_of(spec, task).to_bytes()
