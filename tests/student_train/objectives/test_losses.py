"""The fused triple loss against the dense formula in float64, in value and in every gradient."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from infra.cpu import native
from student_train.objectives import native_exact, vocabulary_kernels
from student_train.objectives import triple_loss as losses
from student_train.objectives.soft_targets import ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import LossTerms, triple_loss
from tests.student_train.heads import Head, random_head

LEAVES = ("z", "weight", "bias", "student_hidden")


@dataclass
class Case:
    """Random inputs; ``teacher`` are logits [N, V]."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    student_hidden: Tensor
    teacher_hidden: Tensor
    head: Head
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """Inputs rounded to ``dtype``; labels as they are."""
        leaves = {name: getattr(self, name).detach().to(dtype).requires_grad_() for name in LEAVES}
        return replace(self, **leaves, head=self.head.to(dtype), teacher_hidden=self.teacher_hidden.to(dtype))

    @property
    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in LEAVES]


def make_case(seed: int, n: int = 11, v: int = 37, d: int = 6, dt: int = 5, mask: float = 0.4) -> Case:
    torch.manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    head = random_head(dt, v, seed).to(torch.float32)
    labels = torch.where(torch.rand(n) < mask, torch.randint(v, (n,)), -100)
    # Multiples of 1/256 are exact in float32, so both precisions see the same problem.
    exact = [(t * 256).round() / 256 for t in (r(n, d), 0.5 * r(v, d), r(v), r(n, dt), r(n, dt))]
    return Case(*exact, head, labels).to(torch.float64)


def teacher_logits(case: Case) -> Tensor:
    return ExactTarget(case.head, case.teacher_hidden).rows(slice(None))


def topk_of(logits: Tensor, k: int, temperature: float) -> TopkTarget:
    values, ids = logits.topk(k, dim=1)
    return TopkTarget(ids, values, torch.logsumexp(logits / temperature, 1), temperature)


def dense_loss(case: Case, k: int | None, options: dict[str, Any]) -> Tensor:
    """The formula of triple_loss.py written out over [N, V]."""
    t = options["temperature"]
    s, teacher = case.z @ case.weight.T + case.bias, teacher_logits(case)
    q, p = functional.softmax(s / t, 1), functional.softmax(teacher / t, 1)
    if k is not None and k < s.shape[1]:
        ids = teacher.topk(k, 1).indices
        outside = torch.ones_like(s).scatter(1, ids, 0.0)
        p = torch.cat([p.gather(1, ids), (p * outside).sum(1, keepdim=True)], 1)
        q = torch.cat([q.gather(1, ids), (q * outside).sum(1, keepdim=True)], 1)
    kl = (p * (p.log() - q.log())).sum(1)
    ce = functional.cross_entropy(s, case.labels, ignore_index=-100, reduction="sum")
    cos = (1 - functional.cosine_similarity(case.student_hidden, case.teacher_hidden)).sum()
    return (
        options["alpha_ce"] * t**2 * kl.sum() / options["kl_tokens"]
        + options["alpha_mlm"] * ce / options["masked"]
        + options["alpha_cos"] * cos / options["tokens"]
    )


OPTIONS = {
    "temperature": 2.0, "alpha_ce": 5.0, "alpha_mlm": 2.0, "alpha_cos": 1.0,
    "tokens": 19.0, "masked": 7.0, "kl_tokens": 17.0, "chunk_size": 4, "compile": False,
}  # fmt: skip


def fused_loss(case: Case, target: SoftTarget | None, **changes: Any) -> LossTerms:
    return triple_loss(
        case.z, case.weight, case.bias, target, case.labels, case.student_hidden, case.teacher_hidden,
        **{**OPTIONS, **changes},
    )  # fmt: skip


def target_of(case: Case, k: int | None, temperature: float = 2.0) -> SoftTarget:
    if k is None:
        return ExactTarget(case.head, case.teacher_hidden)
    return topk_of(teacher_logits(case), k, temperature)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:  # all terms off
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def relative_error(value: Tensor, oracle: Tensor, floor: float = 1e-9) -> float:
    """Distance over the oracle's norm, or over ``floor`` where the oracle is smaller than that."""
    distance = (value.detach().double() - oracle.detach()).norm()
    return float(distance / oracle.detach().norm().clamp_min(floor))


def cancellation_floor(case: Case, options: dict[str, Any]) -> float:
    """A hundredth of the terms before they cancel.

    Where the student nearly is the teacher, the loss is a difference of numbers many thousand times as large,
    and no float32 result can be relatively good; 1e-5 of this floor is one float32 rounding of the terms.
    """
    kl = options["alpha_ce"] * options["temperature"] * max(options["temperature"], 1) / options["kl_tokens"]
    others = options["alpha_mlm"] / options["masked"] + options["alpha_cos"] / options["tokens"]
    return 0.01 * len(case.labels) * (kl + others)


def assert_matches(case: Case, k: int | None, dtype: torch.dtype, tolerance: float, **changes: Any) -> None:
    options = {**OPTIONS, **changes}
    oracle = dense_loss(case, k, options)
    narrow = case.to(dtype)
    fused = fused_loss(narrow, target_of(narrow, k, options["temperature"]), **changes).total
    floor = max(cancellation_floor(case, options), 1e-9)
    assert relative_error(fused, oracle, floor) <= tolerance
    pairs = zip(gradients(fused, narrow.leaves), gradients(oracle, case.leaves), LEAVES, strict=True)
    for found, expected, name in pairs:
        assert found.dtype == dtype
        assert relative_error(found, expected, floor) <= tolerance, name


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
    """Student logits of the tail lie 200 below the top: exp(-200) is 0 in float32, its logarithm is not."""
    s = torch.tensor([[0.0, -200.0, -201.0]])
    ids, p = torch.tensor([[0]]), torch.tensor([[0.75]])
    one = torch.ones(1)
    kl, _ = vocabulary_kernels.topk_kernel(
        s, ids, p, torch.tensor([0.25]), torch.tensor([-100]), one, one, 1.0, False
    )
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
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-12)


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
    def __init__(self, kernel: vocabulary_kernels.Kernel) -> None:
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
    counters = CountedKernel(vocabulary_kernels.exact_kernel), CountedKernel(vocabulary_kernels.mlm_kernel)
    monkeypatch.setattr(ExactTarget, "kernel", counters[0])
    monkeypatch.setattr(losses, "mlm_kernel", counters[1])
    fused_loss(case, target_of(case, None), chunk_size=1, **changes)
    assert [counter.rows for counter in counters] == [exact, mlm]


def test_the_cosine_looks_at_positions_of_its_own() -> None:
    """A loss at masked positions alone compares hidden states at all of them."""
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


def test_the_native_kernel_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies that end within a vector of 16, labels at both ends, rows without a scale, two threads."""
    generator = torch.Generator().manual_seed(0)
    for v, threads in itertools.product((2, 15, 16, 17, 64, 67, 1000), (1, 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        s, t = (3 * torch.randn(9, v, generator=generator) for _ in range(2))
        labels = torch.tensor([0, v - 1, -100, 1, -100, v // 2, 0, v - 1, -100])
        kl_scale, mlm_scale = torch.rand(9, generator=generator), (labels >= 0) * torch.rand(9)
        kl_scale[3] = 0.0
        biases = torch.randn(2, v, generator=generator)
        wide = s.double() + biases[0]
        expected = vocabulary_kernels.exact_kernel(
            wide, t.double() + biases[1], labels, kl_scale.double(), mlm_scale.double(), 2.0, True
        )
        assert native_exact.usable(s, t)
        found = native_exact.exact_loss(s, biases[0], t, biases[1], labels, kl_scale, mlm_scale, 2.0, True)
        for one, oracle in zip((s, *found), (wide, *expected), strict=True):
            torch.testing.assert_close(one.double(), oracle, rtol=2e-6, atol=1e-6)


def test_without_a_cpp_compiler_the_exact_target_is_compiled_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "COMPILERS", ())
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler was found"):
        assert native_exact._library.__wrapped__() is None
    monkeypatch.setattr(native_exact, "_library", lambda: None)
    kernels: list[vocabulary_kernels.Kernel] = []
    monkeypatch.setattr(losses, "fused", lambda kernel: kernels.append(kernel) or kernel)
    case = make_case(19).to(torch.float32)
    assert torch.isfinite(fused_loss(case, target_of(case, None), compile=True).total)
    assert set(kernels) == {vocabulary_kernels.exact_kernel}


@pytest.mark.parametrize("k", [None, 6])
def test_compiled_equals_eager(k: int | None) -> None:
    case = make_case(18, n=13).to(torch.float32)
    eager, compiled = (
        fused_loss(case, target_of(case, k), compile=on, chunk_size=8).total for on in (False, True)
    )
    assert float(compiled) == pytest.approx(float(eager), rel=1e-5)
    for a, b in zip(gradients(compiled, case.leaves), gradients(eager, case.leaves), strict=True):
        assert relative_error(a, b.double()) <= 1e-5


@pytest.fixture
def compiled_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[vocabulary_kernels.Kernel], None]]:
    """Sets what torch.compile makes of a kernel."""
    vocabulary_kernels.fused.cache_clear()
    yield lambda kernel: monkeypatch.setattr(torch, "compile", lambda *_, **__: kernel)
    vocabulary_kernels.fused.cache_clear()


def test_falls_back_to_eager_with_one_warning(compiled_to: Callable[..., None]) -> None:
    """Also where the compiled kernel fails after it has overwritten logits."""
    calls = itertools.count()

    def broken(s: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        next(calls)
        s.fill_(7.0)
        raise RuntimeError("no working C++ compiler found")

    compiled_to(broken)
    case = make_case(19)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = fused_loss(case, target_of(case, 6), compile=True)
        assert float(found.total.detach()) == float(fused_loss(case, target_of(case, 6)).total.detach())
        fused_loss(make_case(19, v=41), target_of(make_case(19, v=41), 6), compile=True)
    assert next(calls) == 2  # once for each shape
    assert [str(w.message) for w in seen if "uncompiled" in str(w.message)] != []
    assert len(seen) == 1


def test_an_error_of_a_kernel_that_worked_is_raised(compiled_to: Callable[..., None]) -> None:
    calls = itertools.count()

    def breaks_later(*arguments: Any) -> tuple[Tensor, Tensor]:
        if next(calls) > 1:
            raise RuntimeError("an illegal memory access")
        return vocabulary_kernels.topk_kernel(*arguments)

    compiled_to(breaks_later)
    case = make_case(19)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fused_loss(case, target_of(case, 6), compile=True)


def test_no_memory_is_no_failure_of_the_compiler(compiled_to: Callable[..., None]) -> None:
    def too_large(*_: object) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError

    compiled_to(too_large)
    case = make_case(19)
    with pytest.raises(torch.OutOfMemoryError):
        fused_loss(case, target_of(case, 6), compile=True)
