"""Soft targets from stored outputs against the teacher's own distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from offline_teacher.models.replay import Replay
from offline_teacher.models.weights import named_weights
from student_train.objectives.soft_targets import Decoder, ExactTarget, SoftTarget, TopkTarget
from student_train.objectives.triple_loss import triple_loss
from tests.student_train.heads import random_head


def topk(
    logits: list[list[float]], full: list[float], temperature: float, dtype: torch.dtype = torch.float32
) -> TopkTarget:
    ids = torch.arange(len(logits[0])).repeat(len(logits), 1)
    return TopkTarget(ids, torch.tensor(logits, dtype=dtype), torch.tensor(full), temperature)


def test_topk_probabilities_are_those_of_the_full_softmax() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0, 0.0, -1.0]])
    for temperature in (1.0, 2.0):
        full = torch.logsumexp(logits / temperature, 1)
        ids, p, tail = TopkTarget(torch.tensor([[0, 1]]), logits[:, :2], full, temperature).probabilities(
            slice(None)
        )
        expected = torch.softmax(logits / temperature, 1)[0]
        assert ids.dtype == torch.int64
        torch.testing.assert_close(p[0], expected[:2])
        torch.testing.assert_close(tail[0], expected[2:].sum())


def test_a_tiny_tail_is_not_noise() -> None:
    """A tail of 1e-6 has the precision that float32 logits and logsumexp allow."""
    full = torch.logaddexp(torch.tensor(0.0), torch.tensor(1e-6).log())
    _, p, tail = topk([[0.0]], [float(full)], 1.0).probabilities(slice(None))
    assert float(tail) == pytest.approx(1e-6, rel=1e-3)
    assert float(p + tail) == pytest.approx(1.0, abs=1e-7)


def test_logits_rounded_above_full_mass_leave_an_empty_tail_and_sum_to_one() -> None:
    _, p, tail = topk(
        [[10.01, 5.0]], [float(torch.logsumexp(torch.tensor([10.0, 5.0]), 0))], 1.0
    ).probabilities(slice(None))
    assert float(tail) == 0.0
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)


def test_the_exact_target_is_the_head_of_the_hidden_states() -> None:
    """Logits have the head's dtype, for stored states of any dtype."""
    head, hidden = random_head(4, 7), torch.randn(3, 4, dtype=torch.float64)
    z = head.decoder_input(hidden)
    expected = z @ head.decoder_weight.T + head.decoder_bias
    torch.testing.assert_close(ExactTarget(head, hidden).logits(slice(None)), expected)
    narrow = ExactTarget(head.to(torch.float32), hidden.half())
    assert len(narrow) == 3
    assert narrow.logits(slice(1, 3)).dtype == torch.float32
    torch.testing.assert_close(narrow.logits(slice(1, 3)).double(), expected[1:], rtol=1e-2, atol=1e-2)
    (buffer,) = narrow.arguments(slice(0, 2), narrow.buffer(3))
    assert torch.equal(buffer[:2], narrow.logits(slice(0, 2)))


@pytest.fixture(scope="module")
def live(shared_dir: Path) -> dict[str, Any]:
    """Returns the shared teacher's float32 hidden states and logits on real text, and a student near it."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "teacher")
    model = AutoModelForMaskedLM.from_pretrained(shared_dir / "teacher", dtype=torch.float32).eval()
    text = sorted((shared_dir / "data/corpus/validation").glob("*.txt"))[0].read_text(encoding="utf-8")[
        2000:3200
    ]
    ids = torch.tensor([tokenizer(text).input_ids[:128]])
    ids[0, 5::7] = tokenizer.mask_token_id
    with torch.no_grad():
        hidden = model.bert(ids).last_hidden_state[0]
        replay = Replay(model.config, named_weights(model), replay_layers=0)
        logits = model.cls.predictions(hidden)
        torch.manual_seed(0)
        z = replay.decoder_input(hidden + 0.3 * hidden.std() * torch.randn_like(hidden))
    return {"hidden": hidden, "logits": logits, "head": replay, "z": z}


def head_gradient(z: Tensor, head: Decoder, target: SoftTarget) -> Tensor:
    z, weight = z.detach().requires_grad_(), head.decoder_weight.detach().clone().requires_grad_()
    terms = triple_loss(
        z, weight, head.decoder_bias.detach(), target, torch.full((len(z),), -100), z, None,
        temperature=2.0, alpha_ce=5.0, alpha_mlm=0.0, alpha_cos=0.0,
        tokens=1, masked=1, kl_tokens=len(z), compile=False,
    )  # fmt: skip
    return torch.cat([g.flatten() for g in torch.autograd.grad(terms.total, (z, weight))])


def live_gradient(z: Tensor, head: Decoder, teacher_logits: Tensor) -> Tensor:
    z = z.detach().double().requires_grad_()
    weight = head.decoder_weight.detach().double().requires_grad_()
    s = z @ weight.T + head.decoder_bias.detach().double()
    log_q = functional.log_softmax(s / 2, 1)
    loss = (
        5
        * 4
        * functional.kl_div(log_q, functional.softmax(teacher_logits.double() / 2, 1), reduction="batchmean")
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (z, weight))])


def test_exact_target_has_the_live_teachers_gradient_on_real_text(live: dict) -> None:
    """From float16 hidden states and a float32 head at T = 2, within 1e-3 of the teacher's own logits."""
    z, head = live["z"], live["head"]
    expected = live_gradient(z, head, live["logits"])
    found = head_gradient(z, head, ExactTarget(head, live["hidden"].half()))
    assert float((found - expected).norm() / expected.norm()) <= 1e-3


def test_one_tail_bucket_beats_renormalising_on_real_text(live: dict) -> None:
    z, head, logits = live["z"], live["head"], live["logits"]
    expected = live_gradient(z, head, logits)
    values, ids = logits.topk(64, 1)
    bucket = TopkTarget(ids, values.half(), torch.logsumexp(logits / 2, 1), 2.0)
    renormalised = TopkTarget(ids, values.half(), torch.logsumexp(values / 2, 1), 2.0)
    errors = [
        float((head_gradient(z, head, target) - expected).norm() / expected.norm())
        for target in (bucket, renormalised)
    ]
    assert errors[0] < 0.6
    assert errors[1] > 5 * errors[0]
