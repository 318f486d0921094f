"""A whole teacher pass in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.recipe import Recipe
from infra.recipe_file import load_recipe
from offline_teacher.cluster.pool import Pool
from offline_teacher.cluster.task_work import TaskWorker
from offline_teacher.source import find_source, spec_of
from offline_teacher.store.reader import Store, open_store
from offline_teacher.teacher_pass import parts_of, run_pass


class LocalPool(Pool):
    """A worker in this process, instead of Ray's."""

    def __enter__(self) -> LocalPool:
        self.worker = TaskWorker(self.recipe, "cpu")
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, items: Any, done: Any, waiting: Any, quarantine: Any = None) -> list[Any]:
        for item in items:
            done(item, getattr(self.worker, item.method)(*item.arguments))
        return []


def make(recipe: Path | Recipe, *overrides: str) -> Store:
    """The finished store of a recipe, or what was missing of it."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe), list(overrides))
    source, decided = find_source(loaded)
    parts = parts_of(decided)
    with LocalPool(decided) as pool:
        run_pass(decided, source, spec_of(decided, source, parts), parts, pool)
    return open_store(decided.store_path)
