"""The nested runs of a recipe's tracked run: the teacher pass, every student, the evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.settings.recipe import Recipe

STAGES = ("teacher", "student", "evaluation")
_PASS = ("corpus", "sequences", "masking", "teacher", "store")
"""Sections that are the parameters of a teacher pass."""


@dataclass(frozen=True)
class TrackedRun:
    """One nested run."""

    key: str
    """Its name in MLflow, in ``tracking.json`` and in its journal's."""
    stage: str
    """One of ``STAGES``."""
    student: str | None
    """Name of the student; None for the other stages."""
    params: dict[str, Any]
    """Section -> settings, of the sections that the recipe has."""

    @property
    def tags(self) -> dict[str, str]:
        """``stage``, and ``student`` for one of them."""
        return {"stage": self.stage} | ({} if self.student is None else {"student": self.student})


def tracked_runs(recipe: Recipe) -> list[TrackedRun]:
    """All nested runs, in order. The pass is one of them where the recipe has a corpus.

    The only student of a recipe without ``students`` has the key ``student``, the others ``student-<name>``.
    """
    teacher = TrackedRun("teacher", "teacher", None, _params(recipe, _PASS))
    students = [
        TrackedRun(
            f"student-{name}" if recipe.students else "student",
            "student",
            name,
            _params(run, ("student", "train")),
        )
        for name, run in recipe.runs().items()
    ]
    evaluation = TrackedRun("evaluation", "evaluation", None, _params(recipe, ("evaluation",)))
    return [*([teacher] if recipe.corpus else []), *students, evaluation]


def tracked_run(recipe: Recipe, stage: str, student: str | None = None) -> TrackedRun:
    """The nested run of a stage; ``student``: which one of several, the only one where it is left out."""
    found = [one for one in tracked_runs(recipe) if one.stage == stage and student in (None, one.student)]
    assert len(found) == 1, (stage, student)
    return found[0]


def parent_params(recipe: Recipe) -> dict[str, Any]:
    """Parameters of the recipe's own run: every section but those that each of several students has."""
    runs = tracked_runs(recipe)
    shared = [one for one in runs if one.stage != "student" or not recipe.students]
    params = {name: values for one in shared for name, values in one.params.items()}
    return params | ({"students": list(recipe.students)} if recipe.students else {})


def _params(owner: Any, sections: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(owner, name) for name in sections}
    return {name: dataclasses.asdict(value) for name, value in values.items() if value is not None}
