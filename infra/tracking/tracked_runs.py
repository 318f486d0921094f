"""The nested runs of a recipe's tracked run: the teacher pass, every student, the evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.settings.recipe import Recipe

_TEACHER_SECTIONS = ("corpus", "sequences", "masking", "teacher", "store")
"""Sections of a recipe that are logged as parameters of the teacher pass."""


@dataclass(frozen=True)
class TrackedRun:
    """A nested run of a recipe."""

    key: str
    """Name of the run in MLflow, in ``tracking.json`` and in the name of its journal."""
    stage: str
    """teacher, student or evaluation."""
    student: str | None
    """Name of the student; None for the other stages."""
    params: dict[str, Any]
    """Section of the recipe -> its settings, for the sections that the run depends on."""

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags: ``stage``, and ``student`` if the run is of a student."""
        return {"stage": self.stage} | ({} if self.student is None else {"student": self.student})


def tracked_runs(recipe: Recipe) -> list[TrackedRun]:
    """Returns all nested runs in the order of the stages; the teacher pass only if the recipe has a corpus. A
    student of ``students`` has the key ``student-<name>``; the student of a recipe without ``students`` has
    the key ``student``."""
    teacher = TrackedRun("teacher", "teacher", None, _params(recipe, _TEACHER_SECTIONS))
    students = []
    for name, run in recipe.runs().items():
        key = f"student-{name}" if recipe.students else "student"
        students.append(TrackedRun(key, "student", name, _params(run, ("student", "train"))))
    evaluation = TrackedRun("evaluation", "evaluation", None, _params(recipe, ("evaluation",)))
    return [*([teacher] if recipe.corpus else []), *students, evaluation]


def tracked_run(recipe: Recipe, stage: str, student: str | None = None) -> TrackedRun:
    """Returns the nested run of a stage; ``student`` is required if the recipe has several students."""
    matching = [run for run in tracked_runs(recipe) if run.stage == stage and student in (None, run.student)]
    assert len(matching) == 1, (stage, student)
    return matching[0]


def parent_params(recipe: Recipe) -> dict[str, Any]:
    """Returns the parameters of the parent run: all sections, but of several students only their names."""
    runs = tracked_runs(recipe)
    shared = [run for run in runs if run.stage != "student" or not recipe.students]
    params = {name: values for run in shared for name, values in run.params.items()}
    return params | ({"students": list(recipe.students)} if recipe.students else {})


def _params(owner: Any, sections: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(owner, name) for name in sections}
    return {name: dataclasses.asdict(value) for name, value in values.items() if value is not None}
