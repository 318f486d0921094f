"""What a finished pass leaves beside its stores, so that the same command again is answered at once.

``pass.json`` holds digests of two lists: what went in (settings, corpus, teacher) and what came out (the
files of the stores). As in make, a local file is taken for unchanged where its size and the time of its last
change are. Where anything differs, the pass itself looks closely. Imports no torch, Ray, MLflow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from infra import storage
from infra.errors import UserError
from infra.locks import exclusive
from infra.recipe import Recipe
from offline_teacher.corpus import Part, parts
from offline_teacher.store.manifest import RECIPE_NAME, RECIPE_SIDECAR_NAME, Manifest
from offline_teacher.store.schema import FORMAT_VERSION
from offline_teacher.store.writer import seal_recipe
from offline_teacher.teacher_directory import HUB_FILES, VOCABULARY_FILES, find_teacher
from offline_teacher.work_queue import Item

NAME = "pass.json"
SECTIONS = ("corpus", "sequences", "masking", "teacher", "store")
APART = (f"/{storage.LOCK}", f"/{RECIPE_NAME}", f"/{RECIPE_SIDECAR_NAME}")
"""Files of a store that may be others in an equal one."""


@dataclass(frozen=True)
class Outcome:
    """What a pass did. ``manifest`` is None if the pass gave up on a shard."""

    root: str
    samples: int
    tokens: int
    """Of all replicas, special tokens included."""
    bytes_per_token: float
    """Of the shard files, over the tokens they hold."""
    new_shards: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    """Spent on shards, from the first worker's start."""
    retries: int = 0
    aside: list[Item] = dataclasses.field(default_factory=list)
    manifest: Manifest | None = None


def has_validation(recipe: Recipe) -> bool:
    return bool(recipe.corpus.validation_path or recipe.corpus.validation_split)


def all_parts(recipe: Recipe) -> list[Part]:
    """Of the text, then of the held-out text, where the recipe names any; UserError as for ``parts``."""
    found = parts(recipe.corpus, recipe.sequences.part_bytes)
    if has_validation(recipe):
        found += parts(recipe.corpus, recipe.sequences.part_bytes, validation=True)
    return found


def inputs_digest(recipe: Recipe) -> str:
    """Of all that decides what a pass makes; of a data set of the hub, its name.

    UserError where the teacher or the text is not there.
    """
    teacher, corpus = find_teacher(recipe.teacher), recipe.corpus
    spans = [] if corpus.source == "hub" else [span for part in all_parts(recipe) for span in part.spans]
    local = {span.path for span in spans if not storage.is_remote(span.path)}
    names = [
        name
        for name in storage.list_names(teacher)
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*HUB_FILES, *VOCABULARY_FILES))
    ]
    return _digest(
        [
            recipe.outcome(*SECTIONS),
            dataclasses.asdict(corpus),
            dataclasses.asdict(recipe.tracking),
            [FORMAT_VERSION, version("transformers"), version("tokenizers")],  # these make ids of text
            [[name, *_stamp(storage.join(teacher, name))] for name in names],
            [dataclasses.astuple(span) for span in spans],
            [[path, *_stamp(path)] for path in sorted(local)],
        ]
    )


def finished(recipe: Recipe, inputs: str) -> list[Outcome] | None:
    """The outcomes of an earlier pass over the same ``inputs`` whose stores are untouched; else None.

    The recipe kept in the stores becomes this one. UserError where another process is at work on them.
    """
    path = storage.join(recipe.root, NAME)
    if storage.is_remote(recipe.root) or not storage.exists(path) or _unsent(recipe):
        return None
    roots, whole = _roots(recipe), False
    try:
        record = storage.read_json(path)
        outcomes = [Outcome(**entry) for entry in record["stores"]]
        if record["inputs"] != inputs or [outcome.root for outcome in outcomes] != roots:
            return None
    except (UserError, KeyError, TypeError):  # it is damaged
        return None
    with contextlib.ExitStack() as held:
        for root in roots:
            held.enter_context(exclusive(root))
        with contextlib.suppress(FileNotFoundError):  # a link to nothing
            whole = record.get("files") == _files_digest(roots)
        if not whole:
            return None
        for root in roots:
            recipe.save(root)
            seal_recipe(root)
    return outcomes


def remember(recipe: Recipe, inputs: str, outcomes: Sequence[Outcome]) -> None:
    """Publishes ``pass.json`` where the pass is complete."""
    if storage.is_remote(recipe.root) or any(outcome.manifest is None for outcome in outcomes):
        return
    names = ("root", "samples", "tokens", "bytes_per_token")
    stores = [{name: getattr(outcome, name) for name in names} for outcome in outcomes]
    record = {"inputs": inputs, "files": _files_digest(_roots(recipe)), "stores": stores}
    storage.publish_json(storage.join(recipe.root, NAME), record)


def _unsent(recipe: Recipe) -> bool:
    """Whether the tracking server has not got all yet, which a start sends."""
    names = storage.list_names(recipe.root) if recipe.tracking.enabled else []
    return any(fnmatch.fnmatch(name, "tracking-*.jsonl") for name in names)


def _roots(recipe: Recipe) -> list[str]:
    """Of the stores, in the order in which they are made."""
    return [recipe.validation_store_dir] * has_validation(recipe) + [recipe.store_dir]


def _files_digest(roots: Sequence[str]) -> str:
    """Of the files of the stores, their recipes apart."""
    found: list[Any] = []
    for root in roots:
        for folder, _, names in os.walk(root):
            paths = [os.path.join(folder, name) for name in names]
            found += [[path, *_stamp(path)] for path in paths if not path.endswith(APART)]
    return _digest(sorted(found))


def _stamp(path: str) -> list[int]:
    """Bytes of a local file, and when its content, name or access was last changed (ns)."""
    status = os.stat(path)
    return [status.st_size, status.st_ctime_ns]


def _digest(value: Any) -> str:
    return storage.digest_bytes(json.dumps(value, sort_keys=True).encode())
