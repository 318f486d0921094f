"""``teacher``: the teacher model, and the workers that run it."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings.sections.fields import Precision, check_at_least, fingerprinted, require, unfingerprinted


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The teacher model, and the workers that run it."""

    model: str = unfingerprinted()
    """Hub name or local directory. The weights are fingerprinted, not the name."""
    revision: str | None = unfingerprinted(None)
    """Commit, tag or branch of a model on the hub."""
    dtype: Precision = fingerprinted("bfloat16")
    batch_size: int = fingerprinted(32)
    """Sequences per forward. It changes the last bits of the outputs, since it changes the order of sums in
    matrix products."""
    cpu_threads: int = fingerprinted(1)
    """Number of torch threads per worker. It is fixed, so that the outputs do not depend on ``workers``."""
    workers: int = unfingerprinted(2)
    """Largest number of workers."""
    min_workers: int = unfingerprinted(1)
    """The pass runs only while at least this many workers are available."""
    gpus_per_worker: float = unfingerprinted(0.0)
    """GPUs per worker; a fraction lets several workers share a GPU."""
    tasks_in_flight: int = unfingerprinted(2)
    """Number of tasks that a worker holds at once: it computes one while it masks, writes and uploads the
    others. Each needs memory for two shards. A GPU that waits for the disk or the network gains from more:
    on an H200, 8 instead of 2 gave 1.47 times the rate."""
    task_attempts: int = unfingerprinted(3)
    """Number of failures on healthy workers after which a task is quarantined and reported; the pass
    continues."""
    ray_address: str | None = unfingerprinted(None)
    """Address of a Ray cluster. None: the cluster to which this process was submitted, else a local Ray."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "cpu_threads", "tasks_in_flight", "task_attempts")
        least, most, gpus = self.min_workers, self.workers, self.gpus_per_worker
        require(1 <= least <= most, f"min_workers: must be 1 to workers = {most}, not {least}")
        reason = "a worker uses one GPU; start more workers"
        require(0 <= gpus <= 1, f"gpus_per_worker: must be 0 to 1, not {gpus}: {reason}")
