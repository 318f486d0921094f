"""A shard is all there or not there, and numbers that cannot be right do not get in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import UserError
from offline_teacher.store.checks import check_values
from offline_teacher.store.schema import ShardPlan
from offline_teacher.store.verify import verify
from offline_teacher.store.writer import (
    begin_store,
    finish_store,
    missing_shards,
    read_sidecar,
    write_shard,
)
from tests.store.synthetic import make_columns, make_declaration, make_store, small_layout, write_files

PLAN = ShardPlan(3, 1, 3)


def full(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writable copies."""
    return {name: array.copy() for name, array in columns.items()}


def put(name: str, at: Any, value: Any):  # type: ignore[no-untyped-def]
    def change(columns: dict[str, np.ndarray]) -> None:
        columns[name][at] = value

    return change


def swap_positions(columns: dict[str, np.ndarray]) -> None:
    columns["masked_positions"][1, :2] = columns["masked_positions"][1, 1::-1]


def repeat_id(columns: dict[str, np.ndarray]) -> None:
    columns["topk_ids"][1, 0, 1] = columns["topk_ids"][1, 0, 0]


def rise(columns: dict[str, np.ndarray]) -> None:
    columns["topk_logits"][1, 0, 1] = columns["topk_logits"][1, 0, 0] + 1


def short(columns: dict[str, np.ndarray]) -> None:
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


@pytest.fixture(scope="module")
def columns() -> dict[str, np.ndarray]:
    """Three full sequences."""
    declaration = make_declaration(plan=PLAN)
    for seed in range(100):
        made = make_columns(declaration, 0, 0, seed)
        if (made["token_count"] == 12).all():
            return made
    raise AssertionError


@pytest.mark.parametrize(("column", "mistake", "words"), MISTAKES)
def test_a_number_that_cannot_be_right_is_named(
    tmp_path: Path, columns: dict[str, np.ndarray], column: str, mistake, words: str
) -> None:  # type: ignore[no-untyped-def]
    declaration, wrong = make_declaration(plan=PLAN), full(columns)
    mistake(wrong)
    with pytest.raises(ValueError, match=rf"r000-00000000: column {column}, row 1 \(sequence 1\): .*{words}"):
        write_shard(str(tmp_path), declaration, 0, 0, wrong)
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_scale", -1.0), ("hidden_scale", np.nan), ("hidden_states", -128)]
)
def test_int8_mistakes_are_named(tmp_path: Path, name: str, value: float) -> None:
    declaration = make_declaration(small_layout(hidden_states="int8"), PLAN)
    wrong = make_columns(declaration, 0, 0)
    wrong[name][1, 0] = value
    with pytest.raises(ValueError, match=rf"column {name}, row 1"):
        write_shard(str(tmp_path), declaration, 0, 0, wrong)


@pytest.mark.parametrize("name", ["topk_ids", "topk_logits", "logsumexp", "hidden_states"])
def test_positions_without_a_token_are_zero(columns: dict[str, np.ndarray], name: str) -> None:
    declaration, wrong = make_declaration(plan=PLAN), full(columns)
    for each in ("topk_ids", "topk_logits", "logsumexp", "hidden_states"):
        wrong[each][2, 9:] = 0
    wrong["token_count"][2], wrong["input_ids"][2, 9:] = 9, 0
    wrong["masked_positions"][2], wrong["masked_labels"][2] = [3, -1], [11, 0]
    args = declaration.layout, declaration.special, range(3)
    assert list(check_values(*args, wrong)) == []
    wrong[name][2, 10] = 1
    assert any(
        (found.column, found.row) == (name, 2) and "without a token" in found.what
        for found in check_values(*args, wrong)
    )


def test_wrong_shapes_and_names(tmp_path: Path, columns: dict[str, np.ndarray]) -> None:
    declaration = make_declaration(plan=PLAN)
    for change, words in (
        ({"logsumexp": None}, "logsumexp is missing"),
        ({"logits": columns["logsumexp"]}, "logits is not a column"),
        ({"topk_logits": columns["topk_logits"].astype(np.float32)}, "must be float16"),
        ({"input_ids": columns["input_ids"][:2]}, r"must be uint16 \[3, 12\]"),
    ):
        wrong = {k: v for k, v in {**columns, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=words):
            write_shard(str(tmp_path), declaration, 0, 0, wrong)


STEPS = ["os.fsync", "os.replace"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", range(1, 7))
def test_a_kill_at_any_step_leaves_a_whole_shard_or_none(tmp_path: Path, step: str, when: int) -> None:
    """The writer dies, as by SIGKILL, in the n-th call of fsync or rename of a commit."""
    whole = make_store(str(tmp_path / "whole"), plan=PLAN)
    root = str(tmp_path / "killed")
    declaration = make_declaration(plan=PLAN)
    begin_store(root, declaration)
    write_files(root, declaration)
    code = f"""
import os
from offline_teacher.store.writer import write_shard
from tests.store.synthetic import make_columns, make_declaration, ShardPlan
calls, true = 0, {step}
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == {when}:
        os._exit(9)
    return true(*args, **kwargs)
{step} = dying
declaration = make_declaration(plan=ShardPlan(3, 1, 3))
write_shard({root!r}, declaration, 0, 0, make_columns(declaration, 0, 0))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode in (0, 9)
    sidecar = read_sidecar(root, 0, 0)
    assert (sidecar is None) == (missing_shards(root, declaration) == [(0, 0)])
    assert done.returncode == 9 or sidecar is not None
    if sidecar is None:
        write_shard(root, declaration, 0, 0, make_columns(declaration, 0, 0))
    assert finish_store(root) == whole.manifest
    assert verify(root) == []
    assert sorted(os.listdir(f"{root}/shards")) == sorted(os.listdir(f"{whole.root}/shards"))


def test_a_full_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    declaration = make_declaration(plan=PLAN)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((UserError, OSError), match="(?i)no space|room|full"):
        write_shard(str(tmp_path), declaration, 0, 0, make_columns(declaration, 0, 0))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_written_twice_is_written_once(tmp_path: Path) -> None:
    declaration = make_declaration(plan=PLAN)
    one = write_shard(str(tmp_path), declaration, 0, 0, make_columns(declaration, 0, 0))
    assert write_shard(str(tmp_path), declaration, 0, 0, make_columns(declaration, 0, 0)) == one
    assert sorted(os.listdir(tmp_path / "shards")) == ["r000-00000000.arrow", "r000-00000000.json"]


def test_another_fingerprint_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    declaration = make_declaration(plan=PLAN)
    begin_store(root, declaration)
    begin_store(root, declaration)
    with pytest.raises(UserError, match="masking.seed: 0 -> 5"):
        begin_store(root, make_declaration(plan=PLAN, seed=5))
    with pytest.raises(UserError, match="layout"):
        begin_store(root, make_declaration(plan=ShardPlan(4, 1, 3)))


def test_a_shard_of_another_fingerprint_does_not_count(tmp_path: Path) -> None:
    other = make_declaration(plan=PLAN, seed=5)
    write_shard(str(tmp_path), other, 0, 0, make_columns(other, 0, 0, 5))
    assert missing_shards(str(tmp_path), other) == []
    assert missing_shards(str(tmp_path), make_declaration(plan=PLAN)) == [(0, 0)]


def test_finishing_drops_what_failed_attempts_left(tmp_path: Path) -> None:
    store = make_store(str(tmp_path), plan=PLAN)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "r000-00000000.json").write_text("{}")
    (tmp_path / "shards" / ".tmp-1234-x.arrow").write_text("half")
    assert finish_store(store.root) == store.manifest
    assert not (tmp_path / "failed").exists()
    assert len(os.listdir(tmp_path / "shards")) == 2
