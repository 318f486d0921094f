"""GPU metrics during training, a profile of some steps, and torch's deterministic mode."""

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
"""Word in the device's name -> the manufacturer's peak of dense 16-bit operations per second."""
FLOAT32_SHARE = 0.5
"""Share of that peak in float32 by TF32. If torch does not use TF32, the reported utilisation is far below
1."""
SKIPPED_STEPS = 10
"""Steps before a profile begins, so that it contains no compilation and no first allocations."""


def gpu_metrics(device: torch.device, flops: float, dtype: str) -> dict[str, float]:
    """Metrics of this rank's GPU; {} if it has none.

    ``gpu_memory``: peak GiB of tensors since the last call. ``gpu_utilisation``: the share of the last
    moments in which a kernel ran, if NVIDIA's library is installed. ``model_flops_utilisation``: ``flops``,
    this rank's FLOP/s of student and loss, as a share of the device's peak, if the device is known.
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


def peak_flops(name: str, dtype: str) -> float | None:
    """Of a device of this name; None where it is not known."""
    words = name.replace("-", " ").split()
    found = next((peak for word, peak in PEAK_FLOPS.items() if word in words), None)
    return found if found is None or dtype != "float32" else found * FLOAT32_SHARE


@contextmanager
def traced(steps: int, path: str) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step; profiles ``steps`` steps and writes a Chrome trace to
    ``path``.

    With ``steps`` 0 it does nothing.
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
    """A context in which, if ``on``, torch uses deterministic algorithms, so that a GPU too repeats every
    bit.

    Raises UserError if torch has no deterministic algorithm for an operation of the student.
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
