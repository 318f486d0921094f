"""``verify``: checks a store by its digests, its own hidden states, and the live teacher."""

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
from offline_teacher.store.pending import finished_tasks, refuse_format_1
from offline_teacher.store.reader import open_store
from offline_teacher.store.schema import SPLITS
from offline_teacher.verification.verify import verify
from offline_teacher.verification.verify_task import Finding

SHOWN = 20
ROUNDS = 2
"""Rounds of repair. Files that cannot be checked without a valid spec.json are checked in the second
round."""


@dataclass(frozen=True)
class Audit:
    """What ``verify`` is asked for."""

    root: str
    deep: int = 0
    """Positions of each task that are compared with the stored hidden states; 0: none."""
    rerun: int = 0
    """Random tasks that the teacher computes again."""
    workers: int = 1
    """Processes that check tasks."""
    recipe_file: str | None = None
    """The recipe for reruns and repair; None: the store's own."""
    overrides: Sequence[str] = ()

    def recipe(self) -> Recipe:
        """UserError where there is none."""
        own = storage.join(self.root, RECIPE)
        if self.recipe_file is None and not storage.exists(own):
            raise UserError(f"{own} is missing: give the recipe the store was made of with --recipe FILE")
        recipe = load_recipe(self.recipe_file or own, self.overrides)
        recipe = replace(recipe, store=replace(recipe.store, path=self.root))
        if recipe.teacher is None:
            raise UserError(f"{self.recipe_file or own}: teacher: is required to compute tasks again")
        return recipe


def audit(asked: Audit, repair: bool) -> int:
    """Prints every finding. Returns 0 if there is none, or if ``repair`` has repaired all.

    Findings of a rerun are never repaired: the stored bytes are undamaged, only the teacher's numbers differ.
    """
    refuse_what_is_no_store(asked.root)
    if asked.recipe_file is not None or asked.overrides:
        asked.recipe()  # a mistake in it is said before hours of reading
    findings = damaged(asked)
    for _ in range(ROUNDS if repair else 0):
        if findings:
            from offline_teacher.verification.repair import repair_store

            print(_report(asked.root, findings))
            repair_store(asked.root, findings, asked.recipe())
            findings = damaged(asked)
    if not findings:
        findings = compared(asked)
    print(_report(asked.root, findings))
    return EXIT_INCOMPLETE if findings else 0


def damaged(asked: Audit) -> list[Finding]:
    """Digests, ranges and numbers of every file."""
    with progress(None, "tasks", f"verify {asked.root}") as shown:
        return verify(asked.root, asked.workers, shown.advance)


def compared(asked: Audit) -> list[Finding]:
    """What ``deep`` and ``rerun`` find in a store whose files are right."""
    findings: list[Finding] = []
    if asked.deep or asked.rerun:
        store = open_store(asked.root)
    if asked.deep:
        from offline_teacher.verification.deep import deep_check

        findings += deep_check(store, asked.deep)
    if asked.rerun:
        from offline_teacher.verification.rerun import rerun

        findings += rerun(store, asked.recipe(), asked.rerun)
    return findings


def refuse_what_is_no_store(root: str) -> None:
    """UserError, before anything is read at length, where ``root`` is no store of this format."""
    names = storage.list_names(root)
    if not names:
        raise UserError(f"{root} is not a store: there is nothing there")
    if SPEC in names:
        return
    refuse_format_1(root)
    if MANIFEST not in names and not any(finished_tasks(root, split) for split in SPLITS):
        raise UserError(f"{root} is not a store: it has no {MANIFEST}, no {SPEC}, no task")


def absolute(root: str) -> str:
    """A local path from the root directory: a store called ``.`` is moved to ``<its name>.damaged``."""
    return root if storage.is_remote(root) else os.path.abspath(root)


def _report(root: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return f"{root}: all right"
    lines = [str(finding) for finding in findings[:SHOWN]]
    if len(findings) > SHOWN:
        lines.append(f"and {len(findings) - SHOWN} more")
    count = f"{len(findings)} {'problem' if len(findings) == 1 else 'problems'}"
    return "\n".join([*lines, f"{root}: {count}"])
