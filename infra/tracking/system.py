"""Measures the load of the machine with MLflow's monitors: processor, memory, disk, network and GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable


def sampler() -> Callable[[], dict[str, float]]:
    """Returns a function that measures everything this machine supports: MLflow's metric name -> value."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no GPU, no driver, or no library for it
            monitors.append(kind())

    def sample() -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values

    return sample
