"""``verify``: is a store what it says it is, by its digests, its own hidden states, the live teacher?"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import numpy as np

from infra import storage
from infra.console import progress
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.recipe import Recipe, load_recipe
from offline_teacher.store.deep import ROUNDOFF, deep_check, recorded_count
from offline_teacher.store.manifest import DECLARATION_NAME, MANIFEST_NAME, RECIPE_NAME
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.schema import shard_name
from offline_teacher.store.verify import Problem, verify
from offline_teacher.store.writer import has_shards

SHOWN = 20


def audit(
    root: str, deep: int, rerun: int, repair: bool, recipe_file: str | None, overrides: Sequence[str]
) -> int:
    """Prints every problem of the store; 0 where there is none (or, with ``repair``, none is left)."""
    root = root if storage.is_remote(root) else os.path.abspath(root)
    problems = check(root, deep, rerun, recipe_file, overrides)
    print(_report(root, problems))
    if not problems:
        return 0
    if not repair:
        return EXIT_INCOMPLETE
    from offline_teacher.repair import mend

    mend(root, problems, _recipe(root, problems, recipe_file, overrides))
    left = check(root, deep, 0, recipe_file, overrides)
    print(_report(root, left))
    return EXIT_INCOMPLETE if left else 0


def check(
    root: str,
    deep: int = 0,
    rerun: int = 0,
    recipe_file: str | None = None,
    overrides: Sequence[str] = (),
) -> list[Problem]:
    """Digests, ranges and ids of every file; where they are right, what ``deep`` and ``rerun`` ask for:
    so many positions of each shard, so many shards.
    """
    _refuse_what_is_no_store(root)
    if recipe_file is not None:
        load_recipe(recipe_file, overrides)  # a mistake in it is said before hours of reading
    with progress(None, "shards", f"verify {root}") as shown:
        problems = verify(root, lambda done, total: shown.advance())
    if problems or not (deep or rerun):
        return problems
    store = open_store(root)
    if deep:
        problems += _compare_with_head(store, deep)
    if rerun:
        problems += rerun_shards(store, _recipe(root, [], recipe_file, overrides), rerun)
    return problems


def _refuse_what_is_no_store(root: str) -> None:
    names = storage.list_names(root)
    if not names:
        raise UserError(f"{root} is not a store: there is nothing there")
    if MANIFEST_NAME in names or DECLARATION_NAME in names:
        return
    if not has_shards(root):
        raise UserError(f"{root} is not a store: it has no {MANIFEST_NAME}, no {DECLARATION_NAME}, no shard")


def _compare_with_head(store: Store, positions: int) -> list[Problem]:
    """Stored top-k and logsumexp against the stored hidden states through the stored head."""
    layout = store.layout
    if layout.top_k == 0 or layout.hidden_states == "none":
        print("deep: nothing to compare, the store does not hold both top-k and hidden states")
        return []
    head, problems = store.head(), []
    dtype = _teacher_dtype(store)
    compared = recorded = 0
    with progress(store.plan.total, "shards", "deep") as shown:
        for shard_id in store.plan.shard_ids():
            shard = store.shard(*shard_id)
            count = recorded_count(shard, layout)
            compared, recorded = compared + min(count, positions), recorded + count
            problems += deep_check(shard, head, layout, dtype, positions)
            shown.advance()
    print(f"deep: {compared:,} of {recorded:,} recorded positions compared")
    return problems


def _teacher_dtype(store: Store) -> str:
    """How exact the stored numbers can be; another writer's fingerprint may not tell."""
    try:
        dtype = store.manifest.declaration.fingerprint["recipe"]["teacher"]["dtype"]
    except (KeyError, TypeError):
        dtype = None
    if dtype not in ROUNDOFF:
        raise UserError(f"{store.root}: --deep needs recipe.teacher.dtype in the store's fingerprint")
    return str(dtype)


def rerun_shards(store: Store, recipe: Recipe, count: int) -> Iterator[Problem]:
    """Up to ``count`` random shards by the live teacher, compared byte for byte, column by column."""
    from offline_teacher.shard_work import ShardWorker
    from offline_teacher.source import as_made, find_source, refuse_other

    recipe, _ = as_made(store.root, recipe)
    refuse_other(recipe, find_source(recipe), store.root, store.manifest.declaration)
    worker = ShardWorker(recipe, _device(recipe))
    chosen = random.sample(list(store.plan.shard_ids()), min(count, store.plan.total))
    with progress(len(chosen), "shards", "rerun") as shown:
        for replica, index in sorted(chosen):
            made, shard = worker.columns(store.root, replica, index), store.shard(replica, index)
            for name, stored in shard.columns.items():
                same = (_bytes_by_row(stored) == _bytes_by_row(made[name])).all(axis=1)
                if not same.all():
                    row = int(np.argmin(same))
                    what = (
                        f"row {row}: the teacher now gives other numbers ({int((~same).sum())} rows differ)"
                    )
                    yield Problem(f"shards/{shard_name(replica, index)}.arrow", what, (replica, index), name)
            shown.advance()


def _device(recipe: Recipe) -> str:
    import torch

    if not recipe.teacher.gpus_per_worker:
        return "cpu"
    if not torch.cuda.is_available():
        raise UserError(
            "teacher.gpus_per_worker: there is no GPU here; set it to 0 where the store was made on a CPU"
        )
    return "cuda"


def _bytes_by_row(column: np.ndarray) -> np.ndarray:
    """uint8 [n, ...]: -0 and 0 are not the same, a NaN is itself."""
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)


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
    return "\n".join([*lines, f"{root}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"])
