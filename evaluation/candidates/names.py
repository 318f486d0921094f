"""Gives every model a unique name in a directory of scores."""

from __future__ import annotations

import os
from collections.abc import Sequence

from infra.errors import UserError
from infra.files import storage
from infra.redaction import without_secrets
from infra.settings.recipe import DEFAULT_STUDENT

SOURCE = "source.json"
"""Name of the file, in a model's folder of scores, that says which model the scores belong to."""


def source_of(model: str) -> str:
    """Returns what identifies a model in every working directory: an absolute path, a URL or a hub name."""
    if storage.is_remote(model):
        return without_secrets(model).rstrip("/")
    return os.path.realpath(model) if os.path.isdir(model) else model


def names_of(source: str) -> list[str]:
    """Returns possible names, the shortest first: the last 1, 2, 3, ... parts of the model's path.

    For ``<recipe>/students/student/model``, a recipe's only student, these are parts of ``<recipe>``; for
    ``<recipe>/students/<name>/model``, parts of ``<recipe>/<name>``.
    """
    path = source.partition("://")[2] if storage.is_remote(source) else source
    parts = [part for part in path.split("/") if part]
    if len(parts) > 3 and parts[-3] == "students" and parts[-1] == "model":
        parts = parts[:-3] if parts[-2] == DEFAULT_STUDENT else [*parts[:-3], parts[-2]]
    return ["-".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def free_name(scores: str, source: str, names: Sequence[str]) -> str:
    """Returns the first of ``names`` that no other model has in ``scores``, or raises UserError."""
    owners = [_owner(scores, name) for name in names]
    for name, owner in zip(names, owners, strict=True):
        if owner in (None, source):
            return name
    raise UserError(
        f"{without_secrets(scores)}: the scores in {names[-1]} belong to {owners[-1]}, not to"
        f" {source}; give another --output"
    )


def record_name(scores: str, source: str, name: str) -> None:
    """Records that the name belongs to this model."""
    if _owner(scores, name) != source:
        storage.publish_json(storage.join(scores, name, SOURCE), {"model": source})


def _owner(scores: str, name: str) -> str | None:
    """Returns the model to which the name belongs, or None."""
    owner: str | None = storage.read_object(storage.join(scores, name, SOURCE)).get("model")
    return owner
