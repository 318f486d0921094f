"""One pass of the teacher over a corpus: sequences, then shards, then the manifest; each step resumable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.cache import Cache
from infra.console import progress
from infra.errors import UserError
from infra.locks import exclusive
from infra.processor import warn_if_slow
from infra.recipe import Recipe
from offline_teacher import corpus
from offline_teacher.cluster import Item, Pool
from offline_teacher.corpus_problems import Problems
from offline_teacher.sequence_building import finish_index, outstanding
from offline_teacher.sequences import open_sequences, read_index
from offline_teacher.shard_work import CACHE_BYTES
from offline_teacher.source import Source, changes, declare, made_files
from offline_teacher.store.manifest import (
    DECLARATION_NAME,
    FAILED,
    MANIFEST_NAME,
    Declaration,
    Manifest,
)
from offline_teacher.store.schema import shard_name
from offline_teacher.store.writer import (
    begin_store,
    finish_store,
    read_declaration,
    seal_recipe,
    sidecars,
)

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Outcome:
    """What a pass did. ``manifest`` is None where shards were set aside."""

    root: str
    samples: int
    tokens: int
    """Of all replicas, special tokens included."""
    bytes_per_token: float
    """Of the shard files, over the tokens they hold."""
    new_shards: int
    new_tokens: int
    seconds: float
    """Spent on shards, from the first worker's start."""
    retries: int
    aside: list[Item]
    manifest: Manifest | None


def run_pass(
    recipe: Recipe,
    source: Source,
    root: str,
    pool: Pool,
    validation: bool = False,
    report: Report | None = None,
    text: bool = True,
) -> Outcome:
    """Makes the store ``root`` of the recipe, or what is missing of it.

    Without ``text`` its finished sequences are known to be right, and the text need not be there. Raises
    UserError where it was begun with another recipe, teacher, tokenizer or corpus, or another process is at
    work on it.
    """
    with exclusive(root):
        _refuse_other(recipe, source, root)
        _publish_beginning(source, root)
        if text:
            _build_sequences(recipe, root, pool, validation)
        declaration = declare(recipe, source, root)
        begin_store(root, declaration)
        recipe.save(root)  # not before the corpus is known to be the store's
        seal_recipe(root)
        if not validation and not recipe.teacher.gpus_per_worker:
            warn_if_slow("teacher.dtype", recipe.teacher.dtype)
        return _capture_shards(recipe, source, root, declaration, pool, report)


def _refuse_other(recipe: Recipe, source: Source, root: str) -> None:
    """Before anything is written: a store begun with another recipe, teacher or tokenizer stays as it is."""
    begun = storage.exists(storage.join(root, DECLARATION_NAME))
    changed = changes(recipe, source, read_declaration(root)) if begun else []
    if changed:
        raise UserError(
            f"{root} holds a store made differently ({'; '.join(changed)}): choose another name, or remove it"
        )


def _publish_beginning(source: Source, root: str) -> None:
    files = source.files()
    for directory in ("tokenizer", "teacher"):  # whatever lies there decides ids
        for name in storage.list_names(storage.join(root, directory)):
            if f"{directory}/{name}" not in files:
                raise UserError(f"{root}: {directory}/{name} is foreign, no file of a store: move it away")
    finished = storage.exists(storage.join(root, MANIFEST_NAME))  # what it lists stays as it is
    for name, data in files.items():
        path = storage.join(root, *name.split("/"))
        if not (finished and storage.exists(path)):
            storage.keep_bytes(path, data)


def _build_sequences(recipe: Recipe, root: str, pool: Pool, validation: bool) -> None:
    parts = corpus.parts(recipe.corpus, recipe.sequences.part_bytes, validation)
    todo = outstanding(root, parts, recipe.corpus, recipe.sequences)
    if not todo and read_index(root) is not None:
        return
    items = [Item(f"part {index}", "build_part", (root, index, parts[index])) for index in todo]
    with progress(len(parts), "parts", "sequences", len(parts) - len(todo)) as shown:
        aside = pool.run(items, lambda item, answer: shown.advance(), shown.say)
    if aside:
        raise UserError(f"sequences: {aside[0].name} of the corpus cannot be built: {aside[0].reason}")
    index = finish_index(root, parts, recipe.corpus, recipe.sequences)
    problems = Problems.merged([index.problems]).summary()
    if problems:
        print(f"corpus: {problems}")


def _capture_shards(
    recipe: Recipe, source: Source, root: str, declaration: Declaration, pool: Pool, report: Report | None
) -> Outcome:
    plan, begin, retries_before = declaration.plan, time.monotonic(), pool.retries
    found, records = sidecars(root, declaration), storage.list_names(storage.join(root, FAILED))
    todo = [shard for shard, sidecar in found.items() if sidecar is None]
    for shard, sidecar in found.items():  # a driver may have died before it removed the record
        if sidecar is not None and shard_name(*shard) + ".json" in records:
            storage.remove(_failed_path(root, shard_name(*shard)))
    tokens = new_shards = 0
    items = [Item(shard_name(*shard), "capture", (root, *shard)) for shard in todo]
    every = max(1, len(items) // 100)

    def done(item: Item, answer: dict[str, Any]) -> None:
        nonlocal tokens, new_shards
        tokens, new_shards = tokens + answer["tokens"], new_shards + 1
        rate = tokens / (time.monotonic() - begin)
        shown.note(f"{rate:,.0f} tokens/s, {pool.retries - retries_before} retries")
        shown.advance()
        storage.remove(_failed_path(root, item.name))
        if report is not None and (new_shards % every == 0 or new_shards == len(items)):
            report({"tokens_per_s": rate, "shards": plan.total - len(items) + new_shards})

    aside: list[Item] = []
    if items:
        with progress(plan.total, "shards", "teacher", plan.total - len(items)) as shown:
            aside = pool.run(items, done, shown.say, lambda item: _record_failure(root, declaration, item))
    seconds = time.monotonic() - begin
    digests = [sidecar.shard_digest for sidecar in found.values() if sidecar is not None]
    manifest = None if aside else _finished(source, root, declaration, digests)
    index = read_index(root)
    assert index is not None
    return Outcome(
        root=root,
        samples=plan.sequences * plan.replicas,
        tokens=index.tokens * plan.replicas,
        bytes_per_token=declaration.layout.bytes_per_sample() * plan.sequences / index.tokens,
        new_shards=new_shards,
        new_tokens=tokens,
        seconds=seconds,
        retries=pool.retries - retries_before,
        aside=aside,
        manifest=manifest,
    )


def _finished(source: Source, root: str, declaration: Declaration, digests: list[str]) -> Manifest:
    """The manifest; of a store that was complete already, with these ``digests`` of its shards, as it is: no
    file is read again."""
    path = storage.join(root, MANIFEST_NAME)
    if storage.exists(path):
        with contextlib.suppress(ValueError):
            manifest = storage.read_checked(path, Manifest.from_bytes)
            if manifest.declaration == declaration and manifest.shard_digests == digests:
                return manifest
    return finish_store(root, made_files(root, source))


def _failed_path(root: str, name: str) -> str:
    return storage.join(root, FAILED, f"{name}.json")


def _record_failure(root: str, declaration: Declaration, item: Item) -> None:
    _, replica, index = item.arguments
    ids = declaration.plan.sequence_range(index)
    record = {
        "shard": item.name,
        "replica": replica,
        "index": index,
        "reason": item.reason,
        "attempts": item.attempts,
        "worker_deaths": item.deaths,
        "sequence_ids": list(ids),
    }
    storage.publish_json(_failed_path(root, item.name), record)


def sequences_of(root: str) -> Any:
    """The store's sequences, through a private cache where the store is remote."""
    return open_sequences(root, Cache(None, CACHE_BYTES) if storage.is_remote(root) else None)
