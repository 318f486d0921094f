"""Is the arithmetic right on this device? Each check raises AssertionError, with figures, if it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from offline_teacher.capture import Capture
from offline_teacher.reduction import reduce_logits
from student_train.losses import triple_loss
from student_train.soft_targets import ExactTarget, TeacherHead
from torch.nn import functional

from infra.sections import Train
from tests.gpu.models import (
    Size,
    batch_of,
    layout_for,
    loaded,
    mlm_head,
    random_teacher,
    random_text,
    student_and_loss,
    tiny_config,
)

TEMPERATURE = 2.0
LOSS_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Relative error of value and gradient against float64."""


def reduction(device: torch.device, size: Size) -> dict[str, Any]:
    """Top-k and logsumexp of random logits against float64, ties included."""
    worst = 0.0
    for rows, vocab_size, dtype in (
        (1, 37, torch.float32),
        (300, 30_522, torch.float32),
        (300, 2_001, torch.bfloat16),
    ):
        torch.manual_seed(rows)
        logits = (4 * torch.randn(rows, vocab_size)).to(device, dtype)
        ids, values, logsumexp = reduce_logits(logits, 16, (1.0, 2.0))
        exact = logits.double().cpu()
        # Among equal logits the lower id comes first: a stable sort gives that order.
        order = exact.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids.cpu(), order.indices[:, :16]), "other ids than a stable sort gives"
        assert torch.equal(values.cpu().double(), order.values[:, :16]), "other logits"
        for column, temperature in enumerate((1.0, 2.0)):
            expected = torch.logsumexp(exact / temperature, dim=1)
            worst = max(worst, float((logsumexp[:, column].cpu() - expected).abs().max()))
    assert worst < 1e-4, f"logsumexp is off by {worst:.2g}"
    return {"logsumexp_error": worst}


def loss(device: torch.device, size: Size) -> dict[str, Any]:
    """The chunked triple loss in every dtype, value and gradients, against the dense formula in float64."""
    chunk = 4096 if device.type == "cuda" else 64
    errors: dict[str, float] = {}
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    for dtype in dtypes:
        for count in (1, chunk - 1, chunk + 1):
            for compiled in (False, True):
                error = _loss_error(device, dtype, count, chunk, compiled)
                key = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'plain'}"
                errors[key] = max(errors.get(key, 0.0), error)
                assert error < LOSS_TOLERANCES[dtype], f"{key}, {count} positions: off by {error:.2g}"
    return {"relative_errors": errors}


def _loss_error(device: torch.device, dtype: torch.dtype, count: int, chunk: int, compiled: bool) -> float:
    """The largest relative error of the value and of the three gradients."""
    config = tiny_config(vocab_size=1_003)
    head = TeacherHead.from_store(mlm_head(random_teacher(config)))
    torch.manual_seed(count)
    z, weight, bias, hidden = (
        torch.randn(shape).to(device, dtype) for shape in ((count, 32), (1_003, 32), (1_003,), (count, 32))
    )
    labels = torch.randint(0, 1_003, (count,)).where(torch.rand(count) < 0.3, -100).to(device)
    labels[0] = 7
    teacher = torch.randn(count, 32).to(device, dtype)
    masked = int((labels >= 0).sum())
    inputs = [tensor.requires_grad_() for tensor in (z, weight, bias)]
    terms = triple_loss(
        *inputs, ExactTarget(head.to(device, dtype), teacher), labels, None, hidden, teacher,
        temperature=TEMPERATURE, alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=1.0,
        tokens=count, masked=masked, kl_tokens=count, chunk_size=chunk, compile=compiled,
    )  # fmt: skip
    terms.total.backward()
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in (z, weight, bias)]
    exact = _dense_loss(wide, head.to("cpu", torch.float64), teacher, labels, hidden)
    exact.backward()
    pairs = [(terms.total, exact), *((own.grad, right.grad) for own, right in zip(inputs, wide, strict=True))]
    return max(
        float((own.detach().double().cpu() - right.detach()).norm() / right.detach().norm())
        for own, right in pairs
    )


def _dense_loss(
    wide: list[torch.Tensor],
    head: TeacherHead,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    z, weight, bias = wide
    teacher, hidden, labels = teacher.double().cpu(), hidden.double().cpu(), labels.cpu()
    logits = z @ weight.T + bias
    taught = head.transform(teacher) @ head.decoder_weight.T + head.decoder_bias
    kl = functional.kl_div(
        (logits / TEMPERATURE).log_softmax(1), (taught / TEMPERATURE).softmax(1), reduction="batchmean"
    )
    cosine = (1 - functional.cosine_similarity(hidden, teacher)).mean()
    return 5 * TEMPERATURE**2 * kl + 2 * functional.cross_entropy(logits, labels) + cosine


def teacher_pass(device: torch.device, size: Size) -> dict[str, Any]:
    """The columns that a pass keeps of a padded batch: this device in float32 against the CPU in float64."""
    config = tiny_config()
    model, layout = random_teacher(config), layout_for(config, 32, top_k=8)
    text = random_text(layout, 12, padded=True)
    arguments = text.input_ids, text.token_count, text.positions
    here = Capture(loaded(model, device, torch.float32), layout).batch(*arguments)
    exact = Capture(loaded(model.double(), torch.device("cpu"), torch.float64), layout).batch(*arguments)
    worst = {
        name: float(np.abs(here[name].astype(np.float64) - exact[name].astype(np.float64)).max())
        for name in ("hidden_states", "topk_logits", "logsumexp")
    }
    same = float((here["topk_ids"] == exact["topk_ids"]).mean())
    assert max(worst.values()) < 0.02, f"columns are off by {worst}"  # float16: 2^-9 at 8
    assert same > 0.99, f"only {same:.3f} of the top-k ids agree"
    real = np.arange(layout.length) < text.token_count[:, None]
    assert not here["hidden_states"][~real].any(), "padded positions must be zero"
    return {"largest_difference": worst, "same_topk_ids": same}


def training(device: torch.device, size: Size) -> dict[str, Any]:
    """Ten steps of the same student: this device in float32 against the CPU, and in bfloat16 by itself."""
    curves = {
        "here": _curve(device, "float32"),
        "cpu": _curve(torch.device("cpu"), "float32"),
        "bfloat16": _curve(device, "bfloat16"),
    }
    difference = max(abs(a / b - 1) for a, b in zip(curves["here"], curves["cpu"], strict=True))
    assert difference < 2e-3, f"losses differ from the CPU's by {difference:.2g}: {curves}"
    assert all(np.isfinite(curves["bfloat16"])), f"bfloat16 losses: {curves['bfloat16']}"
    assert curves["bfloat16"][-1] < curves["bfloat16"][0], f"bfloat16 does not learn: {curves['bfloat16']}"
    return {"largest_relative_difference": difference, "curves": curves}


def _curve(device: torch.device, dtype: str) -> list[float]:
    config = tiny_config()
    teacher, layout = random_teacher(config), layout_for(config, 32, top_k=0)
    text = random_text(layout, 16, padded=True)
    arguments = text.input_ids, text.token_count, text.positions
    columns = Capture(loaded(teacher, torch.device("cpu"), torch.float32), layout).batch(*arguments)
    batch = batch_of(text, columns).to(device)
    train = Train(dtype=dtype)  # type: ignore[arg-type]
    model, objective = student_and_loss(teacher, layout, train, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, masked = int(text.token_count.sum()), int((text.positions >= 0).sum())
    curve = []
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        total = objective(model, batch, tokens, masked).total
        total.backward()
        optimizer.step()
        curve.append(float(total.detach()))
    return curve
