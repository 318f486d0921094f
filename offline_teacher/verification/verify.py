"""Checks every file of a store against its manifest: names, digests, byte offsets and values in blocks.

Tasks are checked by several processes. Each process has one shard in memory at a time.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store import paths, unfinished
from offline_teacher.store.manifest import Manifest, Spec
from offline_teacher.store.numbering import SplitPlan
from offline_teacher.store.records import Missing
from offline_teacher.store.schema import SPLITS
from offline_teacher.store.store import Split, read_root
from offline_teacher.verification.verify_task import Finding, Job, check_task, foreign


def verify(root: str, workers: int = 1, done: Callable[[], None] = lambda: None) -> list[Finding]:
    """Returns a finding for everything that is wrong with a store, foreign files included.

    If the manifest is missing, that is a finding, and the files that exist are checked without it.
    ``workers``: number of processes that check tasks. ``done()`` is called after every task.
    """
    findings: list[Finding] = []
    manifest, spec = _manifest_and_spec(root, findings)
    if spec is None:
        return findings
    splits = _splits(root, spec, manifest, findings)
    for name, digest in manifest.files.items() if manifest else ():
        findings += _check_file(root, name, digest, "the manifest")
    findings += _check_names(root, splits, manifest)
    for split in splits:
        findings += _check_parts(root, split)
    jobs = [job for split in splits for job in _jobs(root, split, findings)]
    for task_findings in _check_tasks(root, spec, jobs, workers):
        findings += task_findings
        done()
    return findings


def _manifest_and_spec(root: str, findings: list[Finding]) -> tuple[Manifest | None, Spec | None]:
    """Reads both files; (None, spec or None) if one is bad or missing. Adds problems to ``findings``."""
    try:
        both = read_root(root)
        if both is not None:
            return both[1], both[0]
        findings.append(Finding(paths.MANIFEST, "is missing: the store is not finished", missing=True))
    except ValueError as error:
        name, _, what = str(error).partition(" ")  # the message begins with the file's name
        findings.append(Finding(name, what, missing=what == "is missing"))
    try:
        return None, unfinished.read_spec(root)
    except UserError as error:
        if all(finding.file != paths.SPEC for finding in findings):
            missing = not storage.exists(storage.join(root, paths.SPEC))
            findings.append(Finding(paths.SPEC, "is missing" if missing else str(error), missing=missing))
        return None, None


def _splits(root: str, spec: Spec, manifest: Manifest | None, findings: list[Finding]) -> list[Split]:
    """Returns the splits that the manifest lists or, without a manifest, the splits that have parts."""
    splits = []
    for name in SPLITS:
        try:
            if manifest is None:
                rows = tuple(index.rows for index, _ in unfinished.read_parts(root, name))
                if sum(rows):
                    splits.append(Split(name, SplitPlan.of(name, rows, spec.plan)))
            elif name in manifest.splits:
                splits.append(Split.of(name, spec, manifest.splits[name]))
        except UserError as error:  # only without a manifest: the parts of the sequences define the tasks
            findings.append(Finding(f"{paths.SEQUENCES}/{name}", str(error), missing=True))
        except ValueError as error:
            findings.append(Finding(paths.MANIFEST, str(error)))
    return splits


def _check_file(root: str, name: str, digest: str, where: str) -> Iterator[Finding]:
    """Checks a file against the digest in ``where``."""
    path = storage.join(root, name)
    if not storage.exists(path):
        yield Finding(name, "is missing", missing=True)
    elif not storage.has_digest(path, digest):
        yield Finding(name, f"its digest differs from the one in {where}")


def _check_names(root: str, splits: list[Split], manifest: Manifest | None) -> Iterator[Finding]:
    """Finds foreign files, but not among those of a part or a task: see `_check_part` and `check_task`."""
    top = paths.TOP | ({paths.FAILED} if manifest is None else set())
    names = [split.name for split in splits]
    yield from _unexpected(root, "", top)
    for directory in (paths.SEQUENCES, paths.SHARDS, paths.TASKS):
        yield from _unexpected(root, directory, set(names) if manifest else set(SPLITS))
    if manifest is not None:
        yield from map(foreign, unfinished.foreign_files(root, set(manifest.files)))
    for split in splits:
        number_of = split.plan.number_of
        for name in storage.list_names(storage.join(root, paths.SHARDS, split.name)):
            if number_of(name) is None:
                yield foreign(f"{paths.SHARDS}/{split.name}/{name}")
        for name in storage.list_names(storage.join(root, paths.TASKS, split.name)):
            if not name.endswith(".json") or number_of(name[:-5]) is None:
                yield foreign(f"{paths.TASKS}/{split.name}/{name}")


def _unexpected(root: str, directory: str, expected: set[str]) -> Iterator[Finding]:
    for name in storage.list_names(storage.join(root, directory) if directory else root):
        if name not in expected:
            yield foreign(f"{directory}/{name}".lstrip("/"))


def _check_parts(root: str, split: Split) -> Iterator[Finding]:
    directory = f"{paths.SEQUENCES}/{split.name}"
    expected: set[str] = set()
    parts = range(len(split.plan.rows))
    for names, findings in unfinished.map_in_order(partial(_check_part, root, split), parts):
        expected |= names
        yield from findings
    if split.parts:
        yield from _unexpected(root, directory, expected)


def _check_part(root: str, split: Split, part: int) -> tuple[set[str], list[Finding]]:
    """Returns the names, without directory, of the files that this part should have, and their problems."""
    directory, name = f"{paths.SEQUENCES}/{split.name}", paths.part_name(part)
    file, names = f"{directory}/{name}.json", {f"{name}.json", f"{name}.arrow", f"{name}.counts.arrow"}
    try:
        index, _ = unfinished.part_index(root, split.name, part, split.parts[part] if split.parts else None)
        if index.rows != split.plan.rows[part]:
            raise ValueError(f"has {index.rows} rows, but the manifest says {split.plan.rows[part]}")
    except ValueError as error:
        return names, [Finding(file, str(error), missing=isinstance(error, Missing))]
    digests = {f"{name}.arrow": index.file}
    if index.counts is not None:
        digests[f"{name}.counts.arrow"] = index.counts
    findings: list[Finding] = []
    for file, digest in digests.items():
        findings += _check_file(root, f"{directory}/{file}", digest, "its index")
    return {f"{name}.json", *digests}, findings


def _jobs(root: str, split: Split, findings: list[Finding]) -> Iterator[Job]:
    """Yields all tasks or, without a manifest, those with an index, and adds one finding for the others."""
    finished, missing = unfinished.finished_tasks(root, split.name), 0
    for task in split.plan.tasks():
        if split.tasks:
            yield split.name, task, split.tasks[task.number]
        elif task.name in finished:
            yield split.name, task, None
        else:
            missing += 1
    if missing:
        problem = f"{missing} of {split.plan.task_count} tasks have no index: the store is not finished"
        findings.append(Finding(f"{paths.TASKS}/{split.name}", problem, missing=True))


def _check_tasks(root: str, spec: Spec, jobs: list[Job], workers: int) -> Iterator[list[Finding]]:
    """Yields the findings of each task, in order. Processes check only a few tasks ahead of the caller."""
    if workers <= 1 or len(jobs) == 1:
        yield from map(partial(check_task, root, spec), jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from unfinished.ahead(pool, partial(check_task, root, spec), jobs, 4 * workers)
