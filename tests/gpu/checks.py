"""Checks of the arithmetic on this device. A failed check raises AssertionError with the measured errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from infra.settings.sections import Student, Train
from offline_teacher.inference.columns import Inference
from offline_teacher.inference.quantise import dequantise, quantise
from offline_teacher.inference.reduction import reduce_logits
from offline_teacher.models.replay import Replay
from offline_teacher.models.weights import top_weights
from student_train.objectives.relations import RELATIONS, relation_loss
from student_train.objectives.soft_targets import ExactTarget
from student_train.objectives.triple_loss import triple_loss
from tests.benchmarks.live_reference import dense_relation_loss
from tests.gpu.models import (
    Size,
    batch_of,
    columns_of,
    layout_for,
    loaded,
    random_teacher,
    random_text,
    student_and_loss,
    tiny_config,
)

TEMPERATURE = 2.0
LOSS_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Dtype -> largest relative error of the loss and of its gradients, compared with float64."""
CPU = torch.device("cpu")


def reduction(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares top-k and logsumexp of random logits, ties included, with float64."""
    worst = 0.0
    for rows, vocab_size, dtype in (
        (1, 37, torch.float32),
        (300, 30_522, torch.float32),
        (300, 50_368, torch.bfloat16),
        (300, 2_001, torch.bfloat16),
        (3, 70_001, torch.bfloat16),
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


def quantisation(device: torch.device, size: Size) -> dict[str, Any]:
    """Checks that int8 changes no hidden state by more than half of its position's scale."""
    torch.manual_seed(0)
    states = torch.randn(500, 384) * torch.logspace(-6, 4, 500)[:, None]
    states[3] = 0
    steps, scale = quantise(states.to(device))
    assert bool((steps[3] == 0).all()), "zeros must stay zero"
    assert float(scale[3]) == 0, "the scale of zeros must be zero"
    off = (dequantise(steps, scale).cpu() - states).abs() / scale.cpu()[:, None].clamp_min(1e-30)
    worst = float(off.max())
    assert worst < 0.5 + 1e-4, f"numbers are off by {worst:.4f} steps"
    return {"largest_error_in_steps": worst}


def loss(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares the chunked triple loss and its gradients, in every dtype, with the dense formula in
    float64."""
    chunk, vocab_size = (4096, 5_003) if device.type == "cuda" else (64, 1_003)
    errors: dict[str, float] = {}
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    for dtype in dtypes:
        for count in (1, chunk - 1, chunk + 1):
            for compiled in (False, True):
                error = _loss_error(device, dtype, count, chunk, vocab_size, compiled)
                key = f"{str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'plain'}"
                errors[key] = max(errors.get(key, 0.0), error)
                assert error < LOSS_TOLERANCES[dtype], f"{key}, {count} positions: off by {error:.2g}"
    return {"relative_errors": errors}


def _loss_error(
    device: torch.device, dtype: torch.dtype, count: int, chunk: int, vocab_size: int, compiled: bool
) -> float:
    """Returns the largest relative error of the loss and of its three gradients."""
    teacher_model = random_teacher(tiny_config(vocab_size))
    head = Replay(teacher_model.config, top_weights(teacher_model, 0), 0)
    torch.manual_seed(count)
    shapes = (count, 32), (vocab_size, 32), (vocab_size,), (count, 32)
    z, weight, bias, hidden = (torch.randn(shape).to(device, dtype) for shape in shapes)
    labels = torch.randint(0, vocab_size, (count,)).where(torch.rand(count) < 0.3, -100).to(device)
    labels[0] = 7
    teacher = torch.randn(count, 32).to(device, dtype)
    masked = int((labels >= 0).sum())
    inputs = [tensor.requires_grad_() for tensor in (z, weight, bias)]
    terms = triple_loss(
        inputs[0], inputs[1], inputs[2],
        ExactTarget(head.to(device, dtype), teacher), labels, hidden, teacher,
        temperature=TEMPERATURE, alpha_ce=5.0, alpha_mlm=2.0, alpha_cos=1.0,
        tokens=count, masked=masked, kl_tokens=count, chunk_size=chunk, compile=compiled,
    )  # fmt: skip
    terms.total.backward()
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in (z, weight, bias)]
    exact = _dense_loss(wide, head.to("cpu", torch.float64), teacher, labels, hidden)
    exact.backward()
    pairs = [(terms.total, exact), *((own.grad, right.grad) for own, right in zip(inputs, wide, strict=True))]
    return max(_relative(own, right) for own, right in pairs)


def _relative(own: torch.Tensor | None, right: torch.Tensor | None) -> float:
    assert own is not None, "no gradient"
    assert right is not None
    return float((own.detach().double().cpu() - right.detach()).norm() / right.detach().norm())


def _dense_loss(
    wide: list[torch.Tensor], head: Replay, teacher: torch.Tensor, labels: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    z, weight, bias = wide
    teacher, hidden, labels = teacher.double().cpu(), hidden.double().cpu(), labels.cpu()
    logits = z @ weight.T + bias
    taught = head.decoder_input(teacher) @ head.decoder_weight.T + head.decoder_bias
    kl = functional.kl_div(
        (logits / TEMPERATURE).log_softmax(1), (taught / TEMPERATURE).softmax(1), reduction="batchmean"
    )
    cosine = (1 - functional.cosine_similarity(hidden, teacher)).mean()
    return 5 * TEMPERATURE**2 * kl + 2 * functional.cross_entropy(logits, labels) + cosine


def relations(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares the chunked relation loss and its gradients, per dtype, with the dense formula in float64."""
    errors: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for padded, compiled in itertools.product((False, True), repeat=2):
            key = f"{str(dtype).removeprefix('torch.')}, {'padded' if padded else 'full'}"
            key += ", compiled" if compiled else ""
            errors[key] = _relation_error(device, dtype, padded, compiled)
            assert errors[key] < LOSS_TOLERANCES[dtype], f"{key}: off by {errors[key]:.2g}"
    return {"relative_errors": errors}


def _relation_error(device: torch.device, dtype: torch.dtype, padded: bool, compiled: bool) -> float:
    torch.manual_seed(3)
    batch, length, heads = 5, 24, 8
    student = {name: torch.randn(batch, length, 48).to(device, dtype) for name in RELATIONS}
    teacher = {name: torch.randn(batch, length, 128).to(device, dtype) for name in RELATIONS}
    count = torch.tensor([24, 7, 24, 1, 13]) if padded else torch.full((batch,), length)
    for tensor in student.values():
        tensor.requires_grad_()
    total = relation_loss(
        student, teacher, count.to(device), heads, float(count.sum()), no_padding=not padded, compile=compiled
    )
    total.backward()
    wide = {name: t.detach().double().cpu().requires_grad_() for name, t in student.items()}
    right = dense_relation_loss(
        list(wide.values()), [teacher[name].double().cpu() for name in RELATIONS], count, heads
    )
    right.backward()
    pairs = [(total, right), *((student[name].grad, wide[name].grad) for name in RELATIONS)]
    return max(_relative(own, exact) for own, exact in pairs if own is not None and exact is not None)


def columns(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares the columns of a padded batch on this device in float32 with the CPU in float64."""
    model, worst, same = random_teacher(tiny_config()), {}, 1.0
    for replay_layers in (0, 1):
        for hidden_states in ("float16", "int8"):
            layout = layout_for(model.config, 32, 8, replay_layers, hidden_states)
            text = random_text(layout, 12, padded=True)
            here = columns_of(loaded(model, replay_layers, device, torch.float32), layout, text)
            exact = columns_of(loaded(model.double(), replay_layers, CPU, torch.float64), layout, text)
            model.float()
            same = min(same, float((here["topk_ids"] == exact["topk_ids"]).mean()))
            real = np.arange(layout.length) < text["token_count"][:, None]
            assert not here["hidden_states"][~real].any(), "padded positions must be zero"
            for name in ("hidden_states", "topk_logits", "logsumexp"):
                off = np.abs(here[name].astype(np.float64) - exact[name].astype(np.float64)).max()
                worst[f"{name}, replay {replay_layers}, {hidden_states}"] = float(off)
                allowed = 1 if here[name].dtype == np.int8 else 0.02  # float16: 2^-9 at 8
                assert off <= allowed, f"columns are off: {worst}"
    assert same > 0.99, f"only {same:.3f} of the top-k ids agree"
    rounded = _rounded_logits(model, device)
    assert rounded == (device.type == "cpu"), "a GPU rounds the logits of a bfloat16 teacher to bfloat16"
    return {"largest_difference": worst, "same_topk_ids": same, "rounded_logits": rounded}


def _rounded_logits(model: Any, device: torch.device) -> bool:
    """Returns whether all logits of a teacher in bfloat16 are numbers of bfloat16."""
    layout = layout_for(model.config, 32, 8, 0, "float16")
    teacher = loaded(model.bfloat16(), 0, device, torch.bfloat16)
    logits = torch.from_numpy(
        columns_of(teacher, layout, random_text(layout, 12, padded=True))["topk_logits"]
    )
    model.float()
    return bool((logits.bfloat16().half() == logits).all())


def graphs(device: torch.device, size: Size) -> dict[str, Any]:
    """Checks that hidden states computed with CUDA graphs are bit-equal to those computed without them."""
    model, worst = random_teacher(tiny_config()), 0.0
    for padded in (False, True):
        layout = layout_for(model.config, 64, 0)
        text = random_text(layout, 16, padded=padded)
        inference = Inference(loaded(model, 0, device, torch.bfloat16), layout)
        first, *others = [inference.columns(text, 4).wait()["hidden_states"] for _ in range(3)]
        for other in others:
            worst = max(worst, float(np.abs(other.astype(np.float64) - first.astype(np.float64)).max()))
        for at in range(0, 16, 4) if not padded else ():  # the first batch of a shape runs without a graph
            single = Inference(loaded(model, 0, device, torch.bfloat16), layout)
            rows = single.columns({name: values[at : at + 4] for name, values in text.items()}, 4).wait()
            assert (rows["hidden_states"] == first[at : at + 4]).all(), "a graph gives other bits"
    assert worst == 0, f"shards differ by {worst} from one call to the next"
    return {"largest_difference": worst}


def replay(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares replayed top layers on padded stored states in float32 with float64 on the CPU."""
    model = random_teacher(tiny_config())
    layout = layout_for(model.config, 32, 0, replay_layers=1)
    text = random_text(layout, 12, padded=True)
    states = torch.from_numpy(columns_of(loaded(model, 1, CPU, torch.float32), layout, text)["hidden_states"])
    count = torch.from_numpy(text["token_count"].astype(np.int64))
    results = {}
    for where, dtype in ((device, torch.float32), (CPU, torch.float64)):
        top = Replay(model.config, top_weights(model, 1), 1, dtype).to(where)
        at = count.to(where)
        last, vectors = top.last_hidden_and_queries_keys_values(states.to(where), at)
        logits = top.decoder_input(last) @ top.decoder_weight.T + top.decoder_bias
        lazy = top.queries_keys_values(states.to(where), at)
        names = ("last_hidden", "logits", "queries", "keys", "values", "lazy_queries")
        tensors = (last, logits, *vectors, lazy[0])
        results[dtype] = {n: t.double().cpu() for n, t in zip(names, tensors, strict=True)}
    real = torch.arange(layout.length) < count[:, None]
    off = {
        name: float((results[torch.float32][name] - right)[real].abs().max() / right[real].abs().max())
        for name, right in results[torch.float64].items()
    }
    assert max(off.values()) < 1e-4, f"replayed numbers are off by {off}"
    return {"largest_relative_difference": off}


def training(device: torch.device, size: Size) -> dict[str, Any]:
    """Compares ten steps of a student in float32 with the CPU; in bfloat16 its loss must only become
    smaller."""
    results: dict[str, Any] = {}
    for name, train in (
        ("triple", {}),
        ("triple and relations", {"alpha_relation": 1.0}),
        ("relations", {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}),
    ):
        curves = {
            "here": _curve(device, "float32", train),
            "cpu": _curve(CPU, "float32", train),
            "bfloat16": _curve(device, "bfloat16", train),
        }
        difference = max(abs(a / b - 1) for a, b in zip(curves["here"], curves["cpu"], strict=True))
        assert difference < 2e-3, f"{name}: losses differ from the CPU's by {difference:.2g}: {curves}"
        low = curves["bfloat16"]
        assert all(map(math.isfinite, low)), f"{name}: bfloat16 losses: {low}"
        assert low[-1] < low[0], f"{name}: bfloat16 does not learn: {low}"
        results[name] = {"largest_relative_difference": difference, "curves": curves}
    return results


def _curve(device: torch.device, dtype: str, weights: dict[str, float]) -> list[float]:
    teacher = random_teacher(tiny_config())
    layout = layout_for(teacher.config, 32, 0, replay_layers=1)
    text = random_text(layout, 16, padded=True)
    columns = columns_of(loaded(teacher, 1, CPU, torch.float32), layout, text)
    batch = batch_of(layout, text, columns).to(device)
    train = Train(dtype=dtype, **weights)  # type: ignore[arg-type]
    student = Student(init="random", dropout=0.0)
    model, objective = student_and_loss(teacher, layout, student, train, device)
    model.to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    curve = []
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        total = objective(model, batch, float(batch.tokens), float(batch.masked)).total
        total.backward()
        optimizer.step()
        curve.append(float(total.detach()))
    return curve
