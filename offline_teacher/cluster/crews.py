"""The two kinds of workers of a pass: what they are, how many, and what each takes of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra.settings.recipe import Recipe
from offline_teacher.cluster.guarded import Guarded
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.cluster.text_work import TextWorker


@dataclass(frozen=True)
class Crew:
    """Workers of one kind."""

    kind: type[Guarded]
    arguments: tuple[Any, ...]
    """Of its constructor."""
    prepare: tuple[Any, ...]
    """Of its first call, ``prepare``: only then is it given items."""
    count: int | None
    """At most; None: as many as the cluster has CPUs."""
    least: int
    """Items are handed out while so many are ready."""
    cpus: int
    gpus: float = 0.0


def text_crew(recipe: Recipe, root: str) -> Crew:
    """Tokenise on all CPUs, and hold no GPU. ``recipe``: with ``masking.probability`` decided."""
    return Crew(TextWorker, (recipe,), (root,), count=None, least=1, cpus=1)


def teacher_crew(recipe: Recipe, root: str) -> Crew:
    """Hold the teacher, as ``recipe.teacher`` says."""
    settings = recipe.teacher
    assert settings is not None
    return Crew(
        kind=TaskWorker,
        arguments=(recipe, "cuda" if settings.gpus_per_worker else "cpu"),
        prepare=(root,),
        count=settings.workers,
        least=settings.min_workers,
        cpus=settings.cpu_threads,
        gpus=settings.gpus_per_worker,
    )
