"""The two kinds of workers in a pass: their class, their number, and the CPUs and GPUs of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra.errors import UserError
from infra.settings.recipe import Recipe
from infra.settings.sections import Teacher
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.cluster.worker_base import Guarded
from offline_teacher.corpus.partition import Part
from offline_teacher.sequences.tokenised_parts import Tokenising


class TextWorker(Guarded):
    """Builds parts of the sequences of one store, one at a time, without torch and without a GPU."""

    def __init__(self, how: Tokenising) -> None:
        self._how = how

    def prepare(self) -> dict[str, Any]:
        """Loads what every part needs, so that a node where this fails is found before it gets a part."""
        return {"vocab_size": self._how.encoder.vocab_size}

    def build_part(self, split: str, number: int, part: Part) -> dict[str, Any]:
        """Publishes one part of the sequences and returns its ``{tokens}``."""
        return {"tokens": self._how.build(split, number, part).tokens}


@dataclass(frozen=True)
class Crew:
    """Workers of one kind. Every worker runs ``prepare()`` before it gets items."""

    kind: type[Guarded]
    arguments: tuple[Any, ...]
    """Arguments of the constructor of ``kind``."""
    count: int | None
    """Largest number of workers; None: one for each CPU of the cluster."""
    least: int
    """Items are handed out only while at least this many workers are ready."""
    cpus: int
    gpus: float = 0.0


def text_crew(how: Tokenising) -> Crew:
    """Workers that tokenise on all CPUs and hold no GPU."""
    return Crew(TextWorker, (how,), count=None, least=1, cpus=1)


def teacher_crew(recipe: Recipe, root: str) -> Crew:
    """Workers that run the teacher, with the resources that ``recipe.teacher`` asks for."""
    settings = recipe.teacher
    assert settings is not None
    return Crew(
        kind=TaskWorker,
        arguments=(recipe, "cuda" if settings.gpus_per_worker else "cpu", root),
        count=settings.workers,
        least=settings.min_workers,
        cpus=settings.cpu_threads,
        gpus=settings.gpus_per_worker,
    )


def refuse_too_few_gpus(settings: Teacher, there: int) -> None:
    """Raises UserError if a local Ray, which cannot grow, has too few GPUs (``there``) for ``min_workers``.

    CPUs are not checked, because the local Ray is started with as many as needed.
    """
    share = settings.gpus_per_worker
    if not share:
        return
    workers = there * int(1 / share + 1e-9)
    if workers < settings.min_workers:
        raise UserError(
            f"teacher.gpus_per_worker: {share:g} for each of teacher.min_workers = {settings.min_workers}"
            f" workers, but Ray finds {there} GPUs on this machine; ask for less, or join a cluster"
            " (teacher.ray_address)"
        )
