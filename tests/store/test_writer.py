"""A task is all there or not there, and numbers that cannot be right do not get in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.schema import Layout, Plan
from offline_teacher.store.store import open_store
from offline_teacher.store.unfinished import finished_tasks, quarantined_tasks
from offline_teacher.store.value_checks import check_block
from offline_teacher.store.writer import TaskWriter, begin_store, finish_store, quarantine_task
from offline_teacher.verification.verify import verify
from tests.store.synthetic import (
    ENVIRONMENT,
    Columns,
    make_columns,
    make_spec,
    make_store,
    small_layout,
    small_plan,
    write_files,
    write_part,
    write_task,
)

ROWS = {"train": (3,)}
PLAN = small_plan(masking_epochs=1)
TASK = SplitPlan.of("train", (3,), PLAN).task(0)


def put(name: str, at: Any, value: Any) -> Any:
    def change(columns: Columns) -> None:
        columns[name][at] = value

    return change


def swap_positions(columns: Columns) -> None:
    columns["masked_positions"][1, :2] = columns["masked_positions"][1, 1::-1]


def repeat_id(columns: Columns) -> None:
    columns["topk_ids"][1, 0, 1] = columns["topk_ids"][1, 0, 0]


def rise(columns: Columns) -> None:
    columns["topk_logits"][1, 0, 1] = columns["topk_logits"][1, 0, 0] + 1


def short(columns: Columns) -> None:
    """Row 1 now says it is shorter than what is recorded."""
    columns["token_count"][1] -= 1


MISTAKES = [
    ("sequence_id", put("sequence_id", 1, 7), "planned"),
    ("token_count", put("token_count", 1, 0), "1 to length"),
    ("token_count", put("token_count", 1, 13), "1 to length"),
    ("input_ids", put("input_ids", (1, 3), 40), "vocabulary"),
    ("input_ids", short, "pad"),
    ("masked_positions", swap_positions, "ascending"),
    ("masked_positions", put("masked_positions", (1, 0), -1), "ascending"),
    ("masked_positions", put("masked_positions", (1, 0), -2), "negative"),
    ("masked_positions", put("masked_positions", (1, 1), 12), "token_count"),
    ("masked_labels", put("masked_labels", (1, 0), 40), "vocabulary"),
    ("masked_labels", put("masked_labels", (1, 0), 2), "special"),
    ("topk_ids", put("topk_ids", (1, 0, 0), 40), "vocabulary"),
    ("topk_ids", repeat_id, "twice"),
    ("topk_logits", put("topk_logits", (1, 0, 0), np.nan), "NaN"),
    ("topk_logits", put("topk_logits", (1, 0, 0), np.inf), "infinite"),
    ("topk_logits", rise, "descending"),
    ("logsumexp", put("logsumexp", (1, 0, 1), np.nan), "NaN"),
    ("logsumexp", put("logsumexp", (1, 0, 0), -50), "below the largest"),
    ("logsumexp", put("logsumexp", (1, 0, 1), 50), "above the largest"),
    ("hidden_states", put("hidden_states", (1, 0, 0), -np.inf), "infinite"),
]


def full_columns(layout: Layout) -> Columns:
    """Three full sequences."""
    spec = make_spec(layout, PLAN)
    for seed in range(200):
        made = make_columns(spec, "train", TASK, seed)
        if (made["token_count"] == 12).all():
            return made
    raise AssertionError


@pytest.fixture
def columns() -> Columns:
    return full_columns(small_layout())


def write(root: str, columns: Columns, layout: Layout | None = None) -> None:
    with TaskWriter(root, make_spec(layout, PLAN), "train", TASK, ENVIRONMENT) as writer:
        writer.write(columns)
        writer.publish()


@pytest.mark.parametrize(("column", "mistake", "words"), MISTAKES)
def test_a_number_that_cannot_be_right_is_named(
    tmp_path: Path, columns: Columns, column: str, mistake: Any, words: str
) -> None:
    mistake(columns)
    with pytest.raises(
        ValueError, match=rf"e000-p00000-0000: column {column}, sample 1 \(sequence 1\): .*{words}"
    ):
        write(str(tmp_path), columns)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("changes", "name", "at", "value"),
    [
        ({"hidden_states": "int8"}, "hidden_scale", (1, 0), -1.0),
        ({"hidden_states": "int8"}, "hidden_scale", (1, 0), np.nan),
        ({"hidden_states": "int8"}, "hidden_states", (1, 0), -128),
        ({"hidden_states": "bfloat16"}, "hidden_states", (1, 0, 0), 0x7F80),
        ({"hidden_states": "bfloat16"}, "hidden_states", (1, 0, 0), 0xFFC1),
        (
            {"positions": "pooled", "masked": 0, "top_k": 0, "hidden_states": "none"},
            "embedding",
            (1, 0),
            np.nan,
        ),
    ],
)
def test_mistakes_of_other_layouts_are_named(
    tmp_path: Path, changes: Any, name: str, at: Any, value: float
) -> None:
    layout = small_layout(**changes)
    wrong = full_columns(layout)
    write(str(tmp_path / "right"), wrong, layout)
    wrong[name][at] = value
    with pytest.raises(ValueError, match=rf"column {name}, sample 1"):
        write(str(tmp_path / "wrong"), wrong, layout)


@pytest.mark.parametrize("name", ["topk_ids", "topk_logits", "logsumexp", "hidden_states"])
def test_positions_without_a_token_are_zero(columns: Columns, name: str) -> None:
    for each in ("topk_ids", "topk_logits", "logsumexp", "hidden_states"):
        columns[each][2, 9:] = 0
    columns["token_count"][2], columns["input_ids"][2, 9:] = 9, 0
    columns["masked_positions"][2], columns["masked_labels"][2] = [3, -1], [11, 0]
    spec = make_spec()
    arguments = spec.layout, spec.special, TASK.sequence_ids()
    assert list(check_block(*arguments, columns)) == []
    columns[name][2, 10] = 1
    found = [(bad.column, bad.row) for bad in check_block(*arguments, columns) if "without" in bad.what]
    assert found == [(name, 2)]


def test_wrong_shapes_names_and_numbers_of_samples(tmp_path: Path, columns: Columns) -> None:
    for change, words in (
        ({"logsumexp": None}, "logsumexp is missing"),
        ({"logits": columns["logsumexp"]}, "logits is not a column"),
        ({"digests": columns["logsumexp"]}, "digests is not a column"),
        ({"topk_logits": columns["topk_logits"].astype(np.float32)}, "must be float16"),
        ({"input_ids": columns["input_ids"][:2]}, r"must be uint16 \[3, 12\]"),
    ):
        wrong = {k: v for k, v in {**columns, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=words):
            write(str(tmp_path), wrong)
    with pytest.raises(ValueError, match="2 of 3 samples"):
        write(str(tmp_path), {name: array[:2] for name, array in columns.items()})
    with pytest.raises(ValueError, match="more than its 3 samples"):
        write(str(tmp_path), {name: np.concatenate([array, array]) for name, array in columns.items()})
    assert finished_tasks(str(tmp_path), "train") == set()


STEPS = {"os.fsync": 7, "os.replace": 3, "os.link": 1, "os.unlink": 4}
"""Calls in the commit of a task of two shards."""


@pytest.mark.parametrize(
    ("step", "when"), [(step, n) for step, calls in STEPS.items() for n in range(1, calls + 1)]
)
def test_a_kill_at_any_step_leaves_a_whole_task_or_none(tmp_path: Path, step: str, when: int) -> None:
    """The writer dies, as by SIGKILL, in the n-th call of a function of a commit."""
    plan = small_plan(masking_epochs=1, shard_blocks=1)
    whole = make_store(str(tmp_path / "whole"), rows=ROWS, plan=plan)
    root, spec = str(tmp_path / "killed"), whole.spec
    begin_store(root, spec)
    code = f"""
import os
from offline_teacher.store.numbering import SplitPlan
from tests.store.synthetic import *
calls, true = 0, {step}
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {when}:
        os._exit(9)
    return true(*args, **kwargs)
{step} = dying
plan = small_plan(masking_epochs=1, shard_blocks=1)
write_task({root!r}, make_spec(plan=plan), "train", SplitPlan.of("train", (3,), plan).task(0))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 9
    if not finished_tasks(root, "train"):
        write_task(root, spec, "train", TASK)
    write_files(root, spec)
    write_part(root, spec, whole.splits["train"].plan, "train", 0)
    assert finish_store(root, {"train": 1}) == whole.manifest
    assert verify(root) == []
    assert every_name(root) == every_name(whole.root)


def every_name(root: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in Path(root).rglob("*"))


def test_a_full_disk_publishes_no_index(
    tmp_path: Path, columns: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        write(str(tmp_path), columns)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_fingerprint_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    begin_store(root, make_spec())
    begin_store(root, make_spec())
    with pytest.raises(UserError, match="masking.seed: 0 -> 5"):
        begin_store(root, make_spec(seed=5))
    with pytest.raises(UserError, match="layout.top_k: 4 -> 3"):
        begin_store(root, make_spec(small_layout(top_k=3)))
    with pytest.raises(UserError, match="plan.task_sequences: 7 -> 6"):
        begin_store(root, make_spec(plan=small_plan(task_sequences=6)))


def test_a_damaged_spec_or_index_is_one_line(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), rows=ROWS, plan=PLAN)
    for name, call in (
        ("tasks/train/e000-p00000-0000.json", lambda: finish_store(store.root, {"train": 1})),
        ("sequences/train/part-00000.json", lambda: finish_store(store.root, {"train": 1})),
        ("spec.json", lambda: begin_store(store.root, store.spec)),
    ):
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data.replace(b"xxh3-128:", b"xxh3-128:0", 1))
        with pytest.raises(UserError, match=rf"{name} is damaged .* verify .* --repair"):
            call()
        path.write_bytes(data)


def test_finishing_drops_what_was_quarantined_and_unfinished(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), rows=ROWS, plan=PLAN)
    quarantine_task(store.root, "train", "e000-p00000-0000", {"error": "not finite"})
    assert quarantined_tasks(store.root, "train") == {"e000-p00000-0000"}
    (tmp_path / "tasks" / "train" / ".tmp-1234-x.json").write_text("half")
    assert finish_store(store.root, {"train": 1}) == store.manifest
    assert not (tmp_path / "failed").exists()
    assert len(os.listdir(tmp_path / "tasks" / "train")) == 1
    assert verify(store.root) == []


def test_a_store_without_teacher_or_tokenizer_is_not_finished(tmp_path: Path) -> None:
    for name in ("teacher/config.json", "tokenizer/vocab.txt"):
        store = make_store(str(tmp_path / name.partition("/")[0]), rows=ROWS, plan=PLAN)
        os.unlink(f"{store.root}/{name}")
        with pytest.raises(UserError, match="lacks teacher/config.json or tokenizer/"):
            finish_store(store.root, {"train": 1})


def test_a_writer_holds_a_few_shards_in_memory_however_long_its_task_is(tmp_path: Path) -> None:
    layout = small_layout(length=128, masked=2, hidden_size=64, top_k=0)
    plan = Plan(masking_epochs=1, task_sequences=4096, block_samples=16, shard_blocks=4)
    peaks = []
    for samples in (512, 4096):
        task = Task(0, 0, 0, 0, range(samples))
        columns = make_columns(make_spec(layout, plan), "train", task)
        tracemalloc.start()
        with TaskWriter(str(tmp_path / str(samples)), make_spec(layout, plan), "train", task, {}) as writer:
            for at in range(0, samples, 16):
                writer.write({name: array[at : at + 16] for name, array in columns.items()})
            writer.publish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    shard = 64 * layout.bytes_per_sample()
    assert max(peaks) < 5 * shard
    assert peaks[1] < 1.3 * peaks[0] + shard


def test_the_store_of_another_pass_is_left_alone(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), rows=ROWS, plan=PLAN)
    with pytest.raises(UserError, match="choose another store.path"):
        begin_store(store.root, make_spec(plan=PLAN, seed=1))
    assert open_store(store.root).digest == store.digest
