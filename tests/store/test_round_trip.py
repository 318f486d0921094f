"""What is written comes back, bit for bit: from the reader, FORMAT.md's own code, pyarrow and datasets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.files import storage
from infra.files.cache import Cache
from offline_teacher.store.block_reader import BlockReader
from offline_teacher.store.blocks import MAX_BLOCK_OVERHEAD, MAX_SHARD_OVERHEAD, dequantise
from offline_teacher.store.parts import read_part
from offline_teacher.store.paths import shard_path
from offline_teacher.store.store import Store, open_store
from offline_teacher.store.unfinished import read_part_index
from offline_teacher.store.writer import TaskWriter, begin_store, finish_store
from offline_teacher.verification.verify import verify
from tests.store.synthetic import (
    ENVIRONMENT,
    make_columns,
    make_spec,
    make_store,
    quantise,
    small_layout,
    write_files,
    write_part,
    write_task,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "float16": {},
    "bfloat16": {"hidden_states": "bfloat16"},
    "int8": {"hidden_states": "int8"},
    "top-k alone": {"hidden_states": "none"},
    "states alone": {"top_k": 0, "replay_layers": 1},
    "masked": {"positions": "masked"},
    "masked int8": {"positions": "masked", "hidden_states": "int8", "top_k": 0},
    "pooled": {"positions": "pooled", "masked": 0, "top_k": 0, "hidden_states": "none"},
    "masking off": {"masked": 0, "teacher_weights": False},
    "uint32 ids": {"vocab_size": 70_000, "hidden_size": 2, "length": 5, "hidden_states": "none"},
}


def columns_of_split(store: Store, split: str, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """What was written, for each masking epoch: column -> array over all its samples."""
    plan, epochs = store.splits[split].plan, []
    for epoch in range(plan.masking_epochs):
        tasks = [plan.task(epoch * plan.tasks_per_epoch + place) for place in range(plan.tasks_per_epoch)]
        made = [make_columns(store.spec, split, task, seed) for task in tasks]
        epochs.append({name: np.concatenate([columns[name] for columns in made]) for name in made[0]})
    return epochs


def read_split(store: Store, split: str, **options: Any) -> list[dict[str, np.ndarray]]:
    """What a reader gives, for each masking epoch."""
    reader, epochs = BlockReader(store, split, list(store.layout.data_columns()), **options), []
    plan = store.splits[split].plan
    for epoch in range(plan.masking_epochs):
        blocks = [reader.rows(epoch, block) for block in range(plan.blocks_per_epoch)]
        epochs.append({name: np.concatenate([columns[name] for columns in blocks]) for name in blocks[0]})
    return epochs


def assert_same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = make_store(str(tmp_path), small_layout(**changes))
    for split in ("train", "validation"):
        expected = columns_of_split(store, split)
        assert_same(read_split(store, split), expected)
        assert store.splits[split].tokens == sum(int(epoch["token_count"].sum()) for epoch in expected)
        masked = sum(int((epoch.get("masked_positions", np.array([-1])) >= 0).sum()) for epoch in expected)
        assert store.splits[split].masked == masked
    assert verify(store.root) == []


def read_task_of_format_md(root_dir: Path) -> Any:
    """The function that FORMAT.md prints under "A reader", compiled from that page's own text."""
    text = (root_dir / "offline_teacher" / "store" / "FORMAT.md").read_text()
    code = text[text.index("## A reader") :].split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert "offline_teacher" not in code
    names: dict[str, Any] = {}
    exec(compile(code, "FORMAT.md", "exec"), names)
    return names["read_task"]


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_the_reader_in_the_format_reads_every_task(
    tmp_path: Path, root_dir: Path, changes: dict[str, Any]
) -> None:
    read_task = read_task_of_format_md(root_dir)
    store = make_store(str(tmp_path), small_layout(**changes))
    for split in ("train", "validation"):
        for task in store.splits[split].plan.tasks():
            found = read_task(store.root, split, task.number)
            assert list(found) == list(store.layout.columns())
            for name, expected in make_columns(store.spec, split, task).items():
                assert found[name].tobytes() == expected.tobytes(), name


def test_the_reader_in_the_format_notices_damage(store: Store, root_dir: Path) -> None:
    read_task = read_task_of_format_md(root_dir)
    index = store.task_index("train", 0)
    path = Path(shard_path(store.root, "train", index.task, index.shards[0].file))
    data = bytearray(path.read_bytes())
    data[index.shards[0].start + index.frames[2].offsets["hidden_states"] + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="damaged hidden_states"):
        read_task(store.root, "train", 0)


def test_plain_pyarrow_and_datasets_open_a_shard(store: Store) -> None:
    task = store.splits["train"].plan.task(0)
    index = store.task_index("train", 0)
    expected = make_columns(store.spec, "train", task)
    at = 0
    for shard in index.shards:
        path = shard_path(store.root, "train", index.task, shard.file)
        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
        table.validate(full=True)
        assert table.column_names == list(store.layout.columns())
        one = datasets.Dataset.from_file(path)
        assert len(one) == table.num_rows == shard.samples
        for row in range(shard.samples):
            assert one[row]["input_ids"] == expected["input_ids"][at + row].tolist()
            states = np.array(table["hidden_states"][row].as_py(), np.float16)
            assert states.tobytes() == expected["hidden_states"][at + row].tobytes()
        at += shard.samples
    assert at == task.samples


def test_the_columns_of_a_part_are_views_of_its_file(store: Store) -> None:
    index, _ = read_part_index(store.root, "train", 0)
    before = pa.total_allocated_bytes()
    columns = read_part(store.root, store.layout, index, Cache(None, 1 << 30))
    assert len(columns["input_ids"]) == index.rows
    assert pa.total_allocated_bytes() == before


def test_samples_may_come_in_pieces_of_any_size(tmp_path: Path, store: Store) -> None:
    root, spec, plan = str(tmp_path / "pieces"), store.spec, store.splits["train"].plan
    begin_store(root, spec)
    for task in plan.tasks():
        columns = make_columns(spec, "train", task)
        with TaskWriter(root, spec, "train", task, ENVIRONMENT) as writer:
            at = 0
            for size in (1, 3, 1, 7):
                piece = {name: array[at : at + size].copy() for name, array in columns.items()}
                writer.write(piece)
                for array in piece.values():
                    array.view(np.uint8)[...] = 255  # the caller's buffers are its own again
                at += len(piece["sequence_id"])
                if at == task.samples:
                    break
            assert writer.publish() == store.task_index("train", task.number)


def test_stores_of_one_recipe_are_equal_whatever_the_order(tmp_path: Path, store: Store) -> None:
    root, spec = str(tmp_path / "other"), store.spec
    begin_store(root, spec)
    for split in ("validation", "train"):
        plan = store.splits[split].plan
        for task in reversed(list(plan.tasks())):
            write_task(root, spec, split, task)
        for part in range(len(plan.rows)):
            write_part(root, spec, plan, split, part)
    write_files(root, spec)
    finish_store(root, {"train": 3, "validation": 1})
    assert files_of(root) == files_of(store.root)


def files_of(root: str) -> dict[str, bytes]:
    """Path below the store -> content, of every file."""
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_the_store_gives_its_tokenizer_and_teacher(store: Store) -> None:
    assert store.tokenizer_files()["vocab.txt"].startswith(b"[PAD]\n")
    assert store.teacher_config()["hidden_size"] == 8
    assert Path(store.teacher_weights()).read_bytes()[8:9] == b"{"
    assert store.pooling() is None
    assert store.digest == storage.digest_file(f"{store.root}/manifest.json")


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_sizes_are_those_of_the_formula(tmp_path: Path, changes: dict[str, Any]) -> None:
    layout = small_layout(**changes)
    L, M, K, T, D = layout.length, layout.masked, layout.top_k, 2, layout.hidden_size  # noqa: N806
    b, P, C = layout.id_dtype.itemsize, layout.recorded, len(layout.columns()) - 1  # noqa: N806
    formula = 8 * C + 10 + b * L + (2 + b) * M
    formula += {"float16": P * 2 * D, "bfloat16": P * 2 * D, "int8": P * (D + 4)}.get(layout.hidden_states, 0)
    formula += 2 * D if layout.positions == "pooled" else 0
    formula += P * (K * (b + 2) + 4 * T) if K else 0
    assert layout.bytes_per_sample() == formula
    store = make_store(str(tmp_path), layout, rows={"train": (7,)})
    index = store.task_index("train", 0)
    for shard in index.shards:
        framing = shard.bytes - shard.samples * formula
        blocks = len(shard.blocks) // 16
        assert 0 < framing < blocks * MAX_BLOCK_OVERHEAD + MAX_SHARD_OVERHEAD
    for rows, frame in index.frames.items():
        assert frame.bytes - rows * formula < MAX_BLOCK_OVERHEAD


def test_a_store_that_is_not_there_or_not_finished_says_what_to_do(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    with pytest.raises(UserError, match="is not a store"):
        open_store(root)
    spec = make_spec()
    begin_store(root, spec)
    with pytest.raises(UserError, match="not tokenised yet: run the teacher pass"):
        open_store(root)
    finished = make_store(str(tmp_path / "whole"))
    plan = finished.splits["train"].plan
    for part in range(3):
        write_part(root, spec, plan, "train", part)
    write_task(root, spec, "train", plan.task(4))
    with pytest.raises(UserError, match="5 of 6 tasks are missing: run the teacher pass again"):
        open_store(root)
    with pytest.raises(
        UserError, match=r"5 of 6 tasks of train are missing \(e000-p00000-0000, .*run"
    ) as caught:
        finish_store(root, {"train": 3})
    assert caught.value.exit_code == 3


def test_a_store_of_format_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "declaration.json").write_text("{}")
    for finished in (False, True):
        if finished:
            (tmp_path / "manifest.json").write_text('{\n "digest": "x",\n "format_version": 1\n}\n')
        with pytest.raises(UserError, match="of format 1, .*teacher pass"):
            open_store(str(tmp_path))
        with pytest.raises(UserError, match="of format 1, .*teacher pass"):
            begin_store(str(tmp_path), make_spec())


def test_int8_by_hand() -> None:
    hidden = np.array([[127.0, -126.5, 1.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    values, scale = quantise(hidden)
    assert values.tolist() == [[127, -126, 2, 0, 0], [0, 0, 0, 0, 0]]  # half to even
    assert scale.tolist() == [1.0, 0.0]
    assert dequantise(values, scale).tolist() == values.astype(float).tolist()


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_int8_is_off_by_half_a_step_at_most(numbers: list[float]) -> None:
    hidden = np.array(numbers, np.float32)
    values, scale = quantise(hidden)
    error = np.abs(values.astype(np.float64) * scale.astype(np.float64) - hidden)
    assert error.max() <= 0.5001 * scale + 127 * 2.0**-149
    assert values.min() >= -127


def test_the_store_needs_no_framework() -> None:
    modules = sorted(path.stem for path in Path("offline_teacher/store").glob("*.py"))
    code = (
        "import sys, importlib\n"
        f"for name in {modules!r}: importlib.import_module('offline_teacher.store.' + name)\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'deepspeed', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
    assert len(modules) > 10


def test_layouts_that_contradict_themselves_name_the_field() -> None:
    for changes in (
        {"top_k": 0, "hidden_states": "none"},
        {"masked": 13},
        {"length": 0},
        {"length": "12"},
        {"vocab_size": True},
        {"temperatures": (2.0, 1.0)},
        {"temperatures": ()},
        {"temperatures": (float("nan"),)},
        {"hidden_states": "float32"},
        {"positions": "some"},
        {"positions": "masked", "masked": 0},
        {"replay_layers": 1, "positions": "masked"},
        {"replay_layers": 1, "hidden_states": "none"},
        {"top_k": 4, "positions": "pooled", "hidden_states": "none"},
        {"hidden_states": "int8", "positions": "pooled", "top_k": 0},
        {"teacher_weights": 1},
    ):
        with pytest.raises(ValueError, match=re.escape(next(iter(changes)))):
            small_layout(**changes)
