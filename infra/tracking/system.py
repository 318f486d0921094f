"""Samples of the machine, taken by MLflow's own monitors: processor, memory, disk, network and GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def sampler() -> Callable[[], dict[str, float]]:
    """A function that takes one sample of everything this machine can measure, by MLflow's names."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no GPU, no driver, no library to ask it
            monitors.append(kind())

    def sample() -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found

    return sample
