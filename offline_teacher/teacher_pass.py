"""One pass of the teacher over a corpus: it makes sequences, then tasks, then the manifest. It can resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.console import progress
from infra.cpu.processor import warn_if_slow
from infra.errors import UserError
from infra.files import storage
from infra.files.locks import exclusive
from infra.settings.recipe import Recipe
from offline_teacher.cluster.pool import Cluster, Pool
from offline_teacher.cluster.work_queue import Item
from offline_teacher.corpus.documents import Part, parts, size_of
from offline_teacher.pass_rates import Environments, Rates
from offline_teacher.sequences.building import Tokenising, outstanding, problems_of, rows_of
from offline_teacher.source import Source, publish_files
from offline_teacher.store.manifest import MANIFEST, Spec, failed_path, part_name
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
    """Whether the store of this spec is finished, and its text files are unmodified since then.

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
    cluster: Cluster,
    report: Report | None = None,
) -> list[Outcome]:
    """Makes the recipe's store, or the tasks that it lacks.

    Text is tokenised first, by workers that hold no GPU; then the teacher runs.

    Raises UserError if the store was started with another recipe, teacher, tokenizer or corpus, or if another
    process is writing it.
    """
    root = recipe.store_path
    assert recipe.teacher is not None
    with exclusive(root):
        begin_store(root, spec)
        publish_files(root, source, spec.layout)
        recipe.save(root)
        if not recipe.teacher.gpus_per_worker:
            warn_if_slow("teacher.dtype", recipe.teacher.dtype)
        build_sequences(recipe, parts, cluster)
        return finish_tasks(
            root, spec, {split: len(found) for split, found in parts.items()}, cluster, report
        )


def finish_tasks(
    root: str, spec: Spec, parts: dict[str, int], cluster: Cluster, report: Report | None = None
) -> list[Outcome]:
    """Makes the missing tasks, held-out text first, and publishes the manifest if no task is quarantined.

    ``parts``: number of parts of each split; their sequences must exist. All workers have ended before the
    manifest is made.
    """
    environments = Environments(root, list(parts))
    with cluster.teachers(root, environments.seen) as pool:
        outcomes = [_infer(root, spec, split, parts, pool, report) for split in reversed(parts)]
    if not any(outcome.quarantined for outcome in outcomes):
        finish_store(root, parts)
    return outcomes


def build_sequences(recipe: Recipe, parts: dict[str, list[Part]], cluster: Cluster) -> None:
    """Tokenises the missing parts. Raises UserError if one cannot be built."""
    with cluster.text_workers(recipe.store_path) as pool:
        for split, found in parts.items():
            _build_split(recipe, split, found, pool)


def _build_split(recipe: Recipe, split: str, parts: list[Part], pool: Pool) -> None:
    assert recipe.corpus is not None
    root, usual = recipe.store_path, recipe.sequences.part_bytes
    todo = outstanding(root, split, parts, Tokenising(recipe.corpus, recipe.sequences))
    items = [
        Item(
            name=f"{split}/{part_name(number)}",
            method="build_part",
            arguments=(root, split, number, parts[number]),
            size=size_of(parts[number], usual),
        )
        for number in todo
    ]
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
    plan = SplitPlan.of(split, rows_of(root, split, parts[split]), spec.plan)
    finished, begin = finished_tasks(root, split), time.monotonic()
    for name in quarantined_tasks(root, split):  # they are tried again
        storage.remove(failed_path(root, split, name))
    items = [
        Item(f"{split}/{task.name}", "infer", (root, split, task, parts["train"]), task.samples)
        for task in plan.tasks()
        if task.name not in finished
    ]
    rates, quarantined = Rates(len(items), pool.retries), list[Item]()

    def done(item: Item, result: dict[str, Any]) -> None:
        due = rates.count(result["place"], result["tokens"])
        shown.note(rates.words(pool.retries))
        shown.advance()
        if report is not None and split == "train" and due:
            report({**rates.metrics(pool.retries), "tasks": plan.task_count - rates.left})

    if items:
        with progress(plan.task_count, "tasks", f"teacher, {split}", plan.task_count - len(items)) as shown:
            quarantined = pool.run(items, done, shown.say, lambda item: _record_failure(root, split, item))
    return Outcome(split, plan.samples, rates.tokens, time.monotonic() - begin, quarantined)


def _record_failure(root: str, split: str, item: Item) -> None:
    task: Task = item.arguments[2]
    record = {
        "task": task.name,
        "reason": item.reason,
        "attempts": item.attempts,
        "worker_deaths": item.deaths,
        "part": task.part,
        "rows": [task.rows.start, task.rows.stop],
    }
    quarantine_task(root, split, task.name, record)
