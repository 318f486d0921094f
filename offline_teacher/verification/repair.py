"""``verify --repair``: moves damaged files out of the store and makes them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from infra.errors import UserError
from infra.files import storage
from infra.files.locks import exclusive
from infra.settings.recipe import Recipe
from offline_teacher.cluster.pool import Cluster
from offline_teacher.corpus.partition import Part
from offline_teacher.inputs.source import Source, find_source, publish_files, spec_of, spec_with, tokenising
from offline_teacher.running.teacher_pass import build_sequences, finish_tasks, parts_of
from offline_teacher.sequences.tokenised_parts import Tokenising
from offline_teacher.store import paths
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import Manifest, Spec
from offline_teacher.store.records import read
from offline_teacher.store.schema import SPLITS
from offline_teacher.store.store import open_store
from offline_teacher.store.unfinished import finished_tasks, foreign_files, read_parts, read_spec
from offline_teacher.store.writer import refuse_different_spec
from offline_teacher.verification.verify_task import Finding, foreign

OTHER_RECIPE = "give the recipe that the store was made of (--recipe)"


def repair_store(root: str, findings: Sequence[Finding], recipe: Recipe) -> None:
    """Moves all damaged files out of the store and makes them again. Reads the text only if sequences are
    damaged. Raises UserError and moves nothing if recipe, teacher or text are not those of the store."""
    source, recipe = find_source(recipe)
    manifest = _manifest(root)
    with exclusive(root):
        text = _text(root, findings, recipe, manifest)
        spec = _spec(root, recipe, source, text)
        if text:
            _refuse_other_text(findings, tokenising(recipe, source), text)
        if manifest is None:
            own = {*source.small_files(), paths.WEIGHTS}
            findings = [*findings, *map(foreign, foreign_files(root, own))]
        names = move_damaged(root, findings)
        print(f"{len(names)} {'file' if len(names) == 1 else 'files'} moved to {damaged_directory(root)}")
        publish_files(root, source, spec.layout)
        recipe.save(root)
        if not storage.exists(storage.join(root, paths.SPEC)):  # `verify` needs it to check the other files
            storage.publish_bytes(storage.join(root, paths.SPEC), spec.to_bytes())
            return
        with Cluster(recipe) as cluster:
            if text:
                build_sequences(text, tokenising(recipe, source), cluster)
            recorded = {split: record.parts for split, record in manifest.splits.items()} if manifest else {}
            parts = {split: len(listed) for split, listed in (text or recorded).items()}
            if manifest is not None:
                _refuse_other_parts(root, manifest)
            outcomes = finish_tasks(root, spec, parts, cluster)
    for outcome in outcomes:
        for item in outcome.quarantined:
            print(f"quarantined: task {item.name}: {item.reason}")
    with contextlib.suppress(UserError):
        if manifest is not None and open_store(root).digest != manifest.digest:
            print(f"{root}: its digest has changed, because tasks were made again in another environment")


def damaged_directory(root: str) -> str:
    """Returns the directory for damaged files. It is beside the store, which so has no extra files."""
    return root.rstrip("/") + ".damaged"


def move_damaged(root: str, findings: Iterable[Finding]) -> list[str]:
    """Moves all files that ``verify`` found damaged or foreign out of the store. Returns their paths in it.

    The index of a task is moved before its shards, because a task without an index counts as not done. The
    manifest is moved last, so that after an interruption ``verify`` can still find the other files.
    """
    findings = list(findings)
    names = [f"{paths.TASKS}/{found.split}/{found.task}.json" for found in findings if found.task is not None]
    names += [found.file for found in findings if not found.missing]
    names = [name for name in dict.fromkeys(names) if name != paths.MANIFEST]
    for name in names:
        path = storage.join(root, name)
        if storage.list_names(path):
            raise UserError(f"{path} is a directory where none belongs: move it away and repeat the command")
    if findings:
        names.append(paths.MANIFEST)
    target = damaged_directory(root)
    return [name for name in names if storage.move(storage.join(root, name), storage.join(target, name))]


def _manifest(root: str) -> Manifest | None:
    """Reads the manifest; None if it is missing or damaged."""
    with contextlib.suppress(ValueError):
        return read(storage.join(root, paths.MANIFEST), Manifest.from_bytes)[0]
    return None


def _text(
    root: str, findings: Iterable[Finding], recipe: Recipe, manifest: Manifest | None
) -> dict[str, list[Part]] | None:
    """Returns the text of each split if sequences must be made again; None if all sequences are undamaged."""
    prefixes = (paths.SPEC, f"{paths.SEQUENCES}/")
    damaged = any(finding.file.startswith(prefixes) and not finding.foreign for finding in findings)
    if manifest is not None and not damaged:
        return None
    if recipe.corpus is None:
        raise UserError("corpus: is required to make the sequences of the store again; add it to the recipe")
    return parts_of(recipe)


def _refuse_other_text(findings: Iterable[Finding], how: Tokenising, text: dict[str, list[Part]]) -> None:
    """Raises UserError if the text of a damaged part has changed since the part was made."""
    files = [finding.file for finding in findings]
    for split, parts in text.items():
        for number, part in enumerate(parts):
            prefix = f"{paths.SEQUENCES}/{split}/{paths.part_name(number)}."
            if any(name.startswith(prefix) for name in files):
                how.refuse_other_text(split, number, part)


def _spec(root: str, recipe: Recipe, source: Source, text: dict[str, list[Part]] | None) -> Spec:
    """Returns the store's spec. Raises UserError if recipe, teacher or text would give another spec."""
    stored = None
    with contextlib.suppress(UserError):
        stored = read_spec(root)
    if text is not None:
        spec = spec_of(recipe, source, text)
    else:
        assert stored is not None
        spec = spec_with(recipe, source, stored.fingerprint["corpus"])
    if stored is not None:
        refuse_different_spec(root, spec, OTHER_RECIPE)
    elif spec.digest not in (named := _named_specs(root)) and named:
        raise UserError(f"{root}: none of its tasks was made with this recipe: {OTHER_RECIPE}")
    return spec


def _named_specs(root: str) -> set[str]:
    """Returns the digests of spec.json that are recorded in the manifest or, without one, in the indices."""
    manifest = _manifest(root)
    if manifest is not None:
        return {manifest.spec}
    named = set()
    for split in SPLITS:
        for task in finished_tasks(root, split):
            with contextlib.suppress(ValueError):
                named.add(read(paths.task_path(root, split, task), TaskIndex.from_bytes)[0].spec)
    return named


def _refuse_other_parts(root: str, manifest: Manifest) -> None:
    """Raises UserError if the text gave other sequences than those from which the tasks were made."""
    for split, record in manifest.splits.items():
        indices = read_parts(root, split)
        for number, ((_, digest), recorded) in enumerate(zip(indices, record.parts, strict=True)):
            if digest != recorded:
                raise UserError(
                    f"corpus: part {number} of the {split} text gives other sequences than those of the"
                    f" store: restore the original text; the earlier files are in {damaged_directory(root)}"
                )
