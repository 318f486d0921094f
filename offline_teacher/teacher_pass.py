"""One pass of the teacher over a corpus: sequences, then tasks, then the manifest; each step resumable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.console import progress
from infra.errors import UserError
from infra.locks import exclusive
from infra.processor import warn_if_slow
from infra.recipe import Recipe
from offline_teacher.cluster.pool import Item, Pool
from offline_teacher.corpus.documents import Part, parts
from offline_teacher.sequences.building import Tokenising, outstanding, problems_of, rows_of
from offline_teacher.source import Source, publish_files
from offline_teacher.store.manifest import MANIFEST, Spec, failed_path
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.pending import finished_tasks, quarantined_tasks
from offline_teacher.store.reader import open_store
from offline_teacher.store.writer import begin_store, finish_store, quarantine_task, refuse_other

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Outcome:
    """What a pass did to one split of its store."""

    split: str
    samples: int
    new_tokens: int
    """Tokens, special tokens included; 0 if nothing was left to do."""
    seconds: float
    """Seconds spent on tasks, from the first worker's start."""
    quarantined: list[Item]


def parts_of(recipe: Recipe) -> dict[str, list[Part]]:
    """The text of each split. Raises UserError if there is none, before anything is started or written."""
    assert recipe.corpus is not None
    size = recipe.sequences.part_bytes
    found = {"train": parts(recipe.corpus, size)}
    if recipe.corpus.validation_path or recipe.corpus.validation_split:
        found["validation"] = parts(recipe.corpus, size, validation=True)
    return found


def is_finished(recipe: Recipe, spec: Spec, parts: dict[str, list[Part]]) -> bool:
    """Whether the store of this spec is finished, and no file of its text was modified since.

    Raises UserError if the directory holds another store.
    """
    assert recipe.corpus is not None
    root = recipe.store_path
    refuse_other(root, spec)
    if not storage.exists(storage.join(root, MANIFEST)):
        return False
    open_store(root)
    how = Tokenising(recipe.corpus, recipe.sequences)
    left = (outstanding(root, split, found, how) for split, found in parts.items())
    return not any(left)


def run_pass(
    recipe: Recipe,
    source: Source,
    spec: Spec,
    parts: dict[str, list[Part]],
    pool: Pool,
    report: Report | None = None,
) -> list[Outcome]:
    """Makes the store of the recipe, or the missing tasks of it.

    Raises UserError if the store was started with another recipe, teacher, tokenizer or corpus, or if another
    process is using it.
    """
    root = recipe.store_path
    assert recipe.teacher is not None
    with exclusive(root):
        begin_store(root, spec)
        publish_files(root, source, spec.layout)
        recipe.save(root)
        if not recipe.teacher.gpus_per_worker:
            warn_if_slow("teacher.dtype", recipe.teacher.dtype)
        for split, found in parts.items():
            build_sequences(recipe, split, found, pool)
        return finish_tasks(root, spec, {split: len(found) for split, found in parts.items()}, pool, report)


def finish_tasks(
    root: str, spec: Spec, parts: dict[str, int], pool: Pool, report: Report | None = None
) -> list[Outcome]:
    """Makes the missing tasks, held-out text first, and publishes the manifest if no task is quarantined.

    ``parts``: the number of parts of each split. Their sequences must exist.
    """
    outcomes = [_infer(root, spec, split, parts, pool, report) for split in reversed(parts)]
    if not any(outcome.quarantined for outcome in outcomes):
        finish_store(root, parts)
    return outcomes


def build_sequences(recipe: Recipe, split: str, parts: list[Part], pool: Pool) -> None:
    """Tokenises the missing parts of a split. Raises UserError if one cannot be built."""
    assert recipe.corpus is not None
    root = recipe.store_path
    todo = outstanding(root, split, parts, Tokenising(recipe.corpus, recipe.sequences))
    items = [Item(f"part {number}", "build_part", (root, split, number, parts[number])) for number in todo]
    if not items:
        return
    with progress(len(parts), "parts", f"sequences, {split}", len(parts) - len(todo)) as shown:
        failed = pool.run(items, lambda item, answer: shown.advance(), shown.say)
    if failed:
        raise UserError(f"sequences: {failed[0].name} of the corpus cannot be built: {failed[0].reason}")
    problems = problems_of(root, split, len(parts))
    if problems:
        print(f"corpus: {problems}")


def _infer(
    root: str, spec: Spec, split: str, parts: dict[str, int], pool: Pool, report: Report | None
) -> Outcome:
    rows = rows_of(root, split, parts[split])
    plan = SplitPlan.of(split, rows, spec.plan)
    finished, begin, retries_before = finished_tasks(root, split), time.monotonic(), pool.retries
    todo = [task for task in plan.tasks() if task.name not in finished]
    for name in quarantined_tasks(root, split):  # they are tried again
        storage.remove(failed_path(root, split, name))
    items = [Item(task.name, "infer", (root, split, task, parts["train"])) for task in todo]
    tokens = count = 0
    every = max(1, len(items) // 100)

    def done(item: Item, answer: dict[str, Any]) -> None:
        nonlocal tokens, count
        tokens, count = tokens + answer["tokens"], count + 1
        rate = tokens / (time.monotonic() - begin)
        shown.note(f"{rate:,.0f} tokens/s, {pool.retries - retries_before} retries")
        shown.advance()
        if report is not None and split == "train" and (count % every == 0 or count == len(items)):
            report({"tokens_per_s": rate, "tasks": plan.task_count - len(items) + count})

    def failed(item: Item) -> None:
        _record_failure(root, split, item)

    quarantined: list[Item] = []
    if items:
        with progress(plan.task_count, "tasks", f"teacher, {split}", plan.task_count - len(items)) as shown:
            quarantined = pool.run(items, done, shown.say, failed)
    return Outcome(split, plan.samples, tokens, time.monotonic() - begin, quarantined)


def _record_failure(root: str, split: str, item: Item) -> None:
    task: Task = item.arguments[2]
    record = {
        "task": item.name,
        "reason": item.reason,
        "attempts": item.attempts,
        "worker_deaths": item.deaths,
        "part": task.part,
        "rows": [task.rows.start, task.rows.stop],
    }
    quarantine_task(root, split, item.name, record)
