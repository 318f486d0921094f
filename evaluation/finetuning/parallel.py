"""Runs jobs one after the other, or in parallel as Ray tasks. No other module of `evaluation` imports Ray."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from evaluation.finetuning.finetune import run, schedule
from evaluation.finetuning.jobs import Job, JobWithData
from evaluation.tasks.task import Split
from infra import console
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.ray_cluster import connect

PACKAGES = ("evaluation", "offline_teacher", "infra")
"""The packages of this repository that a worker imports."""
REPEATS = 2
"""Number of times that a run is repeated after its worker died."""

Result = dict[str, Any]


def run_all(jobs: list[JobWithData], workers: int, done: Callable[[Job, Result], None]) -> None:
    """Runs every job; calls ``done`` with each job and the content of its score file.

    Raises the first UserError at once; no further job is started.
    """
    if workers == 1 or len(jobs) < 2:
        _in_process(jobs, done)
    else:
        _on_ray(jobs, workers, done)


def _in_process(jobs: list[JobWithData], done: Callable[[Job, Result], None]) -> None:
    for number, (job, splits) in enumerate(jobs, start=1):
        title = f"{' '.join(job.names)} ({number}/{len(jobs)})"
        with console.progress(_training_rows(job, splits), "rows", title) as bar:
            result = run(job, splits, bar.advance)
        done(job, result)


def _training_rows(job: Job, splits: dict[str, Split]) -> int:
    """Returns the number of training rows over all epochs, the length of the progress bar.

    It is 1 for a job without training. SQuAD's questions count as one row each, although a question may give
    several rows.
    """
    if "train" not in splits:
        return 1
    rows, planned = len(splits["train"]), schedule(job)
    return min(round(rows * planned.epochs), planned.steps(rows) * planned.batch_size)


def _on_ray(jobs: list[JobWithData], workers: int, done: Callable[[Job, Result], None]) -> None:
    import ray
    from ray.exceptions import RayError, RayTaskError

    started_here = not ray.is_initialized()
    if started_here:  # joins RAY_ADDRESS or this user's head on this machine, else starts a local Ray
        connect(None, "RAY_ADDRESS", PACKAGES, num_cpus=workers)
    try:
        gpus = gpu_share(workers, int(ray.cluster_resources().get("GPU", 0)))
        threads = max(1, (os.cpu_count() or 1) // workers)
        remote_run = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=REPEATS)(_run_with_threads)
        # one copy of the data per benchmark task, not per job
        shared = {id(splits): ray.put(splits) for _, splits in jobs}
        waiting: Iterator[JobWithData] = iter(jobs)  # so that the inner loop continues where it stopped
        running: dict[Any, Job] = {}
        with console.progress(len(jobs), "runs", "fine-tuning") as bar:
            while True:
                for job, splits in waiting:
                    running[remote_run.remote(job, shared[id(splits)], threads)] = job
                    if len(running) == workers:
                        break
                if not running:
                    return
                (reference,), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    title, kind = " ".join(job.names), type(error).__name__
                    raise UserError(
                        f"{title}: its worker died {REPEATS + 1} times ({kind}), perhaps"
                        " for lack of memory; lower evaluation.workers, or run the same command again",
                        EXIT_INCOMPLETE,
                    ) from None
                bar.advance(1)
                bar.note(f"{job.candidate.name} {job.task_name}")
                done(job, result)
    finally:
        if started_here:
            ray.shutdown()


def gpu_share(workers: int, gpus: int) -> float:
    """Returns the share of a GPU for each run: the largest share at which all workers fit on the
    GPUs at once.

    Ray sets CUDA_VISIBLE_DEVICES of a run to the GPU that it chose.
    """
    return 1 / math.ceil(workers / gpus) if gpus else 0.0


def _run_with_threads(job: Job, splits: dict[str, Split], threads: int) -> Result:
    torch.set_num_threads(threads)
    return run(job, splits)
