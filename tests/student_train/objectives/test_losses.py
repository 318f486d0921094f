"""The fused triple loss against the dense formula in float64, in value and in every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from student_train.objectives import kl_loss
from student_train.objectives import triple_loss as losses
from student_train.objectives.soft_targets import ExactTarget
from tests.student_train.objectives.loss_cases import (
    LEAVES,
    OPTIONS,
    assert_matches,
    dense_loss,
    fused_loss,
    gradients,
    make_case,
    relative_error,
    target_of,
)

weights = st.sampled_from([0.0, 0.5, 5.0])


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 21),
    v=st.integers(2, 60),
    d=st.integers(1, 9),
    dt=st.integers(4, 9),
    chunk_size=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 1.7, 2.0, 4.0]),
    alphas=st.tuples(weights, weights, weights),
    mask=st.sampled_from([0.0, 0.3, 1.0]),
    k=st.sampled_from([None, 1, 3, 100]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    by_row=st.booleans(),
)
def test_equals_the_dense_oracle(
    seed: int, n: int, v: int, d: int, dt: int, chunk_size: int, temperature: float,
    alphas: tuple[float, float, float], mask: float, k: int | None, dtype: torch.dtype,
    by_row: bool,
) -> None:  # fmt: skip
    case = make_case(seed, n, v, d, dt, mask)
    options = dict(zip(("alpha_ce", "alpha_mlm", "alpha_cos"), alphas, strict=True))
    k = None if k is None else min(k, v)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    by_row = by_row and k is None and alphas[0] > 0 and dtype == torch.float32  # the rest has to be compiled
    assert_matches(
        case, k, dtype, tolerance, chunk_size=chunk_size, temperature=temperature, compile=by_row, **options
    )


@pytest.mark.parametrize("k", [None, 5])
def test_numerical_gradient(k: int | None) -> None:
    case = make_case(3, n=5, v=9, d=3)
    target = target_of(case, k)

    def loss(z: Tensor, weight: Tensor, bias: Tensor, student_hidden: Tensor) -> Tensor:
        moved = replace(case, z=z, weight=weight, bias=bias, student_hidden=student_hidden)
        return fused_loss(moved, target).total

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize(
    ("k", "dtype", "by_row"),
    [
        (None, torch.bfloat16, False), (None, torch.float16, False), (None, torch.bfloat16, True),
        (8, torch.bfloat16, False), (8, torch.float16, False),
    ],
)  # fmt: skip
def test_half_precision_stays_near_the_oracle(k: int | None, dtype: torch.dtype, by_row: bool) -> None:
    narrow = make_case(5, n=40, v=300, d=32).to(dtype)
    assert_matches(narrow.to(torch.float64), k, dtype, 0.02, chunk_size=16, compile=by_row)


def test_float16_survives_the_large_denominators_of_a_step() -> None:
    case = make_case(6, n=20).to(torch.float16)
    large = {"tokens": 1e6, "masked": 1e6, "kl_tokens": 1e6}
    scaled = fused_loss(case, target_of(case, None), **large).total * 2.0**16
    oracle = dense_loss(case.to(torch.float64), None, {**OPTIONS, **large})
    wide = case.to(torch.float64)
    expected = gradients(dense_loss(wide, None, {**OPTIONS, **large}) * 2.0**16, wide.leaves)
    assert torch.isfinite(oracle)
    for found, oracle_gradient in zip(gradients(scaled, case.leaves), expected, strict=True):
        assert relative_error(found, oracle_gradient) <= 0.02


@pytest.mark.parametrize(("k", "by_row"), [(None, False), (None, True), (5, False), (37, False)])
def test_no_gradient_and_no_kl_where_the_student_is_the_teacher(k: int | None, by_row: bool) -> None:
    case = make_case(8, dt=6).to(torch.float32)
    z = case.head.decoder_input(case.teacher_hidden).detach().requires_grad_()
    same = replace(
        case, z=z, weight=case.head.decoder_weight.clone().requires_grad_(), bias=case.head.decoder_bias
    )
    terms = fused_loss(same, target_of(same, k), alpha_mlm=0.0, alpha_cos=0.0, compile=by_row)
    assert abs(float(terms.kl)) <= 5e-7
    for gradient in torch.autograd.grad(terms.total, (same.z, same.weight)):
        assert gradient.abs().max() <= 1e-5


@pytest.mark.parametrize("by_row", [False, True])
def test_a_small_kl_is_good_to_the_rounding_of_the_normalisers(by_row: bool) -> None:
    case = make_case(9, v=2000, dt=6)
    close = case.head.decoder_input(case.teacher_hidden) + 1e-2 * torch.randn(11, 6, dtype=torch.float64)
    near = replace(case, z=close, weight=case.head.decoder_weight, bias=case.head.decoder_bias).to(
        torch.float32
    )
    wide = near.to(torch.float64)
    options = {"alpha_mlm": 0.0, "alpha_cos": 0.0}
    oracle = dense_loss(wide, None, {**OPTIONS, **options})
    terms = fused_loss(near, target_of(near, None), compile=by_row, **options)
    expected = float(oracle.detach()) / (5.0 * 2.0**2)
    assert 1e-6 < expected < 1e-4
    assert float(terms.kl) == pytest.approx(expected, abs=5e-7)


def test_temperature_of_a_tail_that_underflows() -> None:
    """The student's tail logits are 200 below the top: exp(-200) is 0 in float32, its logarithm is not."""
    s = torch.tensor([[0.0, -200.0, -201.0]])
    ids, p = torch.tensor([[0]]), torch.tensor([[0.75]])
    one = torch.ones(1)
    kl, _ = kl_loss.topk_kernel(s, ids, p, torch.tensor([0.25]), torch.tensor([-100]), one, one, 1.0, False)
    log_q_tail = float(torch.logsumexp(torch.tensor([-200.0, -201.0]), 0))
    expected = 0.75 * torch.tensor(0.75).log() + 0.25 * (torch.tensor(0.25).log() - log_q_tail)
    assert float(kl) == pytest.approx(float(expected), rel=1e-5)
    assert torch.isfinite(s).all()
    assert float(s.sum()) == pytest.approx(0.0, abs=1e-6)


def test_reported_terms_add_up() -> None:
    case = make_case(10)
    terms = fused_loss(case, target_of(case, None))
    total = 5.0 * 2.0**2 * terms.kl + 2.0 * terms.mlm + terms.cosine
    assert float(total) == pytest.approx(float(terms.total.detach()), rel=1e-12)
    assert terms.total.requires_grad
    assert not any(term.requires_grad for term in (terms.kl, terms.mlm, terms.cosine))


def test_micro_batches_add_up_to_the_batch() -> None:
    case = make_case(11, n=12)
    whole = fused_loss(case, target_of(case, None)).total
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        names = ("z", "student_hidden", "teacher_hidden", "labels")
        part = replace(case, **{name: getattr(case, name)[rows] for name in names})
        parts.append(fused_loss(part, target_of(part, None)).total)
    assert sum(float(part.detach()) for part in parts) == pytest.approx(float(whole.detach()), rel=1e-12)


CHANGES = [
    {"temperature": 3.0}, {"alpha_ce": 1.0}, {"alpha_mlm": 1.0}, {"alpha_cos": 3.0},
    {"tokens": 5.0}, {"masked": 5.0}, {"kl_tokens": 5.0},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_number_has_an_effect(change: dict[str, float]) -> None:
    case = make_case(12)
    target = target_of(case, None)
    changed, plain = fused_loss(case, target, **change).total, fused_loss(case, target).total
    assert float(changed.detach()) != pytest.approx(float(plain.detach()))


def test_every_tensor_has_an_effect() -> None:
    case = make_case(13)
    reference = float(fused_loss(case, target_of(case, None)).total.detach())
    changes = {
        name: getattr(case, name).detach() + torch.randn_like(getattr(case, name))
        for name in (*LEAVES, "teacher_hidden")
    }
    changes["labels"] = case.labels.roll(1)
    for name, value in changes.items():
        changed = replace(case, **{name: value})
        assert float(fused_loss(changed, target_of(changed, None)).total.detach()) != pytest.approx(
            reference
        ), name


class CountedKernel:
    def __init__(self, kernel: kl_loss.Kernel) -> None:
        self.kernel, self.rows = kernel, 0

    def __call__(self, s: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.rows += len(s)
        return self.kernel(s, *arguments)


@pytest.mark.parametrize(
    ("changes", "exact", "mlm"),
    [
        ({}, 30, 0),
        ({"alpha_mlm": 0.0}, 30, 0),
        ({"alpha_ce": 0.0}, 0, 30),  # nothing of the teacher's
        ({"alpha_ce": 0.0, "alpha_mlm": 0.0}, 0, 0),  # not even the decoder
    ],
)
def test_a_term_that_is_off_costs_nothing(
    changes: dict[str, float], exact: int, mlm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(14, n=30)
    counters = CountedKernel(kl_loss.exact_kernel), CountedKernel(kl_loss.mlm_kernel)
    monkeypatch.setattr(ExactTarget, "kernel", counters[0])
    monkeypatch.setattr(losses, "mlm_kernel", counters[1])
    fused_loss(case, target_of(case, None), chunk_size=1, **changes)
    assert [counter.rows for counter in counters] == [exact, mlm]


def test_the_cosine_looks_at_positions_of_its_own() -> None:
    """Even if KL and CE use masked positions only, the cosine compares hidden states at all positions."""
    case = make_case(15)
    more = replace(
        case,
        student_hidden=torch.randn(29, 5, dtype=torch.float64).requires_grad_(),
        teacher_hidden=torch.randn(29, 5, dtype=torch.float64),
    )
    found = fused_loss(more, target_of(case, None))
    vocabulary = fused_loss(case, target_of(case, None), alpha_cos=0.0)
    distance = (1 - functional.cosine_similarity(more.student_hidden, more.teacher_hidden)).sum()
    expected = float((vocabulary.total + distance / 19.0).detach())
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-12)


def test_without_gradients_only_values() -> None:
    case = make_case(16)
    with torch.no_grad():
        quiet = fused_loss(case, target_of(case, 4))
    assert float(quiet.total) == float(fused_loss(case, target_of(case, 4)).total.detach())


def test_no_term_at_all_is_zero_even_with_zero_denominators() -> None:
    case = make_case(17)
    terms = fused_loss(case, None, alpha_ce=0.0, masked=0.0, tokens=0.0)
    assert float(terms.total) == 0.0
