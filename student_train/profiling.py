"""GPU metrics of a training run, and a profile of some of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch

PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
"""Peak FLOP/s of dense 16-bit matrix products, from the manufacturer, by a word of the GPU's name."""
TF32_SHARE = 0.5
"""Peak of TF32 as a share of the 16-bit peak. Without TF32 the reported utilisation stays far below 1."""
SKIPPED_STEPS = 10
"""Number of steps before the profiled ones: compilation and the first allocations stay out of the profile."""


def gpu_metrics(device: torch.device, flops: float, dtype: str) -> dict[str, float]:
    """Returns metrics of this rank's GPU; {} on a CPU.

    ``gpu_memory``: peak GiB of tensors since the last call. ``gpu_utilisation``: share of the last second or
    so in which a kernel ran; only if pynvml is installed. ``model_flops_utilisation``: ``flops`` as a share
    of the GPU's peak in ``dtype``; only if `PEAK_FLOPS` lists the GPU.

    ``flops``: FLOP/s that this rank spends on the student and its loss.
    """
    if device.type != "cuda":
        return {}
    metrics = {"gpu_memory": torch.cuda.max_memory_allocated(device) / 2**30}
    torch.cuda.reset_peak_memory_stats(device)
    with suppress(Exception):  # pynvml is optional, and drivers raise many kinds of errors
        metrics["gpu_utilisation"] = torch.cuda.utilization(device) / 100
    peak = peak_flops(torch.cuda.get_device_name(device), dtype)
    if peak is not None:
        metrics["model_flops_utilisation"] = flops / peak
    return metrics


def peak_flops(gpu_name: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s in ``dtype`` of a GPU with this name; None if `PEAK_FLOPS` does not list it."""
    words = gpu_name.replace("-", " ").split()
    peak16 = next((peak for word, peak in PEAK_FLOPS.items() if word in words), None)
    return peak16 * TF32_SHARE if peak16 is not None and dtype == "float32" else peak16


@contextmanager
def profiled(steps: int, path: str) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every training step. After `SKIPPED_STEPS` steps, ``steps`` steps are
    profiled and written to ``path`` as a Chrome trace. If ``steps`` is 0, nothing is profiled."""
    if not steps:
        yield lambda: None
        return
    schedule = torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1)
    write = partial(torch.profiler.profile.export_chrome_trace, path=path)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
