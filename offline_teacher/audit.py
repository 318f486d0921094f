"""``verify``: is a store what it says it is, by its digests, its own hidden states, the live teacher?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

import numpy as np

from infra import storage
from infra.console import progress
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.recipe import Recipe, load_recipe
from offline_teacher.store.deep import deep_check
from offline_teacher.store.manifest import FILE_DIRECTORIES, MANIFEST_NAME, RECIPE_NAME
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.schema import shard_name
from offline_teacher.store.verify import Problem, quarantine, set_aside_damaged, verify

DEEP_POSITIONS = 512
"""Compared in each shard, spread over it: the head costs a quarter of the teacher."""
SHOWN = 20


def audit(
    root: str, deep: bool, rerun: int, repair: bool, recipe_file: str | None, overrides: Sequence[str]
) -> int:
    """Prints every problem of the store; 0 where there is none (or, with ``repair``, none is left)."""
    problems = check(root, deep, rerun, recipe_file, overrides)
    print(_report(root, problems))
    if not problems:
        return 0
    if not repair:
        return EXIT_INCOMPLETE
    recipe = _recipe(root, problems, recipe_file, overrides)
    mend(root, problems, recipe)
    left = check(root, deep, 0, recipe_file, overrides)
    print(_report(root, left))
    return EXIT_INCOMPLETE if left else 0


def check(
    root: str,
    deep: bool = False,
    rerun: int = 0,
    recipe_file: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Problem]:
    """Digests, ranges and ids of every file; where they are right, what ``deep`` and ``rerun`` ask for."""
    if not storage.list_names(root):
        raise UserError(f"{root} is not a store: there is nothing there")
    if recipe_file is not None:
        load_recipe(recipe_file, overrides)  # a mistake in it is said before hours of reading
    with progress(None, "shards", f"verify {root}") as shown:
        problems = verify(root, lambda done, total: shown.advance())
    if problems or not (deep or rerun):
        return problems
    store = open_store(root)
    recipe = _recipe(root, [], recipe_file, overrides)
    if deep:
        head = store.head()
        for shard_id in store.plan.shard_ids():
            shard = store.shard(*shard_id)
            problems += deep_check(shard, head, store.layout, recipe.teacher.dtype, DEEP_POSITIONS)
    if rerun:
        problems += rerun_shards(store, recipe, rerun)
    return problems


def rerun_shards(store: Store, recipe: Recipe, count: int) -> Iterator[Problem]:
    """Up to ``count`` random shards by the live teacher, compared byte for byte, column by column."""
    from offline_teacher.shard_work import ShardWorker

    worker = ShardWorker(recipe, "cuda" if recipe.teacher.gpus_per_worker else "cpu")
    chosen = random.sample(list(store.plan.shard_ids()), min(count, store.plan.total))
    with progress(len(chosen), "shards", "rerun") as shown:
        for replica, index in sorted(chosen):
            made, shard = worker.columns(store.root, replica, index), store.shard(replica, index)
            for name, stored in shard.columns.items():
                same = (stored == made[name]).reshape(len(shard), -1).all(axis=1)
                if not same.all():
                    row = int(np.argmin(same))
                    what = (
                        f"row {row}: the teacher now gives other numbers ({int((~same).sum())} rows differ)"
                    )
                    yield Problem(f"shards/{shard_name(replica, index)}.arrow", what, (replica, index), name)
            shown.advance()


def mend(root: str, problems: Sequence[Problem], recipe: Recipe) -> None:
    """Sets everything damaged aside and makes it again: the corpus and the teacher must be there."""
    from offline_teacher.capture_pass import find_source, run_pass, validation_recipe
    from offline_teacher.cluster import Pool

    validation = root.rstrip("/").endswith("validation_store")
    source = find_source(recipe)  # before anything is moved: without the teacher nothing can be made again
    names = set_aside_damaged(root, problems)
    print(f"{len(names)} files set aside in {quarantine(root)}")
    for name in [*names, *(problem.file for problem in problems)]:
        for other in _made_together(name):
            storage.remove(storage.join(root, *other.split("/")))
    if any(problem.file == MANIFEST_NAME for problem in problems):
        # Nothing else holds the digests of these files: they are made again rather than trusted.
        for directory in FILE_DIRECTORIES:
            storage.remove_tree(storage.join(root, directory))
    with Pool(recipe) as pool:
        run_pass(
            validation_recipe(recipe) if validation else recipe, source, root, pool, validation=validation
        )


def _made_together(name: str) -> list[str]:
    """Files that are only made again with ``name``: the pass would take the rest of them for the whole."""
    part = re.fullmatch(r"(sequences/part-\d+)\..*", name)
    if part:
        return [part[1] + suffix for suffix in (".json", ".arrow", ".counts.arrow")]
    if name.startswith("sequences/"):
        return ["sequences/index.json", "sequences/token_counts.arrow"]
    return []


def _recipe(
    root: str, problems: Sequence[Problem], recipe_file: str | None, overrides: Sequence[str]
) -> Recipe:
    own = storage.join(root, RECIPE_NAME)
    if recipe_file is None and (any(p.file == RECIPE_NAME for p in problems) or not storage.exists(own)):
        raise UserError(
            f"{own} is damaged or missing: give the recipe the store was made of with --recipe FILE"
        )
    return load_recipe(recipe_file or own, overrides)


def _report(root: str, problems: Sequence[Problem]) -> str:
    if not problems:
        return f"{root}: all right"
    lines = [str(problem) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    return "\n".join([*lines, f"{root}: {len(problems)} problems"])
