"""The command ``verify``: checks a store's files, then its numbers by replay and with the live teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from infra.console import progress
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.files import storage
from infra.settings.recipe import Recipe
from infra.settings.recipe_file import load_recipe
from offline_teacher.store.paths import MANIFEST, RECIPE, SPEC
from offline_teacher.store.schema import SPLITS
from offline_teacher.store.store import open_store
from offline_teacher.store.unfinished import finished_tasks, refuse_format_1
from offline_teacher.verification.verify import verify
from offline_teacher.verification.verify_task import Finding

SHOWN = 20
"""Largest number of findings that are printed."""
REPAIR_ROUNDS = 2
"""The second round repairs files that can be checked only after spec.json is repaired."""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of the command ``verify``, except ``--repair``."""

    root: str
    deep: int = 0
    """Number of positions of each task that ``--deep`` compares; 0 without ``--deep``."""
    rerun: int = 0
    """Number of random tasks that the teacher computes again."""
    workers: int = 1
    """Number of processes that check tasks."""
    recipe_file: str | None = None
    """Path of the recipe for ``--rerun`` and ``--repair``; None for the recipe in the store."""
    overrides: Sequence[str] = ()

    def recipe(self) -> Recipe:
        """Loads the recipe. Raises UserError if it is missing or has no section ``teacher``."""
        own = storage.join(self.root, RECIPE)
        if self.recipe_file is None and not storage.exists(own):
            raise UserError(f"{own} is missing: give the recipe of the store with --recipe FILE")
        recipe = load_recipe(self.recipe_file or own, self.overrides)
        recipe = replace(recipe, store=replace(recipe.store, path=self.root))
        if recipe.teacher is None:
            raise UserError(f"{self.recipe_file or own}: teacher: is required to compute tasks again")
        return recipe


def run_verify(options: VerifyOptions, repair: bool) -> int:
    """Prints the findings. Returns exit code 0 if there are none, or if ``repair`` has repaired all. Findings
    of ``--deep`` and ``--rerun`` are not repaired: numbers of another environment are not damage."""
    refuse_other_directory(options.root)
    if options.recipe_file is not None or options.overrides:
        options.recipe()  # raises an error of the recipe before hours of reading
    findings = find_damage(options)
    for _ in range(REPAIR_ROUNDS if repair else 0):
        if findings:
            from offline_teacher.verification.repair import repair_store

            print(_report(options.root, findings))
            repair_store(options.root, findings, options.recipe())
            findings = find_damage(options)
    if not findings:
        findings = compare_with_teacher(options)
    print(_report(options.root, findings))
    return EXIT_INCOMPLETE if findings else 0


def find_damage(options: VerifyOptions) -> list[Finding]:
    """Checks the digests, ranges and numbers of every file, and shows the progress."""
    with progress(None, "tasks", f"verify {options.root}") as shown:
        return verify(options.root, options.workers, shown.advance)


def compare_with_teacher(options: VerifyOptions) -> list[Finding]:
    """Runs ``--deep`` and ``--rerun``, if asked for, on a store whose files are undamaged."""
    findings: list[Finding] = []
    if options.deep or options.rerun:
        store = open_store(options.root)
    if options.deep:
        from offline_teacher.verification.deep import deep_check

        findings += deep_check(store, options.deep)
    if options.rerun:
        from offline_teacher.verification.rerun import rerun

        findings += rerun(store, options.recipe(), options.rerun)
    return findings


def refuse_other_directory(root: str) -> None:
    """Raises UserError if ``root`` is not a store of this format, from the names of its files alone."""
    names = storage.list_names(root)
    if not names:
        raise UserError(f"{root} is not a store: the directory is empty or does not exist")
    if SPEC in names:
        return
    refuse_format_1(root)
    if MANIFEST not in names and not any(finished_tasks(root, split) for split in SPLITS):
        raise UserError(f"{root} is not a store: it has no {MANIFEST}, no {SPEC} and no finished task")


def absolute(root: str) -> str:
    """Makes a local path absolute, so that damaged files of the store ``.`` go to ``<its name>.damaged``."""
    return root if storage.is_remote(root) else os.path.abspath(root)


def _report(root: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return f"{root}: no problem found"
    count = len(findings)
    more = [f"and {count - SHOWN} more"] if count > SHOWN else []
    last = f"{root}: {count} {'problem' if count == 1 else 'problems'}"
    return "\n".join([*map(str, findings[:SHOWN]), *more, last])
