"""Tokens per second, and the share of the device's peak that the model's own arithmetic is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from offline_teacher.capture import Capture
from transformers import BertConfig

from infra.sections import Train
from tests.gpu.models import Size, batch_of, layout_for, loaded, random_teacher, random_text, student_and_loss

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12}
"""bfloat16 without sparsity, by a part of the GPU's name; from the vendor's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of bfloat16 products; None for a device that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name.split("-")[0].split()), None)


def encoder_flops(config: BertConfig, length: int, layers: int) -> int:
    """FLOP of a token's forward through the layers: products of weights, and attention's two."""
    D, F = config.hidden_size, config.intermediate_size  # noqa: N806
    return layers * (2 * (4 * D * D + 2 * D * F) + 4 * length * D)


def head_flops(config: BertConfig) -> int:
    """FLOP of a token's forward through the masked-LM head."""
    return 2 * config.hidden_size * (config.hidden_size + config.vocab_size)


def teacher_pass(device: torch.device, size: Size) -> dict[str, Any]:
    """The pass's own batch from ids to columns, both on the host: hidden states alone, and with top-64."""
    teacher = loaded(random_teacher(size.config), device, torch.bfloat16)
    rows = []
    for length in size.lengths:
        for batch_size in size.batch_sizes:
            for top_k in (0, min(64, size.config.vocab_size)):
                layout = layout_for(size.config, length, top_k)
                text = random_text(layout, batch_size, padded=False)
                capture = Capture(teacher, layout)
                arguments = text.input_ids, text.token_count, text.positions
                seconds = _seconds(lambda c=capture, a=arguments: c.batch(*a), device, size.rounds)
                flops = encoder_flops(size.config, length, size.config.num_hidden_layers)
                flops += head_flops(size.config) if top_k else 0
                what = f"L {length}, batch {batch_size}, {f'top-{top_k} and ' if top_k else ''}hidden states"
                rows.append(_row(what, length * batch_size, seconds, flops, device))
    return {"rows": rows}


def student(device: torch.device, size: Size) -> dict[str, Any]:
    """A whole optimiser step of a half-depth student under the triple loss, and the host's waits in one."""
    teacher, rows = random_teacher(size.config), []
    length = size.lengths[0]
    layout = layout_for(size.config, length, top_k=0)
    waits = None
    for batch_size in size.batch_sizes:
        text = random_text(layout, batch_size, padded=False)
        columns = Capture(loaded(teacher, device, torch.bfloat16), layout).batch(
            text.input_ids, text.token_count, text.positions
        )
        batch = batch_of(text, columns).to(device)
        model, objective = student_and_loss(teacher, layout, Train(), device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
        tokens, masked = int(text.token_count.sum()), int((text.positions >= 0).sum())

        def step(m=model, o=objective, b=batch, a=optimizer, t=tokens, k=masked) -> None:  # type: ignore[no-untyped-def]
            a.zero_grad(set_to_none=True)
            o(m, b, t, k).total.backward()
            a.step()

        seconds = _seconds(step, device, size.rounds)
        depth = model.model.config.num_hidden_layers
        flops = 3 * (encoder_flops(size.config, length, depth) + head_flops(size.config))
        flops += head_flops(size.config)  # the teacher's head, replayed
        rows.append(_row(f"triple loss, L {length}, batch {batch_size}", tokens, seconds, flops, device))
        waits = _host_waits(step, device)
    return {"rows": rows, "host_waits_in_a_step": waits}


def _seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of ``rounds`` calls after three that warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_waits(step: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for the device in one step, as torch's own debug mode counts it."""
    if device.type != "cuda":
        return None
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _row(what: str, tokens: int, seconds: float, flops: int, device: torch.device) -> dict[str, Any]:
    rate, peak = tokens / seconds, peak_flops(device)
    return {
        "what": what,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "utilisation": rate * flops / peak if peak else None,
    }
