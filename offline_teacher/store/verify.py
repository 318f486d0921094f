"""Is a store, byte for byte and number for number, what its manifest says? And setting aside what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from infra import storage
from infra.cache import Cache
from infra.errors import UserError, WrongContent
from offline_teacher.store.checks import check_shapes, check_values
from offline_teacher.store.manifest import (
    DECLARATION_NAME,
    FAILED,
    FILE_DIRECTORIES,
    MANIFEST_NAME,
    RECIPE_NAME,
    RECIPE_SIDECAR_NAME,
    SHARDS,
    Declaration,
    Manifest,
    Sidecar,
    shard_path,
    sidecar_path,
)
from offline_teacher.store.reader import parsed_metadata, read_manifest
from offline_teacher.store.schema import shard_name
from offline_teacher.store.sealed import read_sealed
from offline_teacher.store.shard_file import open_file
from offline_teacher.store.writer import read_declaration

CACHE_BYTES = 1 << 30
"""Of a remote store held on the local disk while it is verified."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a store."""

    file: str
    """Path below the store."""
    what: str
    shard: tuple[int, int] | None = None
    """(replica, index), where the file belongs to a shard of the plan."""
    column: str | None = None
    missing: bool = False
    """There is no file to set aside."""

    def __str__(self) -> str:
        where = f", column {self.column}" if self.column else ""
        return f"{self.file}{where}: {self.what}"


def verify(root: str, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Every digest, range and id of a store; [] where all is right.

    A store that is not finished is checked against its declaration and sidecars, its missing manifest
    and shards being problems. ``progress(done, total)`` is called after every shard.
    """
    problems: list[Problem] = []
    manifest, declaration = _manifest(root, problems)
    if declaration is None:
        return problems
    problems += _check_files(root, manifest)
    problems += check_recipe(root)
    problems += _check_names(root, declaration, manifest)
    cache = Cache(None, CACHE_BYTES) if storage.is_remote(root) else None
    for done, (replica, index) in enumerate(declaration.plan.shard_ids(), start=1):
        digest = manifest.shard_digest(replica, index) if manifest else None
        problems += _check_shard(root, declaration, replica, index, digest, cache)
        if progress is not None:
            progress(done, declaration.plan.total)
    return problems


def _manifest(root: str, problems: list[Problem]) -> tuple[Manifest | None, Declaration | None]:
    """What the store says it is; damage is added to ``problems``."""
    path = storage.join(root, MANIFEST_NAME)
    try:
        if storage.exists(path):
            manifest = read_manifest(root)
            return manifest, manifest.declaration
        problems.append(Problem(MANIFEST_NAME, "is missing: the store is not finished", missing=True))
    except UserError as error:
        problems.append(Problem(MANIFEST_NAME, str(error).removeprefix(path).strip()))
    try:
        return None, read_declaration(root)
    except UserError as error:
        path = storage.join(root, DECLARATION_NAME)
        what = str(error).removeprefix(path).strip()
        problems.append(Problem(DECLARATION_NAME, what, missing=not storage.exists(path)))
        return None, None


def declared(root: str) -> Declaration | None:
    """What a store says it is, by its manifest or else its declaration; None where both are damaged."""
    return _manifest(root, [])[1]


def _check_files(root: str, manifest: Manifest | None) -> Iterator[Problem]:
    for name, digest in manifest.files.items() if manifest else ():
        path = storage.join(root, name)
        if not storage.exists(path):
            yield Problem(name, "is missing", missing=True)
        elif storage.digest_file(path) != digest:
            yield Problem(name, "its digest is not the manifest's")


def check_recipe(root: str) -> Iterator[Problem]:
    """Is the store's copy of its recipe what the pass wrote? A store may have none."""
    path, sidecar = storage.join(root, RECIPE_NAME), storage.join(root, RECIPE_SIDECAR_NAME)
    if not storage.exists(path) and not storage.exists(sidecar):
        return
    try:
        content = read_sealed(sidecar, "it is made again when the pass is run again")
    except UserError as error:
        what = str(error).removeprefix(sidecar).strip()
        yield Problem(RECIPE_SIDECAR_NAME, what, missing=not storage.exists(sidecar))
        return
    if not storage.exists(path):
        yield Problem(RECIPE_NAME, "is missing", missing=True)
    elif content != {"name": RECIPE_NAME, "file_digest": storage.digest_file(path)}:
        yield Problem(RECIPE_NAME, f"its digest is not that of {RECIPE_SIDECAR_NAME}")


def _check_names(root: str, declaration: Declaration, manifest: Manifest | None) -> Iterator[Problem]:
    """Files that nothing of the store accounts for."""
    top = {DECLARATION_NAME, MANIFEST_NAME, RECIPE_NAME, RECIPE_SIDECAR_NAME, SHARDS, *FILE_DIRECTORIES}
    if manifest is None:
        top.add(FAILED)
    for name in storage.list_names(root):
        if name not in top:
            yield Problem(name, "is foreign: no file of a store has this name")
    shards = {
        shard_name(*shard) + end for shard in declaration.plan.shard_ids() for end in (".arrow", ".json")
    }
    for name in storage.list_names(storage.join(root, SHARDS)):
        if name not in shards:
            yield Problem(f"{SHARDS}/{name}", "is foreign: the plan has no such shard")
    if manifest is None:
        return
    for directory in FILE_DIRECTORIES:
        for name in storage.list_names(storage.join(root, directory)):
            if f"{directory}/{name}" not in manifest.files:
                yield Problem(f"{directory}/{name}", "is foreign: it is not in the manifest")


def _check_shard(
    root: str,
    declaration: Declaration,
    replica: int,
    index: int,
    digest: str | None,
    cache: Cache | None,
) -> Iterator[Problem]:
    shard, ids = (replica, index), declaration.plan.sequence_range(index)
    name = f"{SHARDS}/{shard_name(replica, index)}"
    path, sidecar_file = shard_path(root, replica, index), sidecar_path(root, replica, index)
    if not storage.exists(path):
        yield Problem(f"{name}.arrow", "is missing", shard, missing=True)
        return
    if not storage.exists(sidecar_file):
        yield Problem(f"{name}.json", "is missing", shard, missing=True)
        return
    try:
        sidecar = storage.read_checked(sidecar_file, Sidecar.from_bytes)
    except ValueError as error:
        yield Problem(f"{name}.json", str(error), shard)
        return
    size = storage.size(path)
    expected = Sidecar(
        name=shard_name(replica, index),
        replica=replica,
        index=index,
        first_sequence=ids.start,
        samples=len(ids),
        bytes=size,
        shard_digest=digest or sidecar.shard_digest,
        fingerprint=declaration.fingerprint_digest,
    )
    if sidecar.bytes != size:
        yield Problem(f"{name}.arrow", f"has {size} bytes, its sidecar says {sidecar.bytes}", shard)
        return
    if sidecar != expected:
        yield Problem(f"{name}.json", "is the sidecar of another shard", shard)
        return
    try:
        local = cache.local(path, sidecar.shard_digest) if cache else path
        right = cache is not None or storage.digest_file(path) == sidecar.shard_digest
    except WrongContent:
        right = False
    if not right:
        yield Problem(f"{name}.arrow", "its digest is not the recorded one", shard)
        return
    yield from _check_content(declaration, replica, index, local, f"{name}.arrow")


def _check_content(
    declaration: Declaration, replica: int, index: int, local: str, name: str
) -> Iterator[Problem]:
    shard, ids = (replica, index), declaration.plan.sequence_range(index)
    try:
        metadata, columns = open_file(local, declaration.layout)
    except ValueError as error:
        yield Problem(name, str(error), shard)
        return
    if parsed_metadata(metadata) != declaration.shard_metadata(replica, index):
        yield Problem(name, "its metadata is that of another shard", shard)
    findings = list(check_shapes(declaration.layout, columns, len(ids)))
    findings = findings or list(check_values(declaration.layout, declaration.special, ids, columns))
    for finding in findings:
        yield Problem(name, f"row {finding.row}: {finding.what}", shard, finding.column)


def quarantine(root: str) -> str:
    """Where damaged files go: beside the store, so that a repaired store is the same as an undamaged one."""
    return root.rstrip("/") + ".damaged"


def set_aside(root: str, replica: int, index: int) -> None:
    """Moves a shard and its sidecar out of the store and drops the manifest: the next pass remakes both."""
    name = shard_name(replica, index)
    _move_out(root, [f"{SHARDS}/{name}.json", f"{SHARDS}/{name}.arrow"])


def set_aside_damaged(root: str, problems: Iterable[Problem]) -> list[str]:
    """Moves everything that ``verify`` found damaged or foreign out of the store; returns the names.

    A damaged shard leaves with its sidecar. The manifest is dropped, so that the next pass makes again
    what is missing and then the manifest.
    """
    names: list[str] = []
    for problem in problems:
        if problem.shard is not None:
            name = f"{SHARDS}/{shard_name(*problem.shard)}"
            names += [f"{name}.json", f"{name}.arrow"]  # the sidecar first: without it there is no shard
        elif not problem.missing:
            names.append(problem.file)
    names = list(dict.fromkeys(names))
    return _move_out(root, names) if names or any(problem.missing for problem in problems) else []


def _move_out(root: str, names: list[str]) -> list[str]:
    """The names of those that were there. The manifest goes last: until then `verify` finds the rest."""
    for name in names:
        path = storage.join(root, name)
        if storage.list_names(path):
            raise UserError(f"{path} is a directory where none belongs: move it away yourself")
    moved = [
        name
        for name in names
        if name != MANIFEST_NAME
        and storage.move(storage.join(root, name), storage.join(quarantine(root), name))
    ]
    if MANIFEST_NAME in names and storage.exists(storage.join(root, MANIFEST_NAME)):
        moved.append(MANIFEST_NAME)
    storage.remove(storage.join(root, MANIFEST_NAME))
    return moved
