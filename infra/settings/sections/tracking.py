"""``tracking``: MLflow."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings.sections.fields import unfingerprinted


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Whether and where runs are recorded with MLflow."""

    enabled: bool = unfingerprinted(True)
    uri: str | None = unfingerprinted(None)
    """MLflow tracking URI. None: ``sqlite:///<output>/mlflow.db``."""
    experiment: str = unfingerprinted("distillation")
    model_name: str | None = unfingerprinted(None)
    """Name in the model registry. None: the recipe's name."""
    system_metrics: bool = unfingerprinted(True)
    """Record the load of processor, memory, disk, network and GPUs."""
