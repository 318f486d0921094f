"""``tracking``: MLflow."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings.sections.fields import speed


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Whether and where runs are recorded with MLflow."""

    enabled: bool = speed(True)
    uri: str | None = speed(None)
    """MLflow tracking URI. None: ``sqlite:///<output>/mlflow.db``."""
    experiment: str = speed("distillation")
    model_name: str | None = speed(None)
    """Name in the model registry. None: the recipe's name."""
    system_metrics: bool = speed(True)
    """Record the load of processor, memory, disk, network and GPUs."""
