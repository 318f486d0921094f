"""A whole teacher pass in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe
from offline_teacher.cluster.crews import Crew
from offline_teacher.cluster.pool import Cluster
from offline_teacher.cluster.work_queue import Item
from offline_teacher.inputs.source import find_source, spec_of
from offline_teacher.running.teacher_pass import parts_of, run_pass
from offline_teacher.store.store import Store, open_store


class LocalPool:
    """A worker in this process, instead of Ray's."""

    retries = 0

    def __init__(self, crew: Crew, started: Any = None) -> None:
        self.crew, self._started = crew, started
        self._worker: Any = None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def worker(self) -> Any:
        """Ready for items."""
        if self._worker is None:
            self._worker = self.crew.kind(*self.crew.arguments)
            facts = self._worker.prepare()
            if self._started is not None:
                self._started("this process", facts)
        return self._worker

    def run(self, items: Any, done: Any, say: Any, quarantine: Any = None) -> list[Item]:
        for item in items:
            result = getattr(self.worker, item.method)(*item.arguments)
            done(item, {**result, "place": "this process"})
        return []


class LocalCluster(Cluster):
    """Of one worker of each kind, in this process."""

    def pool(self, crew: Crew, started: Any = None) -> Any:
        return LocalPool(crew, started)


def make(recipe: Path | Recipe, *overrides: str) -> Store:
    """The finished store of a recipe, or what was missing of it."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe), list(overrides))
    source, decided = find_source(loaded)
    parts = parts_of(decided)
    with LocalCluster(decided) as cluster:
        run_pass(decided, source, spec_of(decided, source, parts), parts, cluster)
    return open_store(decided.store_path)
