"""The reduction of logits to top-k and logsumexp against numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp

from infra.cpu import native
from offline_teacher.inference import reduction, reduction_kernel
from offline_teacher.inference.reduction import reduce_logits


def uncompiled(logits: torch.Tensor, top_k: int, temperatures: tuple[float, ...]) -> reduction.Reduced:
    """What a machine without a C++ compiler, and a GPU, does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction_kernel, "available", lambda: False)
        return reduce_logits(logits, top_k, temperatures)


REDUCTIONS = {"compiled": reduce_logits, "uncompiled": uncompiled}


def test_the_kernel_compiles_here() -> None:
    assert reduction_kernel.available()


@pytest.mark.parametrize("name", list(REDUCTIONS))
@given(
    seed=st.integers(0, 10_000), vocab=st.integers(3, 2_500), k=st.integers(1, 12), levels=st.integers(1, 40)
)
def test_reduction_is_exact_with_ties_to_the_lower_id(
    name: str, seed: int, vocab: int, k: int, levels: int
) -> None:
    """Few distinct values, so that ties cross block and top-k borders all the time."""
    k = min(k, vocab)
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-levels, levels + 1, (4, vocab)) * rng.choice([0.5, -0.5])).astype(np.float32)
    check_reduction(REDUCTIONS[name], torch.from_numpy(logits), k, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("vocab", "k"), [(30_522, 64), (30_522, 2_000), (1_024, 1), (16, 16), (50_265, 64)])
def test_reduction_of_a_real_vocabulary(name: str, dtype: str, vocab: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab + k)
    logits = (
        torch.randn(6, vocab, generator=generator) * torch.tensor([0.0, 0.01, 1.0, 4.0, 15.0, 40.0])[:, None]
    )
    check_reduction(REDUCTIONS[name], logits.to(getattr(torch, dtype)), k, (0.5, 1.0, 2.0, 4.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_reduction_of_extreme_rows(name: str) -> None:
    """Far below the rest, -inf (a token that is switched off), one value only."""
    logits = torch.full((3, 100), -3e4)
    logits[0, 7], logits[1, 50:] = 9.0, float("-inf")
    check_reduction(REDUCTIONS[name], logits, 3, (1.0, 2.0))


@pytest.mark.parametrize("name", list(REDUCTIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("column", [0, 1_500, 2_999])
def test_reduction_of_nan_is_nan(name: str, dtype: str, column: int) -> None:
    logits = torch.zeros(2, 3_000, dtype=getattr(torch, dtype))
    logits[1, column] = float("nan")
    sums = REDUCTIONS[name](logits, 4, (1.0, 2.0))[2]
    assert sums.isnan().tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("k", [4, 700, 1_500])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reduction_of_rows_of_nan(k: int, sign: float) -> None:
    """The processor's own NaN is negative: as keys such entries are below all others."""
    logits = torch.copysign(torch.full((3, 2_000), torch.nan), torch.tensor(sign))
    logits[1, :600] = 1.0
    ids, values, sums = reduction_kernel.reduce_logits(logits, k, (1.0, 2.0))
    assert sums.isnan().all()
    assert values[0].isnan().all()
    assert ((ids >= 0) & (ids < 2_000)).all()


def test_threads_do_not_change_the_reduction() -> None:
    logits, threads = torch.randn(7, 999, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(reduction_kernel.reduce_logits(logits, 5, (1.0, 2.0)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def check_reduction(reduce: Any, logits: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> None:
    """Ids and values exactly, logsumexp to float32's accuracy, against numpy in float64."""
    exact = logits.double().numpy()
    ids, values, sums = reduce(logits, k, temperatures)
    expected = np.argsort(-exact, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids.numpy(), expected)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(exact, expected, -1))
    for j, temperature in enumerate(temperatures):
        np.testing.assert_allclose(sums[:, j], logsumexp(exact / temperature, axis=-1), rtol=2e-6, atol=2e-6)


def test_without_a_compiler_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    unwarned = reduction_kernel._library.__wrapped__
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler was found; install"):
        assert unwarned() is None


def test_a_compiler_that_fails_leaves_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    with pytest.warns(RuntimeWarning, match="the compiler failed"):
        assert reduction_kernel._library.__wrapped__() is None
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [(path.name, path.stat().st_size) for path in left] == [(".reduction_kernel.lock", 0)]
