"""The two crews of a pass (text workers, teacher workers): class, number, environment, CPUs and GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra.errors import NodeError, UserError
from infra.settings.recipe import Recipe
from infra.settings.sections import Teacher
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.cluster.worker_base import WorkerBase
from offline_teacher.corpus.partition import Part
from offline_teacher.sequences.tokenised_parts import Tokenising

WORKER_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    # By default oneDNN keeps compiled kernels of 1,024 shapes. The number of masked positions differs between
    # batches, so most kernels are never used again; a worker grew by 100 MB in its first hundreds of tasks.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    # With these settings glibc keeps freed memory for the next forward pass. By default it returns freed
    # activations to the system and gets them back at the next layer, which made a pass 3 to 15 % slower.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest value that glibc allows
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
"""Environment variables of every worker."""


class TextWorker(WorkerBase):
    """Builds parts of the sequences of one store, one at a time, without torch and without a GPU."""

    def __init__(self, how: Tokenising) -> None:
        self._how = how

    def prepare(self) -> dict[str, Any]:
        """Loads what every part needs, so that a node where this fails is found before it gets a part. Raises
        NodeError then: the driver has written the same files, so the cause is this node."""
        try:
            return {"vocab_size": self._how.encoder.vocab_size}
        except UserError as error:
            raise NodeError(str(error)) from error

    def build_part(self, split: str, number: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences and returns its ``{tokens}``."""
        return {"tokens": self._how.build(split, number, part).tokens}


@dataclass(frozen=True)
class Crew:
    """Workers of one class, each with ``cpus`` and ``gpus``; each runs ``prepare()`` before it gets items."""

    kind: type[WorkerBase]
    arguments: tuple[Any, ...]
    """Arguments of the constructor of ``kind``."""
    count: int | None
    """Largest number of workers; None for one per CPU of the cluster."""
    min_ready: int
    """Number of workers that must be ready before items are assigned."""
    cpus: int
    gpus: float = 0.0
    """Several workers share a GPU if it is below 1."""
    in_flight: int = 2
    """Number of items that a worker holds at once."""


def text_crew(how: Tokenising) -> Crew:
    """Returns the crew that tokenises on all CPUs without GPUs."""
    return Crew(TextWorker, (how,), count=None, min_ready=1, cpus=1)


def teacher_crew(recipe: Recipe, root: str) -> Crew:
    """Returns the crew that runs the teacher, with the resources in ``recipe.teacher``."""
    settings = recipe.teacher
    assert settings is not None
    return Crew(
        kind=TaskWorker,
        arguments=(recipe, "cuda" if settings.gpus_per_worker else "cpu", root),
        count=settings.workers,
        min_ready=settings.min_workers,
        cpus=settings.cpu_threads,
        gpus=settings.gpus_per_worker,
        in_flight=settings.tasks_in_flight,
    )


def refuse_too_few_gpus(settings: Teacher, available: int) -> None:
    """Raises UserError if the ``available`` GPUs of a local Ray are too few for ``min_workers``. CPUs are not
    checked, because a local Ray is started with as many as needed."""
    share = settings.gpus_per_worker
    if share and available * int(1 / share + 1e-9) < settings.min_workers:
        raise UserError(
            f"teacher.gpus_per_worker: {share:g} for each of teacher.min_workers = {settings.min_workers}"
            f" workers, but Ray finds {available} GPUs on this machine; lower one of the two, or join a"
            " cluster (teacher.ray_address)"
        )
