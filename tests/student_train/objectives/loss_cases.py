"""Random inputs of the triple loss, the dense formula in float64, and their comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from student_train.objectives.soft_targets import ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import LossTerms, triple_loss
from tests.student_train.heads import Head, random_head

LEAVES = ("z", "weight", "bias", "student_hidden")


@dataclass
class Case:
    """Random inputs of the triple loss; ``teacher`` are logits [N, V]."""

    z: Tensor
    weight: Tensor
    bias: Tensor
    student_hidden: Tensor
    teacher_hidden: Tensor
    head: Head
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """Returns the inputs rounded to ``dtype``, with unchanged labels."""
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
    z, weight, bias, student, teacher = (
        (t * 256).round() / 256 for t in (r(n, d), 0.5 * r(v, d), r(v), r(n, dt), r(n, dt))
    )
    return Case(z, weight, bias, student, teacher, head, labels).to(torch.float64)


def teacher_logits(case: Case) -> Tensor:
    return ExactTarget(case.head, case.teacher_hidden).logits(slice(None))


def topk_of(logits: Tensor, k: int, temperature: float) -> TopkTarget:
    values, ids = logits.topk(k, dim=1)
    return TopkTarget(ids, values, torch.logsumexp(logits / temperature, 1), temperature)


def dense_loss(case: Case, k: int | None, options: dict[str, Any]) -> Tensor:
    """Computes the formula of triple_loss.py on dense tensors [N, V]."""
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
    """Returns the distance from the oracle over its norm, or over ``floor`` if the norm is smaller."""
    distance = (value.detach().double() - oracle.detach()).norm()
    return float(distance / oracle.detach().norm().clamp_min(floor))


def cancellation_floor(case: Case, options: dict[str, Any]) -> float:
    """Returns a hundredth of the terms before they cancel.

    If the student nearly equals the teacher, the loss is a difference of numbers many thousand times as
    large, so no float32 result has a small relative error. 1e-5 of this floor is one float32 rounding of the
    terms.
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
