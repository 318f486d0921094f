"""Is a store, byte for byte and number for number, what its manifest says?

Tasks are checked by several processes, each of which holds one shard in memory at a time.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store.index import PartIndex
from offline_teacher.store.manifest import (
    FAILED,
    MANIFEST,
    RECIPE,
    SEQUENCES,
    SHARDS,
    SPEC,
    TASKS,
    TEACHER,
    TOKENIZER,
    Manifest,
    Spec,
    part_name,
)
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.pending import finished_parts, finished_tasks, in_order, read_parts, read_spec
from offline_teacher.store.reader import read_root
from offline_teacher.store.records import read
from offline_teacher.store.schema import SPLITS
from offline_teacher.verification.verify_task import Expected, Finding, check_task

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Split:
    """What is known of one split before its files are read."""

    name: str
    plan: SplitPlan
    parts: tuple[str, ...] | None
    """File digests of the indices of parts; None without a manifest."""
    tasks: tuple[str, ...] | None
    """File digests of the indices of tasks; None without a manifest."""


def verify(root: str, workers: int = 1, progress: Progress | None = None) -> list[Finding]:
    """Everything that is wrong with a store; [] if all is right.

    Checks every file, digest, range and number, and names foreign files. A missing manifest is a
    finding; the files that exist are checked all the same. ``workers``: processes that check tasks.
    ``progress(done, total)`` is called after every task.
    """
    findings: list[Finding] = []
    manifest, spec = _root(root, findings)
    if spec is None:
        return findings
    splits = _splits(root, spec, manifest, findings)
    findings += _check_files(root, manifest)
    findings += _check_names(root, splits, manifest)
    for split in splits:
        findings += _check_parts(root, spec, split)
    jobs = [(split, number) for split in splits for number in _tasks_to_check(root, split, findings)]
    for done, found in enumerate(_checked(root, spec, jobs, workers), start=1):
        findings += found
        if progress is not None:
            progress(done, len(jobs))
    return findings


def _root(root: str, findings: list[Finding]) -> tuple[Manifest | None, Spec | None]:
    """manifest.json and spec.json; what is wrong with them goes to ``findings``."""
    try:
        found = read_root(root)
        if found is not None:
            return found[1], found[0]
        findings.append(Finding(MANIFEST, "is missing: the store is not finished", missing=True))
    except ValueError as error:
        name, _, what = str(error).partition(" ")
        findings.append(Finding(name, what, missing=what == "is missing"))
    try:
        return None, read_spec(root)
    except UserError as error:
        if all(finding.file != SPEC for finding in findings):
            missing = not storage.exists(storage.join(root, SPEC))
            findings.append(Finding(SPEC, "is missing" if missing else str(error), missing=missing))
        return None, None


def _splits(root: str, spec: Spec, manifest: Manifest | None, findings: list[Finding]) -> list[_Split]:
    """The splits that the manifest lists; without a manifest, those of the parts that exist."""
    found = []
    for name in SPLITS:
        try:
            if manifest is None:
                rows = tuple(index.rows for index, _ in read_parts(root, name, finished_parts(root, name)))
                if sum(rows):
                    found.append(_Split(name, SplitPlan.of(name, rows, spec.plan), None, None))
            elif name in manifest.splits:
                record = manifest.splits[name]
                plan = SplitPlan.of(name, record.rows, spec.plan)
                if plan.task_count != len(record.tasks):
                    raise ValueError(f"{name}: {len(record.tasks)} tasks instead of {plan.task_count}")
                found.append(_Split(name, plan, record.parts, record.tasks))
        except UserError as error:  # without a manifest, tasks follow from the sequences
            findings.append(Finding(f"{SEQUENCES}/{name}", str(error), missing=True))
        except ValueError as error:
            findings.append(Finding(MANIFEST, str(error)))
    return found


def _check_files(root: str, manifest: Manifest | None) -> Iterator[Finding]:
    """The files of tokenizer and teacher."""
    for name, digest in manifest.files.items() if manifest else ():
        path = storage.join(root, name)
        if not storage.exists(path):
            yield Finding(name, "is missing", missing=True)
        elif not storage.has_digest(path, digest):
            yield Finding(name, "its digest differs from the one in the manifest")


def _check_names(root: str, splits: list[_Split], manifest: Manifest | None) -> Iterator[Finding]:
    """Unexpected files. Those in the directory of a task's shards are left to the check of that task."""
    top = {SPEC, MANIFEST, RECIPE, TOKENIZER, TEACHER, SEQUENCES, SHARDS, TASKS}
    top |= {FAILED} if manifest is None else set()
    names = [split.name for split in splits]
    yield from _foreign(root, "", top)
    for directory in (SEQUENCES, SHARDS, TASKS):
        yield from _foreign(root, directory, set(names) if manifest else set(SPLITS))
    for directory in (TOKENIZER, TEACHER):
        if manifest is not None:
            own = {name.partition("/")[2] for name in manifest.files if name.startswith(f"{directory}/")}
            yield from _foreign(root, directory, own)
    for split in splits:
        number_of = split.plan.number_of
        for name in storage.list_names(storage.join(root, SHARDS, split.name)):
            if number_of(name) is None:
                yield _foreign_file(f"{SHARDS}/{split.name}/{name}")
        for name in storage.list_names(storage.join(root, TASKS, split.name)):
            if not name.endswith(".json") or number_of(name[:-5]) is None:
                yield _foreign_file(f"{TASKS}/{split.name}/{name}")


def _foreign(root: str, directory: str, own: set[str]) -> Iterator[Finding]:
    for name in storage.list_names(storage.join(root, directory) if directory else root):
        if name not in own:
            yield _foreign_file(f"{directory}/{name}".lstrip("/"))


def _foreign_file(name: str) -> Finding:
    return Finding(name, "is foreign: a store has no file of this name")


def _check_parts(root: str, spec: Spec, split: _Split) -> Iterator[Finding]:
    directory = f"{SEQUENCES}/{split.name}"
    own: set[str] = set()
    for names, findings in in_order(partial(_check_part, root, split), range(len(split.plan.rows))):
        own |= names
        yield from findings
    if split.parts is not None:
        yield from _foreign(root, directory, own)


def _check_part(root: str, split: _Split, part: int) -> tuple[set[str], list[Finding]]:
    """The plain names of the files that this part should have, and what is wrong with them."""
    directory, name = f"{SEQUENCES}/{split.name}", part_name(part)
    file, names = f"{directory}/{name}.json", {f"{name}.json", f"{name}.arrow", f"{name}.counts.arrow"}
    try:
        data = read(storage.join(root, file), split.parts[part] if split.parts else None)
        if data is None:
            return names, [Finding(file, "is missing", missing=True)]
        index = PartIndex.from_bytes(data)
        if (index.split, index.part, index.rows) != (split.name, part, split.plan.rows[part]):
            raise ValueError("is the index of another part")
    except ValueError as error:
        return names, [Finding(file, str(error))]
    digests = {f"{name}.arrow": index.file}
    if index.counts is not None:
        digests[f"{name}.counts.arrow"] = index.counts
    findings = []
    for plain, digest in digests.items():
        path = storage.join(root, directory, plain)
        if not storage.exists(path):
            findings.append(Finding(f"{directory}/{plain}", "is missing", missing=True))
        elif not storage.has_digest(path, digest):
            findings.append(Finding(f"{directory}/{plain}", "its digest differs from the one in its index"))
    return {f"{name}.json", *digests}, findings


def _tasks_to_check(root: str, split: _Split, findings: list[Finding]) -> Iterator[int]:
    """Numbers of tasks: with a manifest all; without, those with an index, and one finding for the rest."""
    finished = finished_tasks(root, split.name)
    absent = 0
    for task in split.plan.tasks():
        if split.tasks is not None or task.name in finished:
            yield task.number
        else:
            absent += 1
    if absent:
        what = f"{absent} of {split.plan.task_count} tasks have no index: the store is not finished"
        findings.append(Finding(f"{TASKS}/{split.name}", what, missing=True))


def _checked(root: str, spec: Spec, jobs: list[tuple[_Split, int]], workers: int) -> Iterator[list[Finding]]:
    """What is wrong with each task, in order. Only a few tasks are checked ahead of the one handed out."""
    expected = (
        Expected(split.name, split.plan.task(number), split.tasks[number] if split.tasks else None)
        for split, number in jobs
    )
    if workers <= 1 or len(jobs) == 1:
        for item in expected:
            yield check_task(root, spec, item)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running: deque[Future[list[Finding]]] = deque()
        for item in expected:
            running.append(pool.submit(check_task, root, spec, item))
            if len(running) >= 4 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
