"""What ``plan`` says of soft targets and relations, against naive oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from offline_teacher.planning.soft_targets import (
    DenseHead,
    SoftTarget,
    exact_name,
    gradient_errors,
    kept_mass,
    relation_gradient,
    renormalised_name,
    round_as_stored,
    tail_bucket_name,
    top_k_targets,
)

V, D, N = 211, 16, 40


@pytest.fixture(scope="module")
def head() -> BertForMaskedLM:
    """A masked LM of which only the head is used; logits are far apart."""
    config = BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    generator = torch.Generator().manual_seed(0)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.cls.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.get_parameter("cls.predictions.transform.LayerNorm.weight").add_(1)
        model.get_parameter("cls.predictions.decoder.weight").mul_(0.4)
    return model


def hidden_states(seed: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def test_kept_mass_is_that_of_a_naive_float64_softmax(head: BertForMaskedLM) -> None:
    hidden, ks, temperatures = hidden_states(0), [1, 8, 64, V], [1.0, 2.0, 4.0]
    logits = DenseHead(head).double()(hidden.double()).detach().numpy()
    for j, row in enumerate(kept_mass(DenseHead(head), hidden, ks, temperatures)):
        p = np.exp(logits / temperatures[j])
        p = -np.sort(-p / p.sum(axis=1, keepdims=True), axis=1)
        assert row == pytest.approx([p[:, :k].sum(axis=1).mean() for k in ks], rel=1e-5)
        assert row[-1] == pytest.approx(1.0)


def kl(target: SoftTarget, teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL, summed over positions, written as a textbook has it; float64 logits [N, V]."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    if not target.top_k:
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
    ids = teacher.topk(target.top_k).indices
    log_p, log_q = log_p.gather(1, ids), log_q.gather(1, ids)
    if target.tail:
        log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1) for x in (log_p, log_q))
    else:
        log_p = log_p - log_p.logsumexp(1, keepdim=True)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_gradients_are_those_of_autograd(head: BertForMaskedLM, tail: bool, temperature: float) -> None:
    dense = DenseHead(head).double()
    target = SoftTarget("top", top_k=8, tail=tail)
    teacher = dense(hidden_states(0).double()).detach().half().double()  # as a store rounds them
    student = dense(hidden_states(1).double()).detach().requires_grad_()
    (expected,) = torch.autograd.grad(kl(target, teacher, student, temperature), student)
    q = torch.softmax(student.detach() / temperature, -1)
    found = temperature * target.gradient(dense, slice(0, N), teacher, q, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_tail_far_below_the_top_k_has_a_gradient() -> None:
    """The student's tail mass is 1e-26 here: 1 minus the rest is 0."""
    teacher = torch.tensor([[2.0, 1.5, 1.0, 0.5]], dtype=torch.float64)
    student = torch.tensor([[9.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    q = torch.softmax(student / 0.1, -1)
    found = SoftTarget("top", top_k=2, tail=True).gradient(
        torch.nn.Identity(),  # type: ignore[arg-type]
        slice(0, 1),
        teacher,
        q,
        0.1,
    )
    p = torch.softmax(teacher / 0.1, -1)
    share = torch.softmax(student[:, 2:] / 0.1, -1)
    expected = torch.cat([q[:, :2] - p[:, :2], q[:, 2:] - p[:, 2:].sum() * share], 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def all_targets(hidden: torch.Tensor) -> list[SoftTarget]:
    """Every form that a store without replayed layers can hold."""
    kept = [
        SoftTarget(exact_name(kind), hidden=round_as_stored(hidden, kind)) for kind in ("int8", "float16")
    ]
    return [*top_k_targets(8), *kept]


def test_a_student_that_is_its_teacher_has_nothing_to_compare(head: BertForMaskedLM) -> None:
    hidden = hidden_states(0)
    errors = gradient_errors(DenseHead(head), hidden, hidden, all_targets(hidden), 2.0)
    assert not np.isfinite(list(errors.values())).any()


def test_gradient_error_is_that_of_the_heads_parameters(head: BertForMaskedLM) -> None:
    """By autograd in float64 through the whole head, one soft target at a time."""
    hidden, student = hidden_states(0), hidden_states(1)
    int8 = SoftTarget(exact_name("int8"), hidden=round_as_stored(hidden, "int8"))

    def gradient(teacher_hidden: torch.Tensor) -> torch.Tensor:
        dense = DenseHead(head).double()
        loss = kl(SoftTarget("dense"), dense(teacher_hidden.double()).detach(), dense(student.double()), 2.0)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(dense.parameters()))])

    assert int8.hidden is not None
    truth = gradient(hidden)
    expected = float((gradient(int8.hidden) - truth).norm() / truth.norm())
    found = gradient_errors(DenseHead(head), hidden, student, [int8], 2.0)
    assert found == {exact_name("int8"): pytest.approx(expected, rel=1e-2)}


def test_exact_targets_are_nearly_right_and_renormalised_ones_badly_wrong(head: BertForMaskedLM) -> None:
    hidden = hidden_states(0)
    close = hidden + 0.05 * (hidden_states(1) - hidden)
    errors = gradient_errors(DenseHead(head), hidden, close, all_targets(hidden), 2.0)
    assert errors[exact_name("float16")] < 1e-2 < errors[exact_name("int8")] < 0.5
    assert errors[tail_bucket_name(8)] < 1 < errors[renormalised_name(8)]


def test_the_gradient_of_relations_is_that_of_the_textbook() -> None:
    """KL(softmax(t t^T / sqrt d) || softmax(s s^T / sqrt d)) by loops and finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 6, generator=generator, dtype=torch.float64)
    count, heads, step = torch.tensor([3]), 2, 1e-6

    def loss(own: torch.Tensor) -> float:
        total = 0.0
        for head in range(heads):
            t, s = (x[0, :3, 3 * head : 3 * head + 3] for x in (teacher, own))
            for row in range(3):
                p, q = (torch.softmax(x[row] @ x.T / 3**0.5, -1) for x in (t, s))
                total += float((p * (p / q).log()).sum())
        return total

    expected = torch.zeros_like(student)
    for place in np.ndindex(*student.shape):
        up, down = student.clone(), student.clone()
        up[place], down[place] = up[place] + step, down[place] - step
        expected[place] = (loss(up) - loss(down)) / (2 * step)
    found = relation_gradient([student], [teacher], count, heads)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-6, atol=1e-8)
