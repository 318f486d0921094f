"""``teacher``: the model that runs once, and its workers."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings.sections.fields import Precision, outcome, require, speed


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher model, and the workers that run it."""

    model: str = speed()
    """Hub name or local directory; its weights, not its name, are fingerprinted."""
    revision: str | None = speed(None)
    dtype: Precision = outcome("bfloat16")
    batch_size: int = outcome(32)
    """Sequences a forward. An outcome field: the blocking of matrix products changes last bits."""
    cpu_threads: int = outcome(1)
    """Torch threads of one worker. The number is fixed, so the teacher's numbers do not depend on
    ``workers``."""
    workers: int = speed(2)
    """At most this many workers."""
    min_workers: int = speed(1)
    """The pass runs only while at least this many workers are available."""
    gpus_per_worker: float = speed(0.0)
    task_attempts: int = speed(3)
    """A task that has failed this many times on healthy workers is quarantined and named; the pass
    continues."""
    ray_address: str | None = speed(None)
    """None: the cluster this process was submitted to, else a local one."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size: must be >= 1, not {self.batch_size}")
        require(self.cpu_threads >= 1, f"cpu_threads: must be >= 1, not {self.cpu_threads}")
        require(
            1 <= self.min_workers <= self.workers,
            f"min_workers: must be 1 to workers = {self.workers}, not {self.min_workers}",
        )
        gpus = self.gpus_per_worker
        require(
            0 <= gpus <= 1,
            f"gpus_per_worker: must be 0 to 1, not {gpus}: a worker uses one GPU; start more workers",
        )
        require(self.task_attempts >= 1, f"task_attempts: must be >= 1, not {self.task_attempts}")
