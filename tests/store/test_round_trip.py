"""A store gives back what was put in, bit for bit, in every layout; and its bytes are as FORMAT.md says."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline_teacher.store.deep import deep_check
from offline_teacher.store.quantise import dequantise, quantise
from offline_teacher.store.reader import open_store
from offline_teacher.store.schema import Layout, ShardPlan, shard_name
from offline_teacher.store.shard_file import write_file
from offline_teacher.store.verify import verify
from tests.store.synthetic import make_columns, make_declaration, make_store, small_layout


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    length = draw(st.integers(4, 20))
    top_k = draw(st.integers(0, 6))
    kinds = ["float16", "int8"] if top_k == 0 else ["float16", "int8", "none"]
    return Layout(
        length=length,
        masked=draw(st.integers(1, length - 2)),
        vocab_size=draw(st.sampled_from([8, 33, 65_536, 65_537])),
        top_k=top_k,
        temperatures=draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 4.0)])),
        hidden_size=draw(st.integers(1, 9)),
        hidden_states=draw(st.sampled_from(kinds)),
        positions=draw(st.sampled_from(["all", "masked"])),
    )


@settings(max_examples=25)
@given(
    layouts(),
    st.builds(ShardPlan, st.integers(1, 9), st.integers(1, 2), st.integers(1, 5)),
    st.integers(0, 99),
)
def test_every_layout_comes_back_bit_for_bit(layout: Layout, plan: ShardPlan, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = make_store(directory, layout, plan, seed)
        assert (store.layout, store.plan) == (layout, plan)
        for replica, index in plan.shard_ids():
            shard = store.shard(replica, index)
            written = make_columns(store.manifest.declaration, replica, index, seed)
            assert list(shard.columns) == list(written)
            for name, array in written.items():
                assert shard.columns[name].dtype == array.dtype
                assert shard.columns[name].shape == array.shape
                assert shard.columns[name].tobytes() == array.tobytes()
        assert verify(directory) == []
        assert deep_check(store.shard(0, 0), store.head(), layout, "float32") == []


def test_views_are_aligned_read_only_and_mapped(tmp_path: Path) -> None:
    shard = make_store(str(tmp_path)).shard(1, 2)
    assert len(shard) == 2
    assert shard.sequence_ids.tolist() == [8, 9]
    before = pa.total_allocated_bytes()
    for array in shard.columns.values():
        assert array.ctypes.data % 64 == 0
        assert not array.flags.writeable
        assert not array.flags.owndata
    assert pa.total_allocated_bytes() == before


def test_the_same_store_is_the_same_bytes(tmp_path: Path) -> None:
    digests = [make_store(str(tmp_path / name)).manifest.digest for name in ("one", "two")]
    assert digests[0] == digests[1]
    one, two = (sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert make_store(str(tmp_path / "three"), seed=1).manifest.digest != digests[0]


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_a_shard_opens_with_everything_that_reads_arrow(tmp_path: Path, samples: int) -> None:
    import datasets

    store = make_store(str(tmp_path), plan=ShardPlan(samples, 1, samples))
    path = str(tmp_path / "shards" / f"{shard_name(0, 0)}.arrow")
    logits = store.shard(0, 0).columns["topk_logits"].reshape(samples, -1)
    as_file = pa.ipc.open_file(pa.memory_map(path)).read_all()
    as_stream = pa.ipc.open_stream(pa.memory_map(path)).read_all()
    as_dataset = datasets.Dataset.from_file(path)
    assert as_file.equals(as_stream)
    as_file.validate(full=True)
    assert len(as_dataset) == samples
    for row in (0, samples - 1):
        assert as_dataset[row]["topk_logits"] == as_file["topk_logits"][row].as_py() == logits[row].tolist()


def test_a_truncated_shard_does_not_open(tmp_path: Path) -> None:
    make_store(str(tmp_path))
    path = tmp_path / "shards" / f"{shard_name(0, 0)}.arrow"
    data = path.read_bytes()
    for kept in range(0, len(data), 97):
        path.write_bytes(data[:kept])
        with pytest.raises(pa.ArrowException):
            pa.ipc.open_file(str(path))


def format_md(root_dir: Path) -> str:
    return (root_dir / "offline_teacher/store/FORMAT.md").read_text()


def test_the_reader_in_the_specification_works(tmp_path: Path, root_dir: Path) -> None:
    code = re.findall(r"## A reader\n```python\n(.*?)```", format_md(root_dir), re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    store = make_store(str(tmp_path))
    for replica, index in store.plan.shard_ids():
        layout, columns = scope["read_shard"](str(tmp_path), replica, index)
        assert layout == store.layout.to_json()
        for name, array in store.shard(replica, index).columns.items():
            assert np.array_equal(columns[name], array.reshape(len(array), -1))
    path = tmp_path / "shards" / f"{shard_name(0, 0)}.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"2")
    with pytest.raises(AssertionError, match="damaged"):
        scope["read_shard"](str(tmp_path), 0, 0)


@pytest.mark.parametrize("hidden_states", ["float16", "int8", "none"])
@pytest.mark.parametrize("positions", ["all", "masked"])
@pytest.mark.parametrize("vocab_size", [30_522, 119_547])
def test_a_realistic_shard_has_the_size_of_the_formula(
    tmp_path: Path, hidden_states: str, positions: str, vocab_size: int
) -> None:
    layout = Layout(128, 20, vocab_size, 64, (1.0, 2.0), 256, hidden_states, positions)
    n, columns = 64, {}
    for name, column in layout.columns().items():
        columns[name] = np.zeros((n, *column.shape), column.dtype)
    path = tmp_path / "shard"
    write_file(str(path), layout, {}, columns)
    b, L, M, K, T, D = 2 if vocab_size <= 65536 else 4, 128, 20, 64, 2, 256  # noqa: N806
    P = L if positions == "all" else M  # noqa: N806
    hidden = {"float16": 2 * D, "int8": D + 4, "none": 0}[hidden_states]
    formula = 10 + b * L + (2 + b) * M + P * (K * (b + 2) + 4 * T) + P * hidden
    assert layout.bytes_per_sample() == formula
    assert path.stat().st_size == pytest.approx(n * formula, rel=0.02)


def test_the_example_in_the_specification_is_right(root_dir: Path) -> None:
    layout = Layout(128, 20, 30_522, 64, (1.0, 2.0), 768, "float16", "all")
    assert f"{layout.bytes_per_token():,.1f} bytes a token" in format_md(root_dir)


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
    code = (
        "import sys, offline_teacher.store.deep, offline_teacher.store.verify\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'deepspeed', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_layouts_that_contradict_themselves_name_the_field() -> None:
    for changes in (
        {"top_k": 0, "hidden_states": "none"},
        {"masked": 13},
        {"length": 0},
        {"vocab_size": True},
        {"temperatures": (2.0, 1.0)},
        {"temperatures": ()},
        {"temperatures": (float("nan"),)},
        {"hidden_states": "bfloat16"},
        {"positions": "some"},
    ):
        with pytest.raises(ValueError, match=next(iter(changes))):
            small_layout(**changes)


@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 70))
def test_every_sample_is_in_exactly_one_shard(sequences: int, replicas: int, size: int) -> None:
    plan = ShardPlan(sequences, replicas, size)
    shards = list(plan.shard_ids())
    assert len(shards) == plan.total
    assert [plan.position(*shard) for shard in shards] == list(range(plan.total))
    samples = [(replica, sequence) for replica, index in shards for sequence in plan.sequence_range(index)]
    assert samples == [(r, s) for r in range(replicas) for s in range(sequences)]


def test_opening_says_how_much_is_missing(tmp_path: Path) -> None:
    from infra.errors import UserError
    from offline_teacher.store.writer import begin_store, finish_store, write_shard

    root = str(tmp_path / "store")
    with pytest.raises(UserError, match="is not a store"):
        open_store(root)
    declaration = make_declaration()
    begin_store(root, declaration)
    write_shard(root, declaration, 1, 0, make_columns(declaration, 1, 0))
    with pytest.raises(UserError, match="5 of 6 shards are missing"):
        open_store(root)
    with pytest.raises(UserError, match="r000-00000000") as caught:
        finish_store(root)
    assert caught.value.exit_code == 3
