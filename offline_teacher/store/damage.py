"""Damaged and foreign files out of a store, so that the next teacher pass makes again what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from infra import storage
from infra.errors import UserError
from offline_teacher.store.manifest import MANIFEST, TASKS
from offline_teacher.store.verify_task import Finding


def damaged_directory(root: str) -> str:
    """Where the files go: beside the store, so that a repaired store is the same as an undamaged one."""
    return root.rstrip("/") + ".damaged"


def move_damaged(root: str, findings: Iterable[Finding]) -> list[str]:
    """Moves all that ``verify`` found damaged or foreign out of the store; returns the names of that.

    The index of a task goes before its shards, since without it the task does not exist, and the manifest
    goes last: until then ``verify`` finds the rest. UserError if a directory is where a file belongs.
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
