"""Paths as users write them: the home directory, file URLs, globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any

from infra.errors import UserError
from infra.files import remote, storage
from infra.redaction import without_secrets


def expand_home(path: str) -> str:
    """Returns the path with a leading ``~`` replaced by the home directory, and without ``file://``. Any
    other URL is returned as it is. This function is the argparse ``type`` of every path on a command line and
    is applied to every path in a recipe (``SETTINGS``), so no other code has to expand paths."""
    if remote.scheme(path) == "file":
        path = path.partition("://")[2]
    return path if storage.is_remote(path) else os.path.expanduser(path)


def expand_home_in_uri(uri: str) -> str:
    """Returns a tracking URI with ``~`` expanded; a leading ``file://`` or ``sqlite:///`` is kept."""
    head, tilde, rest = uri.partition("~")
    return head + os.path.expanduser(tilde + rest) if head in ("", "file://", "sqlite:///") else uri


SETTINGS: dict[str, Callable[[str], str]] = {
    "output": expand_home,
    "corpus.path": expand_home,
    "corpus.validation_path": expand_home,
    "teacher.model": expand_home,
    "store.path": expand_home,
    "train.deepspeed_config": expand_home,
    "train.cache_dir": expand_home,
    "evaluation.data": expand_home,
    "evaluation.models": expand_home,
    "tracking.uri": expand_home_in_uri,
}
"""The settings that name files or directories, and the function that expands each of them."""


def expand_settings(tree: dict[str, Any]) -> None:
    """Expands, in place, the paths of a recipe tree; values that are no text are left for the type checks."""
    for setting, expand in SETTINGS.items():
        section, dot, name = setting.rpartition(".")
        values = tree.get(section) if dot else tree
        if not isinstance(values, dict):
            continue
        value = values.get(name)
        if isinstance(value, str):
            values[name] = expand(value)
        elif isinstance(value, list):
            values[name] = [expand(item) if isinstance(item, str) else item for item in value]
        elif isinstance(value, dict):
            values[name] = {
                key: expand(item) if isinstance(item, str) else item for key, item in value.items()
            }


def find_files(globs: Sequence[str]) -> list[str]:
    """Returns the sorted paths of the files that match; a file that matches several globs appears once.

    ``[``, ``?`` and ``*`` may also be part of a name. So a glob that is the exact name of a file matches this
    file, and the longest beginning that is the exact name of a directory is taken literally. Raises UserError
    for a directory, and for a glob that matches no file.
    """
    paths: set[str] = set()
    for pattern in map(expand_home, globs):
        matches = _matches(pattern)
        if not matches:
            raise UserError(f"{without_secrets(pattern)}: matches no file")
        paths.update(matches)
    unique: dict[str, str] = {}
    for path in sorted(paths):
        unique.setdefault(path if storage.is_remote(path) else os.path.realpath(path), path)
    return list(unique.values())


def _matches(pattern: str) -> list[str]:
    kind = storage.kind(pattern)
    if kind == "file":
        return [pattern]
    if kind == "directory":
        name = without_secrets(pattern)
        raise UserError(f"{name}: is a directory; name its files, for example {storage.join(name, '*.txt')}")
    parent = pattern
    while glob.has_magic(parent := parent.rpartition("/")[0]):
        if storage.kind(parent) == "directory":
            pattern = glob.escape(parent) + pattern[len(parent) :]
            break
    if not storage.is_remote(pattern):
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    entries = remote.call(pattern, "glob", remote.key_of(pattern), detail=True)
    bucket = "/".join(pattern.split("/", 3)[:3])  # including the storage account, if the URL names one
    return [f"{bucket}/{key.partition('/')[2]}" for key, info in entries.items() if info["type"] == "file"]
