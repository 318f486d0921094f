"""This machine's processors: their names, and the number formats that they support in hardware."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

WITH_BFLOAT16 = ("AVX512", "SVE")
"""Torch's names of the instruction sets for which its CPU kernels have bfloat16 products of their own.

Measured without: on AVX2, torch 2.13, [2048, 384] x [384, 1536] takes 7 times as long as in float32.
"""


def computes_bfloat16() -> bool:
    """Whether torch has bfloat16 products for this CPU; without them it takes several times as long."""
    import torch

    return torch.backends.cpu.get_cpu_capability().startswith(WITH_BFLOAT16)


def warn_if_slow(setting: str, dtype: str) -> None:
    """Prints one line to stderr if this CPU only emulates ``dtype``. It never chooses another dtype, because
    results would then depend on the machine."""
    if dtype == "bfloat16" and not computes_bfloat16():
        print(
            f"warning: {setting}: this processor multiplies bfloat16 several times slower than float32;"
            f" {setting}=float32 is the faster choice here",
            file=sys.stderr,
        )


def cpu_name() -> str:
    """The processor's own name, for example ``AMD EPYC 7763 64-Core Processor``."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs of which the driver tells; torch is not needed for them."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found += [line.partition(":")[2].strip() for line in _lines(path) if line.startswith("Model:")]
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
