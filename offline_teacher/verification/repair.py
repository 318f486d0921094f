"""``verify --repair`` moves damaged files out of the store and makes them again; after an error, nothing is
moved.

Only files that ``verify`` finds by their digests are moved. Numbers that differ because of another
environment are not damage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from infra.errors import UserError
from infra.files import storage
from infra.files.locks import exclusive
from infra.settings.recipe import Recipe
from offline_teacher.cluster.pool import Cluster
from offline_teacher.corpus.documents import Part
from offline_teacher.sequences.building import Tokenising, refuse_other_text
from offline_teacher.source import Source, find_source, publish_files, spec_of, spec_with
from offline_teacher.store.index import TaskIndex
from offline_teacher.store.manifest import (
    MANIFEST,
    SEQUENCES,
    SPEC,
    TEACHER,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    Spec,
    part_name,
    task_path,
)
from offline_teacher.store.pending import finished_parts, finished_tasks, read_parts, read_spec
from offline_teacher.store.reader import open_store
from offline_teacher.store.records import read
from offline_teacher.store.schema import SPLITS
from offline_teacher.store.writer import refuse_other
from offline_teacher.teacher_pass import build_sequences, finish_tasks, parts_of
from offline_teacher.verification.damage import damaged_directory, move_damaged
from offline_teacher.verification.verify_task import Finding

OTHER_RECIPE = "give the recipe that the store was made of (--recipe)"


def repair_store(root: str, findings: Sequence[Finding], recipe: Recipe) -> None:
    """Moves all damaged files out of the store and makes them again with the teacher and, if needed, the
    text.

    ``recipe.store_path`` is ``root``. If recipe, teacher or text are not those of the store, raises UserError
    and moves nothing.
    """
    source, recipe = find_source(recipe)
    manifest = _manifest(root)
    with exclusive(root):
        text = _text(root, findings, recipe, manifest)
        spec = _spec(root, recipe, source, text)
        _refuse_other_text(root, findings, recipe, source, text or {})
        if manifest is None:
            findings = [*findings, *_foreign(root, source)]
        names = move_damaged(root, findings)
        print(f"{len(names)} {'file' if len(names) == 1 else 'files'} moved to {damaged_directory(root)}")
        publish_files(root, source, spec.layout)
        recipe.save(root)
        if not storage.exists(storage.join(root, SPEC)):  # the rest could not be checked without it
            storage.publish_bytes(storage.join(root, SPEC), spec.to_bytes())
            return
        with Cluster(recipe) as cluster:
            if text:
                build_sequences(recipe, text, cluster)
            parts = _part_counts(root, text, manifest)
            _refuse_other_parts(root, parts, manifest)
            outcomes = finish_tasks(root, spec, parts, cluster)
    for outcome in outcomes:
        for item in outcome.quarantined:
            print(f"quarantined: task {item.name}: {item.reason}")
    _tell_another_digest(root, manifest)


def _manifest(root: str) -> Manifest | None:
    """The manifest that is there, if it is whole."""
    with contextlib.suppress(ValueError):
        data = read(storage.join(root, MANIFEST))
        return None if data is None else Manifest.from_bytes(data)
    return None


def _text(
    root: str, findings: Iterable[Finding], recipe: Recipe, manifest: Manifest | None
) -> dict[str, list[Part]] | None:
    """The text of each split where sequences must be made again; None where they are known to be right."""
    files = {finding.file for finding in findings}
    needed = manifest is None or SPEC in files
    if not needed and not any(name.startswith(f"{SEQUENCES}/") for name in files):
        return None
    if not needed and all(_is_foreign(name, manifest) for name in files if name.startswith(SEQUENCES)):
        return None
    if recipe.corpus is None:
        raise UserError("corpus: is required to make the sequences of the store again")
    return parts_of(recipe)


def _refuse_other_text(
    root: str,
    findings: Iterable[Finding],
    recipe: Recipe,
    source: Source,
    text: dict[str, list[Part]],
) -> None:
    """UserError where a damaged part was made of other text than is there now."""
    assert recipe.corpus is not None or not text
    pooled = recipe.store.positions == "pooled" and source.pooling is not None
    prompt = source.pooling.prompt if pooled and source.pooling else ""
    files = [finding.file for finding in findings]
    for split, parts in text.items():
        for number, part in enumerate(parts):
            start = f"{SEQUENCES}/{split}/{part_name(number)}."
            if recipe.corpus is not None and any(name.startswith(start) for name in files):
                how = Tokenising(recipe.corpus, recipe.sequences, prompt)
                refuse_other_text(root, split, number, part, how)


def _foreign(root: str, source: Source) -> Iterator[Finding]:
    """Files that are none of the tokenizer's and the teacher's; without a manifest ``verify`` cannot tell."""
    own = {*source.small_files(), WEIGHTS}
    for directory in (TOKENIZER, TEACHER):
        for name in storage.list_names(storage.join(root, directory)):
            if f"{directory}/{name}" not in own:
                yield Finding(f"{directory}/{name}", "is foreign: a store has no file of this name")


def _is_foreign(name: str, manifest: Manifest | None) -> bool:
    """Whether no part of the store has a file of this name."""
    assert manifest is not None
    _, split, plain = (name.split("/") + ["", ""])[:3]
    record = manifest.splits.get(split)
    ends = (".arrow", ".json", ".counts.arrow")
    stem, dot, end = plain.partition(".")
    number = stem.removeprefix("part-")
    if record is None or dot + end not in ends or not number.isdecimal():
        return True
    return int(number) >= len(record.parts)


def _spec(root: str, recipe: Recipe, source: Source, text: dict[str, list[Part]] | None) -> Spec:
    """The store's spec. UserError where the recipe, its teacher or its text would give another."""
    found = None
    with contextlib.suppress(UserError):
        found = read_spec(root)
    if text is not None:
        spec = spec_of(recipe, source, text)
    else:
        assert found is not None
        spec = spec_with(recipe, source, found.fingerprint["corpus"])
    if found is not None:
        refuse_other(root, spec, OTHER_RECIPE)
    elif spec.digest not in (named := _named_specs(root)) and named:
        raise UserError(f"{root}: none of its tasks was made with this recipe: {OTHER_RECIPE}")
    return spec


def _named_specs(root: str) -> set[str]:
    """Digests of spec.json that the manifest and the indices of tasks name."""
    manifest = _manifest(root)
    if manifest is not None:
        return {manifest.spec}
    named = set()
    for split in SPLITS:
        for task in finished_tasks(root, split):
            with contextlib.suppress(ValueError):
                data = read(task_path(root, split, task))
                named.add(TaskIndex.from_bytes(data or b"").spec)
    return named


def _part_counts(root: str, text: dict[str, list[Part]] | None, manifest: Manifest | None) -> dict[str, int]:
    if text is not None:
        return {split: len(found) for split, found in text.items()}
    assert manifest is not None
    return {split: len(record.parts) for split, record in manifest.splits.items()}


def _refuse_other_parts(root: str, parts: dict[str, int], manifest: Manifest | None) -> None:
    """UserError where the text gave other sequences than the tasks of the store were made of."""
    for split, record in manifest.splits.items() if manifest else ():
        assert finished_parts(root, split) == parts[split]
        made = [digest for _, digest in read_parts(root, split, parts[split])]
        for number, (own, recorded) in enumerate(zip(made, record.parts, strict=True)):
            if own != recorded:
                raise UserError(
                    f"corpus: part {number} of the {split} text gives other sequences than those of the"
                    f" store: restore the original text; the earlier files are in {damaged_directory(root)}"
                )


def _tell_another_digest(root: str, before: Manifest | None) -> None:
    with contextlib.suppress(UserError):
        if before is not None and open_store(root).digest != before.digest:
            print(
                f"{root}: its digest is another now: tasks were made again in another environment than before"
            )
