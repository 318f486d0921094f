"""Moves damaged and foreign files out of a store, so that the next teacher pass makes the missing ones
again."""

from __future__ import annotations

from collections.abc import Iterable

from infra.errors import UserError
from infra.files import storage
from offline_teacher.store.manifest import MANIFEST, TASKS
from offline_teacher.verification.verify_task import Finding


def damaged_directory(root: str) -> str:
    """Where the files go: beside the store, so that a repaired store is the same as an undamaged one."""
    return root.rstrip("/") + ".damaged"


def move_damaged(root: str, findings: Iterable[Finding]) -> list[str]:
    """Moves all files that ``verify`` found damaged or foreign out of the store; returns their names.

    The index of a task is moved before its shards, because a task without index counts as not done. The
    manifest is moved last, so that ``verify`` can find the rest after an interruption. Raises UserError if a
    directory stands where a file belongs.
    """
    findings = list(findings)
    names = [f"{TASKS}/{found.split}/{found.task}.json" for found in findings if found.task is not None]
    names += [found.file for found in findings if not found.missing]
    names = [name for name in dict.fromkeys(names) if name != MANIFEST]
    for name in names:
        path = storage.join(root, name)
        if storage.list_names(path):
            raise UserError(f"{path} is a directory where none belongs: move it away yourself")
    if findings:
        names.append(MANIFEST)
    beside = damaged_directory(root)
    return [name for name in names if storage.move(storage.join(root, name), storage.join(beside, name))]
