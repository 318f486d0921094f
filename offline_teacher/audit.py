"""``verify``: is a store what it says it is, by its digests, its own hidden states, the live teacher?"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from infra import storage
from infra.console import progress
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.recipe import Recipe, load_recipe
from offline_teacher import corpus
from offline_teacher.sequences import read_index, refuse_other_text
from offline_teacher.store.deep import ROUNDOFF, deep_check, recorded_count
from offline_teacher.store.manifest import DECLARATION_NAME, MANIFEST_NAME, RECIPE_NAME, SHARDS, Declaration
from offline_teacher.store.reader import Store, open_store
from offline_teacher.store.schema import shard_name
from offline_teacher.store.verify import Problem, declared, quarantine, set_aside_damaged, verify
from offline_teacher.store.writer import sidecars, store_files, unexpected

if TYPE_CHECKING:
    from offline_teacher.capture_pass import Source

SEQUENCE_FILE = re.compile(
    r"sequences/(part-\d+\.(arrow|json|counts\.arrow)|index\.json|token_counts\.arrow)"
)
SHARD_FILE = re.compile(r"r\d{3,}-\d{8,}\.(arrow|json)")

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
    recipe = _recipe(root, problems, recipe_file, overrides)
    mend(root, problems, recipe)
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
    shards = storage.list_names(storage.join(root, SHARDS)) if SHARDS in names else []
    if not any(SHARD_FILE.fullmatch(name) for name in shards):
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
    from offline_teacher.capture_pass import find_source
    from offline_teacher.shard_work import ShardWorker

    recipe, _ = _as_made(store.root, recipe)
    _refuse_other(recipe, find_source(recipe), store.root, store.manifest.declaration)
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


def mend(root: str, problems: Sequence[Problem], recipe: Recipe) -> None:
    """Sets everything damaged aside and makes it again, by the teacher and, unless the sequences are known to
    be right, from the text. Where that cannot be done nothing is moved."""
    from offline_teacher.capture_pass import find_source, run_pass
    from offline_teacher.cluster import Pool

    recipe, validation = _as_made(root, recipe)
    source, begun = find_source(recipe), declared(root)
    if begun is not None:
        _refuse_other(recipe, source, root, begun)
    else:
        _refuse_other_shards(recipe, source, root)
    files = {problem.file for problem in problems}
    listed = MANIFEST_NAME not in files
    text = not listed or any(SEQUENCE_FILE.fullmatch(name) for name in files)
    if text:
        parts = corpus.parts(recipe.corpus, recipe.sequences.part_bytes, validation)
        if listed and not any(name.startswith(("tokenizer/", "sequences/index")) for name in files):
            refuse_other_text(root, parts, recipe.corpus, recipe.sequences)
    if not listed:  # nothing but their makers can tell whether these files are right
        problems = [*problems, *_unlisted(root, source)]
    with storage.exclusive(root):
        names = set_aside_damaged(root, problems)
        for name in [*names, *(problem.file for problem in problems)]:
            for other in _made_together(name):
                storage.remove(storage.join(root, *other.split("/")))
    print(f"{len(names)} {'file' if len(names) == 1 else 'files'} set aside in {quarantine(root)}")
    with Pool(recipe) as pool:
        run_pass(recipe, source, root, pool, validation=validation, text=text)


def _as_made(root: str, recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe as the pass takes it for this store, and whether the store is of the held-out text."""
    from offline_teacher.capture_pass import validation_recipe

    validation = root.rstrip("/").rpartition("/")[2] == "validation_store"
    return (validation_recipe(recipe) if validation else recipe), validation


def _refuse_other(recipe: Recipe, source: Source, root: str, begun: Declaration) -> None:
    from offline_teacher.capture_pass import changes

    changed = changes(recipe, source, begun)
    if changed:
        raise UserError(
            f"{root} was made differently ({'; '.join(changed)}): give the recipe it was made of (--recipe)"
        )


def _refuse_other_shards(recipe: Recipe, source: Source, root: str) -> None:
    """As ``_refuse_other``, where neither manifest nor declaration tells: by what the shards say."""
    from offline_teacher.capture_pass import declare

    try:
        if read_index(root) is None:
            return
    except UserError:
        return
    found = sidecars(root, declare(recipe, source, root))
    there = any(SHARD_FILE.fullmatch(name) for name in storage.list_names(storage.join(root, SHARDS)))
    if there and not any(found.values()):
        raise UserError(
            f"{root}: none of its shards is of this recipe: give the one it was made of (--recipe)"
        )


def _unlisted(root: str, source: Source) -> list[Problem]:
    """What is not as it was made, of the files that a manifest would list."""
    from offline_teacher.capture_pass import made_files

    found = [name for name in store_files(root) if name != DECLARATION_NAME]
    try:
        expected = made_files(root, source)
    except UserError:  # the sequences' own index or a sidecar: all of them are made again
        return [Problem(name, "is not accounted for") for name in found if name.startswith("sequences/")]
    digests = {name: storage.digest_file(storage.join(root, *name.split("/"))) for name in found}
    return [Problem(name, what) for name, what in unexpected(digests, expected) if name in found]


def _made_together(name: str) -> list[str]:
    """Files that are only made again with ``name``: the pass would take the rest of them for the whole."""
    part = re.fullmatch(r"(sequences/part-\d+)\..*", name)
    if part:
        return [part[1] + suffix for suffix in (".json", ".arrow", ".counts.arrow")]
    if SEQUENCE_FILE.fullmatch(name):
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
    return "\n".join([*lines, f"{root}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'}"])
