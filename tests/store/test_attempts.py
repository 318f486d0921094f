"""Several attempts of one task, of different bits: the index never names another attempt's shards."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from infra.files import storage
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.paths import shard_path, task_path
from offline_teacher.store.writer import TaskWriter, begin_store, finish_store
from offline_teacher.verification.verify import verify
from tests.s3_server import FaultyProxy
from tests.store.synthetic import (
    Columns,
    make_columns,
    make_spec,
    small_plan,
    write_files,
    write_part,
    write_task,
)

PLAN = SplitPlan.of("train", (7,), small_plan(masking_epochs=1))
TASK = PLAN.task(0)


def columns_of(spec: Spec, attempt: int) -> Columns:
    """The same text, other last bits of the hidden states: those of another GPU, say."""
    columns = make_columns(spec, "train", TASK)
    columns["hidden_states"][:, 0] = attempt
    return columns


def attempt_writer(root: str, spec: Spec, attempt: int) -> TaskWriter:
    writer = TaskWriter(root, spec, "train", TASK, {"gpu": attempt})
    writer.write(columns_of(spec, attempt))
    return writer


def assert_one_attempt_holds(root: str, spec: Spec) -> int:
    """The store can be finished and is whole, of one attempt alone; returns which."""
    index = TaskIndex.from_bytes(storage.read_bytes(task_path(root, "train", TASK.name)))
    directory = storage.join(root, "shards", "train", TASK.name)
    assert storage.list_names(directory) == sorted(shard.file for shard in index.shards)
    attempt = index.environment["gpu"]
    assert isinstance(attempt, int)
    states = columns_of(spec, attempt)["hidden_states"].tobytes()
    found = b""
    for shard in index.shards:
        data = storage.read_bytes(shard_path(root, "train", TASK.name, shard.file))
        assert storage.digest_bytes(data) == shard.digest
        at = shard.start
        for count in [2] * (shard.samples // 2) + [1] * (shard.samples % 2):
            offset = at + index.frames[count].offsets["hidden_states"]
            found += data[offset : offset + count * spec.layout.columns()["hidden_states"].bytes]
            at += index.frames[count].bytes
    assert found == states
    write_files(root, spec)
    write_part(root, spec, PLAN, "train", 0)
    finish_store(root, {"train": 1})
    assert verify(root) == []
    return attempt


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    return storage.join(request.getfixturevalue("bucket"), "store")


def test_the_slow_attempt_loses_and_cleans_up(root: str) -> None:
    spec = make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    with attempt_writer(root, spec, 1) as slow, attempt_writer(root, spec, 2) as fast:
        first = fast.publish()
        assert slow.publish() == first
    assert first.environment == {"gpu": 2}
    assert assert_one_attempt_holds(root, spec) == 2


def test_an_attempt_that_starts_after_the_index_loses(root: str) -> None:
    spec = make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    with attempt_writer(root, spec, 1) as first:
        first.publish()
    with attempt_writer(root, spec, 2) as late:
        assert late.publish().environment == {"gpu": 1}
    assert assert_one_attempt_holds(root, spec) == 1


def test_what_a_dead_attempt_left_goes_with_the_next(root: str) -> None:
    spec = make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    with attempt_writer(root, spec, 1) as dead:
        for publishing in dead._publishing:
            publishing.result()  # its shards are there, its index never comes
    left = storage.list_names(storage.join(root, "shards", "train", TASK.name))
    assert len(left) == 2
    with attempt_writer(root, spec, 2) as second:
        second.publish()
    assert assert_one_attempt_holds(root, spec) == 2


def test_attempts_in_threads_give_one_index(root: str) -> None:
    spec = make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    together, winners = threading.Barrier(4), []

    def attempt(number: int) -> None:
        with attempt_writer(root, spec, number) as writer:
            together.wait(60)
            winners.append(writer.publish().environment["gpu"])

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 4
    assert set(winners) == {assert_one_attempt_holds(root, spec)}


ATTEMPT = """
import sys
from tests.store.test_attempts import PLAN, attempt_writer, make_spec
root, number = sys.argv[1], int(sys.argv[2])
with attempt_writer(root, make_spec(plan=PLAN.plan), number) as writer:
    sys.stdin.readline()
    print(writer.publish().environment["gpu"])
"""


def test_attempts_in_processes_give_one_index(tmp_path: Path) -> None:
    for round_ in range(3):
        root, spec = str(tmp_path / str(round_)), make_spec(plan=PLAN.plan)
        begin_store(root, spec)
        attempts = [
            subprocess.Popen(
                [sys.executable, "-c", ATTEMPT, root, str(number)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(3)
        ]
        for process in attempts:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = {int(process.communicate()[0]) for process in attempts}
        assert answers == {assert_one_attempt_holds(root, spec)}


def test_an_index_whose_answer_was_lost_is_still_this_attempts(bucket: str, proxy: FaultyProxy) -> None:
    root, spec = storage.join(bucket, "store"), make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    with attempt_writer(root, spec, 1) as writer:
        proxy.choose = lost_answer(proxy)
        index = writer.publish()
    assert ("PUT", "cut") in {(method, fault) for method, _, fault in proxy.seen}
    assert index.environment == {"gpu": 1}
    assert assert_one_attempt_holds(root, spec) == 1


def lost_answer(proxy: FaultyProxy):  # type: ignore[no-untyped-def]
    """The first PUT of an index is carried out, but its answer does not arrive."""
    left = ["cut"]
    return lambda method, path: left.pop() if left and method == "PUT" and "/tasks/" in path else None


def test_equal_attempts_leave_one_whole_task(root: str) -> None:
    spec = make_spec(plan=PLAN.plan)
    begin_store(root, spec)
    for _ in range(2):
        write_task(root, spec, "train", TASK)
    write_files(root, spec)
    write_part(root, spec, PLAN, "train", 0)
    finish_store(root, {"train": 1})
    assert verify(root) == []
    assert np.all(PLAN.sequence_ids(0) == [0, 1])
