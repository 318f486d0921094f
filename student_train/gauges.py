"""What a GPU says of itself in training, a trace of some steps, and steps that repeat to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from infra.errors import UserError

PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Dense products a second in 16 bits that the maker gives for devices of which this is a word of the name."""
FLOAT32_SHARE = 0.5
"""Of them in float32, by TF32, where torch uses it; else the utilisation that is told is far below 1."""
SKIPPED_STEPS = 10
"""Before a trace begins: compilation and first allocations are no part of it."""


def gpu_metrics(
    device: torch.device, flops_per_token: float, tokens_per_second: float, dtype: str
) -> dict[str, float]:
    """Of this rank's device; {} where it is no GPU.

    ``gpu_memory``: the most GiB that tensors took since the last call. ``gpu_utilisation``: the share of the
    last moments in which any kernel ran, where NVIDIA's library is there. ``model_flops_utilisation``: the
    share of what the device could compute that student and loss need, where its name is known. The numbers
    that are given are of one rank.
    """
    if device.type != "cuda":
        return {}
    metrics = {"gpu_memory": torch.cuda.max_memory_allocated(device) / 2**30}
    torch.cuda.reset_peak_memory_stats(device)
    with suppress(Exception):  # pynvml is no dependency, and drivers refuse in ways of their own
        metrics["gpu_utilisation"] = torch.cuda.utilization(device) / 100
    peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    if peak is not None:
        metrics["model_flops_utilisation"] = flops_per_token * tokens_per_second / peak
    return metrics


def peak_flops(name: str, dtype: str) -> float | None:
    """Of a device of this name; None where it is not known."""
    words = name.replace("-", " ").split()
    found = next((peak for word, peak in PEAK_FLOPS.items() if word in words), None)
    return found if found is None or dtype != "float32" else found * FLOAT32_SHARE


@contextmanager
def traced(steps: int, path: str) -> Iterator[Callable[[], None]]:
    """Call what it gives after every step: ``steps`` of them are written to ``path`` as a Chrome trace.

    ``steps`` 0: nothing is done.
    """
    if not steps:
        yield lambda: None
        return
    plan = torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(path)

    with torch.profiler.profile(schedule=plan, on_trace_ready=write) as profile:
        yield profile.step


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Inside, torch computes the same bits from the same numbers, on a GPU too, where ``on``.

    Raises UserError where torch has no such algorithm for something that a student needs.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's products are first used
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"train.deterministic: {reason}; set it to false") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
