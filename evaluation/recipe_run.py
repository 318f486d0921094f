"""Evaluates a recipe: collects the report's rows, makes the report, and checks ``evaluation.require``."""

from __future__ import annotations

import contextlib

from evaluation.candidates.recipe_rows import TEACHER, rows_of
from evaluation.evaluate import evaluate
from evaluation.finetuning.scores import prepare
from evaluation.report import gates, tables
from infra.errors import EXIT_INCOMPLETE, EXIT_UNMET, UserError
from infra.files import storage
from infra.settings.recipe import Recipe


def run_recipe(recipe: Recipe, predict_test: bool = False) -> int:
    """Evaluates the recipe's teacher and students, writes ``evaluation/``, and repeats no finished work.

    Returns the exit code: EXIT_INCOMPLETE if a student is not trained yet and so not in the report, else 0.
    Raises UserError with EXIT_UNMET if a student does not meet ``evaluation.require``.
    """
    with contextlib.ExitStack() as stack:
        rows = rows_of(recipe, stack)
        plan = prepare(
            rows.candidates,
            recipe.evaluation,
            storage.join(recipe.evaluation_dir, "scores"),
            keep_models=(TEACHER, *rows.students),
            predict_test=predict_test,
        )
        content = evaluate(recipe, rows, plan, list(rows.students) if predict_test else ())
    print(tables.summary_table(content))
    for note in content["notes"]:
        print(f"note: {note}")
    print(storage.join(recipe.evaluation_dir, "report.html"))
    missed = gates.unmet(content, recipe.evaluation.require) if recipe.evaluation.require else []
    if missed:
        raise UserError(f"evaluation.require: {'; '.join(missed)}", EXIT_UNMET)
    return EXIT_INCOMPLETE if rows.untrained else 0
