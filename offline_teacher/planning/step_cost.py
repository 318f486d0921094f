"""What a training step of each student computes, in multiply-adds a token; arithmetic, nothing is measured.

With D hidden, I feed-forward, L length, V vocabulary and 2 operations a multiply-add, a layer's forward is
8 D^2 + 4 D I + 4 L D operations a token: four projections, two feed-forward products, scores and context.
A backward costs twice its forward. Norms, activations and embeddings are left out.
"""

from __future__ import annotations

from typing import Any

from infra.settings.recipe import Recipe, StudentRun
from offline_teacher.families import family_of
from offline_teacher.models.students import planned_student
from offline_teacher.store.schema import Layout


def step_cost(recipe: Recipe, teacher: Any, layout: Layout) -> dict[str, dict[str, float]]:
    """Student -> operations a token of its own step (``student``), of the product with the vocabulary
    (``vocabulary``), of replaying one whole layer (``replay``) and of its Q, K, V alone (``projections``).
    """
    return {name: _cost(run, teacher, layout) for name, run in recipe.runs().items()}


def _cost(run: StudentRun, teacher: Any, layout: Layout) -> dict[str, float]:
    layers, config = planned_student(run.student, teacher)
    own = 3 * len(layers) * _layer(config, layout.length)
    looks = bool(run.train.alpha_ce or run.train.alpha_mlm)
    vocabulary = 3 * 2 * config.hidden_size * layout.vocab_size * looks
    exact = bool(run.train.alpha_ce) and run.train.soft_target_kind(layout.hidden_states) == "exact"
    vocabulary += 2 * teacher.hidden_size * layout.vocab_size * exact
    whole, projections = _layer(teacher, layout.length), 6.0 * teacher.hidden_size**2
    return {
        "student": own,
        "vocabulary": vocabulary,
        "replay": whole,
        "projections": projections,
    }


def _layer(config: Any, length: int) -> float:
    """Operations a token of one layer's forward."""
    width = config.hidden_size
    wide = getattr(config, family_of(config).own_name("intermediate_size"))
    return float(8 * width**2 + 4 * width * wide + 4 * length * width)
