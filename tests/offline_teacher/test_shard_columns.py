"""The columns of a shard: what the device checks, what the host checks again, and logits in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import UserError
from infra.settings.sections import Teacher
from offline_teacher.inference import columns as inference
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.shard_columns import Pending, ShardColumns, impossible_top_k
from offline_teacher.inference.teacher import LoadedTeacher, environment, load_teacher, logit_dtype
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.schema import Column, Layout
from offline_teacher.store.value_checks import check_block
from offline_teacher.store.writer import HOST_CHECKS, TaskWriter
from tests.offline_teacher.tiny_teacher import save_bert
from tests.store.synthetic import ENVIRONMENT, make_columns, make_spec, small_layout, small_plan

N, K, V = 40, 6, 95
TEMPERATURES = (0.5, 2.0)


def top_k(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, logits and logsumexp [N, ...] of random logits."""
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 4
    values, ids = logits.topk(K)
    sums = torch.stack([torch.logsumexp(logits / t, 1) for t in TEMPERATURES], 1)
    return ids, values.half(), sums


def flagged(ids: Tensor, logits: Tensor, logsumexp: Tensor) -> list[int]:
    wrong = impossible_top_k(ids, logits, logsumexp, torch.tensor(TEMPERATURES), V)
    return wrong.nonzero().flatten().tolist()


def put(place: int, at: tuple[int, ...], value: float) -> Callable[..., None]:
    def change(*columns: Tensor) -> None:
        columns[place][at] = value

    return change


def same_token_twice(ids: Tensor, logits: Tensor, logsumexp: Tensor) -> None:
    ids[7, 3] = ids[7, 1]


def swapped(ids: Tensor, logits: Tensor, logsumexp: Tensor) -> None:
    logits[7, 2:4] = logits[7, 2:4].flip(0).clone()


def lower(ids: Tensor, logits: Tensor, logsumexp: Tensor) -> None:
    logsumexp[7, 1] = logits[7, 0].float() / TEMPERATURES[1] - 0.05


def higher(ids: Tensor, logits: Tensor, logsumexp: Tensor) -> None:
    logsumexp[7, 0] = logits[7, 0].float() / TEMPERATURES[0] + np.log(V) + 0.05


FAULTS: list[Callable[..., None]] = [
    put(0, (7, 5), V),
    same_token_twice,
    swapped,
    *(put(1, (7, k), value) for k in (0, 5) for value in (np.nan, np.inf, -np.inf)),
    *(put(2, (7, 1), value) for value in (np.nan, np.inf, -np.inf)),
    lower,
    higher,
]


@pytest.mark.parametrize("seed", range(5))
def test_top_k_of_real_logits_is_possible(seed: int) -> None:
    assert flagged(*top_k(seed)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_device_finds_what_the_host_finds(fault: Callable[..., None]) -> None:
    ids, logits, sums = top_k()
    fault(ids, logits, sums)
    assert flagged(ids, logits, sums) == [7]
    plan = small_plan(task_sequences=N)
    layout = small_layout(length=8, masked=0, top_k=K, vocab_size=V, temperatures=TEMPERATURES)
    spec, task = make_spec(layout, plan), SplitPlan.of("train", (N,), plan).task(0)
    columns = make_columns(spec, "train", task)
    for name, values in zip(("topk_ids", "topk_logits", "logsumexp"), (ids, logits, sums), strict=True):
        columns[name][:, 0] = values.numpy().astype(columns[name].dtype)
    found = {bad.row for bad in check_block(layout, spec.special, task.sequence_ids(), columns)}
    assert found == {7}


def test_a_negative_id_is_impossible() -> None:
    """The store's ids have no sign, so the host cannot find this."""
    ids, logits, sums = top_k()
    ids[3, 0] = -1
    assert flagged(ids, logits, sums) == [3]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LoadedTeacher:
    directory = save_bert(tmp_path_factory.mktemp("teacher"))
    return load_teacher(Teacher(model=str(directory), dtype="float32"), 0, True, "cpu")


def layout_of(teacher: LoadedTeacher, **changes: Any) -> Layout:
    shape = {"length": 8, "masked": 2, "vocab_size": V, "hidden_size": teacher.config.hidden_size}
    fixed = {"top_k": 4, "temperatures": (1.0,), "hidden_states": "float16", "positions": "all"}
    return Layout(**{**shape, **fixed, **changes})


def pending(teacher: LoadedTeacher, layout: Layout) -> Pending:
    ids = np.random.default_rng(0).integers(5, 90, (5, 8)).astype(np.uint16)
    counts, masked = np.array([8, 8, 7, 8, 6], np.uint16), np.tile(np.array([1, 4], np.int16), (5, 1))
    text = {"input_ids": ids, "token_count": counts, "masked_positions": masked}
    return Inference(teacher, layout).columns(text, batch_size=2)


FORMS: list[dict[str, Any]] = [
    *({"hidden_states": form, "top_k": 0, "temperatures": ()} for form in ("float16", "bfloat16", "int8")),
    {"hidden_states": "none"},
    {"positions": "masked"},
]


@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("at", [0, 4])
def test_a_hidden_state_that_is_no_number_is_impossible(
    teacher: LoadedTeacher, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], at: int
) -> None:
    layout = layout_of(teacher, **changes)
    right = pending(teacher, layout)
    right.wait()
    assert right.values_possible()
    lower, calls = teacher.lower, iter(range(3))

    def broken(ids: Tensor, count: Tensor | None = None) -> Tensor:
        states: Tensor = lower(ids, count).clone()
        if next(calls) == 1:  # in the second of three batches
            states[1, at, 3] = torch.nan
        return states

    monkeypatch.setattr(inference, "GraphedLower", None)
    object.__setattr__(teacher, "lower", broken)
    try:
        wrong = pending(teacher, layout)
    finally:
        object.__setattr__(teacher, "lower", lower)
    wrong.wait()
    # Position 0 is no masked position, so its hidden state is not recorded.
    assert wrong.values_possible() == (changes.get("positions") == "masked" and at == 0)


@pytest.mark.parametrize(("value", "possible"), [(1e6, None), (np.inf, False), (60_000.0, True)])
def test_an_embedding_that_float16_cannot_hold(value: float, possible: bool | None) -> None:
    specs = {"embedding": Column(np.dtype("<f2"), (4,))}
    shard = ShardColumns(specs, 2, torch.device("cpu"))
    shard.put_embeddings(torch.full((1, 4), value), torch.tensor([1]))
    found = shard.copy(None)
    if possible is None:
        with pytest.raises(
            UserError, match=r"embeddings, the largest of which is 1e\+06; set store.positions"
        ):
            found.wait()
    else:
        found.wait()
        assert found.values_possible() == possible


def test_the_columns_of_a_shard_are_one_block_of_memory() -> None:
    layout = small_layout(hidden_states="int8")
    specs = {name: c for name, c in layout.data_columns().items() if name not in inference.TEXT}
    shard = ShardColumns(specs, 3, torch.device("cpu"))
    arrays = shard.copy(None).wait()
    assert {name: (a.dtype, a.shape[1:]) for name, a in arrays.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    places = sorted((a.__array_interface__["data"][0], a.nbytes) for a in arrays.values())
    for (start, size), (following, _) in zip(places, places[1:], strict=False):
        assert start + size <= following < start + size + 16, "columns overlap, or lie apart"


@pytest.mark.parametrize(("checked", "found"), [(False, range(20)), (True, (0, 8, 16))])
def test_the_host_checks_some_blocks_again(tmp_path: Path, checked: bool, found: Any) -> None:
    """One bad value in each block in turn. Text is checked in all of them."""
    assert HOST_CHECKS == 8
    plan = small_plan(masking_epochs=1, block_samples=2, shard_blocks=5, task_sequences=40)
    spec, task = make_spec(plan=plan), SplitPlan.of("train", (40,), plan).task(0)
    columns = make_columns(spec, "train", task)

    def error(name: str, block: int) -> str:
        wrong = {key: values.copy() for key, values in columns.items()}
        wrong[name][2 * block + 1] = np.nan if name == "hidden_states" else 60_000
        with TaskWriter(str(tmp_path), spec, "train", task, ENVIRONMENT) as writer:
            try:
                writer.write(wrong, checked)
            except ValueError as bad:
                return str(bad)
        return ""

    for block in range(20):
        assert ("hidden_states" in error("hidden_states", block)) == (block in found)
        assert "input_ids" in error("input_ids", block)


def test_samples_that_wait_for_a_block_are_checked_if_one_of_them_is_not(tmp_path: Path) -> None:
    plan = small_plan(masking_epochs=1, block_samples=4, shard_blocks=5, task_sequences=8)
    spec, task = make_spec(plan=plan), SplitPlan.of("train", (8,), plan).task(0)
    columns = make_columns(spec, "train", task)
    columns["hidden_states"][5] = np.nan  # in the second block, which is not in the sample

    def parts(*checked: bool) -> None:
        with TaskWriter(str(tmp_path), spec, "train", task, ENVIRONMENT) as writer:
            for start, flag in zip((0, 6, 7), checked, strict=True):
                stop = {0: 6, 6: 7, 7: 8}[start]
                writer.write({name: values[start:stop] for name, values in columns.items()}, flag)

    parts(True, True, True)
    for flags in ((False, True, True), (True, False, True), (True, True, False)):
        with pytest.raises(ValueError, match=r"hidden_states, sample 5"):
            parts(*flags)


def test_the_logits_of_a_16_bit_teacher_are_not_rounded_where_the_device_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA alone has the product that returns float32; a function with its signature takes its place here."""
    teacher = load_teacher(Teacher(model=str(save_bert(tmp_path)), dtype="bfloat16"), 0, True, "cpu")
    layout = layout_of(teacher)

    def wider(bias: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert bias.dtype == dtype == out.dtype == torch.float32
        return torch.addmm(bias, a.float(), b.float(), out=out)

    rounded = pending(teacher, layout).wait()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype_out", wider, "CPU")
        monkeypatch.setattr(inference, "logit_dtype", lambda *_: torch.float32)
        found = pending(teacher, layout).wait()
    for columns, all_bfloat16 in ((rounded, True), (found, False)):
        logits = torch.from_numpy(columns["topk_logits"])
        assert bool((logits.bfloat16().half() == logits).all()) == all_bfloat16
    assert np.abs(found["topk_logits"].astype(float) - rounded["topk_logits"]).max() < 0.02
    assert np.abs(found["logsumexp"] - rounded["logsumexp"]).max() < 0.02


def test_where_logits_are_wider() -> None:
    assert logit_dtype("cuda", torch.bfloat16) == torch.float32
    assert logit_dtype("cpu", torch.bfloat16) == torch.bfloat16
    assert logit_dtype("cpu", torch.float32) == torch.float32
    assert environment(Teacher(model="unused", dtype="bfloat16"), "cpu")["logits"] == "bfloat16"
