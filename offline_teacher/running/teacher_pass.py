"""Runs the teacher over a corpus: makes sequences, tasks and the manifest. The same call resumes a pass."""

from __future__ import annotations

import os
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
from offline_teacher.cluster.crews import teacher_crew, text_crew
from offline_teacher.cluster.pool import Cluster, Pool
from offline_teacher.cluster.work_queue import Item
from offline_teacher.corpus.partition import Part, parts, relative_size
from offline_teacher.inputs.source import Source, publish_files, tokenising
from offline_teacher.running.pass_rates import Environments, Rates
from offline_teacher.sequences.tokenised_parts import Tokenising, part_indices, problem_summary
from offline_teacher.store.manifest import Spec
from offline_teacher.store.numbering import SplitPlan, Task
from offline_teacher.store.parts import PartIndex
from offline_teacher.store.paths import MANIFEST, failed_path, part_name
from offline_teacher.store.store import open_store
from offline_teacher.store.unfinished import finished_tasks, quarantined_tasks
from offline_teacher.store.writer import begin_store, finish_store, quarantine_task, refuse_different_spec

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a pass for one split."""

    split: str
    samples: int
    new_tokens: int
    """Number of tokens computed by this pass, special tokens included; 0 if nothing was left to do."""
    seconds: float
    """Duration of the work on the split's tasks, including the start of the first workers."""
    quarantined: list[Item]


def parts_of(recipe: Recipe) -> dict[str, list[Part]]:
    """Returns the text of each split, in parts. Raises UserError if there is no text."""
    assert recipe.corpus is not None
    size = recipe.sequences.part_bytes
    by_split = {"train": parts(recipe.corpus, size)}
    if recipe.corpus.validation_path or recipe.corpus.validation_split:
        by_split["validation"] = parts(recipe.corpus, size, validation=True)
    return by_split


def refuse_common_text(by_split: dict[str, list[Part]]) -> None:
    """Raises UserError if a file, or a split of a hub dataset, is training text and held-out text: its losses
    would mean nothing."""
    if len(by_split) == 1:
        return
    places = [
        {part.split or _real_path(span.path) for part in listed for span in part.spans}
        for listed in by_split.values()
    ]
    common = sorted(places[0] & places[1])
    if common:
        what = "corpus.validation_split" if by_split["train"][0].split else "corpus.validation_path"
        raise UserError(f"{what}: {common[0]} is also training text; leave it out of one of the two")


def _real_path(path: str) -> str:
    return path if storage.is_remote(path) else os.path.realpath(path)


def is_finished(spec: Spec, parts: dict[str, list[Part]], how: Tokenising) -> bool:
    """Whether the store of this spec is finished, and its text files are unmodified since it was made. Raises
    UserError if the directory holds the store of another spec."""
    refuse_different_spec(how.root, spec)
    if not storage.exists(storage.join(how.root, MANIFEST)):
        return False
    open_store(how.root)
    return not any(how.outstanding(split, listed) for split, listed in parts.items())


def run_pass(
    recipe: Recipe,
    source: Source,
    spec: Spec,
    parts: dict[str, list[Part]],
    cluster: Cluster,
    report: Report | None = None,
) -> list[Outcome]:
    """Makes the recipe's store, or its missing tasks. The text is tokenised first, by workers without GPUs.
    Raises UserError if the store was started with other inputs, or if another process is writing to it."""
    root, settings = recipe.store_path, cluster.settings
    with exclusive(root):
        begin_store(root, spec)
        publish_files(root, source, spec.layout)
        recipe.save(root)
        if not settings.gpus_per_worker:
            warn_if_slow("teacher.dtype", settings.dtype)
        build_sequences(parts, tokenising(recipe, source), cluster)
        counts = {split: len(listed) for split, listed in parts.items()}
        return finish_tasks(root, spec, counts, cluster, report)


def finish_tasks(
    root: str, spec: Spec, parts: dict[str, int], cluster: Cluster, report: Report | None = None
) -> list[Outcome]:
    """Makes the missing tasks, held-out text first, and publishes the manifest if no task is quarantined. The
    workers end before. ``parts``: number of parts of each split, whose sequences must exist."""
    environments = Environments(root, list(parts))
    with cluster.pool(teacher_crew(cluster.recipe, root), environments.check) as pool:
        outcomes = [_infer(root, spec, split, parts, pool, report) for split in reversed(parts)]
    if not any(outcome.quarantined for outcome in outcomes):
        finish_store(root, parts)
    return outcomes


def build_sequences(parts: dict[str, list[Part]], how: Tokenising, cluster: Cluster) -> None:
    """Tokenises the parts that have no sequences yet. Raises UserError if a part cannot be tokenised."""
    with cluster.pool(text_crew(how)) as pool:
        for split, listed in parts.items():
            _build_split(split, listed, how, pool)


def _build_split(split: str, parts: list[Part], how: Tokenising, pool: Pool) -> None:
    items = []
    for number in how.outstanding(split, parts):
        name, part = f"{split}/{part_name(number)}", parts[number]
        size = relative_size(part, how.sequences.part_bytes)
        items.append(Item(name, "build_part", (split, number, part), size))
    if not items:
        return
    with progress(len(parts), "parts", f"sequences, {split}", len(parts) - len(items)) as shown:
        failed = pool.run(items, lambda item, answer: shown.advance(), shown.say)
    if failed:
        raise UserError(f"sequences: {failed[0].name} of the corpus cannot be built: {failed[0].reason}")
    problems = problem_summary(how.root, split, len(parts))
    if problems:
        print(f"corpus: {problems}")


def _tokens(task: Task, part: PartIndex) -> float:
    """Estimates the tokens of a task, on which its duration depends, from those of its part."""
    return part.tokens * task.samples / part.rows


def _infer(
    root: str, spec: Spec, split: str, parts: dict[str, int], pool: Pool, report: Report | None
) -> Outcome:
    indices = part_indices(root, split, parts[split])
    plan = SplitPlan.of(split, tuple(index.rows for index in indices), spec.plan)
    finished, begin = finished_tasks(root, split), time.monotonic()
    for name in quarantined_tasks(root, split):  # tasks that an earlier pass gave up are tried again
        storage.remove(failed_path(root, split, name))
    items = [
        Item(f"{split}/{task.name}", "infer", (split, task), _tokens(task, indices[task.part]))
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

    def quarantine(item: Item) -> None:
        task: Task = item.arguments[1]
        record = {"task": task.name, "part": task.part, "rows": [task.rows.start, task.rows.stop]}
        record |= {"reason": item.reason, "attempts": item.attempts, "worker_deaths": item.deaths}
        quarantine_task(root, split, task.name, record)

    if items:
        with progress(plan.task_count, "tasks", f"teacher, {split}", plan.task_count - len(items)) as shown:
            quarantined = pool.run(items, done, shown.say, quarantine)
    return Outcome(split, plan.samples, rates.tokens, time.monotonic() - begin, quarantined)
