"""Names of models in a directory of scores, where every model has a name of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from infra.errors import UserError
from infra.files import remote, storage
from infra.settings.recipe import DEFAULT_STUDENT

SOURCE = "source.json"
"""Which model a folder of scores is of, beside its tasks."""


def source_of(model: str) -> str:
    """What identifies the model wherever the command is given: an absolute path, a URL or a hub name."""
    if storage.is_remote(model):
        return remote.without_secrets(model).rstrip("/")
    return os.path.realpath(model) if os.path.isdir(model) else model


def names_of(source: str) -> list[str]:
    """Possible names, the shortest first: the last part of the model's path, then more and more of the path.

    ``<recipe>/students/student/model``, a recipe's only student, gets the name of the recipe.
    ``<recipe>/students/<name>/model`` gets that of the student, then that of recipe and student.
    """
    path = source.partition("://")[2] if storage.is_remote(source) else source
    parts = [part for part in path.split("/") if part]
    if len(parts) > 3 and parts[-3] == "students" and parts[-1] == "model":
        parts = parts[:-3] if parts[-2] == DEFAULT_STUDENT else [*parts[:-3], parts[-2]]
    return ["-".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def free_name(scores: str, source: str, names: Sequence[str]) -> str:
    """The first of the names that has no scores of another model below ``scores``; UserError without one."""
    owners = [_owner(scores, name) for name in names]
    for name, owner in zip(names, owners, strict=True):
        if owner in (None, source):
            return name
    raise UserError(
        f"{remote.without_secrets(scores)}: the scores in {names[-1]} belong to {owners[-1]}, not to"
        f" {source}; give another --output"
    )


def keep_name(scores: str, source: str, name: str) -> None:
    """From now on the name is this model's."""
    if _owner(scores, name) != source:
        storage.publish_json(_path(scores, name), {"model": source})


def _owner(scores: str, name: str) -> str | None:
    path = _path(scores, name)
    if not storage.exists(path):
        return None
    content = storage.read_json(path)
    return str(content.get("model")) if isinstance(content, dict) else None


def _path(scores: str, name: str) -> str:
    return storage.join(scores, name, SOURCE)
