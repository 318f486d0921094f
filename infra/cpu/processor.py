"""Names of this machine's processors, and the number formats that they support in hardware."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

WITH_BFLOAT16 = ("AVX512", "SVE")
"""Beginnings of torch's names of the instruction sets for which it has native bfloat16 matrix products.

Measured without them, on AVX2 with torch 2.13: [2048, 384] x [384, 1536] takes 7 times as long as in float32.
"""


def computes_bfloat16() -> bool:
    """Returns whether torch has native bfloat16 matrix products for this CPU."""
    import torch

    return torch.backends.cpu.get_cpu_capability().startswith(WITH_BFLOAT16)


def warn_if_slow(setting: str, dtype: str) -> None:
    """Prints one line to stderr if this CPU only emulates ``dtype``, the value of ``setting``. The dtype
    itself is not changed, because results would then depend on the machine."""
    if dtype == "bfloat16" and not computes_bfloat16():
        print(
            f"warning: {setting}: this processor multiplies bfloat16 several times slower than float32;"
            f" {setting}=float32 is the faster choice here",
            file=sys.stderr,
        )


def cpu_name() -> str:
    """Returns the name of the processor, for example ``AMD EPYC 7763 64-Core Processor``."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Returns the names of the NVIDIA GPUs that the driver reports; torch is not imported."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        names += [line.partition(":")[2].strip() for line in _lines(path) if line.startswith("Model:")]
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
