"""Computes the operations per token of each student's training step by a formula; nothing is measured.

A multiply-add counts as 2 operations. The forward pass of a layer takes 8 D^2 + 4 D I + 4 L D operations per
token (four projections, two feed-forward products, attention scores and context), with D hidden size, I
feed-forward size and L length. A backward pass takes twice as many as its forward pass. Norms, activations
and embeddings are not counted.
"""

from __future__ import annotations

from typing import Any

from infra.settings.recipe import Recipe
from offline_teacher.families import family_of
from offline_teacher.models.students import planned_student
from offline_teacher.store.schema import Layout


def step_cost(recipe: Recipe, teacher: Any, layout: Layout) -> dict[str, dict[str, float]]:
    """Returns for each student the operations per token of four parts of a step.

    ``student``: its encoder layers; ``vocabulary``: products with the output embeddings of student and
    teacher; ``replay``: one replayed teacher layer; ``projections``: only its queries, keys and values.
    """
    costs = {}
    for name, run in recipe.runs().items():
        layers, config = planned_student(run.student, teacher)
        needs_logits = bool(run.train.alpha_ce or run.train.alpha_mlm)
        vocabulary = 3 * 2 * config.hidden_size * layout.vocab_size * needs_logits
        exact = bool(run.train.alpha_ce) and run.train.soft_target_kind(layout.hidden_states) == "exact"
        vocabulary += 2 * teacher.hidden_size * layout.vocab_size * exact
        costs[name] = {
            "student": 3 * len(layers) * _layer_forward(config, layout.length),
            "vocabulary": vocabulary,
            "replay": _layer_forward(teacher, layout.length),
            "projections": 6.0 * teacher.hidden_size**2,
        }
    return costs


def _layer_forward(config: Any, length: int) -> float:
    """Returns the operations per token of one layer's forward pass."""
    hidden = config.hidden_size
    feed_forward = getattr(config, family_of(config).own_name("intermediate_size"))
    return float(8 * hidden**2 + 4 * hidden * feed_forward + 4 * length * hidden)
