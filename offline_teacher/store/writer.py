"""Writing a store: declaration first, then shards in any order from any worker, the manifest last.

A shard is published whole under its final name, then its sidecar: a crash at any point leaves either
a shard with a valid sidecar or no shard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infra import storage
from infra.errors import EXIT_INCOMPLETE, UserError
from infra.trees import difference
from offline_teacher.store.checks import check_shapes, check_values
from offline_teacher.store.head import HEAD_NAME, MlmHead, head_bytes
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
    repair_command,
    shard_path,
    sidecar_path,
)
from offline_teacher.store.schema import shard_name
from offline_teacher.store.sealed import read_sealed, seal
from offline_teacher.store.shard_file import write_file

PARALLEL_READS = 16
"""Sidecars of a remote store read at once."""


def begin_store(root: str, declaration: Declaration) -> None:
    """Publishes ``declaration.json``, or finds the same one there.

    UserError, with the difference spelled out, where the directory holds a store of another fingerprint.
    """
    path = storage.join(root, DECLARATION_NAME)
    if storage.exists(path):
        begun = read_declaration(root)
        differences = difference(begun.fingerprint, declaration.fingerprint)
        if not differences and begun != declaration:
            differences = ["the layout or the number of sequences is another"]
        if differences:
            raise UserError(
                f"{root} holds a store made differently ({'; '.join(differences)}): choose another name"
            )
        return
    storage.publish_bytes(path, seal(declaration.to_json()))


def read_declaration(root: str) -> Declaration:
    """UserError where it is absent or damaged."""
    path = storage.join(root, DECLARATION_NAME)
    if not storage.exists(path):
        raise UserError(f"{path} is missing: run the teacher pass again, or choose another directory")
    value = read_sealed(path, f"run `{repair_command(root)}`")
    try:
        return Declaration.from_json(value)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def write_shard(
    root: str, declaration: Declaration, replica: int, index: int, columns: Mapping[str, np.ndarray]
) -> Sidecar:
    """Checks, writes and publishes one shard from arrays [n, *shape] of ``layout.columns()``.

    n is the length of ``plan.sequence_range(index)``. Raises ValueError naming column and row where a
    value cannot be right (NaN, order, range, padding); nothing is published then.
    """
    name, ids = shard_name(replica, index), declaration.plan.sequence_range(index)
    declaration.plan.position(replica, index)
    layout = declaration.layout
    for finding in check_shapes(layout, columns, len(ids)):
        raise ValueError(f"shard {name}: column {finding.column} {finding.what}")
    for finding in check_values(layout, declaration.special, ids, columns):
        sequence = ids[finding.row]
        raise ValueError(
            f"shard {name}: column {finding.column}, row {finding.row} (sequence {sequence}): {finding.what}"
        )
    with storage.publishing(shard_path(root, replica, index)) as temporary:
        write_file(temporary, layout, declaration.shard_metadata(replica, index), columns)
        sidecar = Sidecar(
            name=name,
            replica=replica,
            index=index,
            first_sequence=ids.start,
            samples=len(ids),
            bytes=storage.size(temporary),
            shard_digest=storage.digest_file(temporary),
            fingerprint=declaration.fingerprint_digest,
        )
    storage.publish_bytes(sidecar_path(root, replica, index), sidecar.to_bytes())
    return sidecar


def read_sidecar(root: str, replica: int, index: int) -> Sidecar | None:
    """None unless sidecar and shard are present, the sidecar is valid and the shard has its size."""
    path, data = sidecar_path(root, replica, index), shard_path(root, replica, index)
    if not (storage.exists(path) and storage.exists(data)):
        return None
    return _sidecar_of(root, replica, index, storage.size(data))


def _sidecar_of(root: str, replica: int, index: int, size: int) -> Sidecar | None:
    """The sidecar of a shard of ``size`` bytes; None where it is not valid or another's."""
    try:
        sidecar = storage.read_checked(sidecar_path(root, replica, index), Sidecar.from_bytes)
    except ValueError:
        return None
    return sidecar if (sidecar.replica, sidecar.index, sidecar.bytes) == (replica, index, size) else None


def missing_shards(root: str, declaration: Declaration) -> list[tuple[int, int]]:
    """(replica, index) of every planned shard without a valid sidecar; reads sidecars, no data."""
    return [shard for shard, sidecar in sidecars(root, declaration).items() if sidecar is None]


def sidecars(root: str, declaration: Declaration) -> dict[tuple[int, int], Sidecar | None]:
    """Of every planned shard, in the order of shards; None where there is no valid one."""
    sizes = storage.list_sizes(storage.join(root, SHARDS))
    fingerprint = declaration.fingerprint_digest

    def valid(shard: tuple[int, int]) -> Sidecar | None:
        name = shard_name(*shard)
        if not {f"{name}.arrow", f"{name}.json"} <= sizes.keys():
            return None
        sidecar = _sidecar_of(root, *shard, sizes[f"{name}.arrow"])
        return sidecar if sidecar is not None and sidecar.fingerprint == fingerprint else None

    shards = list(declaration.plan.shard_ids())
    if not storage.is_remote(root):
        return {shard: valid(shard) for shard in shards}
    with ThreadPoolExecutor(PARALLEL_READS) as pool:  # each is a round trip
        return dict(zip(shards, pool.map(valid, shards), strict=True))


def write_head(root: str, head: MlmHead) -> None:
    """Publishes ``teacher/mlm_head.safetensors``."""
    storage.publish_bytes(storage.join(root, HEAD_NAME), head_bytes(head))


def seal_recipe(root: str) -> None:
    """Publishes ``recipe.json``, the sidecar of ``recipe.yaml``; call after every writing of the recipe.

    The recipe is not in the manifest: it holds speed settings, and stores made at another speed are equal.
    """
    path = storage.join(root, RECIPE_NAME)
    if storage.exists(path):
        content = {"name": RECIPE_NAME, "file_digest": storage.digest_file(path)}
        storage.keep_bytes(storage.join(root, RECIPE_SIDECAR_NAME), seal(content))


def finish_store(root: str, expected: Mapping[str, str] | None = None) -> Manifest:
    """Publishes the manifest once every shard is there, and drops what failed attempts left behind.

    ``expected``, path below the store -> digest, are the files of the fixed directories as they were made.
    UserError where one is missing, foreign or another; with exit code 3 where shards are missing.
    """
    declaration = read_declaration(root)
    found = sidecars(root, declaration)
    missing = [shard_name(*shard) for shard, sidecar in found.items() if sidecar is None]
    if missing:
        raise UserError(
            f"{root} is incomplete: {len(missing)} of {declaration.plan.total} shards are missing "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); run the same command again",
            EXIT_INCOMPLETE,
        )
    files = {name: storage.digest_file(storage.join(root, *name.split("/"))) for name in store_files(root)}
    if expected is not None:
        for name, what in unexpected(files, expected):
            raise UserError(f"{root}: {name} {what}: run `{repair_command(root)}`")
    manifest = Manifest(declaration, [sidecar.shard_digest for sidecar in found.values() if sidecar], files)
    seal_recipe(root)
    storage.remove_tree(storage.join(root, FAILED))
    storage.remove_unfinished(root)
    storage.publish_bytes(storage.join(root, MANIFEST_NAME), manifest.to_bytes())
    return manifest


def unexpected(files: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Name and what is wrong with it, of files of the fixed directories.

    Both are path below the store -> digest.
    """
    for name in sorted((files.keys() | expected.keys()) - {DECLARATION_NAME}):
        if name not in files:
            yield name, "is missing"
        elif name not in expected:
            yield name, "is foreign: no file of this store has this name"
        elif files[name] != expected[name]:
            yield name, "is damaged: it is not as it was made"


def store_files(root: str) -> list[str]:
    """Paths below the store of the files the manifest lists: the declaration and the fixed directories.

    UserError where something else than a file is among them.
    """
    names = [DECLARATION_NAME]
    for directory in FILE_DIRECTORIES:
        path = storage.join(root, directory)
        files = storage.list_sizes(path)
        for name in storage.list_names(path):
            if name not in files:
                raise UserError(
                    f"{storage.join(path, name)} is no file, and nothing of a store: move it away"
                )
            names.append(f"{directory}/{name}")
    return names


def has_shards(root: str) -> bool:
    """Is there a file with the name of a shard or of its sidecar?"""
    names = storage.list_names(storage.join(root, SHARDS))
    return any(re.fullmatch(r"r\d{3,}-\d{8,}\.(arrow|json)", name) for name in names)
