"""Measures tokens per second, and the model's FLOP/s as a share of the device's peak."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from infra.settings.sections import Store, Student, Train
from offline_teacher.inference.columns import Inference, Pending
from offline_teacher.store.schema import Layout
from tests.gpu import stores
from tests.gpu.models import (
    Size,
    batch_of,
    columns_of,
    layout_for,
    loaded,
    random_teacher,
    random_text,
    student_and_loss,
)
from tests.gpu.steps import NO_DEEPSPEED, EngineStep, PlainStep, deepspeed_there

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12}
"""Part of a GPU's name -> peak FLOP/s in dense bfloat16, from the vendor's data sheets."""
SHARD_BYTES = 256 << 20
TOP_OPERATIONS = 15
RELATIONS_ALONE = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0, "alpha_relation": 1.0}


def peak_flops(device: torch.device) -> float | None:
    """Returns the peak FLOP/s in bfloat16; None if the device is not in PEAK_FLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name.split("-")[0].split()), None)


def encoder_flops(config: BertConfig, length: int, layers: int) -> int:
    """Returns the FLOP per token of a forward through ``layers`` layers. It counts the products with weights
    and the two products in attention."""
    D, F = config.hidden_size, config.intermediate_size  # noqa: N806
    return layers * (2 * (4 * D * D + 2 * D * F) + 4 * length * D)


def head_flops(config: BertConfig) -> int:
    """Returns the FLOP per token of a forward through the masked-LM head."""
    return 2 * config.hidden_size * (config.hidden_size + config.vocab_size)


def teacher_pass(device: torch.device, size: Size) -> dict[str, Any]:
    """Measures a worker of the pass after a warm-up, from input ids to columns in host memory or in a
    store."""
    results: dict[str, Any] = {"rows": [], "host_waits_in_a_shard": {}}
    model, top_k = random_teacher(size.config), min(64, size.config.vocab_size)
    short, long = size.lengths[0], size.lengths[-1]
    with tempfile.TemporaryDirectory() as scratch:
        saved = stores.save_teacher(model, Path(scratch, "teacher"))
        for layout, at_once in (
            (layout_for(size.config, short, 0), (2, 8)),
            (layout_for(size.config, short, 0, hidden_states="int8"), (8,)),
            (layout_for(size.config, short, top_k), (8,)),
            (layout_for(size.config, long, 0), (8,)),
            (layout_for(size.config, long, top_k), (8,)),
        ):
            _columns_row(results, model, layout, device, size)
            for in_flight in at_once:
                _store_row(results, saved, Path(scratch), layout, device, size, in_flight)
    return results


def _what(layout: Layout) -> str:
    top_k = f"top-{layout.top_k} and " if layout.top_k else ""
    return f"L {layout.length}, {top_k}hidden states in {layout.hidden_states}"


def _batch_size(layout: Layout, size: Size) -> int:
    """Returns a batch size with which batches of all lengths have equally many tokens."""
    return size.batch_size * size.lengths[0] // layout.length


def _columns_row(
    results: dict[str, Any], model: Any, layout: Layout, device: torch.device, size: Size
) -> None:
    """Measures shards from input ids to columns in host memory, with two shards in flight. Also counts how
    often the host waits for the device, and records a profile if ``size`` asks for it."""
    batch_size, what = _batch_size(layout, size), _what(layout)
    fits = SHARD_BYTES // layout.bytes_per_sample() // batch_size * batch_size
    count = fits if device.type == "cuda" else 2 * batch_size
    text = random_text(layout, count, padded=False)
    inference = Inference(loaded(model, 0, device, torch.bfloat16), layout)
    pending: deque[Pending] = deque()

    def shard() -> None:
        pending.append(inference.columns(text, batch_size))

    def shards(number: int) -> None:
        for _ in range(number):
            shard()
            if len(pending) > 2:
                pending.popleft().wait()
        while pending:
            pending.popleft().wait()

    shards(4)  # warms up
    begin = time.perf_counter()
    shards(size.rounds)
    seconds = (time.perf_counter() - begin) / size.rounds
    results["rows"].append(
        _row(f"{what}, to memory", count * layout.length, seconds, _pass_flops(size.config, layout), device)
    )
    results["host_waits_in_a_shard"][what] = host_waits(shard, device)
    if size.profile:
        results.setdefault("profiles", {})[what] = profile(shard, device)
    shards(0)


def _store_row(
    results: dict[str, Any],
    saved: Path,
    scratch: Path,
    layout: Layout,
    device: torch.device,
    size: Size,
    in_flight: int,
) -> None:
    """Measures the real worker, which writes ``in_flight`` tasks at once to a store on the local disk."""
    batch_size = _batch_size(layout, size)
    per_task = (1 << 18) // layout.length if device.type == "cuda" else 2 * batch_size
    store = Store(top_k=layout.top_k, hidden_states=layout.hidden_states, task_sequences=per_task)  # type: ignore[arg-type]
    making = stores.begin(
        scratch / "run", saved, str(device), dtype="bfloat16", length=layout.length, batch_size=batch_size,
        store=store, sequences={"train": per_task * size.tasks},
    )  # fmt: skip
    tokens, seconds = making.run("train", in_flight)
    what = f"{_what(layout)}, to a store, {in_flight} tasks at once"
    row = _row(what, tokens, seconds, _pass_flops(size.config, layout), device)
    bytes_per_token = layout.bytes_per_sample() / layout.length
    results["rows"].append({**row, "bytes_per_second": row["tokens_per_second"] * bytes_per_token})
    shutil.rmtree(scratch / "run")


def _pass_flops(config: BertConfig, layout: Layout) -> int:
    head = head_flops(config) if layout.top_k else 0
    return encoder_flops(config, layout.length, config.num_hidden_layers) + head


def plain_step(device: torch.device, size: Size) -> dict[str, Any]:
    """Measures steps of several students and losses with torch's AdamW, with the batch on the device."""
    return _steps(PlainStep, device, size)


def engine_step(device: torch.device, size: Size) -> dict[str, Any]:
    """Measures the same steps with the trainer's engine."""
    return _steps(EngineStep, device, size) if deepspeed_there() else {"skipped": NO_DEEPSPEED}


def _steps(make: type[PlainStep | EngineStep], device: torch.device, size: Size) -> dict[str, Any]:
    results: dict[str, Any] = {"rows": [], "host_waits_in_a_step": {}}
    narrow = Student(init="random", hidden_size=size.narrow)
    for what, replay_layers, shape, weights in (
        ("half depth, triple loss, replay 1", 1, Student(), {}),
        ("half depth, triple loss, replay 0", 0, Student(), {}),
        ("half depth, half width, relations alone", 1, narrow, RELATIONS_ALONE),
    ):
        _step_row(results, make, what, replay_layers, shape, weights, device, size)
    return results


def _step_row(
    results: dict[str, Any],
    make: type[PlainStep | EngineStep],
    what: str,
    replay_layers: int,
    shape: Student,
    weights: dict[str, float],
    device: torch.device,
    size: Size,
) -> None:
    teacher, length, batch_size = random_teacher(size.config), size.lengths[0], size.batch_size
    layout = layout_for(size.config, length, 0, replay_layers)
    text = random_text(layout, batch_size, padded=False)
    columns = columns_of(loaded(teacher, replay_layers, device, torch.bfloat16), layout, text)
    batch = batch_of(layout, text, columns)
    batch = batch.to(device)  # the trainer copies a batch while the previous batch is computed
    train = Train(batch_size=batch_size, micro_batch_size=batch_size, **weights)  # type: ignore[arg-type]
    model, objective = student_and_loss(teacher, layout, shape, train, device)
    step = make(model, objective, train, device)
    seconds = median_seconds(lambda: step(batch), device, size.rounds)
    flops = _step_flops(size.config, model.model.config, length, replay_layers, weights)
    row = _row(f"{what}, L {length}, batch {batch_size}", batch.tokens, seconds, flops, device)
    results["rows"].append(row)
    results["host_waits_in_a_step"][what] = host_waits(lambda: step(batch), device)
    if size.profile:
        results.setdefault("profiles", {})[what] = profile(lambda: step(batch), device)


def _step_flops(
    teacher: BertConfig, student: Any, length: int, replay_layers: int, weights: dict[str, float]
) -> int:
    """Returns the FLOP per token of the student's forward and backward (twice the forward) and the replay."""
    own = BertConfig(
        hidden_size=student.hidden_size,
        intermediate_size=getattr(student, "hidden_dim", None) or student.intermediate_size,
        vocab_size=teacher.vocab_size,
    )
    flops = 3 * encoder_flops(own, length, student.num_hidden_layers)
    if weights:  # relations only: three projections, and x x^T of three relations
        D = teacher.hidden_size  # noqa: N806
        return flops + 6 * D * D + 3 * (2 * length * D + 3 * 2 * length * own.hidden_size)
    return flops + 3 * head_flops(own) + head_flops(teacher) + encoder_flops(teacher, length, replay_layers)


def median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Returns the median seconds of ``rounds`` calls after a warm-up; waits for the device every few
    calls."""
    for _ in range(3):
        function()
    times, calls = [], 4
    for _ in range(max(1, rounds // calls)):
        wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        times.append((time.perf_counter() - started) / calls)
    return sorted(times)[len(times) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_waits(function: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Returns source line -> how often the host waits there for the device in one call. The waits are those
    that torch's sync debug mode reports; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            line = f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
            waits[line] = waits.get(line, 0) + 1
    return waits


def profile(function: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Returns the most expensive operations of one call on the device, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    function()
    wait(device)
    try:
        with profiler(activities=activities) as recorded:
            function()
            wait(device)
    except RuntimeError as error:  # some machines forbid profiling
        return [{"operation": f"not measured: {error}", "calls": 0, "microseconds": 0, "share": 0.0}]
    events = [
        (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in recorded.key_averages()
    ]
    total = sum(microseconds for _, _, microseconds in events) or 1
    events.sort(key=lambda event: -event[2])
    return [
        {"operation": name[:120], "calls": calls, "microseconds": round(us), "share": round(us / total, 4)}
        for name, calls, us in events[:TOP_OPERATIONS]
    ]


def _row(what: str, tokens: int, seconds: float, flops: int, device: torch.device) -> dict[str, Any]:
    rate, peak = tokens / seconds, peak_flops(device)
    return {
        "what": what,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "utilisation": rate * flops / peak if peak else None,
    }
