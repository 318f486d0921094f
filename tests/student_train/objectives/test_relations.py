"""Attention relations against the dense float64 formula, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from infra.cpu import native
from infra.errors import UserError
from student_train.data.loss_needs import relation_heads
from student_train.objectives import native_relations, relations
from student_train.objectives.relations import RELATIONS, relation_loss
from tests.benchmarks.live_reference import dense_relation_loss


def draw(B: int, L: int, D: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:  # noqa: N803
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(B, L, D, generator=generator, dtype=torch.float64).to(dtype) for name in RELATIONS
    }


def gradient_of(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


CASES = [
    # B, L, teacher's D, student's D, heads, token counts
    (1, 1, 8, 8, 4, [1]),
    (3, 7, 12, 8, 4, [7, 7, 7]),
    (4, 9, 16, 24, 8, [9, 1, 5, 2]),
    (5, 16, 48, 32, 16, [16, 3, 16, 8, 15]),
    (2, 33, 8, 8, 1, [33, 20]),
]


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_relations, "_library", lambda: None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "in_cpp", "tolerance"),
    [
        (torch.float32, True, 5e-6),
        (torch.float32, False, 2e-5),
        (torch.bfloat16, True, 1e-2),
        (torch.bfloat16, False, 6e-2),
        (torch.float16, False, 8e-3),
    ],
)
def test_value_and_gradient_are_the_dense_formula(
    case: tuple[int, int, int, int, int, list[int]],
    dtype: torch.dtype,
    in_cpp: bool,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not in_cpp:
        without_native(monkeypatch)
    B, L, teacher_width, student_width, heads, counts = case  # noqa: N806
    monkeypatch.setitem(relations._CHUNK_BYTES, "cpu", 4 * heads * L * L * 2)  # chunks of two sequences
    count = torch.tensor(counts)
    student = {name: x.requires_grad_() for name, x in draw(B, L, student_width, 1, dtype).items()}
    teacher = draw(B, L, teacher_width, 2, dtype)
    assert native_relations.usable(student["keys"], teacher["keys"]) == in_cpp
    exact = {name: x.detach().double().requires_grad_() for name, x in student.items()}
    expected = dense_relation_loss(list(exact.values()), [x.double() for x in teacher.values()], count, heads)
    (3 * expected).backward()
    loss = relation_loss(student, teacher, count, heads, sum(counts), no_padding=min(counts) == L)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
    for name in RELATIONS:
        found, wanted = gradient_of(student[name]), gradient_of(exact[name])
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-9, name
        for row, n in enumerate(counts):
            assert not found[row, n:].any(), "padding gets no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpp_kernel_is_the_chunk_of_torch(dtype: torch.dtype) -> None:
    """Lengths and head sizes that are no multiples of 16, padding, sequences without a token."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        length, heads, d, teacher_d = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((1, 70), (1, 6), (1, 40), (1, 65))
        )
        student = draw(3, length, heads * d, seed, dtype)["keys"]
        teacher = draw(3, length, heads * teacher_d, seed + 99, dtype)["keys"]
        count = torch.randint(0, length + 1, (3,), generator=generator)
        for counts in (count, None):
            value, gradient = native_relations.summed_kl(student, teacher, counts, heads, True)
            again, nothing = native_relations.summed_kl(student, teacher, counts, heads, False)
            expected, wanted = relations._chunk(student.double(), teacher.double(), counts, heads, True)
            rounding = 2e-6 if dtype == torch.float32 else 4e-3  # of the gradient, when it is stored
            assert (again, nothing) == (value, None)
            assert value.item() == pytest.approx(expected.item(), rel=2e-5, abs=2e-5)
            assert gradient is not None
            assert wanted is not None
            torch.testing.assert_close(gradient.double(), wanted, rtol=rounding, atol=2e-6)
            for row, n in enumerate(count if counts is not None else ()):
                assert not gradient[row, n:].any()


def test_the_cpp_kernel_takes_a_part_of_a_larger_tensor() -> None:
    """For example, one matrix product may compute queries, keys and values together."""
    joint, teacher = draw(2, 9, 24, 1, torch.float32)["keys"], draw(2, 9, 24, 2, torch.float32)["keys"]
    for part, other in zip(joint.split(8, dim=2), teacher.split(8, dim=2), strict=True):
        found = native_relations.summed_kl(part, other, None, 2, True)
        expected = native_relations.summed_kl(part.clone(), other.clone(), None, 2, True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_threads_of_the_cpp_kernel_do_not_change_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = draw(3, 20, 30, 1, torch.float32)["keys"], draw(3, 20, 60, 2, torch.float32)["keys"]
    found = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(native_relations.summed_kl(student, teacher, torch.tensor([20, 3, 17]), 5, True))
    for value, gradient in found[1:]:
        torch.testing.assert_close((value, gradient), found[0], rtol=0, atol=0)


def test_a_number_that_is_none_is_seen() -> None:
    """NaN and infinity reach the loss, also by the compiled kernel, so that the step is noticed."""
    student, teacher = draw(2, 6, 8, 1, torch.float32), draw(2, 6, 8, 2, torch.float32)
    for broken in (float("nan"), float("inf")):
        student["keys"][1, 2, 3] = broken
        assert not relation_loss(student, teacher, torch.tensor([6, 6]), 2, 12).isfinite()
        assert relation_loss(student, teacher, torch.tensor([6, 2]), 2, 8).isfinite(), "padding is not read"


def test_a_missing_compiler_gives_a_warning_and_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = draw(2, 6, 8, 1, torch.float32)["keys"], draw(2, 6, 8, 2, torch.float32)["keys"]
    assert native_relations.usable(student, teacher)
    assert not native_relations.usable(student, teacher.bfloat16()), "of one dtype only"
    monkeypatch.setattr(native, "COMPILERS", ())
    with pytest.warns(RuntimeWarning, match="relation loss runs uncompiled, slower: no C\\+\\+ compiler"):
        assert native_relations._library.__wrapped__() is None


def test_shares_of_micro_batches_add_up() -> None:
    student, teacher, count = draw(6, 5, 8, 3), draw(6, 5, 8, 4), torch.tensor([5, 4, 3, 5, 1, 2])
    whole = relation_loss(student, teacher, count, 4, 20)
    parts = [
        relation_loss(
            {n: x[rows] for n, x in student.items()},
            {n: x[rows] for n, x in teacher.items()},
            count[rows],
            4,
            20,
        )
        for rows in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)


def test_weights_choose_and_weigh_relations() -> None:
    student, teacher, count = draw(2, 6, 8, 5), draw(2, 6, 8, 6), torch.tensor([6, 4])
    alone = {
        name: relation_loss(
            student, teacher, count, 2, 10, dict.fromkeys(RELATIONS, 0.0) | {name: 2.0}
        ).item()
        for name in RELATIONS
    }
    mixed = relation_loss(student, teacher, count, 2, 10, {"queries": 1.0, "keys": 3.0, "values": 0.0}).item()
    assert mixed == pytest.approx((alone["queries"] + 3 * alone["keys"]) / 4, rel=1e-6)
    assert len({round(value, 4) for value in alone.values()}) == 3
    only_keys = relation_loss(
        {"keys": student["keys"]}, {"keys": teacher["keys"]}, count, 2, 10, {"keys": 1.0}
    )
    assert only_keys.item() == pytest.approx(alone["keys"], rel=1e-6)


def test_a_student_like_its_teacher_has_no_loss() -> None:
    teacher, count = draw(2, 6, 8, 7, torch.float32), torch.tensor([6, 3])
    student = {name: x.clone().requires_grad_() for name, x in teacher.items()}
    loss = relation_loss(student, teacher, count, 4, 9)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(gradient_of(x).abs().max().item() for x in student.values()) < 1e-6


def test_large_scores_stay_finite() -> None:
    student = {name: 100 * x.float() for name, x in draw(2, 40, 8, 8).items()}
    teacher = {name: 100 * x.float() for name, x in draw(2, 40, 8, 9).items()}
    for x in student.values():
        x.requires_grad_()
    loss = relation_loss(student, teacher, torch.tensor([40, 2]), 2, 42)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient_of(x)).all() for x in student.values())


def test_relation_heads() -> None:
    assert relation_heads(768, 768) == 64
    assert relation_heads(384, 192) == 64
    assert relation_heads(1024, 384) == 64
    assert relation_heads(768, 312) == 24
    assert relation_heads(7, 5) == 1
    assert relation_heads(768, 384, 48) == 48
    for wanted in (0, 5, 7):
        with pytest.raises(UserError, match="train.relation_heads: .* choose a divisor of 384"):
            relation_heads(768, 384, wanted)
